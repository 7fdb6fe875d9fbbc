"""What every training loop does in the same way: schedule, moving average, and the files of a run folder."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from napari_brainmvp.io.atomic import write_text_atomic
from napari_brainmvp.training.cache import Problem

__all__ = ["describe_run", "drop_rows", "log_row", "schedule", "update_average"]

logger = logging.getLogger(__name__)


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


def log_row(path: Path, step: int, row: dict[str, float], board: SummaryWriter | None = None) -> None:
    """Append a row to a CSV file whose first column is the step, and to TensorBoard."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", *row])
        writer.writerow([step, *(f"{value:.6g}" for value in row.values())])
    for key, value in row.items():
        if board is not None:
            board.add_scalar(f"{path.stem}/{key}", value, step)


def drop_rows(path: Path, step: int) -> None:
    """Forget what was logged after a checkpoint: it is about to happen again."""
    if path.exists():
        head, *rows = path.read_text(encoding="utf-8").splitlines()
        kept = [row for row in rows if int(row.split(",")[0]) <= step]
        write_text_atomic(path, "\n".join([head, *kept]) + "\n")


def describe_run(run: Path, spec: BaseModel, problems: Sequence[Problem]) -> None:
    """Write ``spec.json``, and ``problems.txt`` with the studies that were left out."""
    write_text_atomic(run / "spec.json", spec.model_dump_json(indent=2) + "\n")
    write_text_atomic(run / "problems.txt", "".join(f"{p.name}: {p.reason}\n" for p in problems))
    if problems:
        logger.warning("%d studies were left out: see %s.", len(problems), run / "problems.txt")
