"""The slice that is looked at, in the study's own order of axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_brainmvp.errors import BrainMVPError, StudyError
from napari_brainmvp.plugin.layers import KEY, LayerOrigin

__all__ = ["Plane", "go_to", "look_at", "needed_plane", "pixel_at", "visible_plane"]


@dataclass(frozen=True)
class Plane:
    """A slice of a study's own grid: across ``axis`` of (i, j, k), at ``index``."""

    axis: int
    index: int

    def of(self, volume: NDArray[Any]) -> NDArray[Any]:
        """Return the slice of an array: a view."""
        view: NDArray[Any] = np.moveaxis(volume, self.axis, 0)[self.index]
        return view


def visible_plane(viewer: Any, layer: Any) -> Plane | None:
    """Return the slice of a layer's study that one looks at; None in 3D, or where one looks along another axis."""
    if viewer.dims.ndisplay != 2:
        return None
    before = viewer.dims.ndim - 3  # axes that other layers have, such as time: the study's are the last ones
    across = [axis - before for axis in viewer.dims.not_displayed if axis >= before]
    if len(across) != 1:  # other layers' axes are displayed
        return None
    axis = across[0]
    index = round(float(layer.world_to_data(viewer.dims.point)[axis]))
    origin: LayerOrigin = layer.metadata[KEY]
    return Plane(origin.order[2 - axis], int(np.clip(index, 0, layer.data.shape[axis] - 1)))


def needed_plane(viewer: Any, layer: Any) -> Plane:
    """Return the slice one looks at.

    Raises
    ------
    BrainMVPError
        One looks at the volume.
    """
    plane = visible_plane(viewer, layer)
    if plane is None:
        raise BrainMVPError("This works on a slice of the study: leave the 3D view, or look at its own axes, first.")
    return plane


def go_to(viewer: Any, layer: Any, plane: Plane) -> None:
    """Look at another slice across the same axis."""
    origin: LayerOrigin = layer.metadata[KEY]
    point = np.array(layer.world_to_data(viewer.dims.point), float)
    point[2 - origin.order.index(plane.axis)] = plane.index
    look_at(viewer, layer.data_to_world(point))


def look_at(viewer: Any, point: Sequence[float]) -> None:
    """Move the slices to a point (z, y, x) of the world, which has more axes where a layer has."""
    last = viewer.dims.ndim
    viewer.dims.set_point(range(last - 3, last), point)


def pixel_at(layer: Any, plane: Plane, position: Sequence[float]) -> tuple[int, int]:
    """Return the pixel of a slice at a position of the viewer's world.

    Raises
    ------
    StudyError
        It lies beside the study.
    """
    index = [round(float(v)) for v in layer.world_to_data(position)]
    origin: LayerOrigin = layer.metadata[KEY]
    at, shape = np.zeros(3, int), np.zeros(3, int)
    at[list(origin.order)], shape[list(origin.order)] = index[::-1], layer.data.shape[::-1]
    if (np.delete(at, plane.axis) < 0).any() or (np.delete(at, plane.axis) >= np.delete(shape, plane.axis)).any():
        raise StudyError("Point at a predicted part of this slice first.")
    row, column = np.delete(at, plane.axis)
    return int(row), int(column)
