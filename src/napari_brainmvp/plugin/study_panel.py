"""The *Study* panel: which layer is which modality, and on which grid results are given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from qtpy.QtCore import Qt, Signal
from qtpy.QtWidgets import (
    QComboBox,
    QFormLayout,
    QHeaderView,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from napari_brainmvp.errors import StudyError
from napari_brainmvp.io.studies import study_folder
from napari_brainmvp.plugin.layers import (
    Frame,
    is_imputed,
    layer_grid,
    layer_modality,
    layer_path,
    layer_scan,
    layer_values,
    shared_frame,
)
from napari_brainmvp.plugin.style import chip, heading, quiet
from napari_brainmvp.study import MODALITIES, Study, modality

__all__ = ["StudyPanel"]

_NONE = "–"


class StudyPanel(QWidget):
    """A table of modalities and the layers that show them.

    Layers are recognised by how they were read, by their names, or by their files; every choice can be changed. A
    layer that was chosen by hand stays chosen as long as it exists.

    Parameters
    ----------
    viewer : napari.Viewer
    """

    changed = Signal()
    """Emitted when the study is another one, or none."""

    def __init__(self, viewer: Any) -> None:
        super().__init__()
        self._viewer = viewer
        self._keys: tuple[str, ...] = ("t1", "t1c", "t2", "flair")
        self._by_hand: dict[str, Any] = {}
        self._boxes: dict[str, QComboBox] = {}
        self._listened: list[Any] = []
        self.table = QTableWidget(0, 3)
        self.reference = QComboBox()
        self.hint = quiet("Open a study: File ▸ Open Folder…, drop a folder here, or File ▸ Open Sample ▸ BrainMVP.")
        self._build()
        for event in (viewer.layers.events.inserted, viewer.layers.events.removed):
            event.connect(self._layers_changed)
        self._layers_changed()

    def _build(self) -> None:
        self.table.setHorizontalHeaderLabels(["Modality", "Layer", ""])
        self.table.verticalHeader().hide()
        self.table.setSelectionMode(QTableWidget.SelectionMode.NoSelection)
        self.table.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self.table.setShowGrid(False)
        self.table.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        header = self.table.horizontalHeader()
        header.setSectionResizeMode(0, QHeaderView.ResizeMode.ResizeToContents)
        header.setSectionResizeMode(1, QHeaderView.ResizeMode.Stretch)
        header.setSectionResizeMode(2, QHeaderView.ResizeMode.ResizeToContents)
        self.reference.setToolTip("Results are given voxel for voxel on this scan's own grid.")
        self.reference.currentIndexChanged.connect(self._refresh)
        form = QFormLayout()
        form.addRow("Result on the grid of", self.reference)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        for part in (heading("Study"), self.hint, self.table):
            layout.addWidget(part)
        layout.addLayout(form)

    def set_modalities(self, keys: Sequence[str]) -> None:
        """Show rows for these modality keys: those the chosen model works on."""
        if tuple(keys) != self._keys:
            self._keys = tuple(keys)
            self._layers_changed()

    def wanted(self) -> tuple[str, ...]:
        """Return the modality keys the chosen model works on."""
        return self._keys

    def assigned(self) -> dict[str, Any]:
        """Return the layer of each modality that has one, by modality key."""
        return {key: layer for key in self._keys if (layer := self._boxes[key].currentData()) is not None}

    def assigned_with_others(self) -> dict[str, Any]:
        """Return :meth:`assigned` and, for known modalities without a row, the layers recognised as such.

        Two layers of one modality are of two studies; of the others then those are taken that lie in the folders of
        the study that has the rows, or of the one that was opened last.
        """
        assigned = self.assigned()
        known = [(kind.key, layer) for layer in self._images() if (kind := layer_modality(layer)) is not None]
        if len({key for key, _ in known}) < len(known):
            homes = {_home(layer) for layer in assigned.values()} or {_home(known[-1][1])}
            known = [(key, layer) for key, layer in known if _home(layer) in homes]
        found = dict(known)
        return {**assigned, **{key: found[key] for key in MODALITIES if key in found and key not in self._keys}}

    def reference_key(self) -> str:
        """Return the modality whose grid results are given on; empty without any layer."""
        assigned = self.assigned()
        chosen = self.reference.currentData()
        if chosen in assigned:
            return str(chosen)
        return _largest(assigned) if assigned else ""

    def frame(self) -> Frame:
        """Return the frame in which the viewer shows the study, whose scans may all be others."""
        layers = self.assigned() or self.assigned_with_others()
        shared = shared_frame(layers.values())
        return np.eye(4) if shared is None else shared  # layers of other readers are shown as they lie

    def replaced(self, layers: Collection[Any]) -> bool:
        """Tell whether another study is in the place of these layers': a result of theirs would be taken for its."""
        return bool(self._images()) and not any(layer in self._viewer.layers for layer in layers)

    def study(self, *, with_others: bool = False) -> Callable[[], Study]:
        """Return a function that makes the study; call it in the worker, where converting arrays hurts nobody.

        Parameters
        ----------
        with_others : bool
            Also the scans of :meth:`assigned_with_others`; without any in the rows, the largest is the reference.

        Raises
        ------
        StudyError
            No layer is chosen.
        """
        assigned = self.assigned_with_others() if with_others else self.assigned()
        reference = self.reference_key()
        if not assigned:
            raise StudyError("There is no scan to work on: open a study, or choose layers in the Study panel.")
        name = next(iter(assigned.values())).name

        def make() -> Study:
            return Study(name, {key: layer_scan(layer, modality(key)) for key, layer in assigned.items()}, reference)

        return make

    def _images(self) -> list[Any]:
        images = [layer for layer in self._viewer.layers if layer._type_string == "image"]
        return [layer for layer in images if layer.ndim == 3 and not layer.rgb]

    def _layers_changed(self, event: object = None) -> None:
        images = self._images()
        self._listen(images)
        self._by_hand = {k: v for k, v in self._by_hand.items() if v is None or v in images}
        guesses: dict[str, Any] = {}
        for layer in images:
            kind = layer_modality(layer)
            if kind is not None and (kind.key not in guesses or not is_imputed(layer)):
                guesses[kind.key] = layer
        keys = self._keys
        self.table.setRowCount(len(keys))
        self._boxes = {}
        for row, key in enumerate(keys):
            self._add_row(row, key, images, self._by_hand.get(key, guesses.get(key)))
        self.table.setFixedHeight(self.table.horizontalHeader().sizeHint().height() + 30 * len(keys) + 4)
        self.hint.setVisible(not images)
        self._refresh()

    def _listen(self, images: list[Any]) -> None:
        """Follow names and transforms of the layers that are there."""
        for layer in images:
            if not any(layer is known for known in self._listened):
                layer.events.name.connect(self._layers_changed)
                for name in ("affine", "scale", "translate", "rotate", "shear"):
                    getattr(layer.events, name).connect(self._refresh)
        self._listened = images

    def _add_row(self, row: int, key: str, images: list[Any], chosen: Any) -> None:
        known = MODALITIES.get(key)
        item = QTableWidgetItem(modality(key).title)
        item.setToolTip(known.meaning if known else "")
        item.setFlags(Qt.ItemFlag.ItemIsEnabled)
        self.table.setItem(row, 0, item)
        self.table.setRowHeight(row, 30)
        box = QComboBox()
        box.addItem(_NONE, None)
        for layer in images:
            box.addItem(layer.name, layer)
        box.setCurrentIndex(next((k + 1 for k, layer in enumerate(images) if layer is chosen), 0))
        box.currentIndexChanged.connect(lambda _, key=key, box=box: self._choose(key, box))
        self._boxes[key] = box
        if (replaced := self.table.cellWidget(row, 1)) is not None:
            replaced.hide()  # Qt deletes it in its own time
        self.table.setCellWidget(row, 1, box)

    def _choose(self, key: str, box: QComboBox) -> None:
        self._by_hand[key] = box.currentData()
        self._refresh()

    def _refresh(self, event: object = None) -> None:
        assigned = self.assigned()
        self._fill_reference(assigned)
        reference = self.reference_key()
        grid = layer_grid(assigned[reference]) if reference else None
        for row, key in enumerate(self._keys):
            if key not in assigned or grid is None:
                pill = chip("missing", "off", "The model's template stands in for it, at some cost in accuracy.")
            elif is_imputed(assigned[key]):
                pill = chip("imputed", "warn", "Made by a network from the other scans, not measured.")
            elif layer_grid(assigned[key]).same_as(grid):
                pill = chip("on grid", "good", "Lies on the grid of the result.")
            else:
                pill = chip("will be resampled", "warn", "Lies on another grid and is resampled for the network.")
            self.table.setItem(row, 2, pill)
        self.changed.emit()

    def _fill_reference(self, assigned: dict[str, Any]) -> None:
        chosen = self.reference.currentData()
        self.reference.blockSignals(True)
        self.reference.clear()
        self.reference.addItem("the largest scan", "")
        for key in assigned:
            self.reference.addItem(modality(key).title, key)
        self.reference.setCurrentIndex(max(0, self.reference.findData(chosen)))
        self.reference.setEnabled(bool(assigned))
        self.reference.blockSignals(False)


def _largest(layers: dict[str, Any]) -> str:
    return max(layers, key=lambda key: layer_values(layers[key]).size)


def _home(layer: Any) -> Path | None:
    """Return the folder of the study that a layer's file is of; None where it came from no file."""
    path = layer_path(layer)
    return None if path is None else study_folder(path)
