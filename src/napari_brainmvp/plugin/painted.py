"""The layer one paints on: between napari's Labels layer and the history of a study's labels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from napari.utils.colormaps import CyclicLabelColormap
from numpy.typing import NDArray
from qtpy.QtCore import QObject, Qt, QTimer, Signal
from qtpy.QtGui import QColor
from qtpy.QtWidgets import QApplication

from napari_brainmvp.annotation.content import LabelClass
from napari_brainmvp.annotation.history import LabelHistory
from napari_brainmvp.errors import BrainMVPError, LockedError, StudyError
from napari_brainmvp.plugin.layers import KEY, Frame, LayerOrigin, labels_layer, layer_grid, scan_layer
from napari_brainmvp.study import Grid, LabelMap, Modality, Scan

__all__ = ["PaintedLayer", "add_label_layer", "add_map_layer", "class_colormap", "native"]

_SAVE_AFTER = 1000
"""Milliseconds: a stroke that is still being drawn is saved this often."""
_OTHER = "#868d96"
_TABLE = 2**16
"""Values that napari's table of colours holds; twice the largest, if one is negative."""
_FEWEST, _MOST = 254, 2**16 - 2
"""Colours that repeat, of which napari makes textures of one byte, or two, a pixel."""


def class_colormap(classes: Sequence[LabelClass], unseen: Collection[int] = ()) -> dict[Any, str] | CyclicLabelColormap:
    """Return the classes' colours as a Labels layer takes them; other values stay visible, in grey.

    napari looks colours up in a table as long as the largest value, and refuses large ones. For classes that have
    such a value its colours repeat instead, every so many values that no two classes meet. A value without a class
    may then have a class's colour; what is painted becomes a class at once.

    Parameters
    ----------
    classes : sequence of LabelClass
    unseen : collection of int, optional
        Values of classes that are seen through.
    """
    colors = {c.value: "transparent" if c.value in unseen else c.color for c in classes}
    largest, negative = max(map(abs, colors), default=0), any(value < 0 for value in colors)
    if largest * (1 + negative) <= _TABLE:
        return {0: "transparent", **colors, None: _OTHER}
    counts = range(max(_FEWEST, len(colors)), _MOST)
    count = next((n for n in counts if len({(value - 1) % n for value in colors}) == len(colors)), _MOST)
    table = np.tile(np.float32(QColor(_OTHER).getRgbF()), (count + 1, 1))
    table[0] = 0
    for value, color in colors.items():  # napari keeps the first row for unlabelled voxels
        table[(value - 1) % count + 1] = QColor(color).getRgbF()
    return CyclicLabelColormap(colors=table)


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
    return viewer.add_labels(values.transpose(origin.order).T, **options, colormap=class_colormap(classes))


def add_map_layer(viewer: Any, values: NDArray[Any], grid: Grid, frame: Frame, name: str) -> Any:
    """Add a hidden image layer that shows an array (i, j, k) of values in 0..1 itself, not a copy of it."""
    scan = Scan(Modality("result", name, ""), values, grid)
    _, options, _ = scan_layer(scan, frame, visible=False)
    origin = options["metadata"][KEY]
    options |= {"colormap": "magma", "contrast_limits": (0, 1), "opacity": 0.6, "blending": "additive"}
    return viewer.add_image(values.transpose(origin.order).T, **options)


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
            "the study's. Nothing was saved or resampled, and nothing is until it is back in its place: undo that, or "
            "open the study again."
        )
    return origin.unpermute(np.asarray(layer.data).T)


class PaintedLayer(QObject):
    """Watch a Labels layer and save every stroke on it.

    A stroke is saved when the brush is lifted, and every second while it is drawn. While strokes cannot be saved,
    because the layer was moved or the project is open elsewhere, one cannot paint.

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
        self._parts: set[int] = set()  # numbers of strokes that go on with the one before
        self._continues = False
        self.written: frozenset[int] = frozenset()  # the label values that the last stroke, or step, has put there
        self._timer = QTimer(self)
        self._timer.setInterval(_SAVE_AFTER)
        self._timer.timeout.connect(self.save)
        painted = (layer.events.set_data, layer.events.labels_update, layer.events.data)
        moved = (getattr(layer.events, name) for name in ("affine", "scale", "translate", "rotate", "shear"))
        self._events = (*painted, *moved)
        for event in self._events:
            event.connect(self._touched)
        layer.events.paint.connect(self.save)

    def _touched(self, event: object = None) -> None:
        if not self._timer.isActive():
            self._timer.start()

    def save(self, event: object = None) -> None:
        """Save what changed."""
        self._timer.stop()
        drawing = event is None and bool(QApplication.mouseButtons() & Qt.MouseButton.LeftButton)
        try:
            changed = self.history.record(native(self.layer))
            self.written = self.history.written
        except BrainMVPError as error:
            if str(error) != self._said:  # say it once, not every second
                self._said = str(error)
                self.layer.editable = not isinstance(error, StudyError | LockedError)
                self.failed.emit(self._said)
            return
        if self._said:
            self._said = ""
            self.layer.editable = True
        if changed:
            self._parts = {part for part in self._parts if part < self.history.stroke}
            if self._continues:
                self._parts.add(self.history.stroke)
        self._continues = drawing and (self._continues or bool(changed))
        if changed:
            self.saved.emit(changed)

    def undo(self) -> bool:
        """Take back the last stroke, all that was saved of it while it was drawn; tell whether there was one."""
        self.written = frozenset()
        part = self.history.stroke
        undone = self._step(self.history.undo)
        while undone and part in self._parts:
            part -= 1
            self._step(self.history.undo)
        return undone

    def redo(self) -> bool:
        """Do a stroke again that was taken back; tell whether there was one."""
        self.written = frozenset()
        redone = self._step(self.history.redo)
        while redone and self.history.stroke + 1 in self._parts and self._step(self.history.redo):
            pass
        return redone

    def _step(self, step: Callable[[], bool]) -> bool:
        self._continues = False  # what is drawn on is a stroke of its own
        done = step()
        self.written |= self.history.written
        return done

    def show_history(self) -> None:
        """Show the labels as the history has them now, after undo or redo."""
        native(self.layer)[...] = self.history.labels
        self.layer.refresh()

    def close(self) -> None:
        """Save and stop watching; what cannot be saved is said once more."""
        self._said = ""
        self.save()
        self._timer.stop()
        for event in self._events:
            event.disconnect(self._touched)
        self.layer.events.paint.disconnect(self.save)
