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
    """*Use the model* where it was found better, *Begin with the model* where nothing is painted, *Use the probe*.

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
        self._better: tuple[AnnotationView, ModelPrediction] | None = None
        self._newest: tuple[AnnotationView, ModelEntry | None] | None = None
        self.hide()
        self.clicked.connect(self._swap)

    def keep(self, view: AnnotationView, found: ModelPrediction | None) -> None:
        """Offer what a model finds in a study, as it was found better than the probe; None where it was not."""
        self._better = (view, found) if found is not None else None

    def look_again(self) -> None:
        """Look for the newest model anew: there may be a newer one."""
        self._newest = None

    def offer(self, project: AnnotationProject | None, view: AnnotationView | None, idle: bool) -> None:
        """Offer what there is for the study that is painted on."""
        self._project, self._view = project, view
        if self._better is not None and self._better[0] is not view:
            self._better = None
        shown = view is not None and bool(view.model)
        begin = not shown and self._better is None and self._beginning() is not None
        self.setVisible(shown or begin or self._better is not None)
        self.setEnabled(idle)
        self.setText("Use the probe" if shown else "Begin with the model" if begin else "Use the model")
        self.setShortcut("Alt+Shift+Q")  # which another text takes away
        self.setToolTip(f"{_USE_PROBE if shown else _BEGIN if begin else _USE_MODEL} (Alt+Shift+Q)")

    def _beginning(self) -> ModelEntry | None:
        """Find the model that one could begin with: the study is read, unpainted, and new to the model."""
        project, view = self._project, self._view
        if project is None or view is None or view.probe.predictor is None or view.painted:
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
            if entry is not None:
                self.hinted.emit(f"Alt+Shift+Q begins with {entry.card.name}.")
        return self._newest[1]

    def _swap(self) -> None:
        project, view, entry = self._project, self._view, self._beginning()
        if project is None or view is None:
            return
        if view.model:
            view.use_probe()
        elif self._better is not None:
            view.use_model(self._better[1])
        elif entry is not None:

            def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
                from napari_brainmvp.annotation.comparison import predict_classes

                return predict_classes(view.study, entry, project.classes, progress, cancel)

            self._run(run, f"Segmenting with {entry.card.name}", lambda found: self._begin(view, found))

    def _begin(self, view: AnnotationView, found: ModelPrediction) -> None:
        if view is self._view and not view.painted:  # else one has begun meanwhile
            view.use_model(found)
