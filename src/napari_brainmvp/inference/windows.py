"""Sliding windows: where they lie, how they are weighted, how they are run and joined."""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from napari_brainmvp.networks import STRIDE, channels_last
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback, no_progress

__all__ = ["SlidingWindow", "gaussian_importance", "report_layers", "window_starts"]

Size = tuple[int, int, int]
_MODEST = 96
"""Edge of a window that every GPU has room for."""
_TOGETHER = 4 * _MODEST**3
"""Voxels computed together on a GPU."""
_PARTS = 100
"""Reports of progress in a window."""

logger = logging.getLogger(__name__)


def gaussian_importance(size: Sequence[int], sigma: float = 1 / 8) -> Tensor:
    """Weight a window's voxels by how much of their surroundings the network saw.

    A Gaussian about the centre with a standard deviation of ``sigma`` times the size along each axis (Isensee et al.,
    nnU-Net, Nature Methods 2021), held above a thousandth so that a voxel seen once is still decided.

    Parameters
    ----------
    size : sequence of three int
        Window in voxels.
    sigma : float
        Relative standard deviation.

    Returns
    -------
    Tensor of shape ``size``, float32
        Largest value 1.
    """
    axes = []
    for n in size:
        x = torch.arange(n, dtype=torch.float32) - (n - 1) / 2
        axes.append(torch.exp(-(x**2) / (2 * (sigma * n) ** 2)))
    weights = axes[0][:, None, None] * axes[1][None, :, None] * axes[2][None, None, :]
    return (weights / weights.max()).clamp(min=1e-3)


