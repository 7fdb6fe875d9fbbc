"""The few looks the panels share; everything else is napari's theme."""

from __future__ import annotations

from qtpy.QtCore import Qt
from qtpy.QtGui import QColor, QIcon, QPixmap
from qtpy.QtWidgets import QLabel, QPushButton, QTableWidgetItem

__all__ = ["ACCENT", "chip", "heading", "main_button", "quiet", "swatch"]

ACCENT = "#4a90d9"
_CHIPS = {"good": "#3fbf8f", "warn": "#f2c14e", "off": "#868d96"}


def heading(text: str) -> QLabel:
    """Make a panel's title."""
    label = QLabel(text)
    label.setStyleSheet("font-size: 14px; font-weight: 600; padding: 2px 0 0 0;")
    return label


def quiet(text: str) -> QLabel:
    """Make a line of explanation that wraps."""
    label = QLabel(text)
    label.setWordWrap(True)
    label.setStyleSheet("color: #9aa0a8;")
    return label


def chip(text: str, kind: str, tooltip: str = "") -> QTableWidgetItem:
    """Make a table cell that says how things are: ``"good"``, ``"warn"`` or ``"off"``."""
    item = QTableWidgetItem(f"● {text}")
    item.setForeground(QColor(_CHIPS[kind]))
    item.setToolTip(tooltip)
    item.setFlags(Qt.ItemFlag.ItemIsEnabled)
    return item


def main_button(text: str) -> QPushButton:
    """Make the one big button of a panel."""
    button = QPushButton(text)
    button.setMinimumHeight(38)
    button.setStyleSheet(
        f"QPushButton {{ background: {ACCENT}; color: white; font-size: 14px; font-weight: 600; border-radius: 6px; }}"
        "QPushButton:hover { background: #5b9fe6; } QPushButton:disabled { background: #3a4048; color: #868d96; }"
    )
    return button


def swatch(color: str) -> QIcon:
    """Make a square icon of a colour."""
    pixmap = QPixmap(14, 14)
    pixmap.fill(QColor(color))
    return QIcon(pixmap)
