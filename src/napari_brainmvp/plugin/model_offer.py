"""The button that makes a study's prediction start from a model of the project, or again from the one that ships."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qtpy.QtCore import Signal
from qtpy.QtWidgets import QPushButton

from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import StudyError
from napari_brainmvp.plugin.annotation_view import AnnotationView
from napari_brainmvp.progress import CancelToken, ProgressCallback

if TYPE_CHECKING:
    from napari_brainmvp.annotation.comparison import ModelPrediction
    from napari_brainmvp.models import ModelEntry

__all__ = ["ModelOffer"]

_USE_MODEL = (
    "Start from what the model predicts on this study, in place of the model that ships. Your strokes stay as they "
    "are and correct it, once the study is read with the model; one of overlapping regions is shown until the next one."
)
_BEGIN = (
    "Nothing is painted here yet: begin with what the newest model of this project predicts, and correct it. It was "
    "not trained on this study."
)
_USE_PROBE = "Start from the model that ships again, and from your strokes."


class ModelOffer(QPushButton):
    """*Begin with the model* where nothing is painted, *Use the model* where something is; then *Use the probe*.

    Parameters
    ----------
    run : callable
        Runs a function of progress and cancel in the background: the function, what it does, and what takes its result.
    """

    hinted = Signal(str)
    """A model was found that one can begin with: what to do."""

    def __init__(self, run: Callable[[Callable[..., Any], str, Callable[[Any], None]], None]) -> None:
        super().__init__()
        self._run = run
        self._project: AnnotationProject | None = None
        self._view: AnnotationView | None = None
        self._found: tuple[AnnotationView, ModelPrediction] | None = None
        self._newest: tuple[AnnotationView, ModelEntry | None] | None = None
        self.hide()
        self.clicked.connect(self._swap)

    def keep(self, view: AnnotationView, found: ModelPrediction) -> None:
        """Know what a model finds in a study, so that it need not be run again."""
        self._found = view, found

    def look_again(self) -> None:
        """Look for the newest model anew: there may be a newer one."""
        self._newest = self._found = None

    def offer(self, project: AnnotationProject | None, view: AnnotationView | None, idle: bool) -> None:
        """Offer what there is for the study that is painted on."""
        self._project, self._view = project, view
        shown, there = view is not None and bool(view.model), self._model() is not None
        begin = there and not shown and view is not None and not view.painted
        self.setVisible(shown or there)
        self.setEnabled(idle)
        self.setText("Use the probe" if shown else "Begin with the model" if begin else "Use the model")
        self.setShortcut("Alt+Shift+Q")  # which another text takes away
        self.setToolTip(f"{_USE_PROBE if shown else _BEGIN if begin else _USE_MODEL} (Alt+Shift+Q)")

    def _model(self) -> ModelEntry | None:
        """Find the project's newest model, once the study is read and if it is new to the model."""
        project, view = self._project, self._view
        if project is None or view is None or view.probe.predictor is None:
            return None
        if self._newest is None or self._newest[0] is not view:
            from napari_brainmvp.annotation.comparison import check_unseen, newest_model

            entry = newest_model(project)
            try:
                if entry is not None:
                    check_unseen(entry.card, project, view.name)
            except StudyError:
                entry = None
            self._newest = view, entry
            if entry is not None and not view.painted:
                self.hinted.emit(f"Alt+Shift+Q begins with {entry.card.name}.")
        return self._newest[1]

    def _swap(self) -> None:
        project, view, entry = self._project, self._view, self._model()
        if project is None or view is None:
            return
        try:
            if view.model:
                view.use_probe()
            elif entry is not None:
                found = self._known(view, entry, project)
                if found is not None:
                    view.use_model(found)
                else:
                    self._segment(project, view, entry)
        except StudyError as error:  # the layer was moved, or the model knows none of the classes
            view.refused.emit(str(error))

    def _known(self, view: AnnotationView, entry: ModelEntry, project: AnnotationProject) -> ModelPrediction | None:
        """Return what the model finds where that is known, of this study, model and classes."""
        from napari_brainmvp.annotation.model_classes import known_classes

        if self._found is None or self._found[0] is not view or self._found[1].entry != entry:
            return None
        found = self._found[1]
        return found if found.known == known_classes(entry.card, project.classes) else None

    def _segment(self, project: AnnotationProject, view: AnnotationView, entry: ModelEntry) -> None:
        def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
            from napari_brainmvp.annotation.comparison import predict_classes

            return predict_classes(view.study, entry, project.classes, progress, cancel)

        def then(found: ModelPrediction) -> None:
            self.keep(view, found)
            if view is self._view:
                view.use_model(found)
                view.follow_classes()  # which may have changed meanwhile

        self._run(run, f"Segmenting with {entry.card.name}", then)
