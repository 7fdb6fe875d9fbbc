"""From strokes on a study's own grid to a prediction on it: the visible slice first, then the volume."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napari_brainmvp.annotation.features import StudyFeatures
from napari_brainmvp.annotation.history import label_dtype
from napari_brainmvp.annotation.labelled import LabelledVoxels, Lesson, labelled_voxels, native_rows
from napari_brainmvp.annotation.placement import Placement, Votes
from napari_brainmvp.annotation.probe import Probe, ProbeSpec
from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.inference.device import choose_device, lacks_memory
from napari_brainmvp.progress import CancelToken

__all__ = ["LabelledVoxels", "StudyPredictor", "VolumePrediction", "labelled_voxels", "uncertain_slice"]

logger = logging.getLogger(__name__)
Predicted = TypeVar("Predicted")

_LABELLED = 20_000
"""Labelled voxels of a class that are learned from, at most: a study that is labelled all over has a million."""
_FEW_PLACES = 100
"""Labelled places up to which predictions are smoothed in full; from there on less, by the cube root."""
_UNLABELLED = 8000
"""Voxels of the study on which the network is believed."""


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
        self,
        features: StudyFeatures,
        background: int = 0,
        spec: ProbeSpec | None = None,
        device: str = "auto",
        known: Sequence[int] = (),
    ) -> None:
        self.features, self.background = features, background
        self.probe = Probe(features.names, background, spec, known)
        self._rows = native_rows(features)
        self._placement = Placement(features.rows, features.grid, features.source)
        self._sample = torch.arange(0, features.count, max(1, features.count // _UNLABELLED))
        self._lesson: tuple[Lesson, Lesson | None, Tensor] | None = None
        self._painted: tuple[NDArray[np.int64], NDArray[Any], Votes] | None = None
        self._move(choose_device(device))
        if self._values.is_cuda:
            self._wake()

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
        if not (others or self.probe.known) and len(np.unique(mine.labels)) < 2 <= len(np.unique(labels[painted])):
            raise BrainMVPError(
                "The strokes of a class all lie in the black outside the head, where nothing is learned: paint the "
                "background inside the head, where nothing is wrong."
            )
        free = torch.ones(self.features.count, dtype=torch.bool)
        where = np.flatnonzero(painted)
        where = where[self._rows.reshape(-1)[where] >= 0]
        rows = self._rows.reshape(-1)[where]
        free[torch.from_numpy(rows)] = False
        rest = _lesson(others, self.features.names) if others else None
        here = _lesson((mine,), self.features.names)
        unlabelled = self.features.values.index_select(0, self._sample[free[self._sample]])
        self._lesson = (here, rest, unlabelled)
        self.refine(steps)
        values = labels.reshape(-1)[where]
        votes = self._placement.votes(rows, np.searchsorted(self.probe.classes, values), self.probe.spec.say)
        self._painted = where, values, votes

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
        found = self._with_memory(lambda: self._predict((axis, index)))
        return found.labels.squeeze(axis), found.uncertainty.squeeze(axis)

    def predict_volume(self, cancel: CancelToken | None = None) -> VolumePrediction:
        """Predict the whole study on its own grid.

        Class probabilities are smoothed, see :class:`ProbeSpec`, and interpolated before the largest is taken.

        Parameters
        ----------
        cancel : CancelToken, optional
            Looked at all along: whoever paints the next stroke does not wait for the volume.

        Raises
        ------
        Cancelled
            It was.
        """
        return self._with_memory(lambda: self._predict(None, cancel))

    def _predict(self, plane: tuple[int, int] | None, cancel: CancelToken | None = None) -> VolumePrediction:
        part = self._placement.part(self._smoothing(), plane)
        values = self._values if part.asked is None else self._values.index_select(0, part.asked)
        probabilities = self.probe.predict(values, cancel)
        votes = self._painted[2] if self._painted is not None else None
        found, uncertainty = self._placement.spread(probabilities, self._classes, part, votes, cancel)
        outside = self._outside[part.voxels]
        shape, at = list(self._rows.shape), list(part.voxels)
        if plane is not None:
            shape[plane[0]], at[plane[0]] = 1, slice(0, 1)
        labels = np.full(shape, self.background, self._classes.dtype)
        labels[tuple(at)] = found.masked_fill_(outside, self.background).cpu().numpy()
        doubt = np.zeros(shape, np.float16)
        doubt[tuple(at)] = uncertainty.masked_fill_(outside, 0).cpu().numpy()
        if self._painted is not None:
            self._keep_painted(labels, plane)
        return VolumePrediction(labels, doubt)

    def _keep_painted(self, labels: NDArray[Any], plane: tuple[int, int] | None) -> None:
        """Put what is painted over what is predicted, of the volume or of a plane."""
        assert self._painted is not None
        where, values, _ = self._painted
        index = list(np.unravel_index(where, self._rows.shape))
        if plane is not None:
            here = index[plane[0]] == plane[1]
            index, values = [along[here] for along in index], values[here]
            index[plane[0]] = np.zeros_like(index[plane[0]])
        labels[tuple(index)] = values

    def _smoothing(self) -> float:
        """Return the standard deviation of the Gaussian, voxels: what many labels say needs less of the neighbours'."""
        places = self._lesson[0].places if self._lesson is not None else 0
        share = min(1.0, (_FEW_PLACES / max(1, places)) ** (1 / 3))
        return float(self.probe.spec.smoothing * share / self.features.grid.spacing[0])

    @property
    def _classes(self) -> NDArray[Any]:
        """Label values, of the type that predictions have."""
        return np.array(self.probe.classes, label_dtype((*self.probe.classes, self.background)))

    def _move(self, device: torch.device) -> None:
        """Keep on a CUDA device what predicting takes, on the processor without one or without its memory."""
        if device.type != "cuda":
            device = torch.device("cpu")
        try:
            self._placement.to(device)
            self._values = self.features.values.index_select(0, self._placement.rows).to(device)
            self._outside = torch.from_numpy(self._rows < 0).to(device)
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            self._retreat(device)

    def _wake(self) -> None:
        """Predict once for nothing: a GPU loads its code at the first use, which the first stroke would wait for."""
        some = self.features.values[:64]
        if len(some) > 1:
            self.probe.fit(Lesson(some, np.arange(len(some)) % 2), 0)
            self.predict_volume()
            self.predict_slice(2, self._rows.shape[2] // 2)
            self.probe = Probe(self.features.names, self.background, self.probe.spec, self.probe.known)

    def _retreat(self, device: torch.device) -> None:
        logger.warning("%s has no memory left for predicting this study: the processor does.", device)
        self._move(torch.device("cpu"))
        torch.cuda.empty_cache()

    def _with_memory(self, predict: Callable[[], Predicted]) -> Predicted:
        """Predict; on the processor from now on where a training that began meanwhile has taken the GPU's memory."""
        try:
            return predict()
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
        self._retreat(self._values.device)
        return predict()


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
