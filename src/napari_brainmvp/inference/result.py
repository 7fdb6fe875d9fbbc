"""What a segmentation gives back."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from napari_brainmvp.models.card import Label
from napari_brainmvp.study import Grid

__all__ = ["SegmentationResult", "Structure", "measure", "volumes_csv"]

_ENOUGH_VOXELS = 20_000
"""A structure's centre is looked for among about this many of its voxels."""


@dataclass(frozen=True)
class Structure:
    """One label of a result, measured.

    Parameters
    ----------
    value, name, color
        As in the model's card.
    voxels : int
    volume_ml : float
        Millilitres.
    centre_mm : tuple of float or None
        A voxel near the centre of the structure's largest connected part, RAS mm; None where it is absent.
    """

    value: int
    name: str
    color: str
    voxels: int
    volume_ml: float
    centre_mm: tuple[float, float, float] | None


@dataclass(frozen=True, eq=False)
class SegmentationResult:
    """A segmentation on a scan's own grid.

    Parameters
    ----------
    labels : ndarray of shape (i, j, k), uint8 or uint16
        Where regions overlap, the last one's value.
    regions : ndarray of shape (R, i, j, k), bool, or None
        Of a model whose regions may overlap: where each of its channels' is.
    grid : Grid
        Of all maps.
    structures : tuple of Structure
        One for every label of the card, present or not.
    probabilities : ndarray of shape (K, i, j, k), float16, or None
        One map per output channel of the model.
    channel_names : tuple of str
        What those maps show.
    uncertainty : ndarray of shape (i, j, k), float32, or None
        Entropy of the class probabilities divided by its maximum: 0 certain, 1 undecided.
    model, device : str
    seconds : float
        Time it took.
    warnings : tuple of str
        What the user should know, one sentence each.
    """

    labels: NDArray[Any]
    regions: NDArray[np.bool_] | None
    grid: Grid
    structures: tuple[Structure, ...]
    probabilities: NDArray[np.float16] | None
    channel_names: tuple[str, ...]
    uncertainty: NDArray[np.float32] | None
    model: str
    device: str
    seconds: float
    warnings: tuple[str, ...]


def measure(
    labels: NDArray[Any], grid: Grid, described: Sequence[Label], regions: Mapping[int, NDArray[np.bool_]] | None = None
) -> tuple[Structure, ...]:
    """Measure every described label: voxels, volume in ml and a place to look at.

    Parameters
    ----------
    labels : ndarray of shape (i, j, k), unsigned integers
    grid : Grid
    described : sequence of Label
    regions : mapping of int to ndarray of shape (i, j, k), bool, optional
        By label value, where each is, if they overlap: a label map shows the last of them only.
    """
    boxes = ndimage.find_objects(labels) if regions is None else []
    structures = []
    for label in described:
        if regions is not None:
            whole = regions.get(label.value)
            box = None if whole is None else next(iter(ndimage.find_objects(whole.view(np.uint8))), None)
            mask = whole[box] if whole is not None and box is not None else None
        else:
            box = boxes[label.value - 1] if label.value <= len(boxes) else None
            mask = labels[box] == label.value if box is not None else None
        voxels = int(mask.sum()) if mask is not None else 0
        world = None
        if mask is not None and box is not None:
            x, y, z = (float(value) for value in grid.to_world(_centre(mask, box)))
            world = (x, y, z)
        volume = voxels * grid.voxel_volume_ml
        structures.append(Structure(label.value, label.name, label.color, voxels, volume, world))
    return tuple(structures)


def _centre(mask: NDArray[np.bool_], box: tuple[slice, ...]) -> NDArray[np.int64]:
    """Return the voxel nearest to the centre of mass of the largest connected part of a mask, which fills a box."""
    parts, count = ndimage.label(mask)
    largest = 1 if count == 1 else 1 + int(np.bincount(parts.ravel())[1:].argmax())
    index = np.argwhere(parts == largest)
    index = index[:: max(1, len(index) // _ENOUGH_VOXELS)]
    nearest = index[((index - index.mean(0)) ** 2).sum(1).argmin()]
    start: NDArray[np.int64] = np.array([side.start for side in box])
    voxel: NDArray[np.int64] = start + nearest
    return voxel


def volumes_csv(structures: Sequence[Structure]) -> str:
    """Return the volumes as CSV: value, name, voxels, volume_ml."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("value", "name", "voxels", "volume_ml"))
    for s in structures:
        writer.writerow((s.value, s.name, s.voxels, f"{s.volume_ml:.4f}"))
    return text.getvalue()
