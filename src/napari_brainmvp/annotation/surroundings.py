"""A voxel's surroundings in one scan: Gaussian means, spread and steepness, by scipy on a processor, else by torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

__all__ = ["SCALES", "describe", "measure_with_scipy", "measure_with_torch"]

SCALES = (1.0, 2.0, 4.0, 8.0)
"""Standard deviations of the Gaussians that describe a voxel's surroundings, mm."""
_SPREAD, _STEEP = 1, 3
"""Which scale the spread is taken at, and how many have their gradient taken."""
_REACH = 3
"""Standard deviations after which a Gaussian ends."""

Measures = tuple[list[Tensor], Tensor, list[Tensor]]
"""Means at all scales, spread, and gradient magnitudes."""


def describe(image: Tensor, spacing: float) -> list[tuple[str, Tensor]]:
    """Describe every voxel of a scan where it is; both ways differ by rounding only.

    Parameters
    ----------
    image : Tensor of shape (X, Y, Z), float32
    spacing : float
        Edge of its voxels, mm.

    Returns
    -------
    list of (str, Tensor)
        The image itself, named ``""``, Gaussian means at :data:`SCALES`, the standard deviation about the one of
        2 mm, and gradient magnitudes of the image's three finest means; on the image's device.
    """
    measure: Callable[[Tensor, float], Measures] = measure_with_torch
    if image.device.type == "cpu":  # with a thread a scale it is as quick as torch there, and needs less memory
        measure = measure_with_scipy
    means, spread, steep = measure(image, spacing)
    named = [("", image), *((f"{s:g}mm", m) for s, m in zip(SCALES, means, strict=True))]
    named.append((f"spread {SCALES[_SPREAD]:g}mm", spread))
    return named + [(f"gradient {s:g}mm", g) for s, g in zip(SCALES[:_STEEP], steep, strict=True)]


def measure_with_scipy(image: Tensor, spacing: float) -> Measures:
    """Measure an image (X, Y, Z) on the CPU, a thread a scale."""
    volume = image.numpy()

    def blur(values: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
        blurred: NDArray[np.float32] = ndimage.gaussian_filter(values, scale / spacing, truncate=_REACH)
        return blurred

    def steepness(values: NDArray[np.float32]) -> NDArray[np.float32]:
        total = np.zeros_like(values)
        for axis in _long(values.shape):
            total += np.square(np.gradient(values, axis=axis))
        return np.sqrt(total)

    with ThreadPoolExecutor(len(SCALES) + 1) as pool:  # scipy's filters let go of the interpreter's lock
        squares = pool.submit(blur, np.square(volume), SCALES[_SPREAD])
        means = list(pool.map(lambda scale: blur(volume, scale), SCALES))
        spread = np.sqrt(np.clip(squares.result() - np.square(means[_SPREAD]), 0, None))
        steep = list(pool.map(steepness, means[:_STEEP]))
    return [torch.from_numpy(m) for m in means], torch.from_numpy(spread), [torch.from_numpy(g) for g in steep]


def _long(shape: Sequence[int]) -> list[int]:
    """Return the axes along which something can change."""
    return [axis for axis, n in enumerate(shape) if n > 1]


def measure_with_torch(image: Tensor, spacing: float) -> Measures:
    """Measure an image (X, Y, Z) on any device, without a copy to another.

    Blurring is linear along each axis, so it is three matrix products. Those are of full float32, while convolutions on
    a GPU are in TF32 by default: too coarse for the spread, a small difference of squares.
    """

    def blur(values: Tensor, scale: float) -> Tensor:
        first, second, third = (torch.from_numpy(_blurring(n, scale / spacing)).to(values.device) for n in values.shape)
        along_first = (first @ values.reshape(len(values), -1)).view(values.shape)
        return second @ along_first @ third.T

    def steepness(values: Tensor) -> Tensor:
        total = torch.zeros_like(values)
        for axis in _long(values.shape):
            total.add_(torch.gradient(values, dim=axis)[0].square_())
        return total.sqrt_()

    means = [blur(image, scale) for scale in SCALES]
    spread = (blur(image.square(), SCALES[_SPREAD]) - means[_SPREAD].square()).clamp_(min=0).sqrt_()
    return means, spread, [steepness(mean) for mean in means[:_STEEP]]


@lru_cache(maxsize=32)
def _blurring(size: int, deviation: float) -> NDArray[np.float32]:
    """Return what scipy's filter does along an axis as a matrix (size, size): its answer to the identity.

    So the kernel's end and the mirrored border are scipy's own, also where the kernel is longer than the axis.
    """
    matrix: NDArray[np.float64] = ndimage.gaussian_filter1d(np.eye(size), deviation, axis=0, truncate=_REACH)
    return matrix.astype(np.float32)
