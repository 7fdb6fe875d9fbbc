"""Where the head is, and what its intensities mean to a network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from napari_brainmvp.preparation.spec import PreparationSpec

__all__ = ["IntensityScale", "foreground_mask", "measure_scale", "normalise"]

_SAMPLES = 200_000
"""Voxels that are enough to estimate a percentile to well under a grey level."""


def foreground_mask(volume: Tensor) -> Tensor:
    """Tell head from air, or brain from what was stripped away around it.

    A value that fills a fifth of the volume exactly (0, or the smallest) is taken as stripped background, also where
    intensities were z-scored before. Otherwise half of Otsu's threshold parts noise from tissue.

    Parameters
    ----------
    volume : Tensor of shape (X, Y, Z), float32
        Raw intensities, finite.

    Returns
    -------
    Tensor of shape (X, Y, Z), bool
        All False for a constant volume.
    """
    low, high = volume.amin(), volume.amax()
    if low == high:
        return torch.zeros_like(volume, dtype=torch.bool)
    for background in (torch.zeros_like(low), low):
        if (volume == background).float().mean() > 0.2:
            return volume != background
    return volume > low + 0.5 * (_otsu(volume) - low)


def _otsu(volume: Tensor) -> Tensor:
    """Otsu's threshold on 256 bins below the 99.5th percentile (Otsu 1979)."""
    sample = _sample(volume.flatten())
    top = torch.quantile(sample, 0.995)
    edges = torch.linspace(float(sample.min()), float(top), 257)
    counts = torch.histc(sample.cpu(), 256, float(edges[0]), float(edges[-1]))
    centres = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum(0)
    above = below[-1] - below
    sums = (counts * centres).cumsum(0)
    between = below * above * (sums / below.clamp(min=1) - (sums[-1] - sums) / above.clamp(min=1)) ** 2
    best: Tensor = centres[between >= between.max() * (1 - 1e-6)]  # a gap between the classes is a plateau
    return best.mean().to(volume.device)


@dataclass(frozen=True)
class IntensityScale:
    """The map between one scan's own units and what a network sees, both ways.

    With ``"robust"`` preparation, z = 1.35 (x - centre) / spread and y = max(0, 1 + asinh(z / 2) / 2); else
    y = (x - centre) / spread, clipped to 0..1 where ``clip`` says so.

    Parameters
    ----------
    centre, spread : float
        Median and interquartile range of the foreground (robust), or its 5th percentile and the distance to the
        95th (percentile), in the scan's units.
    floor, background : float
        The scan's smallest value, and the median of what is not foreground.
    robust, clip : bool
        Which formula.

    Examples
    --------
    >>> scale = IntensityScale.nominal(PreparationSpec())
    >>> scale.invert(torch.tensor([0.0, 1.0, 2.0])).round().tolist()
    [0.0, 500.0, 1000.0]
    """

    centre: float
    spread: float
    floor: float
    background: float
    robust: bool
    clip: bool

    @classmethod
    def nominal(cls, spec: PreparationSpec) -> IntensityScale:
        """Units for a scan that never was: background 0, and median tissue 500 (robust) or 95th percentile 1000."""
        if spec.intensity == "robust":
            return cls(500.0, 500 * 1.35 / 7.253720815694037, 0.0, 0.0, True, False)  # 2 sinh(2): y = 0 becomes 0
        return cls(100.0, 900.0, 0.0, 0.0, False, spec.clip)

    def apply(self, volume: Tensor, mask: Tensor) -> Tensor:
        """Take intensities (X, Y, Z) to the network's; the robust ones are 0 outside the mask."""
        if not self.robust:
            scaled: Tensor = (volume - self.centre) / self.spread
            return scaled.clamp(0, 1) if self.clip else scaled
        z = 1.35 * (volume - self.centre) / self.spread
        return torch.where(mask, (1 + 0.5 * torch.asinh(0.5 * z)).clamp(min=0), 0.0)

    def invert(self, prepared: Tensor) -> Tensor:
        """Take a network's intensities back to the scan's units, never below the scan's smallest value.

        Exact wherever nothing was clipped: inside the foreground, above 0.
        """
        if not self.robust:
            return (prepared * self.spread + self.centre).clamp(min=self.floor)
        z = 2 * torch.sinh(2 * (prepared - 1))
        return (z * (self.spread / 1.35) + self.centre).clamp(min=self.floor)


def measure_scale(volume: Tensor, mask: Tensor, spec: PreparationSpec) -> IntensityScale | None:
    """Measure what :func:`normalise` does to a scan; None where the mask is empty or the foreground constant.

    Parameters are those of :func:`normalise`.
    """
    inside = volume[mask]
    if inside.numel() == 0:
        return None
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], device=volume.device)
    p5, p25, median, p75, p95 = torch.quantile(_sample(inside), levels)
    if p95 == p5:
        return None
    outside = volume[~mask]
    background = float(_sample(outside).median()) if outside.numel() else 0.0
    floor = float(volume.min())
    if spec.intensity == "percentile":
        return IntensityScale(float(p5), float(p95 - p5), floor, background, False, spec.clip)
    spread = torch.maximum(p75 - p25, 0.05 * (p95 - p5))
    return IntensityScale(float(median), float(spread), floor, background, True, False)


def normalise(volume: Tensor, mask: Tensor, spec: PreparationSpec) -> Tensor:
    """Map raw intensities to the range a network expects.

    ``"robust"``: with z = 1.35 (x - median) / (interquartile range) inside the mask, y = max(0, 1 + asinh(z / 2) / 2).
    The median tissue becomes 1 and the background 0; bright lesions and cerebrospinal fluid keep their order
    because nothing saturates above. ``"percentile"``: the 5th to 95th percentile inside the mask become 0..1
    (Rui et al., CVPR 2025), clipped where the specification says so. :class:`IntensityScale` is the way back.

    Parameters
    ----------
    volume : Tensor of shape (X, Y, Z), float32
        Raw intensities, finite.
    mask : Tensor of shape (X, Y, Z), bool
        Foreground of this scan.
    spec : PreparationSpec
        Chooses the formula.

    Returns
    -------
    Tensor of shape (X, Y, Z), float32
        All 0 where the mask is empty or the foreground is constant.

    Examples
    --------
    >>> volume = torch.arange(27.0).reshape(3, 3, 3)
    >>> float(normalise(volume, volume > 0, PreparationSpec())[volume == 0])
    0.0
    """
    scale = measure_scale(volume, mask, spec)
    return torch.zeros_like(volume) if scale is None else scale.apply(volume, mask)


def _sample(values: Tensor) -> Tensor:
    """At most about ``_SAMPLES`` values, evenly spaced: deterministic, and within torch.quantile's limit."""
    return values[:: max(1, values.numel() // _SAMPLES)]
