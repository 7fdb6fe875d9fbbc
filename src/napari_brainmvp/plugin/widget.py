"""The dock widget: small panels one below the other."""

from __future__ import annotations

from typing import Any

from qtpy.QtCore import QEvent, QObject
from qtpy.QtWidgets import QFrame, QScrollArea, QVBoxLayout, QWidget

from napari_brainmvp.models.card import NOTICE
from napari_brainmvp.plugin.segment_panel import SegmentPanel
from napari_brainmvp.plugin.study_panel import StudyPanel
from napari_brainmvp.plugin.style import quiet

__all__ = ["BrainMVPWidget"]


class BrainMVPWidget(QWidget):
    """Study and Segment panels.

    Parameters
    ----------
    napari_viewer : napari.Viewer
        Given by napari, by this name.
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__()
        self.study = StudyPanel(napari_viewer)
        self.segment = SegmentPanel(napari_viewer, self.study)
        inside = QWidget()
        panels = QVBoxLayout(inside)
        panels.setContentsMargins(10, 8, 10, 8)
        panels.setSpacing(10)
        panels.addWidget(self.study)
        panels.addWidget(_line())
        panels.addWidget(self.segment)
        panels.addStretch(1)
        panels.addWidget(quiet(NOTICE))
        area = QScrollArea()
        area.setWidgetResizable(True)
        area.setFrameShape(QFrame.Shape.NoFrame)
        area.setWidget(inside)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(area)
        self.setMinimumWidth(330)
        self.destroyed.connect(self.segment.abandon)

    def showEvent(self, event: QEvent | None) -> None:
        """Watch the window this widget now lives in."""
        super().showEvent(event)
        self.window().installEventFilter(self)

    def eventFilter(self, watched: QObject | None, event: QEvent | None) -> bool:
        """Let go of a run when that window closes."""
        if event is not None and event.type() == QEvent.Type.Close:
            self.segment.abandon()
        return False


def _line() -> QFrame:
    line = QFrame()
    line.setFrameShape(QFrame.Shape.HLine)
    line.setStyleSheet("color: #3a4048;")
    return line
