"""The live loop of one study: features in the background, then the visible slice and the volume after every stroke."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QObject, Qt, Signal
from qtpy.QtWidgets import QApplication

from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import FileError, StudyError
from napari_brainmvp.plugin.work import Work, step_back
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback
from napari_brainmvp.study import Study
from napari_brainmvp.threads import usable_cores, use_threads

if TYPE_CHECKING:
    from napari_brainmvp.annotation.prediction import LabelledVoxels, StudyPredictor

__all__ = ["LiveProbe", "Plane", "read_features"]

_GLANCE = 0.1
"""Seconds that the window waits for the visible slice: what it would draw meanwhile takes the cores from it."""


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
    """Fit and predict in a thread; a stroke that comes meanwhile stops that and is seen to next.

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
    _sliced = Signal()

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
        self._over = False
        self._slices: queue.SimpleQueue[tuple[Plane, NDArray[Any], NDArray[Any]]] = queue.SimpleQueue()
        self._sliced.connect(self._show_slices)

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
        self.progressed.emit(Progress("Reading the study"))

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
        self.progressed.emit(Progress("Reading the studies"))
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
        if self._over:
            return
        self._waiting = (labels.copy(), plane)
        if self.predictor is None:
            return
        if self._work is not None:
            self._work.cancel()
            return
        glanced = self._next()
        if not _brush_is_down() and glanced.wait(_GLANCE):
            self._show_slices()

    def _next(self) -> threading.Event:
        """See to the latest labels; the event tells that the visible slice is there, or that none will be."""
        assert self.predictor is not None
        assert self._waiting is not None
        (labels, plane), self._waiting = self._waiting, None
        predictor, others, glanced = self.predictor, self.others, threading.Event()

        def glance() -> None:
            try:
                predictor.fit(labels, others, predictor.probe.spec.first_steps)
                if plane is not None:
                    self._slices.put((plane, *predictor.predict_slice(plane.axis, plane.index)))
            finally:
                glanced.set()

        def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
            _use_all_cores()
            with use_threads(1):  # so few voxels are done before a second core has woken up
                glance()
            self._sliced.emit()
            step_back()
            predictor.refine(predictor.probe.spec.steps - predictor.probe.spec.first_steps)
            return predictor.predict_volume(cancel)

        self._run(run, self._show_volume, urgent=True)
        return glanced

    def _show_slices(self) -> None:
        while not (self._over or self._slices.empty()):
            plane, labels, uncertainty = self._slices.get()
            plane.of(self.prediction)[...] = labels
            plane.of(self.uncertainty)[...] = uncertainty
            self.updated.emit(False)

    def _show_volume(self, volume: Any) -> None:
        self.prediction[...] = volume.labels
        self.uncertainty[...] = volume.uncertainty
        self.updated.emit(True)

    def _run(
        self,
        function: Callable[[ProgressCallback, CancelToken], Any],
        done: Callable[[Any], None],
        urgent: bool = False,
    ) -> None:
        work = Work(function, urgent)
        work.progressed.connect(self.progressed)
        work.done.connect(lambda result: self._ended(lambda: done(result)))
        work.failed.connect(lambda message: self._ended(lambda: self.failed.emit(message)))
        work.crashed.connect(lambda error: self._ended(lambda: self.crashed.emit(error)))
        work.cancelled.connect(lambda: self._ended(self._cancelled))
        self._work = work
        work.start()

    def _ended(self, then: Callable[[], None]) -> None:
        self._work = None
        then()
        if self._work is None and self.predictor is not None and self._waiting is not None:
            self._next()

    def _cancelled(self) -> None:
        if self.predictor is None:  # else the next stroke has come
            self.failed.emit(
                "Cancelled: the study was not read, so nothing is predicted. Your strokes are kept all the same; "
                "Annotate this study reads it anew."
            )

    @property
    def reads_others(self) -> bool:
        """Whether other studies are being read, to learn from them."""
        return self._reading is not None

    def cancel(self) -> None:
        """Stop reading the study; what is predicted of one that was read goes on."""
        if self._work is not None and self.predictor is None:
            self._work.cancel()

    def abandon(self) -> None:
        """Stop, and say nothing more."""
        self._over, self._waiting = True, None
        for work in (self._work, self._reading):
            if work is not None:
                work.abandon()
        self._work = self._reading = None


def _use_all_cores() -> None:
    """Let this thread compute on all cores, of which torch takes every other one, unless the user has said how many."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())


def _brush_is_down() -> bool:
    return bool(QApplication.mouseButtons() != Qt.MouseButton.NoButton)


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
