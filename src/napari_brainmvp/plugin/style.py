"""The few looks the panels share; everything else is napari's theme."""

from __future__ import annotations

from qtpy.QtCore import Qt
from qtpy.QtGui import QColor, QIcon, QPixmap
from qtpy.QtWidgets import QLabel, QProgressBar, QPushButton, QTableWidgetItem, QTabWidget, QToolButton

__all__ = [
    "ACCENT",
    "STATE_COLORS",
    "chip",
    "heading",
    "link",
    "main_button",
    "quiet",
    "slim_bar",
    "small_button",
    "style_tabs",
    "swatch",
]

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


def slim_bar() -> QProgressBar:
    """Make a thin bar of progress in thousandths, without text."""
    bar = QProgressBar()
    bar.setRange(0, 1000)
    bar.setTextVisible(False)
    bar.setFixedHeight(6)
    bar.setStyleSheet(
        "QProgressBar { background: rgba(128,128,128,60); border: none; border-radius: 3px; height: 6px; }"
        f"QProgressBar::chunk {{ background: {ACCENT}; border-radius: 3px; }}"
    )
    return bar


def small_button(text: str, tooltip: str) -> QPushButton:
    """Make a button that is no wider than it has to be."""
    button = QPushButton(text)
    button.setToolTip(tooltip)
    button.setStyleSheet("QPushButton { min-width: 0; padding: 4px 6px; }")
    button.setMinimumWidth(20)
    return button


def link(text: str) -> QToolButton:
    """Make a button that looks like a quiet word."""
    button = QToolButton()
    button.setText(text)
    button.setCursor(Qt.CursorShape.PointingHandCursor)
    button.setStyleSheet(
        "QToolButton { background: transparent; border: none; color: #9aa0a8; padding: 0; }"
        f"QToolButton:hover {{ color: {ACCENT}; }} QToolButton::menu-indicator {{ image: none; }}"
    )
    return button


def style_tabs(tabs: QTabWidget) -> None:
    """Give a tab widget flat tabs that share the width, with a line below the one that is chosen."""
    tabs.setDocumentMode(True)
    tabs.setUsesScrollButtons(False)
    bar = tabs.tabBar()
    bar.setDrawBase(False)
    bar.setExpanding(True)
    bar.setElideMode(Qt.TextElideMode.ElideNone)
    bar.setCursor(Qt.CursorShape.PointingHandCursor)
    bar.setStyleSheet(
        "QTabBar { border: none; background: transparent; }"
        "QTabBar::tab { background: none; background-color: transparent; border: none;"
        " border-bottom: 2px solid rgba(128,128,128,70); padding: 7px 2px; margin: 0; font-size: 12px; }"
        "QTabBar::tab:!selected { color: #9aa0a8; }"
        f"QTabBar::tab:!selected:hover {{ color: {ACCENT}; }}"
        f"QTabBar::tab:selected {{ border-bottom: 2px solid {ACCENT}; background: none; }}"
    )
