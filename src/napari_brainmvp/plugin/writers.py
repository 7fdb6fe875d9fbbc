"""Save layers as NIfTI on the grid they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from napari_brainmvp.errors import StudyError
from napari_brainmvp.io import write_image, write_label_map
from napari_brainmvp.plugin.layers import KEY, LayerOrigin, is_imputed, layer_grid, layer_path, layer_values

__all__ = ["write_image_layer", "write_labels_layer"]

_TRANSFORMS = ("name", "metadata", "scale", "translate", "rotate", "shear", "affine")


def write_labels_layer(path: str, data: Any, attributes: dict[str, Any]) -> list[str]:
    """Write a Labels layer with its integers unchanged (napari's writer contribution)."""
    layer = _layer(data, attributes, "labels")
    values = np.asarray(layer_values(layer)).T
    origin = layer.metadata.get(KEY)
    grid = layer_grid(layer)
    if isinstance(origin, LayerOrigin) and grid is origin.shown:
        values = origin.unpermute(values) if origin.scan is None else _back_onto(values, origin)
        grid = origin.grid
    return [str(write_label_map(Path(path), values, grid, like=layer_path(layer)))]


def write_image_layer(path: str, data: Any, attributes: dict[str, Any]) -> list[str]:
    """Write an Image layer as float32; a scan shown by interpolation is written as it was read."""
    layer = _layer(data, attributes, "image")
    origin = layer.metadata.get(KEY)
    grid, values = layer_grid(layer), np.asarray(layer_values(layer)).T
    if isinstance(origin, LayerOrigin) and grid is origin.shown:
        values = origin.unpermute(values) if origin.scan is None else origin.scan.data
        grid = origin.grid
    mark = " (imputed)" if is_imputed(layer) and "(imputed)" not in layer.name else ""
    return [str(write_image(Path(path), values, grid, like=layer_path(layer), description=layer.name[:60] + mark))]


def _layer(data: Any, attributes: dict[str, Any], kind: str) -> Any:
    """Make a layer of what napari hands to writers, to read its transforms the way napari means them.

    Raises
    ------
    StudyError
        It has no three axes.
    """
    from napari.layers import Layer

    layer = Layer.create(data, {key: attributes[key] for key in _TRANSFORMS if key in attributes}, kind)
    if layer.ndim != 3 or getattr(layer, "rgb", False):
        raise StudyError(f"The layer {layer.name!r} is no volume of three axes: NIfTI is written of such only.")
    return layer


def _back_onto(values: Any, origin: LayerOrigin) -> Any:
    """Bring labels painted on an interpolated display back to the scan's own grid, by the nearest voxel."""
    from scipy import ndimage

    matrix = np.linalg.inv(origin.shown.affine) @ origin.grid.affine
    return ndimage.affine_transform(values, matrix[:3, :3], matrix[:3, 3], origin.grid.shape, order=0)
