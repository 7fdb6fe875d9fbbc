"""How alike two images are: PSNR, SSIM and MAE inside a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Similarity", "measure_similarity", "structural_similarity"]


@dataclass(frozen=True)
class Similarity:
    """How close an image comes to the truth, in prepared units (median tissue 1 with the robust preparation).

    Parameters
    ----------
    name : str
        What was compared: ``"combined"``, a source's modality key, or ``"template alone"``.
    psnr : float
        Peak signal-to-noise ratio, dB; the peak is the truth's largest value inside the mask.
    ssim : float
        Mean structural similarity, -1..1.
    mae : float
        Mean absolute error.
    voxels : int
        Inside the mask.
    """

    name: str
    psnr: float
    ssim: float
    mae: float
    voxels: int


def measure_similarity(name: str, image: Tensor, truth: Tensor, mask: Tensor) -> Similarity:
    """Compare an image with the truth.

    Parameters
    ----------
    name : str
    image, truth : Tensor of shape (X, Y, Z), float32
    mask : Tensor of shape (X, Y, Z), bool
        Where to compare; NaN is returned where it is empty.
    """
    inside = truth[mask]
    if inside.numel() == 0:
        nan = float("nan")
        return Similarity(name, nan, nan, nan, 0)
    error = image[mask] - inside
    peak = inside.max().clamp(min=1e-6)
    psnr = 10 * torch.log10(peak**2 / error.square().mean().clamp(min=1e-12))
    ssim = structural_similarity(image, truth, float(peak))[mask].mean()
    return Similarity(name, float(psnr), float(ssim), float(error.abs().mean()), inside.numel())


def structural_similarity(image: Tensor, truth: Tensor, peak: float, sigma: float = 1.5) -> Tensor:
    """Structural similarity of every voxel's surroundings (Wang et al., IEEE Trans. Image Process. 2004).

    S = (2 m_a m_b + c1) (2 s_ab + c2) / ((m_a^2 + m_b^2 + c1) (s_a^2 + s_b^2 + c2)) with Gaussian-weighted means m,
    variances s^2 and covariance s_ab, c1 = (0.01 peak)^2 and c2 = (0.03 peak)^2.

    Parameters
    ----------
    image, truth : Tensor of shape (X, Y, Z), float32
    peak : float
        Range of the values.
    sigma : float
        Standard deviation of the weights, voxels.

    Returns
    -------
    Tensor of shape (X, Y, Z), float32, -1..1
    """
    reach = round(3.5 * sigma)
    x = torch.arange(-reach, reach + 1, dtype=torch.float32, device=image.device)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()

    def blur(volume: Tensor) -> Tensor:
        for axis in range(3):
            shape = [1, 1, 1, 1, 1]
            shape[2 + axis] = len(kernel)
            padding = [0, 0, 0, 0, 0, 0]
            padding[4 - 2 * axis] = padding[5 - 2 * axis] = reach
            padded = F.pad(volume[None, None], padding, mode="replicate")
            volume = F.conv3d(padded, kernel.view(shape))[0, 0]
        return volume

    mean_a, mean_b = blur(image), blur(truth)
    variances = blur(image * image + truth * truth) - mean_a**2 - mean_b**2
    covariance = blur(image * truth) - mean_a * mean_b
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similarity: Tensor = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return similarity / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
