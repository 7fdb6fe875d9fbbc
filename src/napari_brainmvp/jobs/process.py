"""The process of a job: ``python -m napari_brainmvp.jobs.process FOLDER``."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from napari_brainmvp.errors import BrainMVPError, Cancelled, FileError
from napari_brainmvp.jobs.job import (
    HEARTBEAT,
    RUN,
    STATE,
    STOP,
    Heartbeat,
    Job,
    JobState,
    StateFile,
    born_at,
    read_job,
    write_file,
)
from napari_brainmvp.jobs.queue import choosing, device_names, freest_gpu, hold_devices
from napari_brainmvp.jobs.spec import KINDS, JobSpec
from napari_brainmvp.models import list_models
from napari_brainmvp.progress import CancelToken, Progress

__all__ = ["main"]

_BEAT = 1.0
"""Seconds between heartbeats."""
_PATIENCE = 30.0
"""Seconds to wait for what is left of a killed process to go: workers that read data notice its end with a delay."""

logger = logging.getLogger(__name__)


def main() -> None:
    """Work on the job in the folder named on the command line."""
    folder = Path(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("lightning").propagate = False  # it has a handler of its own
    if os.environ.get("LOCAL_RANK", "0") != "0":  # started by Lightning, as one of several processes of the job
        _follow(folder)
        return
    if hasattr(os, "nice"):
        os.nice(15)  # windows go first, and what a window computes in a thread (at 10) too
    try:
        with FileLock(folder / ".lock", timeout=_PATIENCE):
            job = read_job(folder)
            if job.spec is not None and job.file is not None and job.file.state is JobState.queued:
                _work(job, job.spec, job.file)
    except Timeout:
        logger.warning("Another process already works on this job.")


def _work(job: Job, spec: JobSpec, file: StateFile) -> None:
    """Wait for the device, train, register the model, and write down how it ended."""
    folder, cancel = job.folder, CancelToken()

    def enter(**changes: Any) -> None:
        nonlocal file
        file = file.model_copy(update=changes)
        write_file(folder / STATE, file)

    end: dict[str, Any] = {"state": JobState.failed}
    with _Pulse(folder, cancel) as pulse, _stop_on_signals(cancel):
        try:
            with choosing(folder):
                devices = _choose_devices(folder, spec)
                enter(devices=devices)
            pulse.report(Progress(f"Waiting for {', '.join(devices)}"))
            with hold_devices(folder, devices, cancel):
                enter(state=JobState.running, started=time.time())
                pulse.report(Progress("Starting"))
                end = {"state": JobState.done, "model": _train(job, spec, pulse, cancel)}
            logger.info("Wrote model %s.", end["model"])
        except Cancelled as error:
            waiting = file.state is JobState.queued
            end = {"state": JobState.stopped, "reason": "Stopped while it waited." if waiting else str(error)}
        except BrainMVPError as error:
            logger.error("%s", error)
            end["reason"] = str(error)
        except Exception as error:
            logger.exception("The job failed")
            end["reason"] = _explain(error)
    enter(ended=time.time(), **end)  # the last thing written: from now on the folder may be removed


def _choose_devices(folder: Path, spec: JobSpec) -> tuple[str, ...]:
    """Decide on devices, the GPUs with the fewest jobs if any will do, and hide the others before torch looks."""
    wanted, _, number = spec.device.partition(":")
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif wanted != "mps" and os.environ.get("CUDA_VISIBLE_DEVICES") != "":  # empty: they are hidden on purpose
        first = int(number) if number else freest_gpu(folder, spec.devices)
        names = device_names(f"cuda:{first}", spec.devices)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(name.partition(":")[2] for name in names)
    from napari_brainmvp.inference.device import choose_device

    return device_names(str(choose_device(wanted)), spec.devices)


def _train(job: Job, spec: JobSpec, pulse: _Pulse, cancel: CancelToken) -> str:
    """Run the training function and return the name of the registered model."""
    from napari_brainmvp.models import import_model

    function, kind = KINDS[spec.kind].load()
    settings = kind.model_validate(spec.settings)
    folder = function(
        settings, job.run, resume=job.run.exists(), cache=spec.cache, progress=pulse.report, cancel=cancel
    )
    taken = {entry.card.name for entry in list_models()}
    names = (spec.name, *(f"{spec.name}-{k}" for k in range(2, 1000)))
    return import_model(folder, next(name for name in names if name not in taken)).card.name


def _follow(folder: Path) -> None:
    """Be one of several processes of a job: the first one reports, and says when to stop."""
    spec = read_job(folder).spec
    assert spec is not None
    parent = os.getppid()

    def leave_with_it() -> None:
        while os.getppid() == parent:
            time.sleep(_BEAT)
        os._exit(1)

    threading.Thread(target=leave_with_it, daemon=True).start()
    function, kind = KINDS[spec.kind].load()
    run = folder / RUN
    with suppress(Cancelled):  # the first process says so
        function(kind.model_validate(spec.settings), run, resume=run.exists(), cache=spec.cache)


def _explain(error: Exception) -> str:
    text = str(error).strip().splitlines()
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "can't allocate" in str(error):
        return "There is not enough memory: choose a smaller crop or batch."
    return f"Something went wrong ({type(error).__name__}: {text[0] if text else 'no message'}): see the log."


class _Pulse:
    """A thread that says every second that the job lives and how far it is, and looks for a wish to stop."""

    def __init__(self, folder: Path, cancel: CancelToken) -> None:
        self._folder, self._cancel = folder, cancel
        self._born = born_at(psutil.Process())
        self._progress, self._since = Progress("Starting"), (time.monotonic(), 0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="brainmvp-pulse", daemon=True)

    def __enter__(self) -> _Pulse:
        self._say()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._say()

    def report(self, progress: Progress) -> None:
        """Take note of progress; it is written with the next heartbeat."""
        if progress.step != self._progress.step:
            logger.info("%s", progress.step)
            self._since = (time.monotonic(), progress.done)
        self._progress = progress

    def _beat(self) -> None:
        while not self._over.wait(_BEAT):
            if (self._folder / STOP).exists():
                self._cancel.cancel()
            self._say()

    def _say(self) -> None:
        progress, (began, first) = self._progress, self._since
        left = None
        if progress.done > first:
            left = (time.monotonic() - began) / (progress.done - first) * (progress.total - progress.done)
        beat = Heartbeat(
            pid=os.getpid(),
            host=socket.gethostname(),
            born=self._born,
            at=time.time(),
            step=progress.step,
            done=progress.done,
            total=progress.total,
            left=left,
        )
        try:
            write_file(self._folder / HEARTBEAT, beat, attempts=1)
        except FileError as error:  # a full disk may be freed; the job goes on
            logger.warning("%s", error)


@contextmanager
def _stop_on_signals(cancel: CancelToken) -> Iterator[None]:
    """Stop well when the machine shuts down."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: cancel.cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
