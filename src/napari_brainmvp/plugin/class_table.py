"""The classes of a project: colour, name, number; the chosen one is what the brush paints. And its regions."""

from __future__ import annotations

from collections.abc import Collection

from qtpy.QtCore import Qt, Signal
from qtpy.QtGui import QColor, QKeySequence
from qtpy.QtWidgets import (
    QColorDialog,
    QHBoxLayout,
    QHeaderView,
    QPushButton,
    QShortcut,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from napari_brainmvp.annotation.content import LabelClass
from napari_brainmvp.annotation.regions import Regions
from napari_brainmvp.plugin.region_dialog import RegionDialog
from napari_brainmvp.plugin.style import quiet, swatch

__all__ = ["ClassTable"]

_REMOVE = "Take the chosen class out of the project, where it is painted on no study (Delete, with the table in focus)"
_KEPT = "The background class stays: a project needs one."
_NEW_COLORS = ("#f2c14e", "#2fbf9b", "#9b6dd6", "#e07a3f", "#6fb98f", "#c06c84", "#d1495b")


class ClassTable(QWidget):
    """A table with one row per class; names are edited in place."""

    chosen = Signal(int)
    """Emits the label value of the row that the user chose, also if it was chosen before."""
    edited = Signal(object)
    """Emits the tuple of classes as the user wants them."""
    removed = Signal(int)
    """Emits the label value of a class that shall leave the project."""
    united = Signal(object)
    """Emits the regions as the user wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.classes: tuple[LabelClass, ...] = ()
        self.dialog: RegionDialog | None = None
        self._regions: Regions = {}
        self._taken: tuple[int, ...] = ()
        self.table = QTableWidget(0, 3)
        self.table.setHorizontalHeaderLabels(["Class", "Number", "Key"])
        self.table.verticalHeader().hide()
        self.table.setShowGrid(False)
        self.table.setSelectionBehavior(QTableWidget.SelectionBehavior.SelectRows)
        self.table.setSelectionMode(QTableWidget.SelectionMode.SingleSelection)
        triggers = QTableWidget.EditTrigger  # not any key: napari's are pressed with the table in focus, too
        self.table.setEditTriggers(triggers.DoubleClicked | triggers.EditKeyPressed)
        self.table.setTabKeyNavigation(False)  # the tabulator leads on to the buttons
        self.table.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.table.setToolTip("The chosen class is what the brush paints. Double-click its name to edit it.")
        self.table.horizontalHeader().setSectionResizeMode(0, QHeaderView.ResizeMode.Stretch)
        self.table.setColumnWidth(1, 70)
        self.table.setColumnWidth(2, 60)
        self.add = QPushButton("Add class")
        self.recolor = QPushButton("Colour…")
        self.remove = QPushButton("Remove")
        self.regions = QPushButton("Regions…")
        self.regions.setToolTip("Say what is learned where classes overlap: whole tumour, tumour core and the like.")
        self.learned = quiet("")
        row = QHBoxLayout()
        for button in (self.add, self.recolor, self.remove, self.regions):
            row.addWidget(button)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.table)
        layout.addLayout(row)
        layout.addWidget(self.learned)
        self.table.itemSelectionChanged.connect(self._choose)
        self.table.itemChanged.connect(self._rename)
        self.add.clicked.connect(self._add)
        self.recolor.clicked.connect(self._recolor)
        self.remove.clicked.connect(self._remove)
        self._delete = QShortcut(QKeySequence(QKeySequence.StandardKey.Delete), self.table)
        self._delete.setContext(Qt.ShortcutContext.WidgetShortcut)  # not in a name that is being edited
        self._delete.activated.connect(self.remove.click)
        self.regions.clicked.connect(self._unite)

    def show_classes(
        self, classes: tuple[LabelClass, ...], regions: Regions, editable: bool, removed: Collection[LabelClass] = ()
    ) -> None:
        """Fill the table, and say what regions are learned; the chosen class stays, without a word."""
        self._taken = tuple(c.value for c in removed)  # numbers that no new class gets
        value = self.value() if self.classes else next((c.value for c in classes), 0)
        self.classes, self._regions = classes, regions
        self.learned.setText(_what_is_learned(classes, regions))
        self.learned.setVisible(bool(regions))
        self.table.blockSignals(True)
        self.table.setRowCount(len(classes))
        for index, entry in enumerate(classes):
            name = QTableWidgetItem(swatch(entry.color), entry.name)
            name.setToolTip("What is none of the others: paint some of it, too." if entry.background else "")
            cells = (name, QTableWidgetItem(str(entry.value)), QTableWidgetItem(f"Alt+{index + 1}" * (index < 9)))
            for column, item in enumerate(cells):
                flags = Qt.ItemFlag.ItemIsEnabled | Qt.ItemFlag.ItemIsSelectable
                item.setFlags(flags | Qt.ItemFlag.ItemIsEditable if column == 0 and editable else flags)
                self.table.setItem(index, column, item)
            self.table.setRowHeight(index, 26)
        self.table.setFixedHeight(self.table.horizontalHeader().sizeHint().height() + 26 * len(classes) + 6)
        self.table.blockSignals(False)
        for button in (self.add, self.regions):
            button.setEnabled(editable)
        self.show_value(value)

    def choose(self, row: int) -> None:
        """Choose a row, as a click does."""
        if row < len(self.classes):
            self.table.selectRow(row)
            self._choose()

    def show_value(self, value: int) -> None:
        """Show that this class is chosen, without a word; no class, if none has this value."""
        if value != self.value():
            self.table.blockSignals(True)
            self.table.clearSelection()
            self.table.setCurrentCell(next((k for k, c in enumerate(self.classes) if c.value == value), -1), 0)
            self.table.blockSignals(False)
        self._allow_changes()

    def value(self) -> int:
        """Return the label value of the chosen class; 0 without any."""
        row = self.table.currentRow()
        return self.classes[row].value if 0 <= row < len(self.classes) else 0

    def _allow_changes(self) -> None:
        """Allow what can be done with the chosen class."""
        chosen = next((c for c in self.classes if c.value == self.value()), None)
        self.recolor.setEnabled(self.add.isEnabled() and chosen is not None)
        background = chosen is not None and chosen.background
        self.remove.setEnabled(self.recolor.isEnabled() and not background)
        self.remove.setToolTip(_KEPT if background else _REMOVE)

    def _choose(self) -> None:
        self._allow_changes()
        if self.value():
            self.chosen.emit(self.value())

    def _change(self, row: int, **changes: str) -> None:
        classes = list(self.classes)
        classes[row] = classes[row].model_copy(update=changes)
        self.edited.emit(tuple(classes))

    def _rename(self, item: QTableWidgetItem) -> None:
        name = item.text().strip()
        if item.column() == 0 and name and name != self.classes[item.row()].name:
            self._change(item.row(), name=name)

    def _recolor(self) -> None:
        row = self.table.currentRow()
        if row < 0:
            return
        color = QColorDialog.getColor(QColor(self.classes[row].color), self)
        if color.isValid():
            self._change(row, color=color.name())

    def _add(self) -> None:
        value = max(0, *self._taken, *(c.value for c in self.classes)) + 1
        color = _NEW_COLORS[len(self.classes) % len(_NEW_COLORS)]
        self.edited.emit((*self.classes, LabelClass(value=value, name=f"Class {value}", color=color)))

    def _remove(self) -> None:
        if self.value():
            self.removed.emit(self.value())

    def _unite(self) -> None:
        self.dialog = dialog = RegionDialog(self.classes, self._regions, self)
        dialog.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        dialog.accepted.connect(lambda: self.united.emit(dialog.regions()))
        dialog.finished.connect(self._close)
        dialog.open()

    def _close(self) -> None:
        self.dialog = None


def _what_is_learned(classes: tuple[LabelClass, ...], regions: Regions) -> str:
    within = {value for values in regions.values() for value in values}
    left = [c.name for c in classes if not c.background and c.value not in within]
    note = f" In no region, so learned as background: {', '.join(left)}." if left else ""
    return f"Fine-tuning learns regions: {', '.join(regions)}.{note}"
