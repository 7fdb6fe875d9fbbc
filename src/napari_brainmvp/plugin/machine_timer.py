"""How fast this machine trains, measured once in the background for all who estimate times from it."""

from __future__ import annotations

from typing import ClassVar

from qtpy.QtCore import QObject, Signal

from napari_brainmvp.plugin.work import Work
from napari_brainmvp.training.pretraining.survey import measure_pace

__all__ = ["MachineTimer"]


class MachineTimer(QObject):
    """Times the machine with a recipe when asked to, unless that was done in this process before."""

    timed = Signal()
    """The pace is known."""
    failed = Signal(str)
    """Why it is not."""

    _known: ClassVar[dict[str, float]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.recipe = "compact"
        self._work: Work | None = None
        self._timing = ""

    @property
    def pace(self) -> float:
        """Seconds a voxel, see :func:`~napari_brainmvp.training.pretraining.survey.measure_pace`; 0 if not known."""
        return self._known.get(self.recipe, 0.0)

    def start(self) -> None:
        """Measure, where the pace is not known and not on its way."""
        if self.pace or (self._work is not None and self._timing == self.recipe):
            return
        self.abandon()
        self._timing = recipe = self.recipe
        self._work = work = Work(lambda progress, cancel: measure_pace(recipe, cancel))
        work.done.connect(self._done)
        work.failed.connect(self._failed)
        work.crashed.connect(self._failed)
        work.start()

    def _done(self, pace: float) -> None:
        self._work = None
        self._known[self._timing] = pace
        self.timed.emit()

    def _failed(self, reason: object) -> None:
        self._work = None
        self.failed.emit(str(reason))

    def abandon(self) -> None:
        """Stop, and say nothing more."""
        if self._work is not None:
            self._work.abandon()
            self._work = None
