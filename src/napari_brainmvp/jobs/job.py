"""A job as anyone may look at it: its files, read without a lock, and whether its process still lives.

Only the job's process writes ``heartbeat.json``. ``state.json`` is written by whoever submits or resumes the job, and
by its process from then on. Both are replaced as a whole, so that any number of windows may read them at any time.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ValidationError

from napari_brainmvp.errors import BrainMVPError, FileError
from napari_brainmvp.io.atomic import write_text_atomic
from napari_brainmvp.jobs.spec import JobSpec, jobs_folder

__all__ = [
    "Heartbeat",
    "Job",
    "JobState",
    "StateFile",
    "find_job",
    "list_jobs",
    "read_job",
    "say_seconds",
    "write_file",
]

SPEC, STATE, HEARTBEAT, STOP, LOG, RUN = "spec.json", "state.json", "heartbeat.json", "stop", "log.txt", "run"
_SILENCE = 60.0
"""Seconds without a heartbeat after which a process that cannot be looked at counts as dead."""
_CLOCK = 5.0
"""Seconds by which two readings of one process's start may differ: the clock is set now and then."""


class JobState(StrEnum):
    """Where a job stands."""

    queued = "queued"
    running = "running"
    stopping = "stopping"
    stopped = "stopped"
    failed = "failed"
    done = "done"

    @property
    def active(self) -> bool:
        """Whether a process works on the job, or waits for its device."""
        return self in (JobState.queued, JobState.running, JobState.stopping)


class StateFile(BaseModel):
    """``state.json``: changes only a few times. Times are seconds since 1970."""

    state: JobState
    queued: float
    started: float = 0.0
    ended: float = 0.0
    reason: str = ""
    model: str = ""
    devices: tuple[str, ...] = ()


class Heartbeat(BaseModel):
    """``heartbeat.json``: who works on the job, how far it is, and when that was said.

    ``born`` is when the process started, by which it is told from a later one of the same number; ``left`` are the
    seconds to go, or None where that cannot be told yet.
    """

    pid: int
    host: str
    born: float
    at: float
    step: str = ""
    done: int = 0
    total: int = 0
    left: float | None = None


@dataclass(frozen=True)
class Job:
    """A job at one moment.

    Parameters
    ----------
    folder : Path
    spec : JobSpec or None
        None where the folder is damaged.
    state : JobState
        A job whose process has died is ``failed``, whatever its file says.
    reason : str
        Why it failed or stopped, in a sentence.
    file : StateFile or None
    beat : Heartbeat or None
    """

    folder: Path
    spec: JobSpec | None
    state: JobState
    reason: str = ""
    file: StateFile | None = None
    beat: Heartbeat | None = None

    @property
    def name(self) -> str:
        """Name of the job and of its model."""
        return self.folder.name

    @property
    def title(self) -> str:
        """What to call it on a screen."""
        return (self.spec.title if self.spec else "") or self.name

    @property
    def run(self) -> Path:
        """The training function's folder: metrics, pictures, checkpoints, model."""
        return self.folder / RUN

    @property
    def log(self) -> Path:
        """What the process said."""
        return self.folder / LOG

    @property
    def model(self) -> str:
        """Name under which the model is registered; empty before the job is done."""
        return self.file.model if self.file else ""

    @property
    def fraction(self) -> float:
        """Share of the present step that is done, 0..1."""
        if self.state is JobState.done:
            return 1.0
        return self.beat.done / self.beat.total if self.beat and self.beat.total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """An estimate for a running job; None where there is none."""
        return self.beat.left if self.beat and self.state is JobState.running else None

    @property
    def progress(self) -> str:
        """How it is, on one line: step, count and time to go of an active job, model or reason of one that ended."""
        if self.state is JobState.done:
            return f"model {self.model}"
        if not self.state.active or self.beat is None:
            return self.reason
        counted = f" {self.beat.done} of {self.beat.total}" if self.beat.total else ""
        left = "" if self.seconds_left is None else f", {say_seconds(self.seconds_left)} left"
        return f"{self.beat.step}{counted}{left}"

    @property
    def ended(self) -> float:
        """When it ended, in seconds since 1970; 0 while it is active or where nobody knows."""
        if self.state.active or self.file is None:
            return 0.0
        return self.file.ended or (self.beat.at if self.beat else self.file.queued)


