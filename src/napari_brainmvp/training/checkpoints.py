"""Checkpoints that are complete or absent, the last two of a run."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from napari_brainmvp.errors import FileError
from napari_brainmvp.io.atomic import atomic_path

__all__ = ["last_checkpoint", "save_checkpoint"]

logger = logging.getLogger(__name__)


def save_checkpoint(run: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``run/checkpoint-STEP.pt`` and remove all but the last two.

    Raises
    ------
    FileError
        It cannot be written; the earlier ones are untouched.
    """
    path = run / f"checkpoint-{step:08d}.pt"
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save({**state, "step": step}, file)
    except RuntimeError as error:  # what torch makes of a full disk
        raise FileError(f"{path} cannot be written ({error}): free some space or choose another place.") from error
    for old in _checkpoints(run)[:-2]:
        old.unlink(missing_ok=True)
    return path


def last_checkpoint(run: Path, device: str = "cpu") -> dict[str, Any] | None:
    """Read the newest checkpoint of a run that can be read, or None; a damaged one is passed over with a warning."""
    for path in reversed(_checkpoints(run)):
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
            return state
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            logger.warning("%s is damaged (%s): going back to the one before.", path, error)
    return None


def _checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoint-*.pt"))
