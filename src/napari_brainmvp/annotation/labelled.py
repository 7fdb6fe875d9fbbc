"""The labelled voxels of a study, and what the probe sees of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napari_brainmvp.annotation.features import CLASS, LIMIT, StudyFeatures
from napari_brainmvp.errors import StudyError
from napari_brainmvp.preparation.resampling import resample

__all__ = ["LabelledVoxels", "Lesson", "labelled_voxels", "native_rows"]

_PLACE = 8.0
"""Edge of the cubes that labelled places are counted in, mm."""


@dataclass(frozen=True, eq=False)
class LabelledVoxels:
    """The labelled voxels of a study as the probe sees them.

    Parameters
    ----------
    values : Tensor of shape (n, F), bfloat16
    labels : ndarray of shape (n,), int64
    names : tuple of str
        The columns of ``values``.
    places : int
        How many cubes of 8 mm they lie in: voxels side by side tell hardly more than one.
    """

    values: Tensor
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    places: int = 0

    def columns(self, names: tuple[str, ...]) -> Tensor:
        """Return the values of other columns: 0 (the mean) for those that are not there, no class being probable."""
        if names == self.names:
            return self.values
        known = {name: k for k, name in enumerate(self.names)}
        out = torch.zeros(len(self.values), len(names), dtype=self.values.dtype)
        for column, name in enumerate(names):
            if name in known:
                out[:, column] = self.values[:, known[name]]
            elif name.startswith(CLASS):
                out[:, column] = -LIMIT
        return out


@dataclass(frozen=True, eq=False)
class Lesson:
    """Labelled voxels to fit to.

    Parameters
    ----------
    values : Tensor of shape (n, F)
    labels : ndarray of shape (n,), integers
        Any values; each is a class.
    places : int
        How many places they lie in, see :attr:`LabelledVoxels.places`.
    """

    values: Tensor
    labels: NDArray[np.int64]
    places: int = 0

    @property
    def weight(self) -> float:
        """Its places, at least one where there is anything."""
        return float(max(1, self.places)) if len(self.labels) else 0.0


def labelled_voxels(
    features: StudyFeatures,
    labels: NDArray[Any],
    rows: NDArray[np.int32] | None = None,
    painted: NDArray[np.bool_] | None = None,
) -> LabelledVoxels:
    """Gather the features of a study's labelled foreground voxels.

    Parameters
    ----------
    features : StudyFeatures
    labels : ndarray of shape ``features.source.shape``, integers
        0 is unlabelled.
    rows : ndarray of the same shape, int32, optional
        The row of each voxel, where the caller has it.
    painted : ndarray of the same shape, bool, optional
        Where ``labels`` are not 0, likewise.

    Raises
    ------
    StudyError
        The labels lie on another grid.
    """
    if labels.shape != features.source.shape:
        raise StudyError(
            f"The labels have shape {labels.shape}, the study {features.source.shape}: paint on a layer of the study."
        )
    rows = native_rows(features) if rows is None else rows
    painted = labels != 0 if painted is None else painted
    where = np.flatnonzero(painted)  # of integers it would take ten times as long, and stop all other threads
    chosen = rows.reshape(-1)[where]
    keep = chosen >= 0
    values = features.values.index_select(0, torch.from_numpy(chosen[keep]))
    cubes = [
        (index * spacing / _PLACE).astype(np.int64)
        for index, spacing in zip(np.unravel_index(where[keep], labels.shape), features.source.spacing, strict=True)
    ]
    seen = np.zeros([1 + int(c.max(initial=0)) for c in cubes], bool)
    seen[tuple(cubes)] = True
    places = int(seen.sum())
    return LabelledVoxels(values, labels.reshape(-1)[where[keep]].astype(np.int64), features.names, places)


def native_rows(features: StudyFeatures) -> NDArray[np.int32]:
    """Return the feature row nearest to each voxel of the study's own grid, -1 outside the foreground."""
    shifted = torch.from_numpy(features.rows + 1)
    rows: NDArray[np.int32] = resample(shifted, features.grid, features.source, "nearest").numpy() - 1
    return np.ascontiguousarray(rows)
