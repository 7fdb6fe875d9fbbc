"""What the buttons of the *Annotate* panel do to the slice one looks at."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from qtpy.QtCore import QObject, Signal

from napari_brainmvp.annotation.brushes import grow, interpolate_slices, take_over
from napari_brainmvp.plugin.painted import native
from napari_brainmvp.plugin.pointing import NextClick
from napari_brainmvp.plugin.shown_prediction import ShownPrediction
from napari_brainmvp.plugin.visible_slice import Plane, go_to, needed_plane, pixel_at

__all__ = ["SliceTools"]

_CLICK = "Click on the predicted part to take over. Escape, or the button again: nothing is taken over."


class SliceTools(QObject):
    """Tools that write labels into a painted layer, by what is predicted; the base of a study's view.

    Whoever derives from it gives it the viewer, the painted layer, the prediction that is shown and the click that
    is waited for.
    """

    said = Signal(str)

    _viewer: Any
    _shown: ShownPrediction
    layer: Any
    pointer: NextClick

    @abstractmethod
    def _wrote(self, count: int) -> None:
        """Save what a tool wrote: so many voxels."""

    @property
    def labels(self) -> NDArray[Any]:
        """What is painted, on the study's own grid (i, j, k): a view of the layer's data."""
        return native(self.layer)

    def next_slice(self) -> None:
        """Go to the least certain slice along the axis one looks along."""
        plane = self._plane()
        from napari_brainmvp.annotation.prediction import uncertain_slice

        index = uncertain_slice(self._shown.uncertainty, self.labels, plane.axis)
        go_to(self._viewer, self.layer, Plane(plane.axis, index))
        self.said.emit(f"Slice {index}: here the prediction is least certain.")

    def point(self) -> None:
        """Wait for a click on the part to take over; if that is waited for, no longer."""
        if self.pointer.armed:
            self.pointer.disarm()
        else:
            self._plane()  # raises where a click could mean no part of a slice
            self.pointer.arm()

    def stop_pointing(self) -> None:
        """Wait for no click any more."""
        self.pointer.disarm()

    def _waits(self, on: bool) -> None:
        self.said.emit(_CLICK if on else "Nothing was taken over.")

    def take_over_part(self, position: Sequence[float] | None = None) -> None:
        """Label the predicted part at a position of the viewer's world, or under the cursor, as it is predicted."""
        self.pointer.disarm()
        plane = self._plane()
        pixel = pixel_at(self.layer, plane, self._viewer.cursor.position if position is None else position)
        self._wrote(take_over(plane.of(self.labels), plane.of(self._shown.labels), pixel))

    def take_over_slice(self) -> None:
        """Label all of this slice as it is predicted."""
        plane = self._plane()
        self._wrote(take_over(plane.of(self.labels), plane.of(self._shown.labels)))

    def grow(self) -> None:
        """Let the chosen class grow on this slice."""
        plane, shown = self._plane(), self._shown
        value = int(self.layer.selected_label)
        self._wrote(grow(plane.of(self.labels), plane.of(shown.labels), plane.of(shown.uncertainty), value))

    def interpolate(self) -> None:
        """Fill the chosen class between slices."""
        self._wrote(interpolate_slices(self.labels, int(self.layer.selected_label), self._plane().axis))

    def _plane(self) -> Plane:
        return needed_plane(self._viewer, self.layer)
