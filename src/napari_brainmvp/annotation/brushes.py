"""Helpers that paint: fill between slices, grow within what is predicted, take a prediction over. No torch here.

All write only where nothing is labelled yet: a stroke of the user's is never painted over.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_brainmvp.errors import StudyError

__all__ = ["grow", "interpolate_slices", "take_over"]

Labels = NDArray[Any]


def interpolate_slices(labels: Labels, value: int, axis: int) -> int:
    """Fill a class between the slices on which it is painted, by shape.

    Between two painted slices the signed distances to their outlines are mixed (Raya and Udupa, IEEE TMI 1990).

    Parameters
    ----------
    labels : ndarray of shape (i, j, k), integers
        Changed in place.
    value : int
    axis : int
        Across which the slices lie.

    Returns
    -------
    int
        Voxels painted.

    Raises
    ------
    StudyError
        The class is painted on fewer than two slices.
    """
    slices = np.moveaxis(labels, axis, 0)
    painted = np.flatnonzero((slices == value).any((1, 2)))
    if len(painted) < 2:
        raise StudyError("Paint the class on at least two slices: what lies between is filled.")
    count = 0
    for low, high in itertools.pairwise(painted):
        if high - low < 2:
            continue
        below, above = _distance(slices[low] == value), _distance(slices[high] == value)
        for index in range(low + 1, high):
            share = (index - low) / (high - low)
            fill = ((1 - share) * below + share * above > 0) & (slices[index] == 0)
            slices[index][fill] = value
            count += int(fill.sum())
    return count


def _distance(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    from scipy import ndimage  # takes a third of the time in which the panels open

    signed: NDArray[np.float64] = ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)
    return signed


def grow(plane: Labels, predicted: Labels, uncertainty: NDArray[Any], value: int, certain: float = 0.5) -> int:
    """Let a class grow from where it is painted on a slice, as far as it is predicted with some certainty.

    Parameters
    ----------
    plane, predicted : ndarray of shape (a, b), integers
        Labels of the slice, changed in place, and its prediction.
    uncertainty : ndarray of the same shape, 0..1
    value : int
    certain : float
        Voxels less certain than this are not entered.

    Returns
    -------
    int
        Voxels painted.

    Raises
    ------
    StudyError
        The class is not painted on this slice.
    """
    seeds = plane == value
    if not seeds.any():
        raise StudyError("Paint a stroke of the class on this slice first: it grows from there.")
    from scipy import ndimage

    allowed = (predicted == value) & (uncertainty < certain) & (plane == 0)
    reached = ndimage.binary_propagation(seeds, mask=allowed | seeds) & (plane == 0)
    plane[reached] = value
    return int(reached.sum())


def take_over(plane: Labels, predicted: Labels, where: tuple[int, int] | None = None) -> int:
    """Label a slice as it is predicted.

    Parameters
    ----------
    plane, predicted : ndarray of shape (a, b), integers
        Labels of the slice, changed in place, and its prediction.
    where : tuple of two int, optional
        Only the connected part of one class at this pixel; default the whole slice.

    Returns
    -------
    int
        Voxels painted.
    """
    region = np.ones(plane.shape, bool)
    if where is not None:
        from scipy import ndimage

        parts, _ = ndimage.label(predicted == predicted[where])
        region = parts == parts[where]
    fill = region & (plane == 0)
    plane[fill] = predicted[fill]
    return int(fill.sum())
