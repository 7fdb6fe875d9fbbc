"""The live loop of one study: features in the background, then the visible slice and the volume after every stroke."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QObject, Signal

from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import FileError, StudyError
from napari_brainmvp.plugin.work import Work
from napari_brainmvp.progress import CancelToken, ProgressCallback
from napari_brainmvp.study import Study

if TYPE_CHECKING:
    from napari_brainmvp.annotation.prediction import LabelledVoxels, StudyPredictor

__all__ = ["LiveProbe", "Plane", "read_features"]


@dataclass(frozen=True)
class Plane:
    """A slice of a study's own grid: across ``axis`` of (i, j, k), at ``index``."""

    axis: int
    index: int

    def of(self, volume: NDArray[Any]) -> NDArray[Any]:
        """Return the slice of an array: a view."""
        view: NDArray[Any] = np.moveaxis(volume, self.axis, 0)[self.index]
        return view


class LiveProbe(QObject):
    """Fit and predict in a thread; a stroke that comes meanwhile is seen to next, older ones are dropped.

    Results are written into the two arrays that the layers show, in the GUI's thread.

    Parameters
    ----------
    study : Study
    background : int
        Label value of the background class.
    prediction, uncertainty : ndarray of shape (i, j, k)
        Where results go.
    """

    prepared = Signal()
    """The features are there."""
    progressed = Signal(object)
    updated = Signal(bool)
    """The layers' arrays have changed; True once the whole volume has."""
    learned = Signal(int, object)
    """Of how many other studies the strokes are used now, too, and the names of those that cannot be read."""
    failed = Signal(str)
    crashed = Signal(object)
    _sliced = Signal(object)

    def __init__(
        self, study: Study, background: int, prediction: NDArray[Any], uncertainty: NDArray[np.float16]
    ) -> None:
        super().__init__()
        self._study, self._background = study, background
        self.prediction, self.uncertainty = prediction, uncertainty
        self.predictor: StudyPredictor | None = None
        self.others: tuple[LabelledVoxels, ...] = ()
        self._work: Work | None = None
        self._reading: Work | None = None
        self._waiting: tuple[NDArray[Any], Plane | None] | None = None
        self._sliced.connect(self._show_slice)

    @property
    def busy(self) -> bool:
        """Whether something is being computed."""
        return self._work is not None

    @property
    def ready(self) -> bool:
        """Whether a prediction is there."""
        return self.predictor is not None and self.predictor.ready

    def prepare(self) -> None:
        """Compute the features, or find them."""
        study, background = self._study, self._background

        def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
            from napari_brainmvp.annotation.prediction import StudyPredictor

            _use_all_cores()
            return StudyPredictor(read_features(study, progress, cancel), background)

        self._run(run, self._prepared)

    def _prepared(self, predictor: StudyPredictor) -> None:
        self.predictor = predictor
        self.prepared.emit()

    def learn_from(self, project: AnnotationProject | None, but: str = "") -> None:
        """Use the strokes of a project's other studies, too, once they are read; None for those of this study only.

        Parameters
        ----------
        project : AnnotationProject or None
        but : str
            The name of this study in it.
        """
        if self._reading is not None:
            self._reading.abandon()
            self._reading = None
        if project is None:
            self.others = ()
            self.learned.emit(0, ())
            return

        def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
            return labelled_elsewhere(project, but, progress, cancel)

        self._reading = work = Work(run)
        work.progressed.connect(self.progressed)
        work.done.connect(self._learn)
        work.failed.connect(self.failed)
        work.crashed.connect(self.crashed)
        work.start()

    def _learn(self, found: tuple[tuple[LabelledVoxels, ...], tuple[str, ...]]) -> None:
        self._reading = None
        self.others, unread = found
        self.learned.emit(len(self.others), unread)

    def update(self, labels: NDArray[Any], plane: Plane | None) -> None:
        """Predict from these labels, the visible slice first.

        Parameters
        ----------
        labels : ndarray of shape (i, j, k), integers
            Copied.
        plane : Plane or None
            What is visible; None in a 3D view.
        """
        self._waiting = (labels.copy(), plane)
        if self._work is None and self.predictor is not None:
            self._next()

    def _next(self) -> None:
        assert self.predictor is not None
        if self._waiting is None:
            return
        (labels, plane), self._waiting = self._waiting, None
        predictor, others = self.predictor, self.others

        def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
            _use_all_cores()
            spec = predictor.probe.spec
            predictor.fit(labels, others, spec.first_steps)
            if plane is not None:
                self._sliced.emit((plane, *predictor.predict_slice(plane.axis, plane.index)))
            predictor.fit(labels, others, spec.steps - spec.first_steps)
            return predictor.predict_volume()

        self._run(run, self._show_volume)

    def _show_slice(self, found: tuple[Plane, NDArray[Any], NDArray[Any]]) -> None:
        if self._work is None:
            return  # the volume has overtaken it
        plane, labels, uncertainty = found
        plane.of(self.prediction)[...] = labels
        plane.of(self.uncertainty)[...] = uncertainty
        self.updated.emit(False)

    def _show_volume(self, volume: Any) -> None:
        self.prediction[...] = volume.labels
        self.uncertainty[...] = volume.uncertainty
        self.updated.emit(True)

    def _run(self, function: Callable[[ProgressCallback, CancelToken], Any], done: Callable[[Any], None]) -> None:
        work = Work(function)
        work.progressed.connect(self.progressed)
        work.done.connect(lambda result: self._ended(lambda: done(result)))
        work.failed.connect(lambda message: self._ended(lambda: self.failed.emit(message)))
        work.crashed.connect(lambda error: self._ended(lambda: self.crashed.emit(error)))
        work.cancelled.connect(lambda: self._ended(lambda: None))
        self._work = work
        work.start()

    def _ended(self, then: Callable[[], None]) -> None:
        self._work = None
        then()
        if self._work is None and self.predictor is not None:
            self._next()

    def abandon(self) -> None:
        """Stop, and say nothing more."""
        self._waiting = None
        for work in (self._work, self._reading):
            if work is not None:
                work.abandon()
        self._work = self._reading = None


def _use_all_cores() -> None:
    """Let this thread compute on all cores: torch counts two hyper-threads as one, which here takes twice the time."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)


def read_features(study: Study, progress: ProgressCallback, cancel: CancelToken) -> Any:
    """Return a study's features by the model that ships, from the disk where they are there."""
    from napari_brainmvp.annotation.store import FeatureStore
    from napari_brainmvp.models import find_model, load_model

    return FeatureStore().get(study, load_model(find_model()), progress, cancel)


def labelled_elsewhere(project: AnnotationProject, but: str, progress: ProgressCallback, cancel: CancelToken) -> Any:
    """Return the labelled voxels of a project's other studies, and the names of those whose scans cannot be read."""
    from napari_brainmvp.annotation.prediction import labelled_voxels

    found, unread = [], []
    for reference in project.studies:
        labels = project.labels(reference.name).labels
        if reference.name == but or not labels.any():
            continue
        try:
            study = project.read(reference.name)
        except (FileError, StudyError):
            unread.append(reference.name)
            continue
        found.append(labelled_voxels(read_features(study, progress, cancel), labels))
    return tuple(found), tuple(unread)
