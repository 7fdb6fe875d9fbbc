"""A list of folders and datalists that more can be dropped into."""

from __future__ import annotations

from collections.abc import Sequence

from qtpy.QtCore import Qt, Signal
from qtpy.QtGui import QDragEnterEvent, QDropEvent, QKeyEvent
from qtpy.QtWidgets import QFileDialog, QInputDialog, QListWidget, QListWidgetItem, QMenu

from napari_brainmvp.training.sources import DataSource

__all__ = ["SourceList"]

_SOURCE = Qt.ItemDataRole.UserRole


class SourceList(QListWidget):
    """Chosen datasets; more can be dropped into it, and Delete takes one out.

    What can be changed of the chosen one, or of the last where none is chosen, is in :attr:`menu`.
    """

    changed = Signal()

    def __init__(self) -> None:
        super().__init__()
        self.setAcceptDrops(True)
        self.setFixedHeight(64)
        self.setTextElideMode(Qt.TextElideMode.ElideLeft)
        self.menu = QMenu(self)
        self.weight = self.menu.addAction("Weight…", self.ask_weight)
        self.base = self.menu.addAction("Base folder…", self.ask_base)
        self.menu.addAction("Remove", self.remove_chosen)
        self.menu.setToolTipsVisible(True)
        self.weight.setToolTip("How often studies of this dataset are drawn, relative to the others.")
        self.base.setToolTip("Where a datalist's relative paths start, if not in its own folder.")
        self.menu.aboutToShow.connect(self._enable)
        self.setContextMenuPolicy(Qt.ContextMenuPolicy.CustomContextMenu)
        self.customContextMenuRequested.connect(lambda position: self.menu.popup(self.mapToGlobal(position)))

    def sources(self) -> tuple[DataSource, ...]:
        """Return what is listed."""
        return tuple(self.item(k).data(_SOURCE) for k in range(self.count()))

    def add_sources(self, paths: Sequence[str]) -> None:
        """Add what is not listed yet."""
        known = {source.path for source in self.sources()}
        new = [DataSource(path=path) for path in dict.fromkeys(paths) if path not in known]
        for source in new:
            item = QListWidgetItem()
            self.addItem(item)
            _fill(item, source)
        if new:
            self.changed.emit()

    def change_chosen(self, **changes: object) -> None:
        """Change fields of the chosen dataset."""
        item = self._chosen()
        if item is not None:
            _fill(item, item.data(_SOURCE).model_copy(update=changes))
            self.changed.emit()

    def ask_weight(self) -> None:
        """Ask how often the chosen dataset is drawn."""
        item = self._chosen()
        if item is None:
            return
        text = "How often is it drawn, relative to the others?"
        weight, agreed = QInputDialog.getDouble(self, "Weight", text, item.data(_SOURCE).weight, 0.01, 1000, 2)
        if agreed:
            self.change_chosen(weight=weight)

    def ask_base(self) -> None:
        """Ask where the chosen datalist's paths start."""
        if base := QFileDialog.getExistingDirectory(self, "Where the paths in this list start"):
            self.change_chosen(base=base)

    def remove_chosen(self) -> None:
        """Take out the chosen dataset."""
        item = self._chosen()
        if item is not None:
            self.takeItem(self.row(item))
            self.changed.emit()

    def _chosen(self) -> QListWidgetItem | None:
        return self.currentItem() or self.item(self.count() - 1)

    def _enable(self) -> None:
        item = self._chosen()
        for action in self.menu.actions():
            action.setEnabled(item is not None)
        self.base.setEnabled(item is not None and item.data(_SOURCE).path.endswith(".json"))

    def keyPressEvent(self, event: QKeyEvent | None) -> None:
        """Take out the chosen dataset with Delete or Backspace."""
        if event is not None and event.key() in (Qt.Key.Key_Delete, Qt.Key.Key_Backspace):
            self.remove_chosen()
        else:
            super().keyPressEvent(event)

    def dragEnterEvent(self, event: QDragEnterEvent | None) -> None:
        """Let files and folders in."""
        if event is not None and event.mimeData().hasUrls():
            event.acceptProposedAction()

    def dragMoveEvent(self, event: QDragEnterEvent | None) -> None:
        """Go on letting them in."""
        self.dragEnterEvent(event)

    def dropEvent(self, event: QDropEvent | None) -> None:
        """Add what was dropped."""
        if event is not None:
            self.add_sources([url.toLocalFile() for url in event.mimeData().urls() if url.isLocalFile()])


def _fill(item: QListWidgetItem, source: DataSource) -> None:
    item.setData(_SOURCE, source)
    weight = f"{source.weight:g} × " if source.weight != 1 else ""
    item.setText(weight + source.path)
    item.setToolTip(f"Paths start in {source.base}." if source.base else "")
