"""What one can do with jobs: submit, stop, resume, remove."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from napari_brainmvp.errors import BrainMVPError, FileError
from napari_brainmvp.jobs.job import LOG, SPEC, STATE, STOP, Job, JobState, StateFile, find_job, read_job, write_file
from napari_brainmvp.jobs.spec import JobSpec, jobs_folder
from napari_brainmvp.models import list_models

__all__ = ["free_name", "remove_job", "resume_job", "stop_job", "submit_job"]


def submit_job(spec: JobSpec) -> Job:
    """Create a job and start its process, which waits for its device and outlives whoever started it.

    Raises
    ------
    BrainMVPError
        There already is a job or a model of this name.
    FileError
        The folder cannot be written.
    """
    folder = jobs_folder() / spec.name
    if folder.exists():
        raise BrainMVPError(f"There already is a job {spec.name!r}: choose another name, or remove it first.")
    _refuse_taken(spec.name)
    partial = folder.with_name(f".{spec.name}.{os.getpid()}.part")
    try:
        partial.mkdir(parents=True)
        write_file(partial / SPEC, spec)
        write_file(partial / STATE, StateFile(state=JobState.queued, queued=time.time()))
        partial.rename(folder)  # nobody ever sees half a job
    except OSError as error:
        raise FileError(
            f"{folder} cannot be written ({error.strerror}): free some space or set BRAINMVP_HOME."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _spawn(folder)
    return read_job(folder)


def stop_job(name: str) -> Job:
    """Ask a job to stop: it writes a checkpoint first, and can be resumed.

    Raises
    ------
    BrainMVPError
        There is no such job, or it is not active.
    """
    job = find_job(name)
    if not job.state.active:
        raise BrainMVPError(f"Job {name!r} is {job.state}: there is nothing to stop.")
    try:
        (job.folder / STOP).touch()
    except OSError as error:
        raise FileError(f"{job.folder} cannot be written ({error.strerror}): check its permissions.") from error
    return read_job(job.folder)


def resume_job(name: str) -> Job:
    """Let a stopped or failed job go on from its last checkpoint.

    A model that took the job's name meanwhile does not matter: the job then registers its own as ``NAME-2``.

    Raises
    ------
    BrainMVPError
        There is no such job, it is active or done, or its folder is damaged.
    """
    job = find_job(name)
    if job.spec is None:
        raise BrainMVPError(f"Job {name!r} cannot be resumed. {job.reason}")
    if job.state not in (JobState.stopped, JobState.failed):
        raise BrainMVPError(f"Job {name!r} is {job.state}: only a stopped or failed job can be resumed.")
    (job.folder / STOP).unlink(missing_ok=True)
    write_file(job.folder / STATE, StateFile(state=JobState.queued, queued=time.time()))
    _spawn(job.folder)
    return read_job(job.folder)


def remove_job(name: str) -> Path:
    """Delete a job's folder with its checkpoints; the model in the registry stays.

    Raises
    ------
    BrainMVPError
        There is no such job, it is active, or a file of it is in use.
    """
    job = find_job(name)
    if job.state.active:
        raise BrainMVPError(f"Job {name!r} is {job.state}: stop it before you remove it.")
    try:
        shutil.rmtree(job.folder)
    except OSError as error:
        raise FileError(
            f"{job.folder} cannot be removed ({error.strerror}): close what uses it and try again."
        ) from error
    return job.folder


def free_name(stem: str) -> str:
    """Return ``stem-1``, ``stem-2``, ...: the first that is neither a job's nor a model's."""
    taken = {entry.card.name for entry in list_models()}
    return next(
        n for n in (f"{stem}-{k}" for k in range(1, 10**6)) if n not in taken and not (jobs_folder() / n).exists()
    )


def _refuse_taken(name: str) -> None:
    if name in {entry.card.name for entry in list_models()}:
        raise BrainMVPError(f"There already is a model {name!r}: choose another name, or remove it first.")


def _spawn(folder: Path) -> None:
    """Start the job's process, detached: no terminal, no window, a session of its own."""
    command = [sys.executable, "-m", "napari_brainmvp.jobs.process", str(folder.resolve())]
    home = {"BRAINMVP_HOME": str(jobs_folder().parent.resolve())} if "BRAINMVP_HOME" in os.environ else {}
    flags = 0
    if sys.platform == "win32":
        flags = (
            subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.BELOW_NORMAL_PRIORITY_CLASS
        )
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | home,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            creationflags=flags,
        )
    threading.Thread(target=process.wait, name="brainmvp-reaper", daemon=True).start()  # leaves no zombie behind
