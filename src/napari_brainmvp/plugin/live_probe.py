"""The live loop of one study: features in the background, then the visible slice and the volume after every stroke."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QObject, Qt, Signal
from qtpy.QtWidgets import QApplication

from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.plugin.reading import labelled_elsewhere, read_predictor
from napari_brainmvp.plugin.visible_slice import Plane
from napari_brainmvp.plugin.work import Work, step_back
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback
from napari_brainmvp.study import Study
from napari_brainmvp.threads import use_all_cores, use_threads

if TYPE_CHECKING:
    from napari_brainmvp.annotation.prediction import LabelledVoxels, StudyPredictor

__all__ = ["LiveProbe"]

_GLANCE = 0.1
"""Seconds that the window waits for the visible slice: what it would draw meanwhile takes the cores from it."""


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
    led = Signal()
    """From now on strokes correct what a model predicts."""
    strayed = Signal(str)
    """They do not, and why."""
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
        self._leading: Work | None = None
        self._led: StudyPredictor | None = None  # by a model of the user's, in place of that by the one that ships
        self._waiting: tuple[NDArray[Any], Plane | None] | None = None
        self._over = False
        self._slices: queue.SimpleQueue[tuple[Any, Plane, NDArray[Any], NDArray[Any]]] = queue.SimpleQueue()
        self._sliced.connect(self._show_slices)

    @property
    def busy(self) -> bool:
        """Whether something is being computed."""
        return self._work is not None

    @property
    def ready(self) -> bool:
        """Whether a prediction is there."""
        return self._current is not None and self._current.ready

    def prepare(self) -> None:
        """Compute the features, or find them."""
        study, background = self._study, self._background
        self.progressed.emit(Progress("Reading the study"))

        def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
            use_all_cores()
            return read_predictor(study, background, progress, cancel)

        self._run(run, self._prepared)

    def _prepared(self, predictor: StudyPredictor) -> None:
        self.predictor = predictor
        self.prepared.emit()

    def lead(self, model: Path | None, known: tuple[int, ...] = ()) -> None:
        """Start from what a model predicts, once the study is read with it; None to start from the one that ships.

        Parameters
        ----------
        model : Path or None
            Its folder.
        known : tuple of int
            The label value of each of its network's classes.
        """
        if self._leading is not None:
            self._leading.abandon()
        self._leading = self._led = None
        if self._work is not None:
            self._work.cancel()
        if model is None:
            return
        study, background = self._study, self._background

        def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
            use_all_cores()
            return read_predictor(study, background, progress, cancel, model, known)

        self._leading = work = Work(run)
        work.progressed.connect(self.progressed)
        work.done.connect(self._follow)
        work.failed.connect(self._stray)
        work.cancelled.connect(lambda: self._stray("Cancelled: your strokes do not correct the model."))
        work.crashed.connect(self._crash)
        work.start()

    def _follow(self, predictor: StudyPredictor) -> None:
        self._leading, self._led = None, predictor
        self.led.emit()
        if self._work is None and self._waiting is not None:
            self._next()

    def _stray(self, why: str) -> None:
        self._leading = None
        self.strayed.emit(why)

    def _crash(self, error: Exception) -> None:
        self._stray("Something went wrong; see the notification.")
        self.crashed.emit(error)

    @property
    def _current(self) -> StudyPredictor | None:
        """What predicts now; None while something is read for it."""
        return (self._led or self.predictor) if self._leading is None else None

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
        work.failed.connect(lambda why: self._unlearned(self.failed, why))
        work.crashed.connect(lambda error: self._unlearned(self.crashed, error))
        self.progressed.emit(Progress("Reading the studies"))
        work.start()

    def _learn(self, found: tuple[tuple[LabelledVoxels, ...], tuple[str, ...]]) -> None:
        self._reading = None
        self.others, unread = found
        self.learned.emit(len(self.others), unread)

    def _unlearned(self, signal: Any, why: object) -> None:
        self._reading = None
        signal.emit(why)

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
        if self._current is None:
            return
        if self._work is not None:
            self._work.cancel()
            return
        glanced = self._next()
        if QApplication.mouseButtons() == Qt.MouseButton.NoButton and glanced.wait(_GLANCE):
            self._show_slices()

    def _next(self) -> threading.Event:
        """See to the latest labels; the event tells that the visible slice is there, or that none will be."""
        predictor, glanced = self._current, threading.Event()
        assert predictor is not None
        assert self._waiting is not None
        (labels, plane), self._waiting = self._waiting, None
        others = self.others if predictor is self.predictor else ()  # a model of the user's was trained on such

        def glance() -> None:
            try:
                predictor.fit(labels, others, predictor.probe.spec.first_steps)
                if plane is not None:
                    self._slices.put((predictor, plane, *predictor.predict_slice(plane.axis, plane.index)))
            finally:
                glanced.set()

        def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
            use_all_cores()
            with use_threads(1):  # so few voxels are done before a second core has woken up
                glance()
            self._sliced.emit()
            step_back()
            predictor.refine(predictor.probe.spec.steps - predictor.probe.spec.first_steps)
            return predictor.predict_volume(cancel)

        self._run(run, lambda volume: self._show_volume(predictor, volume), urgent=True)
        return glanced

    def _show_slices(self) -> None:
        while not (self._over or self._slices.empty()):
            predictor, plane, labels, uncertainty = self._slices.get()
            if predictor is not self._current:
                continue
            plane.of(self.prediction)[...] = labels
            plane.of(self.uncertainty)[...] = uncertainty
            self.updated.emit(False)

    def _show_volume(self, predictor: StudyPredictor, volume: Any) -> None:
        if predictor is not self._current:
            return
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
        if self._work is None and self._current is not None and self._waiting is not None:
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
        """Stop reading the study, with whatever model; what is predicted of one that was read goes on."""
        if self._leading is not None:
            self._leading.cancel()
        if self._work is not None and self.predictor is None:
            self._work.cancel()

    def abandon(self) -> None:
        """Stop, and say nothing more."""
        self._over, self._waiting = True, None
        for work in (self._work, self._reading, self._leading):
            if work is not None:
                work.abandon()
        self._work = self._reading = self._leading = None
