"""What every training loop does in the same way: schedule, moving average, and the files of a run folder."""

from __future__ import annotations

import csv
import errno
import io
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from pydantic import BaseModel
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from napari_brainmvp.errors import BrainMVPError, FileError
from napari_brainmvp.inference.device import TrainingPrecision, choose_precision, lightning_devices
from napari_brainmvp.io.atomic import remove_partial, write_text_atomic
from napari_brainmvp.training.cache import Problem
from napari_brainmvp.training.cache_space import cache_folder

__all__ = [
    "SkippedUpdates",
    "describe_run",
    "drop_rows",
    "hold_run",
    "log_row",
    "make_fabric",
    "may_fail",
    "run_cache",
    "schedule",
    "update_average",
]

logger = logging.getLogger(__name__)

_PATIENCE = 5.0
"""Seconds for a killed process's lock to be let go of."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems without locks answer, mostly network ones."""
_MOST_SKIPPED = 10
"""Updates in a row that may be skipped before a run counts as lost."""


def schedule(step: int, steps: int, warm_up: int) -> float:
    """Return the factor on the learning rate: a linear warm-up, at most a tenth of all, then a cosine to zero.

    Examples
    --------
    >>> [round(schedule(step, 100, 10), 2) for step in (0, 9, 10, 55, 99)]
    [0.1, 1.0, 1.0, 0.5, 0.0]
    """
    warm_up = min(warm_up, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Move the exponential moving average of the weights; the decay grows from 0.1 so that the start is forgotten.

    Buffers, such as the statistics of batch normalisation, are copied.
    """
    held = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_([p.data for p in average.parameters()], [p.data for p in model.parameters()], 1 - held)
    for kept, now in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(now)


class SkippedUpdates:
    """Counts the updates in a row that are skipped, as their loss or gradient is not finite.

    One that is not would ruin the weights, their average and, soon, all checkpoints.
    """

    def __init__(self) -> None:
        self.count = 0

    def skip(self, model: nn.Module, average: nn.Module, step: int, remedy: str) -> None:
        """Put back the statistics that the forward pass of a skipped update has moved.

        Parameters
        ----------
        model, average : Module
            Of the last good update, the average has copies of the buffers.
        step : int
        remedy : str
            What to do when nothing else comes.

        Raises
        ------
        BrainMVPError
            It is the tenth in a row. Nothing is to be saved: a checkpoint is older and better.
        """
        for now, before in zip(model.buffers(), average.buffers(), strict=True):
            now.copy_(before)
        self.count += 1
        logger.warning("The update of step %d was skipped: its loss or its gradient is not finite.", step)
        if self.count == _MOST_SKIPPED:
            raise BrainMVPError(
                f"The loss or its gradient was not finite in {_MOST_SKIPPED} steps in a row, up to step {step}: "
                f"{remedy}."
            )


def log_row(path: Path, step: int, row: dict[str, float], board: SummaryWriter | None = None) -> None:
    """Append a row to a CSV file whose first column is the step, and to TensorBoard.

    A full disk costs the row and not the run: it may be freed meanwhile.
    """
    with may_fail(f"{path}, step {step},"):
        _append(path, step, row)
    if board is None:
        return
    with may_fail("TensorBoard's log"):
        try:
            for key, value in row.items():
                board.add_scalar(f"{path.stem}/{key}", value, step)
        except OSError:
            board.file_writer = board.all_writers = None  # its thread has ended; the next row gets another
            raise


def _append(path: Path, step: int, row: dict[str, float]) -> None:
    """Write the whole row or none of it."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        content = io.StringIO(newline="")
        writer = csv.writer(content)
        if not end:
            writer.writerow(["step", *row])
        writer.writerow([step, *(f"{value:.6g}" for value in row.values())])
        try:
            if file.write(encoded := content.getvalue().encode()) < len(encoded):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


@contextmanager
def may_fail(what: str) -> Iterator[None]:
    """Say that something could not be written, and go on."""
    try:
        yield
    except FileError as error:  # says what
        logger.error("%s Training goes on.", error)
    except OSError as error:
        logger.error("%s was not written (%s): free some space. Training goes on.", what, error.strerror or error)


def drop_rows(path: Path, step: int) -> None:
    """Forget what was logged after a step, as it is about to happen again; and rows that are damaged."""
    if not path.exists():
        return
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")  # what no line break ends is half a row
    head, *rows = [line.rstrip("\r") for line in lines] or [""]
    whole = [row for row in rows if row.count(",") == head.count(",") and row.split(",")[0].isdecimal()]
    kept = [row for row in whole if int(row.split(",")[0]) <= step]
    write_text_atomic(path, "".join(f"{line}\n" for line in [head, *kept] if line))


def make_fabric(
    accelerator: str,
    precision: Literal["auto"] | TrainingPrecision,
    devices: int = 1,
    nodes: int = 1,
    strategy: str = "auto",
) -> Fabric:
    """Set up Lightning's Fabric; ``accelerator`` may be ``"cuda:N"``, too, for the GPUs from number N on.

    Raises
    ------
    BrainMVPError
        There are not so many devices of that kind, or Lightning knows no such name.
    """
    kind, chosen = lightning_devices(accelerator, devices)
    chosen_precision = choose_precision(precision, accelerator)
    try:
        return Fabric(accelerator=kind, devices=chosen, num_nodes=nodes, strategy=strategy, precision=chosen_precision)
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise BrainMVPError(
            f"accelerator {accelerator}, devices {devices}, strategy {strategy}: {error} Correct the setting."
        ) from error


@contextmanager
def hold_run(run: Path) -> Iterator[None]:
    """Keep other processes from working on a run, and clear away what a killed one was writing.

    Raises
    ------
    BrainMVPError
        Another process works on it.
    FileError
        The folder cannot be made.
    """
    lock = FileLock(run / ".lock", timeout=_PATIENCE, fallback_to_soft=False)  # a soft one outlives its node
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise BrainMVPError(
            f"Another process works on {run}, it holds .lock there: wait for it, stop it, or choose another folder."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise FileError(f"{run} cannot be used ({error}): choose another folder.") from error
        logger.warning("%s lies where files cannot be locked: see to it that no other process uses it.", run)
    try:
        if lock.is_locked:
            remove_partial(run)
        yield
    finally:
        lock.release()


def run_cache(run: Path, cache: Path | None, *, keep: bool = True) -> Path:
    """Return where the prepared studies of a run are: the cache that is named, or was when the run began, or the usual.

    Parameters
    ----------
    run : Path
    cache : Path or None
    keep : bool
        Remember a cache that is named; only one of several processes does.
    """
    said = run / "cache.txt"
    if cache is None:
        return Path(said.read_text(encoding="utf-8").strip()) if said.is_file() else cache_folder()
    if keep:
        write_text_atomic(said, f"{cache.expanduser().absolute()}\n")
    return cache


def describe_run(run: Path, spec: BaseModel, problems: Sequence[Problem]) -> None:
    """Write ``spec.json``, and ``problems.txt`` with the studies that were left out."""
    write_text_atomic(run / "spec.json", spec.model_dump_json(indent=2) + "\n")
    write_text_atomic(run / "problems.txt", "".join(f"{p.name}: {' '.join(p.reason.split())}\n" for p in problems))
    if problems:
        logger.warning("%d studies were left out: see %s.", len(problems), run / "problems.txt")
