"""``brainmvp jobs``: what runs in the background, and how it goes."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from napari_brainmvp.cli.console import say, table

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["jobs_app", "submit"]

jobs_app = typer.Typer(help="Follow, stop, resume and remove background jobs.", no_args_is_help=True)
NameArgument = Annotated[str, typer.Argument(help="The job's name, as brainmvp jobs list shows it.")]


@jobs_app.command("list")
def list_command() -> None:
    """List the jobs, the latest first."""
    from napari_brainmvp.jobs import list_jobs

    rows = [(job.name, job.spec.kind if job.spec else "", job.state.value, job.progress) for job in list_jobs()]
    table("Jobs", ("Name", "Kind", "State", "Progress"), rows)


@jobs_app.command("show")
def show_command(name: NameArgument) -> None:
    """Say how a job is, and where its files are."""
    from napari_brainmvp.jobs import find_job

    job = find_job(name)
    rows = [("State", job.state.value), ("Progress", job.progress if job.state.active else "")]
    if job.file is not None:
        times = {"Queued": job.file.queued, "Started": job.file.started, "Ended": job.ended}
        rows += [(what, f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}") for what, at in times.items() if at]
        rows.append(("Device", ", ".join(job.file.devices)))
    rows += [("Reason", job.reason), ("Model", job.model), ("Folder", str(job.folder))]
    table(job.title, ("", ""), [row for row in rows if row[1]])


@jobs_app.command("logs")
def logs_command(
    name: NameArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more until the job ends.")] = False,
) -> None:
    """Print what a job says."""
    from napari_brainmvp.jobs import find_job, read_job

    job = find_job(name)
    position = _print_from(job.log, 0)
    while follow and job.state.active:
        time.sleep(0.5)
        job = read_job(job.folder)
        position = _print_from(job.log, position)
    if follow:
        say(f"{job.name} is {job.state}. {job.reason}".rstrip())


@jobs_app.command("stop")
def stop_command(name: NameArgument) -> None:
    """Stop a job well: it writes a checkpoint first."""
    from napari_brainmvp.jobs import stop_job

    say(f"{name} is {stop_job(name).state}.")


@jobs_app.command("resume")
def resume_command(name: NameArgument) -> None:
    """Let a stopped or failed job go on from its last checkpoint."""
    from napari_brainmvp.jobs import resume_job

    say(f"{name} is {resume_job(name).state}.")


@jobs_app.command("remove")
def remove_command(name: NameArgument) -> None:
    """Delete a job that has ended, with its checkpoints; its model stays."""
    from napari_brainmvp.jobs import remove_job

    say(f"Removed {remove_job(name)}")


def submit(kind: str, settings: BaseModel, name: str, cache: Path | None) -> None:
    """Let a job run a training function, and say how to follow it."""
    from napari_brainmvp.jobs import submit_job, training_job

    job = submit_job(training_job(kind, settings, name, cache=cache))
    say(f"Job {job.name} is {job.state}: follow it with brainmvp jobs logs -f {job.name}.")


def _print_from(path: Path, position: int) -> int:
    """Print a growing file from a position on, and return where it ends now."""
    try:
        with path.open("rb") as file:
            file.seek(position)
            content = file.read()
    except FileNotFoundError:
        return position
    sys.stdout.write(content.decode("utf-8", errors="replace"))
    sys.stdout.flush()
    return position + len(content)
