"""The prediction one looks at and takes over from: the probe's, or for a while that of a fine-tuned model."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.plugin.layers import KEY, Frame
from napari_brainmvp.plugin.painted import add_label_layer, add_map_layer, class_colormap
from napari_brainmvp.study import Grid

__all__ = ["ShownPrediction"]

_NAME = "Prediction"


class ShownPrediction:
    """The layers *Prediction* and *Uncertainty*.

    They show arrays themselves, not copies. While they show a model's, the probe may go on writing into its own.

    Parameters
    ----------
    viewer : napari.Viewer
    project : AnnotationProject
        Gives the classes their colours.
    grid : Grid
        The study's own.
    frame : ndarray of shape (4, 4)
    dtype : type
        Of label values.

    Attributes
    ----------
    labels, uncertainty : ndarray of shape (i, j, k)
        What is shown.
    model : str
        The name of the model whose prediction that is; empty for the probe.
    leader : str
        The name of the model that the probe starts from; empty for the one that ships.
    """

    def __init__(self, viewer: Any, project: AnnotationProject, grid: Grid, frame: Frame, dtype: type) -> None:
        self._project = project
        self.labels: NDArray[Any] = np.zeros(grid.shape, dtype)
        self.uncertainty: NDArray[np.float16] = np.zeros(grid.shape, np.float16)
        self._probe = self.labels, self.uncertainty
        self.model = self.leader = ""
        self._layer = add_label_layer(viewer, self.labels, grid, frame, _NAME, project.classes)
        self._map = add_map_layer(viewer, self.uncertainty, grid, frame, "Uncertainty")
        viewer.layers.move(len(viewer.layers) - 1, len(viewer.layers) - 2)  # below the prediction
        self._layer.opacity = 0.4
        self._layer.editable = False
        self.recolor()

    @property
    def layers(self) -> tuple[Any, Any]:
        """Both layers, from below."""
        return self._map, self._layer

    def show_model(self, name: str, labels: NDArray[Any], uncertainty: NDArray[np.float16]) -> None:
        """Show what a model predicts in place of the probe; the layer's name says so as long as it does."""
        self.model = name
        self._show(labels.astype(self.labels.dtype, copy=False), uncertainty)

    def show_probe(self) -> None:
        """Show what the probe predicts."""
        self.model = ""
        self._show(*self._probe)

    def follow(self, leader: str, labels: NDArray[Any] | int, uncertainty: NDArray[np.float16] | int) -> None:
        """Show what the probe predicts from a model of this name on, or without one; until then, what is given."""
        self.leader = leader
        self._probe[0][...], self._probe[1][...] = labels, uncertainty
        self.show_probe()

    def _show(self, labels: NDArray[Any], uncertainty: NDArray[np.float16]) -> None:
        self.labels, self.uncertainty = labels, uncertainty
        self._layer.name = f"{_NAME} of {self.model or self.leader}" if self.model or self.leader else _NAME
        for layer, values in ((self._layer, labels), (self._map, uncertainty)):
            layer.data = values.transpose(layer.metadata[KEY].order).T
        self._layer.editable = False  # new data make it editable, and what is painted on it is saved by nobody

    def show_uncertainty(self, on: bool) -> None:
        """Show or hide the uncertainty."""
        self._map.visible = on

    def refresh(self) -> None:
        """Draw what was written into the arrays."""
        self._layer.refresh()
        if self._map.visible:
            self._map.refresh()

    def recolor(self) -> None:
        """Use the classes' colours as they are now; the background is seen through, as it covers most of the brain."""
        self._layer.colormap = class_colormap(self._project.classes, unseen=(self._project.background.value,))
