"""A list of folders and datalists that more can be dropped into."""

from __future__ import annotations

from collections.abc import Sequence

from qtpy.QtCore import Qt, Signal
from qtpy.QtGui import QDragEnterEvent, QDropEvent
from qtpy.QtWidgets import QListWidget

__all__ = ["SourceList"]


class SourceList(QListWidget):
    """Chosen folders and lists; more can be dropped into it."""

    changed = Signal()

    def __init__(self) -> None:
        super().__init__()
        self.setAcceptDrops(True)
        self.setFixedHeight(64)
        self.setTextElideMode(Qt.TextElideMode.ElideLeft)

    def paths(self) -> list[str]:
        """Return what is listed."""
        return [self.item(k).text() for k in range(self.count())]

    def add_sources(self, paths: Sequence[str]) -> None:
        """Add what is not listed yet."""
        new = [path for path in paths if path not in self.paths()]
        for path in new:
            self.addItem(path)
        if new:
            self.changed.emit()

    def remove_chosen(self) -> None:
        """Take out the chosen line, or the last."""
        row = self.currentRow() if self.currentRow() >= 0 else self.count() - 1
        if self.takeItem(row) is not None:
            self.changed.emit()

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
