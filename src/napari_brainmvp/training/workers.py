"""One function on many studies, by several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import TypeVar

from napari_brainmvp.errors import FileError
from napari_brainmvp.progress import CancelToken

__all__ = ["each"]

_POLL = 0.2
"""Seconds between looks at whether to stop, while other processes prepare."""
_MOST_WORKERS = 61
"""Windows waits for no more."""

Item = TypeVar("Item")
Made = TypeVar("Made")


def each(
    function: Callable[[Item], Made], items: Iterable[Item], workers: int, cancel: CancelToken | None
) -> Iterator[Made]:
    """Yield what a function makes of every item, in their order; by several processes where there are two or more."""
    cancel = cancel or CancelToken()
    if workers < 2:
        for item in items:
            cancel.raise_if_cancelled()
            yield function(item)
        return
    context = multiprocessing.get_context("spawn")  # a copy of this process could hang on a lock of torch's threads
    ended, alive = context.Pipe(duplex=False)  # closed by the system, too, when this process is killed
    with ended, alive, ProcessPoolExecutor(min(workers, _MOST_WORKERS), context, _begin_worker, (ended,)) as pool:
        try:
            for future in [pool.submit(function, item) for item in items]:
                yield _result(future, cancel)
        except BrokenProcessPool as error:
            raise FileError(
                "A process that prepares studies has ended before its time: use fewer workers where memory is short; "
                "in a script of your own, call this below if __name__ == '__main__'."
            ) from error
        finally:
            alive.close()  # what they are at is not waited for: files are complete or not there


def _result(future: Future[Made], cancel: CancelToken) -> Made:
    while wait([future], _POLL).not_done:
        cancel.raise_if_cancelled()
    cancel.raise_if_cancelled()
    return future.result()


def _begin_worker(ended: Connection) -> None:
    """Leave interrupts to the parent, end when it closes its end of a pipe, and take one core."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_it() -> None:
        ended.poll(None)
        os._exit(0)

    threading.Thread(target=end_with_it, daemon=True).start()
