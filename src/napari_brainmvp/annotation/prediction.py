"""From strokes on a study's own grid to a prediction on it: the visible slice first, then the volume."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napari_brainmvp.annotation.features import CLASS, LIMIT, StudyFeatures
from napari_brainmvp.annotation.history import label_dtype
from napari_brainmvp.annotation.probe import Lesson, Probe, ProbeSpec
from napari_brainmvp.errors import BrainMVPError, StudyError
from napari_brainmvp.inference.device import choose_device
from napari_brainmvp.preparation.resampling import resample
from napari_brainmvp.progress import CancelToken

__all__ = ["LabelledVoxels", "StudyPredictor", "VolumePrediction", "labelled_voxels", "uncertain_slice"]

logger = logging.getLogger(__name__)

_PLACE = 8.0
"""Edge of the cubes that labelled places are counted in, mm."""
_LABELLED = 20_000
"""Labelled voxels of a class that are learned from, at most: a study that is labelled all over has a million."""
_UNLABELLED = 8000
"""Voxels of the study on which the network is believed."""


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
class VolumePrediction:
    """A prediction on the study's own grid.

    Parameters
    ----------
    labels : ndarray of shape (i, j, k), int32 (int64 where values need it)
        A label value everywhere in the foreground, the background's elsewhere.
    uncertainty : ndarray of shape (i, j, k), float16
        Entropy over its maximum, 0..1.
    """

    labels: NDArray[Any]
    uncertainty: NDArray[np.float16]


class StudyPredictor:
    """The probe of one study: told its labels after every stroke, asked for slices and volumes.

    Parameters
    ----------
    features : StudyFeatures
    background : int
        Label value predicted outside the foreground.
    spec : ProbeSpec, optional
    device : str
        Where voxels are predicted, as :func:`napari_brainmvp.inference.choose_device` takes it; the fit, of few voxels
        and many small steps, is quicker on the processor, and so is everything on what is no CUDA device.
    """

    def __init__(
        self, features: StudyFeatures, background: int = 0, spec: ProbeSpec | None = None, device: str = "auto"
    ) -> None:
        self.features, self.background = features, background
        self._values = _on_device(features.values, device)
        self.probe = Probe(features.names, background, spec)
        self._rows = _native_rows(features)
        self._sample = torch.arange(0, features.count, max(1, features.count // _UNLABELLED))
        self._lesson: tuple[Lesson, Lesson | None, Tensor] | None = None
        self._exact = np.abs(np.array(features.source.spacing) - features.grid.spacing[0]).max() < 1e-3

    @property
    def ready(self) -> bool:
        """Whether there is something to predict with."""
        return bool(self.probe.classes)

    def fit(self, labels: NDArray[Any], others: tuple[LabelledVoxels, ...] = (), steps: int | None = None) -> None:
        """Fit to everything that is labelled.

        Parameters
        ----------
        labels : ndarray of shape (i, j, k), integers
            On the study's own grid; 0 is unlabelled.
        others : tuple of LabelledVoxels
            Of other studies.
        steps : int, optional
            See :meth:`Probe.fit`.

        Raises
        ------
        BrainMVPError
            Fewer than two classes are labelled in the foreground.
        """
        painted = labels != 0
        mine = labelled_voxels(self.features, labels, self._rows, painted)
        if not others and len(np.unique(mine.labels)) < 2 <= len(np.unique(labels[painted])):
            raise BrainMVPError(
                "The strokes of a class all lie in the black outside the head, where nothing is learned: paint the "
                "background inside the head, where nothing is wrong."
            )
        free = torch.ones(self.features.count, dtype=torch.bool)
        rows = self._rows[painted]
        free[torch.from_numpy(rows[rows >= 0]).long()] = False
        rest = _lesson(others, self.features.names) if others else None
        here = _lesson((mine,), self.features.names)
        self._lesson = (here, rest, self.features.values[self._sample[free[self._sample]]])
        self.refine(steps)

    def refine(self, steps: int | None = None) -> None:
        """Go on with the last fit, to the same labels.

        Parameters
        ----------
        steps : int, optional
            See :meth:`Probe.fit`.
        """
        lesson = self._lesson
        if lesson is None:
            raise ValueError("There is nothing to go on with: call fit first.")
        here, elsewhere, unlabelled = lesson
        self.probe.fit(here, steps, elsewhere=elsewhere, unlabelled=unlabelled)

    def predict_slice(self, axis: int, index: int) -> tuple[NDArray[Any], NDArray[np.float16]]:
        """Predict one plane of the study's own grid.

        Parameters
        ----------
        axis, index : int
            The plane across ``axis`` of (i, j, k).

        Returns
        -------
        labels : ndarray of the plane's shape, int32
        uncertainty : ndarray of the same shape, float16
        """
        rows: NDArray[np.int32] = np.take(self._rows, index, axis=axis)
        inside = rows >= 0
        chosen = torch.from_numpy(rows[inside]).long().to(self._values.device)
        found, doubt = self._decide(self.probe.predict(self._values[chosen]))
        labels = np.full(rows.shape, self.background, found.dtype)
        uncertainty = np.zeros(rows.shape, np.float16)
        labels[inside], uncertainty[inside] = found, doubt
        return labels, uncertainty

    def predict_volume(self, cancel: CancelToken | None = None) -> VolumePrediction:
        """Predict the whole study on its own grid.

        Where its voxels are those of the features this is a look-up. Elsewhere class probabilities are interpolated
        before the largest is taken, so that outlines stay smooth.

        Parameters
        ----------
        cancel : CancelToken, optional
            Looked at all along: whoever paints the next stroke does not wait for the volume.

        Raises
        ------
        Cancelled
            It was.
        """
        probabilities = self.probe.predict(self._values, cancel)
        found, doubt = self._decide(probabilities)
        inside = self._rows >= 0
        uncertainty = np.zeros(self._rows.shape, np.float16)
        uncertainty[inside] = doubt[self._rows[inside]]
        labels = np.full(self._rows.shape, self.background, found.dtype)
        if self._exact:
            labels[inside] = found[self._rows[inside]]
            return VolumePrediction(labels, uncertainty)
        best = np.zeros(self._rows.shape, np.float32)
        rows = torch.from_numpy(self.features.rows)
        for value, column in zip(self.probe.classes, probabilities.T.cpu(), strict=True):
            volume = torch.zeros(rows.shape)
            volume[rows >= 0] = column
            share = resample(volume, self.features.grid, self.features.source).numpy()
            better = (share > best) & inside
            labels[better], best[better] = value, share[better]
        return VolumePrediction(labels, uncertainty)

    def _decide(self, probabilities: Tensor) -> tuple[NDArray[Any], NDArray[np.float16]]:
        """Return the label value and the relative entropy of each row."""
        values = np.array(self.probe.classes, label_dtype((*self.probe.classes, self.background)))
        entropy = -torch.xlogy(probabilities, probabilities).sum(1) / np.log(len(values))
        return values[probabilities.argmax(1).cpu().numpy()], entropy.clamp_(0, 1).half().cpu().numpy()


def _lesson(studies: Sequence[LabelledVoxels], names: tuple[str, ...]) -> Lesson:
    """Put labelled voxels together, of each class at most so many."""
    labels = np.concatenate([study.labels for study in studies])
    chosen = _evenly(labels, _LABELLED)
    values = torch.cat([study.columns(names) for study in studies])[torch.from_numpy(chosen)]
    return Lesson(values, labels[chosen], sum(study.places for study in studies))


def _evenly(labels: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Choose at most so many of each label, evenly, in their order."""
    parts = (np.flatnonzero(labels == value) for value in np.unique(labels))
    return np.sort(np.concatenate([part[:: -(-len(part) // most)] for part in parts] or [np.zeros(0, np.int64)]))


def _on_device(values: Tensor, device: str) -> Tensor:
    """Copy features to a CUDA device, once a study; leave them where they are without one, or without the memory."""
    chosen = choose_device(device)
    if chosen.type != "cuda":
        return values
    try:
        return values.to(chosen)
    except torch.OutOfMemoryError:
        logger.warning("%s has no memory left for the features of this study: the processor predicts.", chosen)
        return values


def uncertain_slice(uncertainty: NDArray[np.floating], labels: NDArray[Any], axis: int) -> int:
    """Find the plane that is least certain and, if possible, holds no label.

    Parameters
    ----------
    uncertainty : ndarray of shape (i, j, k), 0..1
    labels : ndarray of the same shape, integers
        0 is unlabelled.
    axis : int
        The plane lies across this axis.
    """
    others = tuple(a for a in range(3) if a != axis)
    score = uncertainty.sum(others, dtype=np.float32)
    score[(labels != 0).any(others)] *= 0.25
    return int(score.argmax())


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
    rows = _native_rows(features) if rows is None else rows
    painted = labels != 0 if painted is None else painted
    where = np.flatnonzero(painted)  # of integers it would take ten times as long, and stop all other threads
    chosen = rows.reshape(-1)[where]
    keep = chosen >= 0
    values = features.values[torch.from_numpy(chosen[keep]).long()]
    cubes = [
        (index * spacing / _PLACE).astype(np.int64)
        for index, spacing in zip(np.unravel_index(where[keep], labels.shape), features.source.spacing, strict=True)
    ]
    seen = np.zeros([1 + int(c.max(initial=0)) for c in cubes], bool)
    seen[tuple(cubes)] = True
    places = int(seen.sum())
    return LabelledVoxels(values, labels.reshape(-1)[where[keep]].astype(np.int64), features.names, places)


def _native_rows(features: StudyFeatures) -> NDArray[np.int32]:
    """Return the feature row nearest to each voxel of the study's own grid, -1 outside the foreground."""
    shifted = torch.from_numpy(features.rows + 1)
    rows: NDArray[np.int32] = resample(shifted, features.grid, features.source, "nearest").numpy() - 1
    return np.ascontiguousarray(rows)
