"""Between napari's layers and the engine's scans: one place for the geometry of the viewer.

The viewer's world is LPS millimetres in (z, y, x) order, so an axial slice opens with anterior up and the patient's
left on the right of the screen. A layer's data is the scan's array with its axes reversed: a view, not a copy.

napari can only slice along its own axes. A study whose reference scan is oblique is therefore shown in a *frame* turned
rigidly until that scan stands upright; scans that are still askew in that frame are interpolated for display only. The
engine always gets the scan as it was read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_brainmvp.io import guess_modality, stem
from napari_brainmvp.study import Grid, LabelMap, Modality, Scan, Study

__all__ = [
    "KEY",
    "Frame",
    "LayerOrigin",
    "LayerTuple",
    "is_imputed",
    "labels_layer",
    "layer_grid",
    "layer_modality",
    "layer_path",
    "layer_scan",
    "layer_transform",
    "layer_values",
    "scan_layer",
    "shared_frame",
    "study_layers",
    "upright_frame",
]

Frame = NDArray[np.float64]
LayerTuple = tuple[Any, dict[str, Any], str]

KEY = "brainmvp"
"""Under this key of ``layer.metadata`` lies a :class:`LayerOrigin`."""

_REVERSE = np.eye(4)[[2, 1, 0, 3]]
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_ASKEW_VOXELS = 0.5


@dataclass(frozen=True, eq=False)
class LayerOrigin:
    """Where a layer came from.

    Parameters
    ----------
    grid : Grid
        The scan's own grid.
    shown : Grid
        The grid of the layer's data: the same with its axes in the order of the viewer's, except for scans that were
        interpolated for display.
    order : tuple of int
        Axis of the scan for each axis of ``shown``.
    frame : ndarray of shape (4, 4)
        Rigid turn from RAS to the upright frame the viewer shows.
    scan : Scan or LabelMap or None
        The original, where the layer shows an interpolation of it.
    modality : Modality or None
    path : Path or None
    imputed : bool
        Made by a network.
    """

    grid: Grid
    shown: Grid
    order: tuple[int, int, int]
    frame: Frame
    scan: Scan | LabelMap | None = None
    modality: Modality | None = None
    path: Path | None = None
    imputed: bool = False

    def unpermute(self, values: NDArray[Any]) -> NDArray[Any]:
        """Take an array on ``shown`` to the scan's own order of axes."""
        return values.transpose(np.argsort(self.order))


def layer_transform(grid: Grid, frame: Frame | None = None) -> NDArray[np.float64]:
    """Return the affine, shape (4, 4), from a layer's (k, j, i) to the viewer's (z, y, x) in LPS mm."""
    turned = grid.affine if frame is None else frame @ grid.affine
    affine: NDArray[np.float64] = _REVERSE @ _LPS @ turned @ _REVERSE
    return affine


def layer_grid(layer: Any) -> Grid:
    """Return the grid a layer's data lies on, RAS mm, from all its transforms together.

    Parameters
    ----------
    layer : napari.layers.Layer
        With three dimensions.
    """
    corners = np.vstack([np.zeros(3), np.eye(3)])
    data = np.array([layer.world_to_data(point) for point in corners])
    world_to_data = np.eye(4)
    world_to_data[:3, :3] = (data[1:] - data[0]).T
    world_to_data[:3, 3] = data[0]
    affine = _LPS @ _REVERSE @ np.linalg.inv(world_to_data) @ _REVERSE
    origin = layer.metadata.get(KEY)
    if isinstance(origin, LayerOrigin):
        affine = np.linalg.inv(origin.frame) @ affine
    grid = Grid(tuple(reversed(layer_values(layer).shape)), affine)
    if isinstance(origin, LayerOrigin) and origin.shown.same_as(grid, 1e-3):
        return origin.shown  # untouched: free of rounding
    return grid


def layer_scan(layer: Any, kind: Modality) -> Scan:
    """Return a layer as a scan for the engine: the original while nobody moved the layer, else what is shown.

    Converting to float32 takes time for large integer scans: call it in the worker.
    """
    grid = layer_grid(layer)
    origin = layer.metadata.get(KEY)
    if isinstance(origin, LayerOrigin) and grid is origin.shown and isinstance(origin.scan, Scan):
        return replace(origin.scan, modality=kind)
    values = np.nan_to_num(np.asarray(layer_values(layer), np.float32).T, posinf=0, neginf=0)
    if isinstance(origin, LayerOrigin) and grid is origin.shown:
        return Scan(kind, origin.unpermute(values), origin.grid, origin.path, origin.imputed)
    return Scan(kind, values, grid, None, is_imputed(layer))  # where it lies now, no file says


def layer_values(layer: Any) -> Any:
    """Return a layer's data, the finest of several resolutions."""
    return layer.data[0] if layer.multiscale else layer.data


def is_imputed(layer: Any) -> bool:
    """Tell whether a network made what a layer shows."""
    origin = layer.metadata.get(KEY)
    return isinstance(origin, LayerOrigin) and origin.imputed


def layer_path(layer: Any) -> Path | None:
    """Return the file a layer was read from, if it is known."""
    origin = layer.metadata.get(KEY)
    if isinstance(origin, LayerOrigin) and origin.path is not None:
        return origin.path
    return Path(layer.source.path) if layer.source.path else None


def layer_modality(layer: Any) -> Modality | None:
    """Say a layer's modality from how it was read, its name, or its file's name; None where nothing tells."""
    origin = layer.metadata.get(KEY)
    if isinstance(origin, LayerOrigin) and origin.modality is not None:
        return origin.modality
    if not layer.source.path:
        return guess_modality(layer.name)
    path = Path(layer.source.path)  # beside it, as what the layer's name shares with the folder says nothing
    return (guess_modality(path.parent / layer.name) if layer.name else None) or guess_modality(path)


