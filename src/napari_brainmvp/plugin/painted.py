"""The layer one paints on: between napari's Labels layer and the history of a study's labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from napari.layers import Labels
from numpy.typing import NDArray
from qtpy.QtCore import QObject, QTimer, Signal

from napari_brainmvp.annotation.content import LabelClass
from napari_brainmvp.annotation.history import LabelHistory
from napari_brainmvp.errors import BrainMVPError, StudyError
from napari_brainmvp.plugin.layers import KEY, Frame, LayerOrigin, labels_layer, layer_grid, scan_layer
from napari_brainmvp.study import Grid, LabelMap, Modality, Scan, Study

__all__ = ["PaintedLayer", "add_label_layer", "add_map_layer", "class_colors", "native", "selected_labels"]

_SAVE_AFTER = 1000
"""Milliseconds: a stroke that is still being drawn is saved this often."""


def class_colors(classes: Sequence[LabelClass]) -> dict[int | None, str]:
    """Return napari's colours of the classes; other values stay visible, in grey."""
    return {0: "transparent", **{c.value: c.color for c in classes}, None: "#868d96"}


def add_label_layer(
    viewer: Any, values: NDArray[Any], grid: Grid, frame: Frame, name: str, classes: Sequence[LabelClass]
) -> Any:
    """Add a Labels layer that shows an array (i, j, k) itself, not a copy of it."""
    _, options, _ = labels_layer(LabelMap(values, grid), frame, name)
    origin = options["metadata"][KEY]
    if origin.scan is not None:
        raise StudyError(
            "This study is shown turned and interpolated, so one cannot paint on its own voxels: choose the scan that "
            "was opened first as the grid of the result."
        )
    return viewer.add_labels(values.transpose(origin.order).T, **options, colormap=class_colors(classes))


def add_map_layer(viewer: Any, values: NDArray[Any], grid: Grid, frame: Frame, name: str) -> Any:
    """Add a hidden image layer that shows an array (i, j, k) of values in 0..1 itself, not a copy of it."""
    scan = Scan(Modality("result", name, ""), values, grid)
    _, options, _ = scan_layer(scan, frame, visible=False)
    origin = options["metadata"][KEY]
    options |= {"colormap": "magma", "contrast_limits": (0, 1), "opacity": 0.6, "blending": "additive"}
    return viewer.add_image(values.transpose(origin.order).T, **options)


def selected_labels(viewer: Any, study: Study) -> Study:
    """Give a study the selected Labels layer as its labels, where it lies on the study's grid.

    Raises
    ------
    StudyError
        A Labels layer is selected that lies elsewhere.
    """
    layer = viewer.layers.selection.active
    if not isinstance(layer, Labels):
        return study
    origin = layer.metadata.get(KEY)
    values = np.asarray(layer.data).T
    grid = layer_grid(layer)
    if isinstance(origin, LayerOrigin) and grid is origin.shown and origin.scan is None:
        values, grid = origin.unpermute(values), origin.grid
    if not grid.same_as(study.grid):
        raise StudyError(
            f"The selected layer {layer.name!r} has another shape or position than the study, and labels are never "
            "resampled unasked: select another layer, or none, to begin with empty labels."
        )
    return replace(study, labels=LabelMap(values.copy(), study.grid))


def native(layer: Any) -> NDArray[Any]:
    """Return a layer's data in its study's own order of axes: a view.

    Raises
    ------
    StudyError
        The layer was moved, turned or scaled, or shows another shape than it did.
    """
    origin = layer.metadata.get(KEY)
    if not isinstance(origin, LayerOrigin) or layer_grid(layer) is not origin.shown:
        raise StudyError(
            f"The layer {layer.name!r} was moved, scaled, turned or given another shape, so its voxels are no longer "
            "the study's. Nothing was saved or resampled: undo that, or open the study again."
        )
    return origin.unpermute(np.asarray(layer.data).T)


class PaintedLayer(QObject):
    """Watch a Labels layer and save every stroke on it.

    A stroke is saved when the brush is lifted, and every second while it is drawn.

    Parameters
    ----------
    layer : napari.layers.Labels
        Made by :func:`add_label_layer`.
    history : LabelHistory
    """

    saved = Signal(int)
    """Emits the number of voxels that a stroke changed."""
    failed = Signal(str)

    def __init__(self, layer: Any, history: LabelHistory) -> None:
        super().__init__()
        self.layer, self.history = layer, history
        self._said = ""
        self._timer = QTimer(self)
        self._timer.setInterval(_SAVE_AFTER)
        self._timer.timeout.connect(self.save)
        self._events = (layer.events.set_data, layer.events.labels_update, layer.events.data)
        for event in self._events:
            event.connect(self._touched)
        layer.events.paint.connect(self.save)

    def _touched(self, event: object = None) -> None:
        if not self._timer.isActive():
            self._timer.start()

    def save(self, event: object = None) -> None:
        """Save what changed."""
        self._timer.stop()
        try:
            changed = self.history.record(native(self.layer))
        except BrainMVPError as error:
            if str(error) != self._said:  # say it once, not every second
                self._said = str(error)
                self.failed.emit(self._said)
            return
        self._said = ""
        if changed:
            self.saved.emit(changed)

    def show_history(self) -> None:
        """Show the labels as the history has them now, after undo or redo."""
        native(self.layer)[...] = self.history.labels
        self.layer.refresh()

    def close(self) -> None:
        """Save and stop watching."""
        self.save()
        self._timer.stop()
        for event in self._events:
            event.disconnect(self._touched)
        self.layer.events.paint.disconnect(self.save)
