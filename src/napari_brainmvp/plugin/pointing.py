"""A click on the canvas that a tool waits for, in place of the brush."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from qtpy.QtCore import QObject, Signal

__all__ = ["NextClick"]

_REST = "pan_zoom"
_DRAG = 4
"""Pixels from which on the mouse drags the image, and does not click."""


class NextClick(QObject):
    """Wait for one click of the left button; meanwhile the brush rests.

    One may move the image and turn over slices before. To take up a brush, or another layer, ends the waiting.

    Parameters
    ----------
    viewer : napari.Viewer
    layer : napari.layers.Labels
        The layer whose brush rests.
    """

    clicked = Signal(object)
    """Emits the clicked position in the viewer's world."""
    waiting = Signal(bool)

    def __init__(self, viewer: Any, layer: Any) -> None:
        super().__init__()
        self._viewer, self._layer = viewer, layer
        self._mode = ""
        """The layer's mode while the brush rests; else empty."""

    @property
    def armed(self) -> bool:
        """Whether a click is waited for."""
        return bool(self._mode)

    def arm(self) -> None:
        """Wait for a click from now on."""
        if self.armed:
            return
        self._viewer.layers.selection = {self._layer}
        self._mode, self._layer.mode = str(self._layer.mode), _REST
        self._viewer.mouse_drag_callbacks.append(self._pressed)
        self._layer.events.mode.connect(self.disarm)
        self._viewer.layers.selection.events.active.connect(self.disarm)
        self.waiting.emit(True)

    def disarm(self, event: object = None) -> None:
        """Wait no longer, and take up the brush again if nothing else was taken up."""
        if not self.armed:
            return
        mode, self._mode = self._mode, ""
        self._viewer.mouse_drag_callbacks.remove(self._pressed)
        self._layer.events.mode.disconnect(self.disarm)
        self._viewer.layers.selection.events.active.disconnect(self.disarm)
        if str(self._layer.mode) == _REST:
            self._layer.mode = mode
        self.waiting.emit(False)

    def _pressed(self, viewer: Any, event: Any) -> Iterator[None]:
        """Tell a click from a drag, as napari calls it: once a press, a move and a release."""
        if event.button != 1:
            return
        start, position, dragged = np.array(event.pos), event.position, False
        yield
        while event.type == "mouse_move":
            dragged = dragged or bool(np.abs(np.array(event.pos) - start).max() > _DRAG)
            yield
        if not dragged and self.armed:
            self.disarm()
            self.clicked.emit(position)
