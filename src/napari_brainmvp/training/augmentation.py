"""What makes one prepared crop many: flips, intensity changes, missing modalities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napari_brainmvp.networks import ModalityTemplates
from napari_brainmvp.training.pool import SCALE, Crop

__all__ = ["Augmentation", "box_coordinates", "fill_missing", "template_volumes"]


@dataclass(frozen=True)
class Augmentation:
    """Strengths of the random changes to prepared intensities (healthy median 1, background 0).

    Parameters
    ----------
    flip : float
        Probability of a mirror image along each axis, independently.
    gamma : float
        Standard deviation of the log of an exponent applied to each modality.
    gain : float
        Standard deviation of the log of a factor on each modality's contrast around 1.
    noise : float
        Largest standard deviation of added noise.
    all_present : float
        Probability that no modality is taken away; otherwise a uniformly drawn number remains.
    """

    flip: float = 0.5
    gamma: float = 0.15
    gain: float = 0.15
    noise: float = 0.04
    all_present: float = 0.5

    def __call__(self, crop: Crop, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Augment a crop.

        Returns
        -------
        images : Tensor of shape (C, n, n, n), float32
        labels : Tensor of shape (n, n, n), int64
        present : Tensor of shape (C,), bool
            Modalities that were not taken away (their channels are left as they are).
        coordinates : Tensor of shape (n, n, n, 3), float32
            Positions in the study's box, -1..1; see :func:`box_coordinates`.
        """
        images = torch.from_numpy(crop.images.astype(np.float32)) / SCALE
        labels = torch.from_numpy(crop.labels.astype(np.int64))
        coordinates = box_coordinates(crop)
        axes = [axis for axis in range(3) if axis == 0 and rng.random() < self.flip]
        if rng.random() < self.flip / 4:  # other mirror images are not anatomy, but scans do come upside down
            axes.append(int(rng.integers(1, 3)))
        if axes:
            images, labels = images.flip([a + 1 for a in axes]), labels.flip(axes)
            coordinates = coordinates.flip(axes)  # a template that stands in is mirrored along
        foreground = images > 0
        for channel in range(len(images)):
            gain, exponent = np.exp(rng.normal(0, (self.gain, self.gamma)))
            changed = (1 + gain * (images[channel].clamp(min=0) - 1)).clamp(min=0.02) ** exponent
            changed = changed + rng.uniform(0, self.noise) * torch.from_numpy(
                rng.standard_normal(changed.shape, dtype=np.float32)
            )
            images[channel] = torch.where(foreground[channel], changed, 0.0)
        return images, labels, self._present(len(images), rng), coordinates

    def _present(self, channels: int, rng: np.random.Generator) -> Tensor:
        present = torch.ones(channels, dtype=torch.bool)
        if rng.random() >= self.all_present and channels > 1:
            kept = rng.permutation(channels)[: rng.integers(1, channels)]
            present[:] = False
            present[torch.from_numpy(kept)] = True
        return present


def box_coordinates(crop: Crop) -> Tensor:
    """Return where a crop's voxels lie in its study's box: (n, n, n, 3), -1 at the first voxel and 1 at the last."""
    n = crop.labels.shape[0]
    axes = [torch.linspace(2 * c - 1, 2 * (c + e) - 1, n) for c, e in zip(crop.corner, crop.extent, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def fill_missing(images: Tensor, present: Tensor, coordinates: Tensor, templates: ModalityTemplates) -> Tensor:
    """Replace missing modalities by their template, inside the foreground of those that are there.

    Parameters
    ----------
    images : Tensor of shape (B, C, X, Y, Z), float32
    present : Tensor of shape (B, C), bool
    coordinates : Tensor of shape (B, X, Y, Z, 3), float32, -1..1
    templates : ModalityTemplates
        One volume per channel.
    """
    filled = images.clone()
    for sample in range(len(images)):
        missing = (~present[sample]).nonzero()[:, 0]
        if len(missing) == 0:
            continue
        foreground = (images[sample, present[sample]] > 0).any(0)
        where = coordinates[sample].expand(len(missing), -1, -1, -1, -1)
        filled[sample, missing] = templates.sample(missing, where)[:, 0].to(images.dtype) * foreground
    return filled


def template_volumes(studies: list[NDArray[np.uint8]], shape: tuple[int, int, int]) -> Tensor:
    """Distil templates from prepared studies: the voxel-wise median over their foreground boxes.

    Parameters
    ----------
    studies : list of ndarray of shape (C + 1, X, Y, Z), uint8
        As in :class:`~napari_brainmvp.training.pool.Pool`; boxes of any size.
    shape : tuple of int
        Size of the templates, which span the box.

    Returns
    -------
    Tensor of shape (C, *shape), float32
    """
    resized = [
        torch.nn.functional.interpolate(
            torch.from_numpy(np.asarray(study[:-1], np.float32))[None] / SCALE,
            shape,
            mode="trilinear",
            align_corners=True,
        )[0]
        for study in studies
    ]
    return torch.stack(resized).median(0).values
