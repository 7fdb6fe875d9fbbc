"""One study being annotated: its three layers, and what the panel's buttons do to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qtpy.QtCore import Signal

from napari_brainmvp.annotation.content import StudyReference
from napari_brainmvp.annotation.history import label_dtype
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.plugin.layers import Frame
from napari_brainmvp.plugin.live_probe import LiveProbe
from napari_brainmvp.plugin.model_choice import ModelChoice
from napari_brainmvp.plugin.painted import PaintedLayer, add_label_layer, class_colormap, native
from napari_brainmvp.plugin.pointing import NextClick
from napari_brainmvp.plugin.shown_prediction import ShownPrediction
from napari_brainmvp.plugin.visible_slice import visible_plane
from napari_brainmvp.progress import Progress
from napari_brainmvp.study import Study

__all__ = ["AnnotationView"]

_WRITES = ("point", "take_over_slice", "grow", "interpolate", "undo", "redo")
_PREDICTS = ("next_slice", "point", "take_over_slice", "grow")


class AnnotationView(ModelChoice):
    """The layers *Annotation*, *Prediction* and *Uncertainty* of a study.

    Parameters
    ----------
    viewer : napari.Viewer
    project : AnnotationProject
    reference : StudyReference
        The study in the project.
    study : Study
        Its scans.
    frame : ndarray of shape (4, 4)
        In which the viewer shows it.

    Raises
    ------
    FileError
        The labels in the project are damaged.
    StudyError
        The study is shown interpolated.
    """

    refused = Signal(str)
    unknown = Signal(int)
    """A label value was painted, or brought back by undo or redo, that no class has."""
    picked = Signal(int)
    """Emits the label value that is painted from now on, whoever chose it."""
    closed = Signal()

    def __init__(
        self, viewer: Any, project: AnnotationProject, reference: StudyReference, study: Study, frame: Frame
    ) -> None:
        super().__init__()
        self._viewer, self._project, self.name, self.study = viewer, project, reference.name, study
        self._from_all = False
        self._live = True
        history = project.labels(reference.name)
        grid, classes = study.grid, project.classes
        known = (*classes, *project.removed_classes)  # an undone stroke may bring one back
        values = (*(c.value for c in known), int(history.labels.min()), int(history.labels.max()))
        dtype = label_dtype(values)
        labels = history.labels.astype(dtype)
        self._shown = ShownPrediction(viewer, project, grid, frame, dtype)
        self.layer = add_label_layer(viewer, labels, grid, frame, f"Annotation {reference.name}", classes)
        self.layer.opacity = 0.75
        self.layer.brush_size = 3
        self.layer.n_edit_dimensions = 2
        self.layer.editable = not project.read_only
        self._painted = PaintedLayer(self.layer, history) if not project.read_only else None
        self._taking = False
        self.pointer = NextClick(viewer, self.layer)
        self.probe = LiveProbe(study, project.background.value, self._shown.labels, self._shown.uncertainty)
        self._connect()

    def _connect(self) -> None:
        probe = self.probe
        self.pointer.waiting.connect(self._waits)
        probe.prepared.connect(self._features_ready)
        probe.progressed.connect(self.progressed)
        probe.updated.connect(self._show)
        probe.learned.connect(self._learned)
        probe.led.connect(self._model_ready)
        probe.strayed.connect(self._model_lost)
        probe.failed.connect(self._wait_for_more)
        probe.crashed.connect(self._crashed)
        if self._painted is not None:
            self._painted.saved.connect(self._stroke)
            self._painted.failed.connect(self.refused)
            for key, step in (("Control-Z", self.undo), ("Control-Shift-Z", self.redo)):  # napari's own knows no tools
                self.layer.bind_key(key, lambda _, step=step: self._by_key(step), overwrite=True)
        self._viewer.layers.events.removed.connect(self._removed)
        self.layer.events.selected_label.connect(self._picked)

    @property
    def painted(self) -> bool:
        """Whether there is a stroke that is not undone."""
        return self._project.labels(self.name).stroke > 0

    def start(self) -> None:
        """Select the brush and compute the features."""
        self._viewer.layers.selection = {self.layer}
        if self._painted is not None:
            self.layer.mode = "paint"
        self.said.emit("Reading the study…")
        self.probe.prepare()
        self.changed.emit()

    def can(self, tool: str) -> bool:
        """Tell whether a tool can be used now."""
        if tool in _WRITES and self._painted is None:
            return False
        return tool not in _PREDICTS or self.probe.ready or bool(self.model)

    def choose(self, value: int) -> None:
        """Paint this class."""
        self.layer.selected_label = value
        if self._painted is not None and str(self.layer.mode) not in ("paint", "fill", "polygon"):
            self.layer.mode = "paint"

    def set_live(self, on: bool) -> None:
        """Follow the brush, or wait for *Update now*."""
        self._live = on
        if on:
            self._predict_if_labelled()

    def show_uncertainty(self, on: bool) -> None:
        """Show or hide the uncertainty."""
        self._shown.show_uncertainty(on)

    def learn_from_all(self, on: bool) -> None:
        """Use the strokes of all studies of the project, or of this one only."""
        self._from_all = on
        if on and self.corrected:
            self.said.emit(f"Your strokes correct {self.corrected}: other studies' are used once you use the probe.")
            return
        self.probe.learn_from(self._project if on else None, self.name)

    def _learn_again(self) -> None:
        if self._from_all and not self.probe.others:
            self.learn_from_all(True)

    def _learned(self, count: int, unread: tuple[str, ...]) -> None:
        self.progressed.emit(Progress(""))
        if count or unread:
            left_out = f" Scans that cannot be read: {', '.join(unread)}." if unread else ""
            self.said.emit(f"Learning from {count} other studies, too.{left_out}")
        self._predict_if_labelled()

    def update_now(self) -> None:
        """Predict from the labels as they are, and show that, whatever was shown."""
        self._show_probe()
        self.probe.update(self.labels, visible_plane(self._viewer, self.layer))

    def _predict_if_labelled(self) -> None:
        if self._live and self.probe.predictor is not None and (self.labels.any() or self.probe.others):
            self.update_now()

    def _stroke(self, changed: int) -> None:
        self.changed.emit()
        self._know_written()
        if self._live and not self._taking:
            self.update_now()

    def _know_written(self) -> None:
        """Say which values were written, painted or undone, that no class has."""
        assert self._painted is not None
        for value in sorted(self._painted.written - {c.value for c in self._project.classes}):
            self.unknown.emit(value)

    def _features_ready(self) -> None:
        self.progressed.emit(Progress(""))
        others = not self._from_all and not self.labels.any() and set(self._project.painted_on()) - {self.name}
        hint = " Alt+A begins with what was painted on the other studies." if others else ""
        self.said.emit(f"Ready: paint a stroke of each class, some background among them.{hint}")
        self.changed.emit()
        self._predict_if_labelled()

    def _wait_for_more(self, message: str) -> None:
        self.progressed.emit(Progress(""))
        self.said.emit(message)

    def _crashed(self, error: Exception) -> None:
        self.progressed.emit(Progress(""))
        self.said.emit("Something went wrong; see the notification.")
        raise error

    def _show(self, whole: bool) -> None:
        if not self._shown.model:
            self._shown.refresh()
            if whole:
                self.said.emit("The prediction follows your strokes. Correct it where it is wrong.")
        if whole:
            self.changed.emit()

    def undo(self) -> None:
        """Take back the last stroke."""
        self._step(back=True)

    def redo(self) -> None:
        """Do again what was taken back."""
        self._step(back=False)

    def _by_key(self, step: Callable[[], None]) -> None:
        try:
            step()
        except BrainMVPError as error:
            self.refused.emit(str(error))

    def save(self) -> None:
        """Save what is not yet.

        Raises
        ------
        StudyError
            The layer was moved: then nothing of it can be saved, nor shown.
        """
        native(self.layer)
        if self._painted is not None:
            self._painted.save()

    def _step(self, back: bool) -> None:
        assert self._painted is not None
        self.save()
        if not (self._painted.undo() if back else self._painted.redo()):
            self.said.emit("There is nothing to undo." if back else "There is nothing to redo.")
            return
        self._painted.show_history()
        self._know_written()
        self.changed.emit()
        if self._live and not self._shown.model:
            self.update_now()

    def recolor(self) -> None:
        """Show the classes' colours, and know what they mean, as they are now."""
        self.layer.colormap = class_colormap(self._project.classes)
        self._shown.recolor()
        self.follow_classes()

    @property
    def layers(self) -> tuple[Any, ...]:
        """The view's own layers that are still in the viewer."""
        return tuple(layer for layer in (*self._shown.layers, self.layer) if layer in self._viewer.layers)

    def remove(self) -> None:
        """Close, and take the layers out of the viewer: another study, or the same one anew, takes their place."""
        self.close(keep=False)
        for layer in self.layers:
            self._viewer.layers.remove(layer)

    def close(self, keep: bool = True) -> None:
        """Save and let go of the layers; those that are kept can be looked at, not painted on."""
        self.pointer.disarm()
        self._viewer.layers.events.removed.disconnect(self._removed)
        self.layer.events.selected_label.disconnect(self._picked)
        self.probe.abandon()
        if self._painted is not None:
            self._painted.close()
        if keep:
            self.layer.editable = False

    def _picked(self, event: Any = None) -> None:
        self.picked.emit(int(self.layer.selected_label))

    def _removed(self, event: Any) -> None:
        if event.value == self.layer:  # which is a proxy, where napari gave the viewer to the plugin
            self.close(keep=False)
            self.closed.emit()

    def _wrote(self, count: int) -> None:
        """Save what a tool wrote; a model whose prediction is taken over piece by piece stays meanwhile."""
        assert self._painted is not None
        self.layer.refresh()
        self._taking = bool(self._shown.model)
        self._painted.save()
        self._taking = False
        note = f" Shown is the prediction of {self.model}." if self.model else ""
        self.said.emit(f"{count} voxels labelled.{note}")
