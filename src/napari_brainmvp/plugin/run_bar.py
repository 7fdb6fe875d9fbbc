"""A panel's main button with what belongs to it: cancel, progress and a line that says how things are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from napari.utils.notifications import show_error
from qtpy.QtCore import Signal
from qtpy.QtWidgets import QHBoxLayout, QPushButton, QVBoxLayout, QWidget

from napari_brainmvp.plugin.style import main_button, quiet, slim_bar
from napari_brainmvp.plugin.work import Work
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback

__all__ = ["RunBar"]


class RunBar(QWidget):
    """Run one piece of work at a time in the background.

    Parameters
    ----------
    text : str
        Of the button.
    busy_text : str, optional
        Of the button while work is under way; default the same.
    """

    done = Signal(object)
    """Emits what the work returned."""
    finished = Signal()
    """Emitted when work has ended, however it ended."""

    def __init__(self, text: str, busy_text: str = "") -> None:
        super().__init__()
        self._texts = text, busy_text or text
        self._work: Work | None = None
        self.button = main_button(text)
        self.cancel = QPushButton("Cancel")
        self.bar = slim_bar()
        self.status = quiet("")
        row = QHBoxLayout()
        row.addWidget(self.button, 1)
        row.addWidget(self.cancel)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addLayout(row)
        layout.addWidget(self.bar)
        layout.addWidget(self.status)
        self.cancel.setMinimumSize(72, self.button.minimumHeight())
        self.cancel.setStyleSheet("QPushButton { border-radius: 6px; }")
        self.cancel.hide()
        self.bar.hide()
        self.cancel.clicked.connect(self.stop)

    @property
    def busy(self) -> bool:
        """Whether work is under way."""
        return self._work is not None

    def start(self, function: Callable[[ProgressCallback, CancelToken], Any]) -> None:
        """Run a function in the background, unless something runs already."""
        if self._work is not None:
            return
        work = Work(function)
        work.progressed.connect(self._progressed)
        work.done.connect(self._done)
        work.failed.connect(lambda message: self._ended(message, show_error))
        work.crashed.connect(self._crashed)
        work.cancelled.connect(lambda: self._ended("Cancelled."))
        self._work = work
        self.bar.setRange(0, 0)
        self.status.setText("")
        self.button.setEnabled(False)
        self.button.setText(self._texts[1])
        self.cancel.setEnabled(True)
        self.cancel.show()
        self.bar.show()
        work.start()

    def stop(self) -> None:
        """Ask the work to stop."""
        if self._work is not None:
            self.status.setText("Cancelling…")
            self.cancel.setEnabled(False)  # it takes a moment, and once is enough
            self._work.cancel()

    def abandon(self) -> None:
        """Forget the work because the window closes."""
        if self._work is not None:
            self._work.abandon()
            self._work = None

    def _progressed(self, progress: Progress) -> None:
        self.bar.setRange(0, progress.total)
        self.bar.setValue(progress.done)
        self.status.setText(f"{progress.step}…" if not progress.total else f"{progress.step}: {progress.fraction:.0%}")

    def _done(self, made: Any) -> None:
        self._reset("Done.")
        self.done.emit(made)
        self.finished.emit()

    def _crashed(self, error: Exception) -> None:
        self._ended("Something went wrong; see the notification.")
        raise error

    def _ended(self, message: str, notify: Callable[[str], object] | None = None) -> None:
        self._reset(message)
        if notify is not None:
            notify(message)
        self.finished.emit()

    def _reset(self, message: str) -> None:
        self._work = None
        self.cancel.hide()
        self.bar.hide()
        self.button.setEnabled(True)
        self.button.setText(self._texts[0])
        self.status.setText(message)
