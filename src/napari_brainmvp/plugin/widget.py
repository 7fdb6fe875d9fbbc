"""The dock widget: the study on top, what can be done with it in tabs below."""

from __future__ import annotations

from typing import Any

from qtpy.QtCore import QEvent, QObject, Qt
from qtpy.QtWidgets import QFrame, QScrollArea, QTabWidget, QVBoxLayout, QWidget

from napari_brainmvp.models.card import NOTICE
from napari_brainmvp.plugin.annotate_panel import AnnotatePanel
from napari_brainmvp.plugin.segment_panel import SegmentPanel
from napari_brainmvp.plugin.study_panel import StudyPanel
from napari_brainmvp.plugin.style import quiet

__all__ = ["BrainMVPWidget"]


class BrainMVPWidget(QWidget):
    """The Study panel and one tab for each thing to do with it.

    Parameters
    ----------
    napari_viewer : napari.Viewer
        Given by napari, by this name.
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__()
        self.study = StudyPanel(napari_viewer)
        self.segment = SegmentPanel(napari_viewer, self.study)
        self.annotate = AnnotatePanel(napari_viewer, self.study)
        self.tabs = QTabWidget()
        self.tabs.setDocumentMode(True)
        self.tabs.tabBar().setElideMode(Qt.TextElideMode.ElideNone)
        self.tabs.setUsesScrollButtons(True)
        self._add("Segment", self.segment, "Paint tissues and lesions with a trained model.")
        self._add("Annotate", self.annotate, "Paint strokes; a prediction of the whole volume follows.")
        layout = QVBoxLayout(self)
        layout.setContentsMargins(10, 8, 10, 8)
        layout.setSpacing(10)
        layout.addWidget(self.study)
        layout.addWidget(self.tabs, 1)
        layout.addWidget(quiet(NOTICE))
        self.setMinimumWidth(360)
        self.destroyed.connect(self._abandon)

    def _add(self, title: str, panel: QWidget, tooltip: str) -> None:
        """Add a tab; a panel higher than the window scrolls."""
        area = QScrollArea()
        area.setWidgetResizable(True)
        area.setFrameShape(QFrame.Shape.NoFrame)
        area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        inside = QWidget()
        column = QVBoxLayout(inside)
        column.setContentsMargins(0, 8, 0, 0)
        column.addWidget(panel)
        column.addStretch(1)
        area.setWidget(inside)
        self.tabs.setTabToolTip(self.tabs.addTab(area, title), tooltip)

    def showEvent(self, event: QEvent | None) -> None:
        """Watch the window this widget now lives in."""
        super().showEvent(event)
        self.window().installEventFilter(self)

    def eventFilter(self, watched: QObject | None, event: QEvent | None) -> bool:
        """Let go of what runs in this window when it closes."""
        if event is not None and event.type() == QEvent.Type.Close:
            self._abandon()
        return False

    def _abandon(self) -> None:
        self.segment.abandon()
        self.annotate.abandon()
