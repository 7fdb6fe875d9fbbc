"""What a scanner adds to an ideal image: coil sensitivity, finite resolution, thick slices, noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from napari_brainmvp.synthesis.draws import Draws

__all__ = ["acquire"]


def acquire(image: Tensor, draws: Draws) -> Tensor:
    """Acquire an ideal image.

    Parameters
    ----------
    image : Tensor of shape (X, Y, Z), float32, at least 0
        Ideal signal on a 1 mm grid.
    draws : Draws
        Decides how good the scanner was.

    Returns
    -------
    Tensor of shape (X, Y, Z), float32, at least 0
    """
    bright = image[image > 0]
    level = torch.quantile(bright[:: max(1, bright.numel() // 50_000)], 0.8) if bright.numel() else torch.tensor(1.0)
    noise = draws.uniform(0.004, 0.05) * level
    image = image * torch.exp(draws.uniform(0.0, 0.25) * draws.smooth(image.shape, 70))
    if draws.chance(0.3):
        image = _thick_slices(image, draws)
    image = _blur(image, draws.uniform(0.0, 0.75))
    image = ((image + noise * draws.normal(*image.shape)) ** 2 + (noise * draws.normal(*image.shape)) ** 2).sqrt()
    return _blur(image, draws.uniform(0.3, 0.7)) if draws.chance(0.5) else image  # scans that were resampled


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Blur with a Gaussian of standard deviation ``sigma`` voxels, axis by axis."""
    if sigma < 0.2:
        return image
    reach = max(1, round(2.5 * sigma))
    x = torch.arange(-reach, reach + 1, device=image.device, dtype=torch.float32)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    for axis in range(3):
        padded = F.pad(image.movedim(axis, -1), (reach, reach))
        length = image.shape[axis]
        parts = [kernel[k] * padded[..., k : k + length] for k in range(2 * reach + 1)]
        image = torch.stack(parts).sum(0).movedim(-1, axis)
    return image


def _thick_slices(image: Tensor, draws: Draws) -> Tensor:
    """Average slices of 2 to 5 mm along one axis and interpolate back to 1 mm."""
    axis = 2 if draws.chance(0.6) else draws.integer(0, 2)  # axial slices are the most common
    thickness = draws.integer(2, 6)
    size = list(image.shape)
    size[axis] = max(2, round(size[axis] / thickness))
    thick = F.interpolate(image[None, None], size=size, mode="area")
    return F.interpolate(thick, size=image.shape, mode="trilinear", align_corners=False)[0, 0]
