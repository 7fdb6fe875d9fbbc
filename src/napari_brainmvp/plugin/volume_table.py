"""A table of structures and their volumes: click one to go there, export them all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qtpy.QtCore import Qt, Signal
from qtpy.QtWidgets import QFileDialog, QHeaderView, QPushButton, QTableWidget, QTableWidgetItem, QVBoxLayout, QWidget

from napari_brainmvp.io import write_text_atomic
from napari_brainmvp.plugin.style import swatch

if TYPE_CHECKING:
    from napari_brainmvp.inference import Structure

__all__ = ["VolumeTable"]


class VolumeTable(QWidget):
    """Structures of a result, hidden until there is one."""

    picked = Signal(object)
    """Emits the :class:`Structure` that was clicked, where it is present in the result."""

    def __init__(self) -> None:
        super().__init__()
        self.structures: tuple[Structure, ...] = ()
        self.table = QTableWidget(0, 2)
        self.table.setHorizontalHeaderLabels(["Structure", "ml"])
        self.table.verticalHeader().hide()
        self.table.setShowGrid(False)
        self.table.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.table.setSelectionBehavior(QTableWidget.SelectionBehavior.SelectRows)
        self.table.setToolTip("Click a structure to go to it.")
        self.table.horizontalHeader().setSectionResizeMode(0, QHeaderView.ResizeMode.Stretch)
        self.table.cellClicked.connect(self._clicked)
        self.export = QPushButton("Export volumes…")
        self.export.setToolTip("Save the table as CSV.")
        self.export.clicked.connect(self._ask_and_export)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.table)
        layout.addWidget(self.export)
        self.hide()

    def show_structures(self, structures: Sequence[Structure]) -> None:
        """Fill the table and show it."""
        self.structures = tuple(structures)
        self.table.setRowCount(len(self.structures))
        for row, structure in enumerate(self.structures):
            name = QTableWidgetItem(swatch(structure.color), structure.name)
            volume = QTableWidgetItem(f"{structure.volume_ml:.1f}" if structure.voxels else "–")
            volume.setTextAlignment(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter)
            for column, item in enumerate((name, volume)):
                item.setFlags(Qt.ItemFlag.ItemIsEnabled | Qt.ItemFlag.ItemIsSelectable)
                self.table.setItem(row, column, item)
            self.table.setRowHeight(row, 26)
        self.table.setFixedHeight(self.table.horizontalHeader().sizeHint().height() + 26 * len(self.structures) + 6)
        self.show()

    def export_csv(self, path: Path) -> None:
        """Write value, name, voxels and volume of every structure.

        Raises
        ------
        FileError
            The file cannot be written.
        """
        from napari_brainmvp.inference.result import volumes_csv

        write_text_atomic(path, volumes_csv(self.structures))

    def _ask_and_export(self) -> None:
        name, _ = QFileDialog.getSaveFileName(self, "Export volumes", "volumes.csv", "CSV (*.csv)")
        if name:
            self.export_csv(Path(name))

    def _clicked(self, row: int, column: int) -> None:
        if self.structures[row].centre_mm is not None:
            self.picked.emit(self.structures[row])
