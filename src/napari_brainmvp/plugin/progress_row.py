"""How far work is, a small button that cancels it, and a line that says how things are: for several pieces of work."""

from __future__ import annotations

from qtpy.QtCore import Signal
from qtpy.QtWidgets import QHBoxLayout, QVBoxLayout, QWidget

from napari_brainmvp.plugin.style import quiet, slim_bar, small_button
from napari_brainmvp.progress import Progress

__all__ = ["ProgressRow"]


class ProgressRow(QWidget):
    """Shows what it is told; a bar and *Cancel* only while something is under way.

    Other than a :class:`~napari_brainmvp.plugin.run_bar.RunBar` it does not run the work.
    """

    stopped = Signal()
    """*Cancel* was pressed."""

    def __init__(self) -> None:
        super().__init__()
        self._doing = ""
        self.bar, self.status = slim_bar(), quiet("")
        self.cancel = small_button("Cancel", "Stop what is under way.")
        row = QHBoxLayout()
        row.addWidget(self.bar, 1)
        row.addWidget(self.cancel)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addLayout(row)
        layout.addWidget(self.status)
        self.bar.hide()
        self.cancel.hide()
        self.cancel.clicked.connect(self._stop)

    def show_progress(self, progress: Progress) -> None:
        """Show how far work is; one without a step is at its end."""
        working = progress.step != ""
        self.bar.setVisible(working)
        self.cancel.setVisible(working)
        self.bar.setRange(0, progress.total)
        self.bar.setValue(progress.done)
        if working:
            self._doing = f"{progress.step}…"
            self.status.setText(self._doing)
        elif self.status.text() == self._doing:  # and nobody has said what came of it
            self.status.clear()

    def _stop(self) -> None:
        self._doing = "Cancelling…"
        self.status.setText(self._doing)
        self.stopped.emit()
