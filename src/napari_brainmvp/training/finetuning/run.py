"""The loop of fine-tuning: resumable at any moment, stopped early, the best weights kept."""

from __future__ import annotations

import copy
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from napari_brainmvp.errors import Cancelled, FileError
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback
from napari_brainmvp.training.checkpoints import last_checkpoint, save_checkpoint, write_state
from napari_brainmvp.training.finetuning.spec import FinetuneSpec
from napari_brainmvp.training.loop import SkippedUpdates, drop_rows, log_row, schedule, update_average

__all__ = ["Run", "Trainable", "Validate"]

_BEST = "best.pt"
logger = logging.getLogger(__name__)


class Trainable(nn.Module, ABC):
    """A model that computes its own losses from a batch; what is minimised is called ``loss``."""

    @abstractmethod
    def set_mode(self, done: float) -> None:
        """Switch to training mode after this share of the run."""


Validate = Callable[[Any, "Path | None"], dict[str, float]]
"""Measures a model on what is held out and draws a picture; ``score`` shall grow; empty with nothing held out."""


class Run:
    """A model in training with its optimiser, moving average, best weights and logs.

    Parameters
    ----------
    fabric : Fabric
    spec : FinetuneSpec
    folder : Path
        For checkpoints, ``metrics.csv``, ``validation.csv`` and ``pictures``.
    model : Trainable
    groups : list of dict
        Parameters and their learning rates, as optimisers take them.
    steps : int
    validate : callable
    """

    def __init__(
        self,
        fabric: Fabric,
        spec: FinetuneSpec,
        folder: Path,
        model: Trainable,
        groups: list[dict[str, Any]],
        steps: int,
        validate: Validate,
    ) -> None:
        self.fabric, self.spec, self.folder, self.steps, self._validate = fabric, spec, folder, steps, validate
        self.average = copy.deepcopy(model).requires_grad_(False).to(fabric.device)
        self.model = model
        optimiser = torch.optim.AdamW(groups, weight_decay=spec.weight_decay)
        self.rates = [group["lr"] for group in optimiser.param_groups]
        self.wrapped, self.optimiser = fabric.setup(model, optimiser)
        self.best: float | None = None
        self.stale, self.skips = 0, SkippedUpdates()

    @property
    def finished(self) -> bool:
        """Whether validation has not improved for so long that going on is a waste."""
        return bool(self.spec.patience) and self.stale >= self.spec.patience

    def restore(self) -> int:
        """Load the last checkpoint and return the step it was written after; 0 where there is none."""
        state = last_checkpoint(self.folder)
        step = 0 if state is None else int(state["step"])
        for name in ("metrics.csv", "validation.csv"):
            drop_rows(self.folder / name, step)
        if state is None:
            return 0
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        if scale := state.get("precision"):
            self.fabric.strategy.precision.load_state_dict(scale)
        self.best, self.stale = state["best"], state["stale"]
        return step

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),  # the scale of float16's gradients
            "best": self.best,
            "stale": self.stale,
        }
        save_checkpoint(self.folder, step, state)

    def train(
        self,
        batches: Iterator[dict[str, Tensor]],
        step: int,
        progress: ProgressCallback,
        cancel: CancelToken | None,
    ) -> None:
        """Go on to the last step, or to where it no longer gets better; a cancelled run writes a checkpoint first.

        An update from a loss or gradient that is not finite is left out: it would ruin weights and checkpoints.

        Raises
        ------
        BrainMVPError
            Ten of them come in a row; nothing is written.
        Cancelled
        """
        spec, saved = self.spec, time.monotonic()
        board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
        while step < self.steps and not self.finished:
            if cancel is not None and cancel.cancelled:
                self.save(step)
                raise Cancelled(f"Stopped after step {step} of {self.steps}. Resume to go on.")
            began = time.perf_counter()
            losses = self._step(next(batches), step)
            row = {**losses, "learning_rate": max(self.rates) * schedule(step, self.steps, spec.warm_up)}
            step += 1
            speed = spec.batch / (time.perf_counter() - began)
            log_row(self.folder / "metrics.csv", step, {**row, "samples_per_second": speed}, board)
            if step % spec.validate_every == 0 or step == self.steps:
                self._measure(step, board)
            if time.monotonic() - saved >= 60 * spec.minutes or step == self.steps or self.finished:
                self._try_to_save(step)
                saved = time.monotonic()
            progress(Progress("Fine-tuning", self.steps if self.finished else step, self.steps))
        board.close()

    def _step(self, batch: dict[str, Tensor], step: int) -> dict[str, float]:
        factor = schedule(step, self.steps, self.spec.warm_up)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.model.set_mode(step / self.steps)
        losses = self.wrapped({key: value.to(self.fabric.device, non_blocking=True) for key, value in batch.items()})
        self.fabric.backward(losses["loss"])
        norm = self.fabric.clip_gradients(
            self.wrapped, self.optimiser, max_norm=self.spec.clip, error_if_nonfinite=False
        )
        finite = bool(torch.isfinite(losses["loss"])) and (norm is None or bool(torch.isfinite(norm)))
        if finite or self.spec.precision == "16-mixed":  # its scaler leaves out such an update itself, and learns by it
            self.optimiser.step()
        self.optimiser.zero_grad()
        if finite:
            self.skips.count = 0
            update_average(self.average, self.model, step, self.spec.average)
        else:
            remedy = f"lower learning_rate, which is {max(self.rates):g}, or look for strange values in the scans"
            self.skips.skip(self.model, self.average, step + 1, f"{remedy}. What is saved is from before")
        return {name: float(value.detach()) for name, value in losses.items()}

    def _measure(self, step: int, board: SummaryWriter) -> None:
        """Validate the moving average, and keep it where it is the best so far."""
        found = self._validate(self.average.eval(), self.folder / "pictures" / f"{step:08d}.png")
        if not found:
            return
        log_row(self.folder / "validation.csv", step, found, board)
        if not found["score"] > (-math.inf if self.best is None else self.best):  # also where it is not a number
            self.stale += 1
            return
        try:
            write_state(self.folder / _BEST, {"step": step, "average": self.average.state_dict()})
        except FileError as error:
            logger.error("%s Training goes on; the best weights are older.", error)
            return
        self.best, self.stale = found["score"], 0

    def _try_to_save(self, step: int) -> None:
        """Write a checkpoint; a full disk stops the run only at its end, as it may be freed meanwhile."""
        try:
            self.save(step)
        except FileError as error:
            if step == self.steps:
                raise
            logger.error("%s Training goes on; the last checkpoint is older.", error)

    def result(self) -> tuple[Any, int]:
        """Return the model with the best weights, in eval mode, and the step they are from."""
        step = self.steps
        if self.best is not None:
            state = torch.load(self.folder / _BEST, map_location="cpu", weights_only=True)
            self.average.load_state_dict(state["average"])
            step = int(state["step"])
        return self.average.eval(), step
