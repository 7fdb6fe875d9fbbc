"""The *Annotate* panel: a project, its classes, and a prediction that follows the brush."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from napari.utils.notifications import show_error, show_info, show_warning
from qtpy.QtCore import Signal
from qtpy.QtGui import QKeySequence
from qtpy.QtWidgets import QFileDialog, QHBoxLayout, QPushButton, QShortcut, QVBoxLayout, QWidget

from napari_brainmvp.annotation.content import StudyReference
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import BrainMVPError, Cancelled
from napari_brainmvp.plugin.annotation_tools import AnnotationTools, key_list
from napari_brainmvp.plugin.annotation_view import AnnotationView
from napari_brainmvp.plugin.class_edits import ClassEdits
from napari_brainmvp.plugin.class_table import ClassTable
from napari_brainmvp.plugin.finetune_row import FinetuneRow
from napari_brainmvp.plugin.layers import Frame
from napari_brainmvp.plugin.new_study import LabelSource, enter
from napari_brainmvp.plugin.place import put_in_place
from napari_brainmvp.plugin.progress_row import ProgressRow
from napari_brainmvp.plugin.project_studies import ProjectStudies
from napari_brainmvp.plugin.study_panel import StudyPanel
from napari_brainmvp.plugin.style import heading, main_button, quiet
from napari_brainmvp.progress import Progress
from napari_brainmvp.study import Study

__all__ = ["AnnotatePanel"]


class AnnotatePanel(ClassEdits, QWidget):
    """Annotate the study of a Study panel in a project.

    Parameters
    ----------
    viewer : napari.Viewer
    study : StudyPanel
    """

    opened = Signal()
    """Emitted when a project was opened or closed."""
    shown = Signal()
    """Emitted when a study of the project is ready to be painted on."""

    def __init__(self, viewer: Any, study: StudyPanel) -> None:
        super().__init__()
        self._viewer, self._study = viewer, study
        self.project: AnnotationProject | None = None
        self.view: AnnotationView | None = None
        self._scans: list[Any] = []  # the layers of the study that is annotated
        self.new, self.open = QPushButton("New project…"), QPushButton("Open project…")
        self.title = quiet("A project keeps your strokes, every one of them, from now on.")
        self.studies = ProjectStudies()
        self.start = main_button("Annotate this study")
        self.begin = LabelSource(viewer)
        self.classes = ClassTable()
        self.toolbox = AnnotationTools()
        self.tools = self.toolbox.buttons
        self.live, self.uncertainty, self.everything = self.toolbox.switches
        self.progress = ProgressRow()
        self.status = self.progress.status
        self.finetune = FinetuneRow()
        self._build()
        self._refresh()

    def _build(self) -> None:
        self.start.setToolTip("Add the open study to the project, if it is not in it, and paint on it (Alt+E).")
        buttons = (self.start, self.studies.rank, self.classes.add, self.classes.regions)
        for button, key in zip(buttons, "EXKO", strict=True):  # S and C are napari's
            button.setShortcut(f"Alt+{key}")
        files = QHBoxLayout()
        files.addWidget(self.new)
        files.addWidget(self.open)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(heading("Annotate"))
        layout.addLayout(files)
        about = (self.title, self.studies, self.begin, self.start, self.progress)
        for part in (*about, self.classes, self.toolbox, self.finetune, key_list()):
            layout.addWidget(part)
        self._connect()

    def _connect(self) -> None:
        self.new.clicked.connect(lambda: self._ask(self.create_project))
        self.open.clicked.connect(lambda: self._ask(self.open_project))
        self.start.clicked.connect(lambda: self._try(self.annotate))
        self.studies.chosen.connect(lambda name: self._try(lambda: self._open_chosen(name)))
        self.studies.removed.connect(lambda name: self._try(lambda: self._remove_study(name)))
        self.studies.said.connect(self.status.setText)
        self.studies.refused.connect(self._refused)
        for part in (self.studies, self.finetune):
            part.progressed.connect(self.progress.show_progress)
        self.progress.stopped.connect(self._cancel)
        self.finetune.use.hinted.connect(lambda hint: self.status.setText(f"{self.status.text()} {hint}"))
        self.classes.edited.connect(lambda classes: self._try(lambda: self._edit_classes(classes)))
        self.classes.united.connect(lambda regions: self._try(lambda: self._unite_classes(regions)))
        self.classes.removed.connect(lambda value: self._try(lambda: self._remove_class(value)))
        self.classes.chosen.connect(lambda value: self._tell("choose", value))
        self.toolbox.used.connect(self._tell)
        self.live.toggled.connect(lambda on: self._tell("set_live", on))
        self.uncertainty.toggled.connect(lambda on: self._tell("show_uncertainty", on))
        self.everything.toggled.connect(lambda on: self._tell("learn_from_all", on))
        self._study.changed.connect(self._refresh)
        for row in range(9):
            shortcut = QShortcut(QKeySequence(f"Alt+{row + 1}"), self)
            shortcut.activated.connect(lambda row=row: self.classes.choose(row))

    def create_project(self, folder: Path) -> None:
        """Make a project in a new or empty folder and open it."""
        self._set_project(AnnotationProject.create(folder))

    def open_project(self, folder: Path) -> None:
        """Open a project; read-only, and with a word about it, where another window has it open."""
        if self.project is not None and self.project.folder == folder.expanduser().resolve():
            self.close_project()  # else its own lock would be in the way
        self._set_project(AnnotationProject.open(folder))
        assert self.project is not None
        if self.project.read_only:
            show_warning(
                f"The project {self.project.folder.name} is already open for writing ({self.project.owner}). "
                "Here you can look at it; close it there to paint here."
            )

    def _set_project(self, project: AnnotationProject) -> None:
        self.close_project()
        self.project = project
        self._refresh()
        self.opened.emit()

    def close_project(self) -> None:
        """Save, let go of the lock, and leave the layers as they are, to look at."""
        view, project = self.view, self.project
        self.view = self.project = None
        self.progress.show_progress(Progress(""))  # what a view was reading is read no more
        try:
            if view is not None:
                view.close()
        finally:
            if project is not None:
                project.close()

    def annotate(self) -> None:
        """Paint on the study that is open in the viewer; one that is new in the project begins with chosen labels.

        It has all scans that are recognised, whatever model is chosen elsewhere; one that is in the project, its own.
        """
        if self.project is None:
            raise BrainMVPError("There is no project yet: make a new one or open one.")
        study = self._study.study(with_others=True)()
        reference = self.project.find(study)
        if reference is None:
            reference = enter(self.project, study, self.begin.currentData(), self)
        if study.reference in reference.scans:
            study = study.with_modalities(tuple(reference.scans))
        layers = self._study.assigned_with_others()
        self._show(reference, study, self._study.frame())
        self._scans = [layer for key, layer in layers.items() if key in study.scans]

    def _show(self, reference: StudyReference, study: Study, frame: Frame) -> None:
        """Show a study's labels and paint on them, in place of those that were shown before."""
        assert self.project is not None
        view, self.view = self.view, None
        if view is not None:
            view.remove()
        self.view = view = AnnotationView(self._viewer, self.project, reference, study, frame)
        self.begin.leave_out(view.layers)
        view.said.connect(self.status.setText)
        view.refused.connect(self._refused)
        view.progressed.connect(self.progress.show_progress)
        view.closed.connect(self._layer_gone)
        view.changed.connect(self._refresh_tools)
        view.unknown.connect(lambda value: self._try(lambda: self._know(value)))
        view.picked.connect(self.classes.show_value)
        view.pointer.waiting.connect(self.toolbox.show_waiting)
        view.pointer.clicked.connect(lambda position: self._tell("take_over_part", position))
        self._refresh()
        self.classes.choose(max(0, self.classes.table.currentRow()))
        view.learn_from_all(self.everything.isChecked())
        view.set_live(self.live.isChecked())
        view.show_uncertainty(self.uncertainty.isChecked())
        view.start()
        self.shown.emit()

    def _open_chosen(self, name: str) -> None:
        """Open a study of the project in the viewer, in place of the one that is annotated, and annotate it."""
        assert self.project is not None
        study = self.project.read(name)
        view, self.view = self.view, None
        self._scans, frame = put_in_place(self._viewer, study, view, self._scans)
        self._show(self.project.study(name), study, frame)

    def _remove_study(self, name: str) -> None:
        """Take a study off the project's list; the scans of the one that is open stay in the viewer, without labels."""
        assert self.project is not None
        view = self.view if self.view is not None and self.view.name == name else None
        if view is not None:
            view.save()
        self.project.remove_study(name)
        if view is not None:
            self.view = None
            view.remove()
            self.progress.show_progress(Progress(""))
        elif self.view is not None and self.everything.isChecked():
            self.view.learn_from_all(True)  # and no longer from this one
        self._refresh()
        kept = f"Its strokes are in {self.project.folder / 'labels' / name}"
        self.status.setText(f"{name} has left the project. {kept} and come back when you annotate it again.")

    def _tell(self, what: str, *values: object) -> None:
        """Tell the study that is being annotated, if one is."""
        if self.view is not None:
            action = getattr(self.view, what)
            self._try(lambda: action(*values))

    def _try(self, action: Callable[[], object]) -> None:
        """Do something; what the user can put right is said, not raised."""
        try:
            action()
        except Cancelled as cancelled:
            self.status.setText(str(cancelled))
        except BrainMVPError as error:
            self._refused(str(error))

    def _ask(self, action: Callable[[Path], None]) -> None:
        name = QFileDialog.getExistingDirectory(self, "The project's folder")
        if name:
            self._try(lambda: action(Path(name)))

    def _refused(self, message: str) -> None:
        if self.project is not None and self.project.read_only:  # it may be so only now
            self._refresh()
        self.status.setText(message)
        show_error(message)

    def _cancel(self) -> None:
        """Stop whatever is under way; predicting after a stroke is not, it has no bar."""
        self.studies.cancel()
        self.finetune.cancel()
        if self.view is not None:
            self.view.probe.cancel()
            if self.view.probe.reads_others:
                self.everything.setChecked(False)

    def _layer_gone(self) -> None:
        self.view = None
        self.progress.show_progress(Progress(""))
        self._refresh()
        show_info("The annotation layer was removed. Its strokes are in the project.")

    def _refresh(self) -> None:
        project = self.project
        self.start.setEnabled(project is not None and bool(self._study.assigned_with_others()))
        self.studies.show_project(project, self.view.name if self.view is not None else "")
        self.begin.setEnabled(project is not None and not project.read_only)
        self.classes.setVisible(project is not None)
        if project is not None:
            note = "  –  read-only, open elsewhere" if project.read_only else ""
            self.title.setText(f"{project.folder}{note}")
            self.classes.show_classes(project.classes, project.regions, not project.read_only, project.removed_classes)
        self._refresh_tools()

    def _refresh_tools(self) -> None:
        view = self.view
        self.toolbox.allow(view.can if view is not None else lambda _: False)
        self.finetune.set_project(self.project, view)

    def abandon(self) -> None:
        """Save and let go because the window closes."""
        self.finetune.abandon()
        self.studies.abandon()
        self.close_project()
