"""From the probabilities of a study's feature rows to its voxels, on the device where they were predicted.

Whole volumes are finished there: a GPU takes a hundredth of the time, and two volumes are copied to the host instead
of everything they are made of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napari_brainmvp.preparation.resampling import resample
from napari_brainmvp.study import Grid

__all__ = ["decide", "interpolate", "place"]


def decide(probabilities: Tensor, classes: NDArray[Any]) -> tuple[Tensor, Tensor]:
    """Return each row's label value and relative entropy.

    Parameters
    ----------
    probabilities : Tensor of shape (n, K), float32
    classes : ndarray of shape (K,), int32 or int64
        Label values.

    Returns
    -------
    labels : Tensor of shape (n,), of the type of ``classes``
    uncertainty : Tensor of shape (n,), float16
        0..1.
    """
    values = torch.from_numpy(classes).to(probabilities.device)
    entropy = -torch.xlogy(probabilities, probabilities).sum(1) / np.log(len(classes))
    return values.index_select(0, probabilities.argmax(1)), entropy.clamp_(0, 1).half()


def place(values: Tensor, places: Tensor, outside: float) -> Tensor:
    """Give each voxel the value of its row.

    Parameters
    ----------
    values : Tensor of shape (N,)
    places : Tensor of any shape, int32
        The row of each voxel, counted from 1; 0 for none.
    outside : float
        What voxels without a row get.
    """
    listed = torch.cat([values.new_full((1,), outside), values])
    return listed.index_select(0, places.reshape(-1)).view(places.shape)


def interpolate(
    probabilities: Tensor, classes: Iterable[int], places: Tensor, grid: Grid, target: Grid
) -> tuple[Tensor, Tensor]:
    """Interpolate the probabilities of one class after the other, and take the largest.

    Parameters
    ----------
    probabilities : Tensor of shape (N, K), float32
    classes : iterable of K int
    places : Tensor of shape ``grid.shape``, int32
        As in :func:`place`.
    grid, target : Grid
        Where the rows lie, and where labels are wanted.

    Returns
    -------
    labels : Tensor of shape ``target.shape``, int64
        0 where nothing reaches.
    best : Tensor of the same shape, float32
        The largest probability.
    """
    best = torch.zeros(target.shape, device=probabilities.device)
    labels = torch.zeros(target.shape, dtype=torch.int64, device=best.device)
    for value, column in zip(classes, probabilities.T, strict=True):
        share = resample(place(column, places, 0), grid, target)
        labels.masked_fill_(share > best, value)
        torch.maximum(best, share, out=best)
    return labels, best
