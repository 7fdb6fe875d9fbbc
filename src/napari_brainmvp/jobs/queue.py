"""One job at a time on a device, in the order in which they were queued.

A device is held by a lock on a file, which the system lets go of when the process ends, however it ends.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from napari_brainmvp.jobs.job import JobState, list_jobs, read_job
from napari_brainmvp.progress import CancelToken

__all__ = ["choosing", "device_names", "freest_gpu", "gpu_count", "hold_devices"]

_POLL = 0.5
_PATIENCE = 600.0
_DEVICES = Path("/dev")
_LOCKS = ".devices"


def device_names(first: str, count: int) -> tuple[str, ...]:
    """Name the devices a job takes, for all processes of this machine alike.

    Parameters
    ----------
    first : str
        ``"cpu"``, ``"mps"``, or ``"cuda:N"`` as this process numbers it.
    count : int
        Neighbouring GPUs.
    """
    if not first.startswith("cuda"):
        return (first,)
    visible = _visible() or []
    start = int(first.partition(":")[2] or 0)
    return tuple(f"cuda:{visible[k] if k < len(visible) else k}" for k in range(start, start + count))


def _visible() -> list[str] | None:
    """Return the GPUs this process may use, where the environment says so; none of them is a statement, too."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if said is None else [name.strip() for name in said.split(",") if name.strip()]


def gpu_count() -> int:
    """Count the NVIDIA GPUs this process may use, without torch; 0 where that is not known (only Linux tells)."""
    visible = _visible()
    return len(list(_DEVICES.glob("nvidia[0-9]*")) if visible is None else visible)


def freest_gpu(folder: Path, count: int) -> int:
    """Choose the first of ``count`` neighbouring GPUs for which the fewest jobs run or wait.

    Parameters
    ----------
    folder : Path
        The job that looks for them.
    count : int
    """
    taken = [
        name
        for job in list_jobs(folder.parent)
        if job.folder != folder and job.state.active and job.file is not None
        if job.beat is None or job.beat.host == socket.gethostname()
        for name in job.file.devices
    ]
    starts = range(max(1, gpu_count() - count + 1))
    return min(starts, key=lambda k: sum(taken.count(name) for name in device_names(f"cuda:{k}", count)))


@contextmanager
def choosing(folder: Path) -> Iterator[None]:
    """Let one job after the other choose its devices, so that each knows what those before it took.

    Parameters
    ----------
    folder : Path
        The job's.
    """
    locks = folder.parent / _LOCKS
    locks.mkdir(exist_ok=True)
    with FileLock(locks / f"{socket.gethostname()}-choice.lock", timeout=_PATIENCE):
        yield


@contextmanager
def hold_devices(folder: Path, devices: Sequence[str], cancel: CancelToken) -> Iterator[None]:
    """Wait until it is this job's turn on all its devices, and hold them while the block runs.

    Parameters
    ----------
    folder : Path
        The job's.
    devices : sequence of str
        As :func:`device_names` names them.
    cancel : CancelToken
        Asked while waiting.

    Raises
    ------
    Cancelled
        The job was stopped while it waited.
    """
    locks = folder.parent / _LOCKS
    locks.mkdir(exist_ok=True)
    names = [re.sub(r"\W+", "-", f"{socket.gethostname()}-{device}") for device in sorted(devices)]
    with ExitStack() as held:
        while True:
            if not _somebody_first(folder, set(devices)):
                try:
                    for name in names:
                        held.enter_context(FileLock(locks / f"{name}.lock", timeout=0))
                    break
                except Timeout:
                    held.close()  # all or none, so that two jobs never wait for each other
            cancel.raise_if_cancelled()
            time.sleep(_POLL)
        yield


def _somebody_first(folder: Path, devices: set[str]) -> bool:
    """Tell whether another job has waited longer for one of these devices."""
    mine = read_job(folder).file
    assert mine is not None
    for job in list_jobs(folder.parent):
        file = job.file
        if job.folder == folder or file is None or file.state is not JobState.queued or not job.state.active:
            continue
        elsewhere = job.beat is not None and job.beat.host != socket.gethostname()
        wants = not file.devices or bool(devices & set(file.devices))  # a job that has only just started may want any
        if wants and not elsewhere and (file.queued, job.name) < (mine.queued, folder.name):
            return True
    return False
