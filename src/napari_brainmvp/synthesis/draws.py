"""Seeded random numbers and smooth random fields on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Draws", "box_mean"]


def box_mean(volume: Tensor, width: int) -> Tensor:
    """Average over a cube around every voxel, with zeros beyond the border.

    Running sums make the cost independent of the width; ``avg_pool3d`` on a CPU is a hundred times slower.

    Parameters
    ----------
    volume : Tensor of shape (X, Y, Z), float32
    width : int
        Odd edge length of the cube in voxels.
    """
    reach = width // 2
    for axis in range(3):
        padded = F.pad(volume.movedim(axis, 0), (0, 0, 0, 0, reach + 1, reach))
        sums = padded.cumsum(0)
        volume = ((sums[width:] - sums[:-width]) / width).movedim(0, axis)
    return volume


class Draws:
    """A random stream: one seed gives one study.

    Parameters
    ----------
    seed : int
        Any non-negative integer.
    device : str
        Where fields are made.

    Examples
    --------
    >>> Draws(1).uniform(0, 1) == Draws(1).uniform(0, 1)
    True
    """

    def __init__(self, seed: int, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self._scalars = torch.Generator().manual_seed(seed)
        self._fields = torch.Generator(self.device).manual_seed(seed)

    def uniform(self, low: float, high: float) -> float:
        """Draw one number, uniform in [low, high)."""
        return low + (high - low) * float(torch.rand((), generator=self._scalars, dtype=torch.float64))

    def normal(self, *shape: int) -> Tensor:
        """Draw independent standard normals of the given shape, float32, on the device."""
        return torch.randn(shape, generator=self._fields, device=self.device)

    def jitter(self, value: float, spread: float) -> float:
        """Multiply a positive value by exp of a normal number with standard deviation ``spread``."""
        return value * math.exp(spread * float(torch.randn((), generator=self._scalars, dtype=torch.float64)))

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self.uniform(0, 1) < probability

    def choice(self, options: Sequence[str], weights: Sequence[float] | None = None) -> str:
        """Draw one of the options, with optional non-negative weights."""
        probabilities = torch.tensor(weights if weights is not None else [1.0] * len(options), dtype=torch.float64)
        return options[int(torch.multinomial(probabilities, 1, generator=self._scalars))]

    def integer(self, low: int, high: int) -> int:
        """Draw an integer with low <= n < high."""
        return int(torch.randint(low, high, (), generator=self._scalars))

    def voxel(self, weights: Tensor) -> Tensor:
        """Draw a voxel index, shape (3,) float32, with probability proportional to ``weights`` (X, Y, Z)."""
        cumulative = weights.flatten().double().cumsum(0)
        position = torch.searchsorted(cumulative, cumulative[-1] * self.uniform(0, 1))
        index = torch.unravel_index(position.clamp(max=weights.numel() - 1), weights.shape)
        return torch.stack(index).float()

    def smooth(self, shape: Sequence[int], scale: float) -> Tensor:
        """Make a smooth random field.

        Independent normals on a grid ``scale`` voxels wide are interpolated trilinearly, which costs next to
        nothing beside convolution.

        Parameters
        ----------
        shape : sequence of three int
            Size of the field (X, Y, Z).
        scale : float
            Distance between the independent values, in voxels.

        Returns
        -------
        Tensor of shape (X, Y, Z), float32
            Mean about 0, standard deviation about 1 at the grid points and less between them.
        """
        coarse = [max(2, round(n / scale) + 1) for n in shape]
        field = self.normal(1, 1, *coarse)
        return F.interpolate(field, size=tuple(shape), mode="trilinear", align_corners=True)[0, 0]