def upright_frame(grid: Grid) -> NDArray[np.float64]:
    """Return the rigid turn (4, 4) about the grid's centre that lines an oblique grid up with the RAS axes."""
    if not _askew(grid):
        return np.eye(4)
    directions = grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0)
    nearest = np.zeros((3, 3))
    axes = np.abs(directions).argmax(axis=0)
    nearest[axes, range(3)] = np.sign(directions[axes, range(3)])
    u, _, vt = np.linalg.svd(nearest @ directions.T)  # the closest rotation, also for slightly sheared grids
    frame = np.eye(4)
    frame[:3, :3] = u @ vt
    centre = grid.to_world((np.array(grid.shape) - 1) / 2)
    frame[:3, 3] = centre - frame[:3, :3] @ centre
    return frame


def _askew(grid: Grid) -> bool:
    """Tell whether an axis drifts by half a voxel or more over the length of the volume."""
    linear = np.abs(grid.affine[:3, :3])
    stray = linear.copy()
    stray[linear.argmax(axis=0), range(3)] = 0
    return bool((stray @ np.array(grid.shape)).max() > _ASKEW_VOXELS * min(grid.spacing))


def scan_layer(scan: Scan, frame: Frame, *, visible: bool = True) -> LayerTuple:
    """Turn a scan into napari's layer tuple for an image."""
    origin, data = _origin(scan, frame, "linear")
    origin = replace(origin, modality=scan.modality, path=scan.path, imputed=scan.imputed)
    options = {"colormap": "gray", "contrast_limits": _contrast(scan.data), "visible": visible}
    return data, _common(scan.title, origin) | options, "image"


def labels_layer(labels: LabelMap, frame: Frame, name: str = "") -> LayerTuple:
    """Turn a label map into napari's layer tuple for labels."""
    origin, data = _origin(labels, frame, "nearest")
    origin = replace(origin, path=labels.path)
    name = name or (stem(labels.path) if labels.path else "Labels")
    return data, _common(name, origin) | {"opacity": 0.5}, "labels"


def study_layers(study: Study, frame: Frame | None = None) -> list[LayerTuple]:
    """Turn a study into napari's layer tuples, scans first and labels on top; one scan is visible.

    Parameters
    ----------
    study : Study
    frame : ndarray of shape (4, 4), optional
        The frame the viewer already shows; default one in which the reference scan stands upright.
    """
    frame = upright_frame(study.grid) if frame is None else frame
    first = "flair" if "flair" in study.scans else study.reference
    layers = [scan_layer(scan, frame, visible=key == first) for key, scan in study.scans.items()]
    if study.labels is not None:
        layers.append(labels_layer(study.labels, frame))
    return layers


def _common(name: str, origin: LayerOrigin) -> dict[str, Any]:
    return {
        "name": name,
        "affine": layer_transform(origin.shown, origin.frame),
        "units": "mm",
        "axis_labels": ("z", "y", "x"),
        "metadata": {KEY: origin},
    }


def _origin(scan: Scan | LabelMap, frame: Frame, interpolation: str) -> tuple[LayerOrigin, NDArray[Any]]:
    """Return the origin and the layer data; interpolated only where napari could not slice the scan as it is."""
    in_frame = Grid(scan.grid.shape, frame @ scan.grid.affine)
    if not _askew(in_frame):
        order = _order(in_frame)
        shown = _permuted(scan.grid, order)
        return LayerOrigin(scan.grid, shown, order, frame), scan.data.transpose(order).T
    upright = Grid(in_frame.shape, upright_frame(in_frame) @ in_frame.affine)
    order = _order(upright)
    shown = _permuted(Grid(upright.shape, np.linalg.inv(frame) @ upright.affine), order)
    return LayerOrigin(scan.grid, shown, order, frame, scan), _interpolate(scan, shown, interpolation).T


def _order(grid: Grid) -> tuple[int, int, int]:
    """Return the grid's axis that runs along each world axis: napari slices a layer along its own axes only."""
    a, b, c = (int(k) for k in np.argsort(np.abs(grid.affine[:3, :3]).argmax(axis=0)))
    return a, b, c


def _permuted(grid: Grid, order: tuple[int, int, int]) -> Grid:
    if order == (0, 1, 2):
        return grid
    return Grid(tuple(grid.shape[k] for k in order), grid.affine[:, [*order, 3]])


def _interpolate(scan: Scan | LabelMap, target: Grid, interpolation: str) -> NDArray[Any]:
    from scipy import ndimage

    matrix = np.linalg.inv(scan.grid.affine) @ target.affine
    moved: NDArray[Any] = ndimage.affine_transform(
        scan.data, matrix[:3, :3], matrix[:3, 3], target.shape, order=1 if interpolation == "linear" else 0
    )
    return moved


def _contrast(data: NDArray[Any]) -> tuple[float, float]:
    """Window from the background to the 99.5th percentile of what is brighter: one rule for every modality."""
    sample = data[::2, ::2, ::2]
    low = float(sample.min())
    inside = sample[sample > low]
    high = float(np.percentile(inside, 99.5)) if inside.size else low + 1
    return low, max(high, low + 1e-6)


def shared_frame(layers: Iterable[Any]) -> Frame | None:
    """Return the frame of layers that are already shown, so that what is opened next lies on top of them."""
    for layer in layers:
        origin = layer.metadata.get(KEY)
        if isinstance(origin, LayerOrigin):
            return origin.frame
    return None
