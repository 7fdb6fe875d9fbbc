"""A reconstruction as a tidy group of layers, and side by side in napari's grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from napari.utils.colormaps import Colormap

from napari_brainmvp.plugin.layers import Frame, LayerTuple, scan_layer
from napari_brainmvp.study import Grid, Modality, Scan

if TYPE_CHECKING:
    from napari_brainmvp.inference import ReconstructionResult

__all__ = ["SideBySide", "reconstruction_layers", "template_layer"]

DIVERGING = Colormap([[0.25, 0.65, 1.0], [0.0, 0.0, 0.0], [1.0, 0.5, 0.15]], name="blue-black-orange")
"""Too dark is blue, too bright is orange, and nothing is black: it disappears when layers are added up."""
_SURE = 6.0
"""Disagreement shown at full brightness, in expected errors."""


def reconstruction_layers(result: ReconstructionResult, truth: Scan | None, frame: Frame) -> list[LayerTuple]:
    """Turn a result into layer tuples: the imputed scan alone, or the group that compares with the truth.

    Parameters
    ----------
    result : ReconstructionResult
    truth : Scan or None
        The target's scan. It gives the contrast.
    frame : ndarray of shape (4, 4)
        Frame the viewer shows.
    """
    if truth is None:
        return [scan_layer(result.scan, frame)]
    name, grid = result.scan.modality.title, result.scan.grid
    contrast = scan_layer(truth, frame)[1]["contrast_limits"]
    reach = 0.5 * (contrast[1] - contrast[0])
    grey = {"colormap": "gray", "contrast_limits": contrast}
    signed = {"colormap": DIVERGING, "contrast_limits": (-reach, reach), "blending": "additive"}
    many = {"colormap": "inferno", "contrast_limits": (1.0, _SURE), "blending": "additive"}
    return [
        _layer(f"{name} masked", result.masked, grid, frame, grey),
        _layer(f"{name} reconstruction", result.scan.data, grid, frame, grey | {"visible": True}),
        _layer(f"{name} disagreement", result.disagreement, grid, frame, many),
        _layer(f"{name} error", result.error, grid, frame, signed | {"visible": True}),
    ]


def template_layer(template: Scan, truth: Scan | None, frame: Frame) -> LayerTuple:
    """Turn a template laid over a study into a layer tuple, in the contrast of the real scan where there is one."""
    look = {"contrast_limits": scan_layer(truth or template, frame)[1]["contrast_limits"], "visible": True}
    return _layer(f"{template.modality.title} template", template.data, template.grid, frame, look)


def _layer(name: str, values: Any, grid: Grid, frame: Frame, look: dict[str, Any]) -> LayerTuple:
    # As a modality of its own it is never taken for the scan it imitates.
    scan = Scan(Modality("result", name, ""), np.asarray(values, np.float32), grid, imputed=True)
    data, options, kind = scan_layer(scan, frame, visible=False)
    return data, options | {"name": name} | look, kind


class SideBySide:
    """Show some layers, and only those, each in a cell of napari's grid; slices, zoom and cursor are shared.

    Parameters
    ----------
    viewer : napari.Viewer
    """

    def __init__(self, viewer: Any) -> None:
        self._viewer = viewer
        self._before: dict[Any, bool] = {}

    @property
    def _grid(self) -> Any:
        return self._viewer.canvas.grid if hasattr(self._viewer, "canvas") else self._viewer.grid  # napari < 0.9

    def enter(self, layers: list[Any]) -> None:
        """Show these layers from the top left on; what was visible before is remembered."""
        self._before = {layer: layer.visible for layer in self._viewer.layers}
        for layer in self._viewer.layers:
            layer.visible = layer in layers
        for layer in layers:
            _label(layer, True)
        self._grid.stride = 1
        self._grid.enabled = True
        self._viewer.reset_view(reset_camera_angle=False)

    def leave(self) -> None:
        """Return to one canvas and to what was visible before."""
        if not self._before:
            return
        self._grid.enabled = False
        for layer in self._viewer.layers:
            _label(layer, False)
            if layer in self._before:
                layer.visible = self._before[layer]
        self._before = {}
        self._viewer.reset_view(reset_camera_angle=False)


def _label(layer: Any, shown: bool) -> None:
    """Write a layer's name into its cell, where napari can (0.7 or later)."""
    if hasattr(layer, "name_overlay"):
        layer.name_overlay.visible = shown
