"""From a study to a network's input, and back onto the scanner's grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napari_brainmvp.errors import StudyError
from napari_brainmvp.preparation.intensity import IntensityScale, foreground_mask, measure_scale
from napari_brainmvp.preparation.resampling import network_grid, resample
from napari_brainmvp.preparation.spec import PreparationSpec
from napari_brainmvp.study import Grid, Scan, Study

__all__ = ["PreparedStudy", "prepare"]

Box = tuple[slice, slice, slice]


@dataclass(frozen=True, eq=False)
class PreparedStudy:
    """A study as a network sees it, with the way back.

    Parameters
    ----------
    images : Tensor of shape (C, X, Y, Z), float32
        Prepared intensities in the order asked for; missing modalities are 0.
    present : tuple of bool
        Which of the C modalities the study has.
    foreground : Tensor of shape (X, Y, Z), bool
        Where any of them shows something.
    grid : Grid
        The grid of ``images``: isotropic, closest to RAS, cut to the foreground box.
    source : Grid
        The study's reference grid, on which results are given unless another is asked for.
    labels : Tensor of shape (X, Y, Z), int16, or None
        The study's labels on ``grid``, where they were asked for.
    scales : tuple of IntensityScale or None
        Of each of the C modalities: the way back to the scan's own units. None where it is missing or constant.
    """

    images: Tensor
    present: tuple[bool, ...]
    foreground: Tensor
    grid: Grid
    source: Grid
    labels: Tensor | None = None
    scales: tuple[IntensityScale | None, ...] = ()

    def restore_labels(self, labels: Tensor, target: Grid | None = None) -> NDArray[Any]:
        """Take integer labels (X, Y, Z) to the target grid by the nearest voxel; 0 outside the box."""
        return resample(labels, self.grid, target or self.source, "nearest").cpu().numpy()

    def restore_image(self, image: Tensor, target: Grid | None = None) -> NDArray[np.float32]:
        """Take an image (X, Y, Z) to the target grid, float32, trilinear; 0 outside the box."""
        restored: NDArray[np.float32] = resample(image.float(), self.grid, target or self.source).cpu().numpy()
        return restored

    def restore_classes(self, scores: Tensor, target: Grid | None = None) -> NDArray[np.uint8]:
        """Decide the class of every voxel of the target grid.

        Scores are interpolated one class at a time before the largest is taken, so that outlines stay smooth on
        fine grids and memory does not grow with the number of classes.

        Parameters
        ----------
        scores : Tensor of shape (K, X, Y, Z), at least 0
            Probabilities, or anything ordered like them.
        target : Grid, optional
            Default the study's reference grid.

        Returns
        -------
        ndarray of the target's shape, uint8
            Index of the largest score; 0 outside the box.
        """
        target = target or self.source
        best = resample(scores[0].float(), self.grid, target)
        classes = torch.zeros(target.shape, dtype=torch.uint8, device=best.device)
        for index in range(1, len(scores)):
            score = resample(scores[index].float(), self.grid, target)
            better = score > best
            classes[better] = index
            torch.maximum(best, score, out=best)
        return classes.cpu().numpy()


def prepare(
    study: Study, modalities: Sequence[str], spec: PreparationSpec, *, with_labels: bool = False
) -> PreparedStudy:
    """Prepare a study for a network (Rui et al., CVPR 2025, section on pre-processing).

    Orientation closest to RAS, isotropic voxels, intensities per modality, foreground box. Scans on other grids than
    the reference are resampled once, straight onto the network's grid.

    Parameters
    ----------
    study : Study
    modalities : sequence of str
        Channels wanted, by modality key.
    spec : PreparationSpec
        The model's preparation.
    with_labels : bool
        Also bring the study's labels, and keep the box around them.

    Raises
    ------
    StudyError
        None of the modalities is there, or there is nothing but background, or labels are wanted and missing.
    """
    scans = [study.scans.get(key) for key in modalities]
    if not any(scans):
        have, want = ", ".join(study.scans), ", ".join(modalities)
        raise StudyError(f"{study.name} has {have}, but this model works on {want}: add one of these scans.")
    full = network_grid(study.grid, spec.spacing)
    volumes, masks = zip(*(_bring(scan, full) for scan in scans), strict=True)
    foreground = torch.stack([mask for mask in masks if mask is not None]).any(0)
    if not foreground.any():
        raise StudyError(f"{study.name}: the scans show nothing but background; check that the files are not empty.")
    labels = None
    if with_labels:
        if study.labels is None:
            raise StudyError(f"{study.name} has no labels: add a file named like *_seg.nii.gz.")
        values = torch.from_numpy(study.labels.data.astype(np.int16))
        labels = resample(values, study.labels.grid, full, "nearest")
    box = _box(foreground if labels is None else foreground | (labels != 0), spec)
    images = torch.zeros(len(scans), *foreground[box].shape)
    scales: list[IntensityScale | None] = [None] * len(scans)
    for channel, (volume, mask) in enumerate(zip(volumes, masks, strict=True)):
        if volume is not None and mask is not None:
            scales[channel] = scale = measure_scale(volume, mask, spec)
            if scale is not None:
                images[channel] = scale.apply(volume, mask)[box]
    start = np.array([s.start for s in box])
    affine = full.affine.copy()
    affine[:3, 3] += full.affine[:3, :3] @ start
    return PreparedStudy(
        images=images,
        present=tuple(scan is not None for scan in scans),
        foreground=foreground[box],
        grid=Grid(tuple(foreground[box].shape), affine),
        source=study.grid,
        labels=None if labels is None else labels[box],
        scales=tuple(scales),
    )


def _bring(scan: Scan | None, grid: Grid) -> tuple[Tensor | None, Tensor | None]:
    """Bring a scan and its foreground to the network's grid; the foreground is found where the scan was taken."""
    if scan is None:
        return None, None
    volume = torch.from_numpy(np.array(scan.data, np.float32))
    mask = foreground_mask(volume)
    return resample(volume, scan.grid, grid), resample(mask, scan.grid, grid, "nearest")


def _box(mask: Tensor, spec: PreparationSpec) -> Box:
    """Bounding box of a mask with the margin, held inside the volume."""
    sides = []
    for axis, size in enumerate(mask.shape):
        others = tuple(a for a in range(3) if a != axis)
        occupied = mask.any(dim=others[1]).any(dim=others[0]).nonzero()
        low, high = int(occupied.min()) - spec.margin, int(occupied.max()) + 1 + spec.margin
        low, high = max(0, low), min(size, high)
        if spec.symmetric:
            low = min(low, size - high)
            high = size - low
        sides.append(slice(low, high))
    a, b, c = sides
    return a, b, c
