"""On how many threads torch computes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["usable_cores", "use_all_cores", "use_threads"]

_lock = threading.Lock()
_inside: dict[int, int] = {}
"""How often each thread, by its number, is in :func:`use_threads` now."""
_before = 1
"""How many threads torch used when the first of them came in."""


def usable_cores() -> int:
    """Count the cores that this process may use, hyper-threads among them."""
    affinity = getattr(os, "sched_getaffinity", None)  # clusters and containers give a part of the machine
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def use_all_cores() -> None:
    """Let this thread compute on all cores, of which torch takes every other one, unless the user has said how many."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Let this thread compute on so many of torch's threads for a while.

    Torch keeps the number for each thread, and gives new threads the one that was set last in any of them. So the last
    to leave puts it back as it was before the first came in, and none leaves its own behind.

    Examples
    --------
    >>> with use_threads(1):
    ...     sums_that_must_not_depend_on_the_number_of_cores()  # doctest: +SKIP
    """
    import torch

    global _before
    me = threading.get_ident()
    with _lock:
        if not _inside:
            _before = torch.get_num_threads()
        outer = torch.get_num_threads() if me in _inside else _before
        _inside[me] = _inside.get(me, 0) + 1
        torch.set_num_threads(count)
    try:
        yield
    finally:
        with _lock:
            _inside[me] -= 1
            if not _inside[me]:
                del _inside[me]
            torch.set_num_threads(outer)
