"""Run the engine in a thread: low priority, with progress, cancel, and silence once nobody waits for it."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from qtpy.QtCore import QObject, Signal

from napari_brainmvp.errors import BrainMVPError, Cancelled
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback

__all__ = ["Work", "step_back"]

_PATIENCE = 10.0
"""Seconds that quitting waits for work to notice that it is no longer wanted."""
_PRIORITY = 10
"""Of threads that the window goes before; 0 is the usual one, 19 the lowest."""
_running: set[Work] = set()


class Work(QObject):
    """One piece of work in a thread of its own.

    Signals arrive in the GUI's thread. After :meth:`abandon` none arrives any more.

    Parameters
    ----------
    function : callable
        Called with a progress callback and a cancel token; what it returns is emitted.
    urgent : bool
        Do not start at low priority: the function itself calls :func:`step_back`, once the user has seen something.
    """

    progressed = Signal(object)
    done = Signal(object)
    failed = Signal(str)
    cancelled = Signal()
    crashed = Signal(object)
    """Emits an exception that is nobody's fault but ours."""
    _told = Signal(object, object)
    _over = Signal()

    def __init__(self, function: Callable[[ProgressCallback, CancelToken], Any], urgent: bool = False) -> None:
        super().__init__()
        self._function, self._urgent = function, urgent
        self._token = CancelToken()
        self._abandoned = False
        self._told.connect(self._tell)
        self._over.connect(self._forget)
        self._thread = threading.Thread(target=self._run, name="brainmvp", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        _running.add(self)
        self._thread.start()

    def cancel(self) -> None:
        """Ask the work to stop; :attr:`cancelled` is emitted when it has."""
        self._token.cancel()

    def abandon(self) -> None:
        """Stop the work and ignore whatever it still has to say."""
        self._abandoned = True
        self._token.cancel()

    def wait(self, seconds: float) -> bool:
        """Wait for the thread to end; tell whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            if not self._urgent:
                step_back()
            self._work()
        finally:
            try:
                self._over.emit()
            except RuntimeError:  # Qt has deleted us
                _running.discard(self)

    def _forget(self) -> None:
        """Let go of ourselves in the GUI's thread, to which we belong, and where nothing is told meanwhile."""
        self._thread.join()
        _running.discard(self)

    def _work(self) -> None:
        try:
            result = self._function(lambda progress: self._emit(self.progressed, progress), self._token)
        except Cancelled:
            self._emit(self.cancelled)
        except BrainMVPError as error:
            self._emit(self.failed, str(error))
        except Exception as error:
            self._emit(self.crashed, error)
        else:
            if self._token.cancelled:
                self._emit(self.cancelled)
            else:
                self._emit(self.done, result)

    def _emit(self, signal: Any, *values: Progress | Any) -> None:
        """Tell something, from the thread: what arrives after :meth:`abandon` is not passed on.

        It is sent to ourselves: a function that listens may be gone by the time it arrives, and Qt would call it.
        """
        if self._abandoned:
            return
        try:
            self._told.emit(signal, values)
        except RuntimeError:  # the window was closed in this very moment and Qt has deleted us
            self._abandoned = True

    def _tell(self, signal: Any, values: tuple[Any, ...]) -> None:
        if not self._abandoned:
            signal.emit(*values)


@atexit.register
def _stop() -> None:
    """End all work before Python ends: a thread that is still inside torch then would abort the whole process."""
    works = tuple(_running)
    for work in works:
        work.abandon()
    for work in works:
        work.wait(_PATIENCE)


def step_back() -> None:
    """Let the GUI's thread go first: on Linux every thread has a priority, and the threads torch starts inherit it."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        if os.getpriority(os.PRIO_PROCESS, thread) < _PRIORITY:  # to raise it again is not allowed
            os.setpriority(os.PRIO_PROCESS, thread, _PRIORITY)