def read_job(folder: Path) -> Job:
    """Read a job; a damaged one is ``failed`` and says what is damaged."""
    try:
        spec = JobSpec.model_validate(_read(folder / SPEC))
        file = StateFile.model_validate(_read(folder / STATE))
    except (OSError, ValueError) as error:
        what = f"{error.error_count()} wrong values" if isinstance(error, ValidationError) else str(error)
        return Job(folder, None, JobState.failed, f"The job's folder is damaged ({what}): remove the job.")
    beat = None
    with suppress(OSError, ValueError):  # not yet there
        beat = Heartbeat.model_validate(_read(folder / HEARTBEAT))
    state, reason = file.state, file.reason
    if state.active and not _alive(file, beat):
        again = "Resume it to go on." if beat is None else "Resume goes on from the last checkpoint."
        reason = f"Its process ended without a word: killed, out of memory, or the machine was switched off. {again}"
        state = JobState.failed
    elif state.active and (folder / STOP).exists():
        state = JobState.stopping
    return Job(folder, spec, state, reason, file, beat)


def list_jobs(folder: Path | None = None) -> list[Job]:
    """List all jobs, the one queued last first; damaged ones at the end."""
    root = folder or jobs_folder()
    found = [read_job(p) for p in root.iterdir() if _is_job(p)] if root.is_dir() else []
    return sorted(found, key=lambda job: (-(job.file.queued if job.file else 0.0), job.name))


def _is_job(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def find_job(name: str) -> Job:
    """Find a job by its name.

    Raises
    ------
    BrainMVPError
        There is no such job; the message lists those there are.
    """
    root = jobs_folder()
    known = sorted(p.name for p in root.iterdir() if _is_job(p)) if root.is_dir() else []
    if name not in known:
        raise BrainMVPError(f"There is no job {name!r}. There are: {', '.join(known) or 'none'}.")
    return read_job(root / name)


def _alive(file: StateFile, beat: Heartbeat | None) -> bool:
    """Tell whether the process that works on a job still lives."""
    now = time.time()
    if beat is None or beat.at < file.queued:  # it was only just started, and has not spoken yet
        return now - file.queued < _SILENCE
    if beat.host != socket.gethostname():
        return now - beat.at < _SILENCE
    try:
        process = psutil.Process(beat.pid)
        born, gone = born_at(process), process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # it belongs to somebody else
        return now - beat.at < _SILENCE
    return not gone and abs(born - beat.born) < _CLOCK


def born_at(process: psutil.Process) -> float:
    """Return when a process started, s; on Linux since the machine did, whose clock may be set meanwhile."""
    return float(process.create_time()) - (psutil.boot_time() if sys.platform == "linux" else 0.0)


def _read(path: Path, attempts: int = 3) -> Any:
    """Read JSON; Windows may refuse for a moment while the file is replaced."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except PermissionError:
        if attempts == 1:
            raise
        time.sleep(0.02)
        return _read(path, attempts - 1)


def say_seconds(seconds: float) -> str:
    """Say a duration as people do: ``"40 s"``, ``"12 min"``, ``"3 h 20 min"``, ``"2 days 5 h"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(round(minutes, -1), 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h" if hours else f"{days} days"


def write_file(path: Path, content: BaseModel, attempts: int = 5) -> None:
    """Replace a file of a job; Windows may refuse for a moment while somebody reads it.

    Raises
    ------
    FileError
        The file cannot be written.
    """
    try:
        write_text_atomic(path, content.model_dump_json(indent=2) + "\n")
    except FileError:
        if attempts == 1:
            raise
        time.sleep(0.05)
        write_file(path, content, attempts - 1)
