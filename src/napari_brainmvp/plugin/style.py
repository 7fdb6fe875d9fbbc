"""The few looks the panels share; everything else is napari's theme."""

from __future__ import annotations

from qtpy.QtCore import Qt
from qtpy.QtGui import QColor, QIcon, QPixmap
from qtpy.QtWidgets import QLabel, QPushButton, QTableWidgetItem, QTabWidget

__all__ = ["ACCENT", "STATE_COLORS", "chip", "heading", "main_button", "quiet", "style_tabs", "swatch"]

ACCENT = "#4a90d9"
STATE_COLORS = {
    "queued": "#f2c14e",
    "running": "#4a90d9",
    "stopping": "#f2c14e",
    "stopped": "#868d96",
    "failed": "#e0605a",
    "done": "#3fbf8f",
}
"""By the state of a job."""
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


def style_tabs(tabs: QTabWidget) -> None:
    """Give a tab widget flat tabs that share the width, with a line below the one that is chosen."""
    bar = tabs.tabBar()
    bar.setDrawBase(False)
    bar.setExpanding(True)
    bar.setUsesScrollButtons(False)
    bar.setElideMode(Qt.TextElideMode.ElideNone)
    tabs.setStyleSheet(
        "QTabWidget::pane { border: none; border-top: 1px solid rgba(255,255,255,30); }"
        "QTabBar::tab { background: transparent; color: #9aa0a8; border: none; border-bottom: 2px solid transparent;"
        " padding: 6px 4px; margin: 0; min-width: 40px; font-size: 12px; }"
        "QTabBar::tab:hover { color: #e6e8eb; }"
        f"QTabBar::tab:selected {{ color: white; border-bottom: 2px solid {ACCENT}; }}"
    )
