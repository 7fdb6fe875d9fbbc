"""The studies of an annotation project: which is open, which to annotate next, and what class each is of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from qtpy.QtCore import Qt, Signal
from qtpy.QtGui import QKeySequence
from qtpy.QtWidgets import (
    QAction,
    QComboBox,
    QFileDialog,
    QHBoxLayout,
    QInputDialog,
    QMenu,
    QMessageBox,
    QPushButton,
    QToolButton,
    QVBoxLayout,
    QWidget,
)

from napari_brainmvp.annotation.participants import (
    class_column,
    export_participants,
    import_participants,
    mixed_subjects,
    title_of,
)
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.io.participants import read_table
from napari_brainmvp.plugin.reading import read_features
from napari_brainmvp.plugin.style import link
from napari_brainmvp.plugin.work import Work
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback

__all__ = ["ProjectStudies"]

_NO_CLASS = "no class"
_LONG = 24
"""Letters of a name that fit a menu."""
_TABLES = "Tables (*.tsv)"


class ProjectStudies(QWidget):
    """A list of the project's studies, an order for those that are not painted on, and the open one's class."""

    chosen = Signal(str)
    """The name of a study to open."""
    said = Signal(str)
    refused = Signal(str)
    removed = Signal(str)
    """The name of a study that shall leave the project; the user was asked."""
    progressed = Signal(object)

    def __init__(self) -> None:
        super().__init__()
        self._project: AnnotationProject | None = None
        self._current = ""
        self._order: tuple[str, ...] = ()
        self._work: Work | None = None
        self.studies = QComboBox()
        self.rank = QPushButton("Which next?")
        self.group = QComboBox()
        self.table = link("Project ▾")
        self.remove = QAction("Remove…", self)
        self._build()

    def _build(self) -> None:
        self.studies.setToolTip("Studies of the project: choose one to open it. Delete takes it off the list.")
        self.remove.setShortcut(QKeySequence(QKeySequence.StandardKey.Delete))
        self.remove.setShortcutContext(Qt.ShortcutContext.WidgetShortcut)
        self.remove.triggered.connect(self._ask_to_remove)
        self.studies.addAction(self.remove)
        self.studies.setContextMenuPolicy(Qt.ContextMenuPolicy.ActionsContextMenu)
        self.rank.setToolTip(
            "Order the studies nobody has painted on: first those on which the prediction is undecided, and that are "
            "like others on which it is. Every study is read once, which takes a while (Alt+X)."
        )
        self.rank.setMinimumWidth(104)  # the text has room to its sides
        for box in (self.studies, self.group):  # a long name shall not widen the panel
            box.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
            box.setMinimumContentsLength(8)
        self.group.setEditable(True)
        self.group.setToolTip("The class of the open study as a whole, for classification: choose, or write a new one.")
        self.table.setToolTip("All studies: their classes from and to a BIDS table, what is annotated as a dataset.")
        self.table.setPopupMode(QToolButton.ToolButtonPopupMode.InstantPopup)
        menu = QMenu(self.table)
        menu.addAction("Import participants.tsv…", lambda: self._ask(QFileDialog.getOpenFileName, self.import_classes))
        menu.addAction("Export participants.tsv…", lambda: self._ask(QFileDialog.getSaveFileName, self.export_classes))
        menu.addAction("Export dataset as BraTS has it…", lambda: self._ask_folder("brats"))
        menu.addAction("Export dataset as BIDS derivative…", lambda: self._ask_folder("bids"))
        menu.addSeparator()
        menu.addAction(self.remove)
        self.table.setMenu(menu)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        for parts in ((self.studies, self.rank), (self.group, self.table)):
            row = QHBoxLayout()
            row.addWidget(parts[0], 1)
            row.addWidget(parts[1])
            layout.addLayout(row)
        self.studies.activated.connect(self._open)
        self.studies.currentIndexChanged.connect(self._offer_removal)
        self.rank.clicked.connect(self.find_next)
        self.group.activated.connect(lambda _: self._classify())
        line = self.group.lineEdit()
        assert line is not None
        line.editingFinished.connect(self._classify)

    def show_project(self, project: AnnotationProject | None, current: str) -> None:
        """Show a project's studies; ``current`` is the one that is painted on now, or empty."""
        if project is not self._project:
            self._order = ()
        self._project, self._current = project, current
        self.setVisible(project is not None and bool(project.studies))
        if project is None:
            return
        known = {s.name: s for s in project.studies}
        order = [name for name in self._order if name in known]
        self.studies.clear()
        self.studies.addItem("Open a study of the project…", "")
        for name in (*order, *(n for n in known if n not in order)):
            place = f"{order.index(name) + 1}.  " if name in order else ""
            group = f"  –  {known[name].group}" if known[name].group else ""
            self.studies.addItem(f"{place}{name}{group}", name)
        self.studies.setCurrentIndex(max(0, self.studies.findData(current)))
        self.rank.setEnabled(self._work is None and len(known) > 1)
        groups = sorted({s.group for s in project.studies} - {""})
        self.group.clear()
        self.group.addItems([_NO_CLASS, *groups])
        self.group.setCurrentText((known[current].group if current in known else "") or _NO_CLASS)
        self.group.setEnabled(current in known and not project.read_only)
        self.table.setEnabled(not project.read_only)
        self._offer_removal()

    def _offer_removal(self) -> None:
        """Offer to take the study that the list shows off it: also one that cannot be opened, as its scans are gone."""
        name, project = self.studies.currentData(), self._project
        allowed = project is not None and not project.read_only and self._work is None  # an export names them all
        self.remove.setEnabled(bool(name) and allowed)
        short = name if len(name or "") <= _LONG else f"{name[:_LONG]}…"
        self.remove.setText(f"Remove {short} from the project…" if name else "Remove a study…")

    def _ask_to_remove(self) -> None:
        name = self.studies.currentData()
        box = QMessageBox(self)
        box.setIcon(QMessageBox.Icon.Question)
        box.setText(f"Remove {name} from the project?")
        box.setInformativeText(
            "Its scans and strokes stay on the disk, and the strokes come back when you annotate it again."
        )
        agreed = box.addButton("Remove", QMessageBox.ButtonRole.AcceptRole)
        box.addButton(QMessageBox.StandardButton.Cancel)
        box.exec()
        if box.clickedButton() is agreed:
            self.removed.emit(name)

    def _open(self, index: int) -> None:
        if name := self.studies.itemData(index):
            self.chosen.emit(name)

    def _classify(self) -> None:
        """Note the class of the open study."""
        project, name = self._project, self._current
        text = self.group.currentText().strip()
        group = "" if text == _NO_CLASS else text
        if project is None or not self.group.isEnabled() or project.study(name).group == group:
            return
        self._try(lambda: project.set_groups({name: group}))
        self.show_project(project, name)

    def import_classes(self, path: Path) -> None:
        """Read all studies' classes from a ``participants.tsv``; ask for the column where it is open."""
        project = self._project
        assert project is not None
        columns, rows = read_table(path)
        column, others = class_column(project, columns), [c for c in columns if c != "participant_id"]
        if not column and others:
            question = f"Which column of {path.name} holds the class?"
            shown = {title_of(c, rows): c for c in others}
            chosen, said = QInputDialog.getItem(self, "Classes of the studies", question, list(shown), 0, False)
            if not said:
                return
            column = shown[chosen]
        count = import_participants(project, path, column)
        self.show_project(project, self._current)
        said_by = f"the column {project.class_column} of {path.name}"
        self.said.emit(f"{count} of {len(project.studies)} studies have a class in {said_by}.")

    def export_classes(self, path: Path) -> None:
        """Write all studies' classes."""
        assert self._project is not None
        export_participants(self._project, path)
        mixed = ", ".join(mixed_subjects(self._project))
        note = f" Sessions of {mixed} are of different classes: each has a row of its own." if mixed else ""
        self.said.emit(f"Wrote {path}.{note}")

    def export_dataset(self, folder: Path, layout: Literal["brats", "bids"]) -> None:
        """Write all that is annotated, with its scans, into a new or empty folder."""
        project = self._project
        assert project is not None

        def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
            from napari_brainmvp.annotation.export import export_dataset

            return export_dataset(project, folder, layout, progress, cancel)

        self._run(run, "Exporting", self._exported)

    def _exported(self, dataset: Path) -> None:
        from napari_brainmvp.annotation.export import left_out

        unread = left_out(dataset)
        note = f" Scans that cannot be read: {', '.join(unread)}." if unread else ""
        self.said.emit(f"Wrote the dataset {dataset}.{note}")

    def find_next(self) -> None:
        """Order what is not painted on."""
        project = self._project
        if project is None:
            return

        def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
            from napari_brainmvp.annotation.ranking import rank_project

            return rank_project(
                project, lambda name: read_features(project.read(name), progress, cancel), progress, cancel
            )

        self._run(run, "Reading the studies", lambda order: self._found(order) if self._project is project else None)

    def _found(self, order: list[str]) -> None:
        self._order = tuple(order)
        self.show_project(self._project, self._current)
        self.said.emit(f"Annotate {order[0]} next: the prediction is undecided there, and on others like it.")

    def _run(self, function: Callable[..., Any], doing: str, done: Callable[[Any], None]) -> None:
        if self._work is not None:
            return
        self._work = work = Work(function)
        work.progressed.connect(self.progressed)
        work.done.connect(self._ended)
        work.done.connect(done)
        work.failed.connect(self._failed)
        work.cancelled.connect(self._cancelled)
        work.crashed.connect(self._crashed)
        self.rank.setEnabled(False)
        self._offer_removal()
        self.progressed.emit(Progress(doing))
        work.start()

    def cancel(self) -> None:
        """Ask what is being read or exported to stop."""
        if self._work is not None:
            self._work.cancel()

    def _cancelled(self) -> None:
        self._ended()
        self.said.emit("Cancelled. Nothing was written.")

    def _failed(self, message: str) -> None:
        self._ended()
        self.refused.emit(message)

    def _crashed(self, error: Exception) -> None:
        self._ended()
        raise error

    def _ended(self, *_: object) -> None:
        self._work = None
        self.progressed.emit(Progress(""))
        self.show_project(self._project, self._current)

    def _ask_folder(self, layout: Literal["brats", "bids"]) -> None:
        name = QFileDialog.getExistingDirectory(self, "An empty folder for the dataset")
        if name:
            self._try(lambda: self.export_dataset(Path(name), layout))

    def _ask(self, dialog: Any, action: Callable[[Path], None]) -> None:
        name, _ = dialog(self, "Classes of the studies", "participants.tsv", _TABLES)
        if name:
            self._try(lambda: action(Path(name)))

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BrainMVPError as error:
            self.refused.emit(str(error))

    def abandon(self) -> None:
        """Forget what is being read."""
        if self._work is not None:
            self._work.abandon()
            self._work = None
