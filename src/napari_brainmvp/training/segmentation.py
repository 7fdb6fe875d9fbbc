"""Training a segmentation network on a pool of prepared studies: objective, schedule, checkpoints."""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from napari_brainmvp.inference.device import choose_dtype
from napari_brainmvp.networks import ModalityTemplates
from napari_brainmvp.progress import Progress, ProgressCallback, no_progress
from napari_brainmvp.training.augmentation import Augmentation, fill_missing
from napari_brainmvp.training.pool import Pool

__all__ = ["SegmentationRecipe", "dice_cross_entropy", "train"]

logger = logging.getLogger(__name__)


class SegmentationRecipe(BaseModel):
    """How a segmentation network is trained.

    Parameters
    ----------
    steps : int
        Optimiser steps in all.
    batch, crop : int
        Crops per step and their edge in voxels (a multiple of 16).
    learning_rate, weight_decay : float
        Of AdamW; linear warm-up, then a cosine to zero.
    warm_up : int
        Steps of warm-up.
    freeze_norm : float
        Share of the steps after which batch normalisation keeps its running statistics, as it will in use; the rest
        of the network then adapts to them.
    average : float
        Decay of the exponential moving average of the weights, which is what is kept.
    minutes : float
        Time between checkpoints.
    seed : int
        Decides crops and augmentation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = 4000
    batch: int = 2
    crop: int = 80
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warm_up: int = 100
    freeze_norm: float = 0.6
    average: float = 0.998
    minutes: float = 3.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / self.warm_up
        progress = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def dice_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Soft Dice over the batch for every class that occurs, plus cross entropy.

    Parameters
    ----------
    logits : Tensor of shape (B, K, X, Y, Z)
    labels : Tensor of shape (B, X, Y, Z), int64
        Class of each voxel, 0 to K - 1.

    Returns
    -------
    Tensor
        Scalar: 1 - mean Dice of the classes present in the labels, plus the mean cross entropy.
    """
    logits = logits.float()
    log_probabilities = F.log_softmax(logits, 1)
    probabilities = log_probabilities.exp().movedim(1, 0).flatten(1)
    truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 0).flatten(1).to(probabilities.dtype)
    volume = truth.sum(1)
    dice = (2 * (probabilities * truth).sum(1) + 1) / (probabilities.sum(1) + volume + 1)
    occurs = volume > 0
    return 1 - dice[occurs].mean() + F.nll_loss(log_probabilities, labels)


def batches(
    pool: Pool, recipe: SegmentationRecipe, augmentation: Augmentation, templates: ModalityTemplates, start: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield endless batches of images (B, C, n, n, n) and labels (B, n, n, n), from step ``start`` on.

    Every step has its own seed, so that a resumed run sees what the uninterrupted one would have seen.
    """
    step = start
    while True:
        rng = np.random.default_rng([recipe.seed, step])
        samples = [augmentation(pool.crop(recipe.crop, rng), rng) for _ in range(recipe.batch)]
        images, labels, present, where = (torch.stack(parts) for parts in zip(*samples, strict=True))
        yield fill_missing(images, present, where, templates), labels
        step += 1


def train(
    network: nn.Module,
    templates: ModalityTemplates,
    pool: Pool,
    recipe: SegmentationRecipe,
    run: Path,
    *,
    device: str = "cpu",
    augmentation: Augmentation | None = None,
    progress: ProgressCallback = no_progress,
) -> nn.Module:
    """Train a segmentation network and return the averaged weights.

    A checkpoint ``run/last.pt`` is written every ``recipe.minutes``, atomically; a run that finds one goes on from it.

    Parameters
    ----------
    network : Module
        Maps (B, C, X, Y, Z) to logits (B, K, X, Y, Z); changed in place.
    templates : ModalityTemplates
        Fill the channels that the augmentation takes away.
    pool : Pool
        Training studies.
    recipe : SegmentationRecipe
    run : Path
        Folder for the checkpoint and ``losses.csv``.
    device : str
    augmentation : Augmentation, optional
    progress : callable

    Returns
    -------
    Module
        A copy of the network with the moving average of its weights, in eval mode.
    """
    run.mkdir(parents=True, exist_ok=True)
    network.to(device)
    average = copy.deepcopy(network).requires_grad_(False)
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    checkpoint = run / "last.pt"
    start = _resume(checkpoint, network, average, optimiser, device)
    saved = time.monotonic()
    data = batches(pool, recipe, augmentation or Augmentation(), templates, start)
    for step in range(start, recipe.steps):
        network.train()
        if step >= recipe.freeze_norm * recipe.steps:
            _freeze_batch_norm(network)
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step)
        loss = _step(network, optimiser, next(data), device)
        _update_average(average, network, min(recipe.average, (1 + step) / (10 + step)))
        with (run / "losses.csv").open("a") as log:
            log.write(f"{step},{loss:.5f},{recipe.rate(step):.3e},{time.time():.1f}\n")
        progress(Progress("Training", step + 1, recipe.steps))
        if time.monotonic() - saved > 60 * recipe.minutes or step + 1 == recipe.steps:
            _save(checkpoint, step + 1, network, average, optimiser)
            saved = time.monotonic()
    return average.eval()


def _step(network: nn.Module, optimiser: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], device: str) -> float:
    images, labels = (part.to(device, non_blocking=True) for part in batch)
    images = images.contiguous(memory_format=torch.channels_last_3d)
    dtype = choose_dtype(torch.device(device))
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype == torch.bfloat16):
        logits = network(images)
    loss = dice_cross_entropy(logits, labels)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimiser.step()
    return float(loss.detach())


def _freeze_batch_norm(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eval()


@torch.no_grad()
def _update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    for mean, value in zip(average.parameters(), network.parameters(), strict=True):
        mean.data.lerp_(value.data, 1 - decay)
    for kept, current in zip(average.buffers(), network.buffers(), strict=True):
        kept.copy_(current)


def _save(path: Path, step: int, network: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    state = {
        "step": step,
        "network": network.state_dict(),
        "average": average.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _resume(path: Path, network: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer, device: str) -> int:
    if not path.exists():
        return 0
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    network.load_state_dict(state["network"])
    average.load_state_dict(state["average"])
    optimiser.load_state_dict(state["optimiser"])
    logger.info("Resuming %s at step %d.", path.parent, state["step"])
    return int(state["step"])
