"""The *Segment* panel: a model, one button, and the result as layers and volumes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from napari.utils.notifications import show_info, show_warning
from qtpy.QtCore import Signal
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QFormLayout,
    QVBoxLayout,
    QWidget,
)
from superqt import QCollapsible

from napari_brainmvp.errors import StudyError
from napari_brainmvp.models import list_models
from napari_brainmvp.plugin.layers import Frame, labels_layer, layer_transform, scan_layer
from napari_brainmvp.plugin.run_bar import RunBar
from napari_brainmvp.plugin.study_panel import StudyPanel
from napari_brainmvp.plugin.style import heading
from napari_brainmvp.plugin.visible_slice import look_at
from napari_brainmvp.plugin.volume_table import VolumeTable
from napari_brainmvp.progress import CancelToken, ProgressCallback
from napari_brainmvp.study import Grid, LabelMap, Modality, Scan

if TYPE_CHECKING:
    from napari_brainmvp.inference import SegmentationResult, Structure

__all__ = ["SegmentPanel"]


class SegmentPanel(QWidget):
    """Segment the study of a Study panel.

    Parameters
    ----------
    viewer : napari.Viewer
    study : StudyPanel
        Says what to segment; told which modalities the chosen model works on.
    """

    finished = Signal()
    """Emitted when a run has ended, however it ended."""

    def __init__(self, viewer: Any, study: StudyPanel) -> None:
        super().__init__()
        self._viewer, self._study = viewer, study
        self._shown: tuple[Grid, Frame] | None = None
        self._of: list[Any] = []  # the layers of the study that is segmented
        self.model = QComboBox()
        self.device = QComboBox()
        self.mirror = QCheckBox("Average with the mirror image")
        self.probabilities = QCheckBox("Show class probabilities")
        self.uncertainty = QCheckBox("Show uncertainty")
        self.run = RunBar("Segment", "Segmenting…")
        self.button, self.status = self.run.button, self.run.status
        self.volumes = VolumeTable()
        self._build()
        self.refresh_models()
        self._update_button()

    def _build(self) -> None:
        self.model.setToolTip("Models that ship, and those in your models folder.")
        self.device.addItems(["auto", "cpu", "cuda", "mps"])
        self.device.setToolTip("auto takes a GPU where there is one.")
        self.mirror.setToolTip("Twice the time, a little more accurate.")
        self.uncertainty.setToolTip("0 where the model is certain, 1 where it cannot decide.")
        self.button.setToolTip("Segment the study (Ctrl+Return)")
        self.button.setShortcut("Ctrl+Return")
        options = QCollapsible("Options")
        inside = QWidget()
        form = QFormLayout(inside)
        form.addRow("Compute on", self.device)
        for box in (self.mirror, self.probabilities, self.uncertainty):
            form.addRow(box)
        options.addWidget(inside)
        chooser = QFormLayout()
        chooser.addRow("Model", self.model)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(heading("Segment"))
        layout.addLayout(chooser)
        layout.addWidget(options)
        layout.addWidget(self.run)
        layout.addWidget(self.volumes)
        self.button.clicked.connect(self.start)
        self.run.done.connect(self._done)
        self.run.finished.connect(self._run_ended)
        self.model.currentIndexChanged.connect(self._model_chosen)
        self._study.changed.connect(self._update_button)
        self.volumes.picked.connect(self._go_to)

    def refresh_models(self) -> None:
        """List the installed segmentation models again."""
        chosen = self.model.currentData()
        self.model.clear()
        for entry in list_models():
            if entry.card.task == "segmentation":
                self.model.addItem(entry.card.title or entry.card.name, entry)
                self.model.setItemData(self.model.count() - 1, entry.card.description, 3)  # Qt.ToolTipRole
        names = [self.model.itemData(k).card.name for k in range(self.model.count())]
        if chosen is not None and chosen.card.name in names:
            self.model.setCurrentIndex(names.index(chosen.card.name))

    def _model_chosen(self) -> None:
        entry = self.model.currentData()
        if entry is not None:
            self._study.set_modalities(entry.card.modalities)
        self._update_button()

    def _update_button(self) -> None:
        if self.run.busy:
            return
        missing = self._missing()
        self.button.setEnabled(not missing)
        if missing or not self.volumes.structures:
            self.status.setText(missing)

    def _missing(self) -> str:
        """Say what has to be there first; empty where all is."""
        if self.model.currentData() is None:
            return "No model is installed: brainmvp models import FILE adds one."
        return "" if self._study.assigned() else "Choose at least one layer in the Study panel."

    def start(self) -> None:
        """Segment in the background."""
        if self.run.busy:
            return
        try:
            make_study = self._study.study()
        except StudyError as error:
            show_warning(str(error))
            return
        folder, device = self.model.currentData().folder, self.device.currentText()
        mirror, maps, uncertain = (b.isChecked() for b in (self.mirror, self.probabilities, self.uncertainty))
        frame, self._of = self._study.frame(), list(self._study.assigned().values())

        def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
            from napari_brainmvp.inference import SegmentOptions, segment

            options = SegmentOptions(device=device, mirror=mirror, probabilities=maps, uncertainty=uncertain)
            result = segment(make_study(), folder, options, progress, cancel)
            return result, _layers(result, frame), frame

        self.run.start(run)

    def abandon(self) -> None:
        """Forget a run because the window closes."""
        self.run.abandon()

    def _done(self, made: tuple[SegmentationResult, list[Any], Frame]) -> None:
        result, layers, frame = made
        if self._study.replaced(self._of):
            self.status.setText("Another study was opened meanwhile, so the result is not shown.")
            return
        for data, options, kind in layers:
            self._add(data, options, kind)
        self._shown = (result.grid, frame)
        self.volumes.show_structures(result.structures)
        self.status.setText(f"Done in {result.seconds:.0f} s on {result.device}. " + " ".join(result.warnings))
        if result.warnings:
            show_info("\n".join(result.warnings))

    def _add(self, data: Any, options: dict[str, Any], kind: str) -> None:
        """Add a result layer, beside and never in place of one that is there."""
        add = self._viewer.add_labels if kind == "labels" else self._viewer.add_image
        add(data, **options)

    def _run_ended(self) -> None:
        self.button.setEnabled(not self._missing())
        self.finished.emit()

    def _go_to(self, structure: Structure) -> None:
        """Move the slice and the camera to a structure."""
        if self._shown is None or structure.centre_mm is None:
            return
        grid, frame = self._shown
        index = grid.to_index(structure.centre_mm)[::-1]
        point = (layer_transform(grid, frame) @ [*index, 1.0])[:3]
        look_at(self._viewer, point)
        self._viewer.camera.center = tuple(point)


def _layers(result: SegmentationResult, frame: Frame) -> list[Any]:
    """Make the layer tuples of a result: probabilities and uncertainty below, labels on top."""
    layers: list[Any] = []
    if result.probabilities is not None:
        for name, values in zip(result.channel_names, result.probabilities, strict=True):
            layers.append(_map_layer(values, result.grid, frame, f"p({name})", "viridis"))
    if result.uncertainty is not None:
        layers.append(_map_layer(result.uncertainty, result.grid, frame, "Uncertainty", "magma"))
    data, options, kind = labels_layer(LabelMap(result.labels, result.grid), frame, "Segmentation")
    colors: dict[int | None, str] = {s.value: s.color for s in result.structures}
    names = {0: "background", **{s.value: s.name for s in result.structures}}
    options |= {
        "colormap": colors | {None: "transparent"},
        "features": {"index": list(names), "structure": list(names.values())},
        "opacity": 0.55,
    }
    return [*layers, (data, options, kind)]


def _map_layer(values: Any, grid: Grid, frame: Frame, name: str, colormap: str) -> Any:
    scan = Scan(Modality("result", name, ""), np.asarray(values, np.float32), grid)
    data, options, kind = scan_layer(scan, frame, visible=False)
    options |= {"colormap": colormap, "contrast_limits": (0, 1), "opacity": 0.7, "name": name}
    return data, options, kind