def window_starts(length: int, size: int, overlap: float, align: int = 1) -> list[int]:
    """Spread windows evenly over an axis.

    Parameters
    ----------
    length, size : int
        Of the axis and of a window, voxels; ``size`` is at most ``length``.
    overlap : float
        Least share of a window that its neighbour covers, 0 to below 1.
    align : int
        Starts are multiples of this, where ``length - size`` is one.

    Examples
    --------
    >>> window_starts(145, 96, 0.5)
    [0, 24, 49]
    """
    steps = math.ceil((length - size) / max(1.0, size * (1 - overlap)))
    return [0] if steps == 0 else [int(k * (length - size) / steps) // align * align for k in range(steps + 1)]


@contextmanager
def report_layers(network: nn.Module, report: Callable[[float], None]) -> Iterator[None]:
    """Report, after each layer of a forward pass in this thread, the share of layers that have run.

    A whole brain in one window takes many seconds on a CPU; so progress is seen in it, and what ``report`` raises, for
    example :class:`~napari_brainmvp.errors.Cancelled`, ends it. Layers differ in time, so the share is a rough one.
    """
    layers = [module for module in network.modules() if next(module.children(), None) is None]
    thread, run = threading.get_ident(), 0

    def count(*_: object) -> None:
        nonlocal run
        if threading.get_ident() == thread:  # others may use the same network
            run += 1
            report(min(1.0, run / len(layers)))

    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class SlidingWindow:
    """Run a network over a volume in overlapping windows and average its probabilities.

    Parameters
    ----------
    patch_size : tuple of three int
        Window in voxels, multiples of the network's stride; shrunk to volumes that are smaller.
    overlap : float
        See :func:`window_starts`.
    batch : int
        Windows run together; 0 chooses one on a CPU, and a few small ones elsewhere. The result does not depend on it.
    device : torch.device
        Where to compute. When its memory does not suffice, the batch is halved, then windows become smaller, and in the
        end the CPU takes over.
    dtype : torch.dtype
        Of the convolutions: ``torch.float32``, or a half precision under autocast.
    mirror : bool
        Average with the prediction on the left-right mirror image.
    align : int
        Windows start at multiples of this; the volume is padded to such a multiple, too.
    step : str
        What progress calls the work.
    warnings : list of str
        Notices of what had to be changed on the way.
    """

    patch_size: Size
    overlap: float
    batch: int
    device: torch.device
    dtype: torch.dtype
    mirror: bool = False
    align: int = 1
    step: str = "Segmenting"
    warnings: list[str] = field(default_factory=list)

    def __call__(
        self,
        network: nn.Module,
        images: Tensor,
        foreground: Tensor,
        activation: Callable[[Tensor], Tensor],
        progress: ProgressCallback = no_progress,
        cancel: CancelToken | None = None,
    ) -> Tensor:
        """Predict a volume: the average of the windows' activations, weighted by :func:`gaussian_importance`.

        Parameters
        ----------
        network : Module
            Maps (B, C, x, y, z) to logits (B, K, x, y, z), in eval mode.
        images : Tensor of shape (C, X, Y, Z), float32
        foreground : Tensor of shape (X, Y, Z), bool
            Windows in which it is empty are skipped.
        activation : callable
            From logits (B, K, x, y, z) to what is averaged: probabilities, or sums for a weighted mean.
        progress, cancel
            Told, and asked, after every layer.

        Returns
        -------
        Tensor of shape (K, X, Y, Z), float32, on the CPU
            0 where no window came.

        Raises
        ------
        Cancelled
            When asked to; at the next layer.
        """
        size = tuple(images.shape[1:])
        while True:
            i, j, k = (min(p, -(-n // STRIDE) * STRIDE) for p, n in zip(self.patch_size, size, strict=True))
            window: Size = (i, j, k)
            rest = [max(w, -(-n // self.align) * self.align) - n for w, n in zip(window, size, strict=True)]
            padding = (0, rest[2], 0, rest[1], 0, rest[0])
            padded, inside = F.pad(images, padding), F.pad(foreground, padding)
            self.batch = self.batch or (1 if self.device.type == "cpu" else max(1, _TOGETHER // math.prod(window)))
            try:
                probabilities = self._run(network, padded, inside, window, activation, progress, cancel)
                return probabilities[:, : size[0], : size[1], : size[2]]
            except torch.OutOfMemoryError:
                self._retreat()

    def _boxes(self, foreground: Tensor, window: Size) -> list[tuple[slice, slice, slice]]:
        starts = [window_starts(n, w, self.overlap, self.align) for n, w in zip(foreground.shape, window, strict=True)]
        boxes = []
        for corner in itertools.product(*starts):
            i, j, k = (slice(s, s + w) for s, w in zip(corner, window, strict=True))
            if foreground[i, j, k].any():
                boxes.append((i, j, k))
        return boxes

    def _retreat(self) -> None:
        """Ask for less memory: half the batch, then smaller windows, then the CPU."""
        if self.device.type == "cpu":
            raise MemoryError("Not enough memory for one window on the CPU.")
        if self.batch > 1:
            self.batch //= 2
            logger.info("Out of memory on %s: going on with %d windows at a time.", self.device, self.batch)
        elif max(self.patch_size) > _MODEST:
            i, j, k = (min(n, _MODEST) for n in self.patch_size)
            self.patch_size = (i, j, k)
            logger.info("Out of memory on %s: going on with windows of %s voxels.", self.device, self.patch_size)
        else:
            self.warnings.append(f"{self.device} ran out of memory: computed on the CPU instead.")
            self.device, self.dtype = torch.device("cpu"), torch.float32
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _run(
        self,
        network: nn.Module,
        images: Tensor,
        foreground: Tensor,
        window: Size,
        activation: Callable[[Tensor], Tensor],
        progress: ProgressCallback,
        cancel: CancelToken | None,
    ) -> Tensor:
        boxes = self._boxes(foreground, window)
        network.to(self.device)
        importance = gaussian_importance(window).to(self.device)
        weight_sum = torch.zeros(images.shape[1:], device=self.device)
        total: Tensor | None = None
        for start in range(0, len(boxes), self.batch):
            chosen = boxes[start : start + self.batch]
            crops = torch.stack([images[(slice(None), *box)] for box in chosen]).to(self.device)
            report = self._reporter(start, len(chosen), len(boxes), progress, cancel)
            predicted = self._predict(network, crops, activation, report)
            if total is None:
                total = torch.zeros(predicted.shape[1], *images.shape[1:], device=self.device)
            for box, probabilities in zip(chosen, predicted, strict=True):
                total[(slice(None), *box)].addcmul_(probabilities, importance)
                weight_sum[box] += importance
        assert total is not None, "the foreground box is never empty"
        return total.div_(weight_sum.clamp(min=1e-6)).cpu()

    def _reporter(
        self, start: int, count: int, windows: int, progress: ProgressCallback, cancel: CancelToken | None
    ) -> Callable[[float], None]:
        """Return what is told the share that is done of ``count`` windows after the first ``start`` ones."""
        said = -1

        def report(share: float) -> None:
            nonlocal said
            if cancel is not None:
                cancel.raise_if_cancelled()
            done = int((start + count * share) * _PARTS)
            if done > said:
                said = done
                progress(Progress(self.step, done, windows * _PARTS))

        report(0.0)
        return report

    def _predict(
        self,
        network: nn.Module,
        crops: Tensor,
        activation: Callable[[Tensor], Tensor],
        report: Callable[[float], None],
    ) -> Tensor:
        views = [crops, crops.flip(2)] if self.mirror else [crops]
        half = self.dtype != torch.float32
        predictions = []
        for number, view in enumerate(views):

            def part(share: float, number: int = number) -> None:
                report((number + share) / len(views))

            with (
                report_layers(network, part),
                torch.autocast(self.device.type, self.dtype if half else None, enabled=half),
            ):
                logits = network(channels_last(view))
            report((number + 1) / len(views))
            predictions.append(activation(logits.float()))
        if self.mirror:
            return (predictions[0] + predictions[1].flip(2)) / 2
        return predictions[0]
