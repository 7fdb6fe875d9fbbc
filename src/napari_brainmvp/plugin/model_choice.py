"""What a study's prediction starts from: the model that ships, or one of the user's own."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

from qtpy.QtCore import Signal

from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import StudyError
from napari_brainmvp.plugin.live_probe import LiveProbe
from napari_brainmvp.plugin.slice_tools import SliceTools
from napari_brainmvp.progress import Progress

if TYPE_CHECKING:
    from napari_brainmvp.annotation.comparison import ModelPrediction

__all__ = ["ModelChoice"]


class ModelChoice(SliceTools):
    """Choose between the probe and a model; a base of a study's view, which gives it the probe."""

    progressed = Signal(object)
    changed = Signal()

    probe: LiveProbe

    _project: AnnotationProject
    _lead: ModelPrediction | None = None

    @abstractmethod
    def _learn_again(self) -> None:
        """Learn from other studies, too, if that was asked for while a model was corrected."""

    @abstractmethod
    def update_now(self) -> None:
        """Predict from the labels as they are."""

    @abstractmethod
    def _predict_if_labelled(self) -> None:
        """Predict, if that follows the brush and there is something to learn from."""

    @property
    def model(self) -> str:
        """The name of the model whose prediction is shown, corrected or not; empty where it is the probe's alone."""
        return self._shown.model or self._shown.leader

    @property
    def corrected(self) -> str:
        """The name of the model that strokes correct; empty where there is none."""
        return self._shown.leader

    def use_model(self, found: ModelPrediction) -> None:
        """Show what a model predicts; strokes correct it where it tells classes apart, else they bring the probe back.

        Until the study is read with the model, strokes wait.
        """
        if found.known:
            self._lead = found
            self._shown.follow(found.model, found.labels, found.uncertainty)
            self.probe.lead(found.entry.folder, found.known)
            self.said.emit(f"Shown is the prediction of {found.model}. Reading the study with it, to correct it…")
        else:
            self._shown.show_model(found.model, found.labels, found.uncertainty)
            self.said.emit(f"Shown is the prediction of {found.model}, until the probe predicts again.")
        self.changed.emit()

    def follow_classes(self) -> None:
        """Know the project's classes as they are now: what they mean to the model may have changed."""
        if not self.corrected or self._lead is None:
            return
        from napari_brainmvp.annotation.model_classes import known_classes

        known = known_classes(self._lead.entry.card, self._project.classes)
        if known != self._lead.known:
            self._lead = replace(self._lead, known=known)
            if known:
                self.probe.lead(self._lead.entry.folder, known)
            else:
                self.use_probe()

    def _model_ready(self) -> None:
        self.progressed.emit(Progress(""))
        self.said.emit(f"From now on your strokes correct the prediction of {self.model}.")
        self._predict_if_labelled()

    def _model_lost(self, why: str) -> None:
        self.progressed.emit(Progress(""))
        try:
            self.use_probe()
        except StudyError as error:  # the layer was moved
            why = f"{why} {error}"
        self.said.emit(why)

    def use_probe(self) -> None:
        """Show what the probe predicts again, by itself; where it follows the brush, of what was taken over, too.

        Raises
        ------
        StudyError
            The layer was moved.
        """
        painted = bool(self.labels.any())
        said = "Shown is the prediction of the probe."
        if self.corrected:
            self.progressed.emit(Progress(""))
            self.probe.lead(None)
            self._shown.follow("", 0, 0)
            if painted or self.probe.others:
                self.update_now()
            else:
                said = "Ready: paint a stroke of each class, some background among them."
            self._learn_again()
        else:
            self._show_probe()
            self._predict_if_labelled()
        self.changed.emit()
        self.said.emit(said)

    def _show_probe(self) -> None:
        if self._shown.model:
            self._shown.show_probe()
            self.changed.emit()
