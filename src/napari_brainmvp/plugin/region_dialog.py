"""A window to say which classes make up which region: a row for each region, a column for each class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QDialog,
    QDialogButtonBox,
    QHBoxLayout,
    QHeaderView,
    QPushButton,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from napari_brainmvp.annotation.content import LabelClass
from napari_brainmvp.annotation.regions import Regions, brats_regions, check_regions
from napari_brainmvp.errors import StudyError
from napari_brainmvp.plugin.style import quiet, swatch

__all__ = ["RegionDialog"]

_BRATS_TIP = "Whole tumour, tumour core and enhancing tumour, as BraTS measures them."

_NAME, _WIDEST = 170, 900
"""Pixels: of the column of names, and of the window, where many classes have long names."""


class RegionDialog(QDialog):
    """Edit a project's regions. What is there makes sense, or *OK* cannot be pressed and a line says why.

    Parameters
    ----------
    classes : sequence of LabelClass
        Of the project; the background is in no region.
    regions : dict of str to tuple of int
        As they are now.
    parent : QWidget, optional
    """

    def __init__(self, classes: Sequence[LabelClass], regions: Regions, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._classes = [c for c in classes if not c.background]
        self._all = classes
        self.table = QTableWidget(0, 1 + len(self._classes))
        self.add, self.remove = QPushButton("&Add region"), QPushButton("&Remove region")
        self.brats = QPushButton("&BraTS")
        self.message = quiet("")
        standard = QDialogButtonBox.StandardButton
        self.buttons = QDialogButtonBox(standard.Ok | standard.Cancel)
        self._build()
        self._fill(regions.items())

    def _build(self) -> None:
        self.setWindowTitle("Regions")
        self.table.setHorizontalHeaderItem(0, QTableWidgetItem("Region"))
        for column, entry in enumerate(self._classes, start=1):
            self.table.setHorizontalHeaderItem(column, QTableWidgetItem(swatch(entry.color), entry.name))
        header = self.table.horizontalHeader()
        header.setSectionResizeMode(QHeaderView.ResizeMode.ResizeToContents)
        header.setSectionResizeMode(0, QHeaderView.ResizeMode.Interactive)
        header.resizeSection(0, _NAME)
        self.resize(min(_WIDEST, header.length() + 60), 320)
        self.table.verticalHeader().hide()
        self.table.setTabKeyNavigation(False)  # or one could not leave it by the keyboard
        self.table.setToolTip("Arrow keys move, the space bar ticks, any letter renames.")
        layout = QVBoxLayout(self)
        layout.addWidget(
            quiet(
                "Tick the classes that each region is made of; regions may overlap. Where there are any, fine-tuning "
                "learns and measures them in place of the classes. You go on painting classes."
            )
        )
        layout.addWidget(self.table, 1)
        row = QHBoxLayout()
        for button in (self.add, self.remove, self.brats):
            row.addWidget(button)
        row.addStretch(1)
        layout.addLayout(row)
        layout.addWidget(self.message)
        layout.addWidget(self.buttons)
        self.table.itemChanged.connect(self._check)
        self.add.clicked.connect(self._add)
        self.remove.clicked.connect(self._remove)
        self.brats.clicked.connect(self._fill_brats)
        self.buttons.accepted.connect(self.accept)
        self.buttons.rejected.connect(self.reject)
        try:
            brats_regions(self._all)
            self.brats.setToolTip(_BRATS_TIP)
        except StudyError as error:
            self.brats.setEnabled(False)
            self.brats.setToolTip(f"{_BRATS_TIP} {error}")

    def regions(self) -> Regions:
        """Return what is ticked.

        Raises
        ------
        StudyError
            It makes no sense.
        """
        return check_regions(self._rows(), self._all)

    def _rows(self) -> list[tuple[str, list[int]]]:
        """Return each row's name and the values of its ticked classes."""
        found = []
        for row in range(self.table.rowCount()):
            cells = [self.table.item(row, column) for column in range(self.table.columnCount())]
            ticked = [c is not None and c.checkState() == Qt.CheckState.Checked for c in cells[1:]]
            values = [entry.value for entry, on in zip(self._classes, ticked, strict=True) if on]
            found.append((cells[0].text() if cells[0] is not None else "", values))
        return found

    def _fill(self, rows: Iterable[tuple[str, Iterable[int]]]) -> None:
        self.table.blockSignals(True)
        self.table.setRowCount(0)
        for name, values in rows:
            self._append(name, set(values))
        self.table.blockSignals(False)
        self._check()

    def _append(self, name: str, values: set[int]) -> None:
        row = self.table.rowCount()
        self.table.insertRow(row)
        self.table.setItem(row, 0, QTableWidgetItem(name))
        for column, entry in enumerate(self._classes, start=1):
            item = QTableWidgetItem()
            item.setFlags(Qt.ItemFlag.ItemIsEnabled | Qt.ItemFlag.ItemIsUserCheckable | Qt.ItemFlag.ItemIsSelectable)
            item.setCheckState(Qt.CheckState.Checked if entry.value in values else Qt.CheckState.Unchecked)
            item.setToolTip(entry.name)
            self.table.setItem(row, column, item)

    def _add(self) -> None:
        taken = {name.lower() for name, _ in self._rows()}
        name = next(f"Region {k}" for k in range(1, len(taken) + 2) if f"region {k}" not in taken)
        self._fill([*self._rows(), (name, ())])
        self.table.setFocus()
        self.table.setCurrentCell(self.table.rowCount() - 1, 0)
        self.table.editItem(self.table.currentItem())

    def _remove(self) -> None:
        if self.table.currentRow() >= 0:
            self.table.removeRow(self.table.currentRow())
            self._check()

    def _fill_brats(self) -> None:
        """Put the three regions of BraTS in the place of those of their names."""
        made = brats_regions(self._all)
        self._fill([*(row for row in self._rows() if row[0].lower() not in made), *made.items()])

    def _check(self) -> None:
        self.remove.setEnabled(self.table.rowCount() > 0)
        try:
            self.regions()
            problem = ""
        except StudyError as error:
            problem = str(error)
        self.message.setText(problem)
        ok = self.buttons.button(QDialogButtonBox.StandardButton.Ok)
        assert ok is not None
        ok.setEnabled(not problem)
