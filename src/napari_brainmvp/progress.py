"""How long work reports progress and learns that it is no longer wanted.

The engine knows no widget and no terminal: it calls a :data:`ProgressCallback` and asks a
:class:`CancelToken`.

Examples
--------
>>> token = CancelToken()
>>> token.cancel()
>>> token.cancelled
True
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from napari_brainmvp.errors import Cancelled

__all__ = ["CancelToken", "Progress", "ProgressCallback", "no_progress"]


@dataclass(frozen=True)
class Progress:
    """One report of progress.

    Parameters
    ----------
    step : str
        What is being done, as a user would say it, for example ``"Segmenting"``.
    done, total : int
        Units finished and units in all; ``total`` is 0 where it is not known.
    """

    step: str
    done: int = 0
    total: int = 0

    @property
    def fraction(self) -> float:
        """Share done in 0..1, or 0.0 where the total is unknown."""
        return self.done / self.total if self.total else 0.0


ProgressCallback = Callable[[Progress], None]
"""Called from the working thread; it must return quickly and must not touch widgets."""


def no_progress(progress: Progress) -> None:
    """Ignore a report: the default callback."""


class CancelToken:
    """A flag that one thread sets and the working thread looks at."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Ask the work to stop at its next opportunity."""
        self._event.set()

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called."""
        return self._event.is_set()

    def raise_if_cancelled(self) -> None:
        """Raise :class:`~napari_brainmvp.errors.Cancelled` once cancelled."""
        if self.cancelled:
            raise Cancelled("Cancelled. Nothing was written.")
