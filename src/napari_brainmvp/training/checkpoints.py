"""Checkpoints that are complete or absent, the last two of a run."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from napari_brainmvp.errors import FileError
from napari_brainmvp.io.atomic import atomic_path

__all__ = ["has_checkpoint", "last_checkpoint", "save_checkpoint", "write_state"]

logger = logging.getLogger(__name__)


def save_checkpoint(run: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``run/checkpoint-STEP.pt`` and remove all but the last two.

    Those of later steps go too: the run went back behind them, because they were damaged.

    Raises
    ------
    FileError
        It cannot be written; the earlier ones are untouched.
    """
    path = run / f"checkpoint-{step:08d}.pt"
    write_state(path, {**state, "step": step})
    every = _checkpoints(run)
    kept = [earlier for earlier in every if earlier <= path][-2:]
    for other in set(every) - set(kept):
        other.unlink(missing_ok=True)
    return path


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and numbers, completely or not at all.

    Raises
    ------
    FileError
        The disk is full or the folder cannot be written; what was there before stays.
    """
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # what torch makes of a full disk
        raise FileError(f"{path} cannot be written ({error}): free some space or choose another place.") from error


def has_checkpoint(run: Path) -> bool:
    """Tell whether a run has a checkpoint, be it damaged."""
    return bool(_checkpoints(run))


def last_checkpoint(run: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint of a run that can be read, or None where there is none; damaged ones are passed over.

    It is read into the processor's memory, so that a full GPU is not taken for a damaged file.

    Raises
    ------
    FileError
        There are checkpoints, and none of them can be read.
    """
    paths, reason = _checkpoints(run), ""
    for path in reversed(paths):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            logger.warning("%s cannot be read (%s): going back to the one before.", path, error)
            reason = str(error)
        else:
            return state
    if paths:
        names = ", ".join(path.name for path in paths)
        raise FileError(
            f"No checkpoint in {run} can be read ({names}: {reason}): free some memory and try again, "
            "put back a copy, or start a new run in another folder."
        )
    return None


def _checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoint-*.pt"))
