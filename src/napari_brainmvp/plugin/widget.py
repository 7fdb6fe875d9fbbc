"""The dock widget: the study on top, what can be done with it in tabs below."""

from __future__ import annotations

from typing import Any

from qtpy.QtCore import QEvent, QObject, QSize, Qt
from qtpy.QtWidgets import QFrame, QScrollArea, QTabWidget, QVBoxLayout, QWidget

from napari_brainmvp.models.card import NOTICE
from napari_brainmvp.plugin.annotate_panel import AnnotatePanel
from napari_brainmvp.plugin.classify_panel import ClassifyPanel
from napari_brainmvp.plugin.jobs_strip import JobsStrip
from napari_brainmvp.plugin.reconstruct_panel import ReconstructPanel
from napari_brainmvp.plugin.segment_panel import SegmentPanel
from napari_brainmvp.plugin.study_panel import StudyPanel
from napari_brainmvp.plugin.style import quiet, style_tabs
from napari_brainmvp.plugin.train_panel import TrainPanel

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
        self.reconstruct = ReconstructPanel(napari_viewer, self.study)
        self.classify = ClassifyPanel(napari_viewer, self.study)
        self.train = TrainPanel(napari_viewer)
        self._panels: list[Any] = []
        self._asked: QWidget | None = None
        self.jobs = JobsStrip()
        self.tabs = QTabWidget()
        style_tabs(self.tabs)
        self._add("Segment", self.segment, "Paint tissues and lesions with a trained model.")
        self._add("Annotate", self.annotate, "Paint strokes; a prediction of the whole volume follows.")
        self._add("Reconstruct", self.reconstruct, "Make a scan from the others, and see where it disagrees.")
        self._add("Classify", self.classify, "Tell classes of studies apart with a model of your own.")
        self.train_tab = self._add("Train", self.train, "Pre-train on your own studies; watch background jobs.")
        self._watch_jobs()
        layout = QVBoxLayout(self)
        layout.setContentsMargins(10, 8, 10, 8)
        layout.setSpacing(10)
        layout.addWidget(self.study)
        layout.addWidget(self.tabs, 1)
        layout.addWidget(self.jobs)
        layout.addWidget(quiet(NOTICE))
        self.setMinimumWidth(360)

    def _add(self, title: str, panel: Any, tooltip: str) -> QWidget:
        """Add a tab; a panel higher than the window scrolls. Its ``abandon`` is called when the window goes."""
        self._panels.append(panel)
        self.destroyed.connect(panel.abandon)
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
        return area

    def _watch_jobs(self) -> None:
        """Let the strip tell the panels what it sees."""
        self._panels.append(self.jobs)
        self.jobs.polled.connect(self.train.show_jobs)
        for panel in (self.segment, self.reconstruct, self.classify):
            self.jobs.finished.connect(panel.refresh_models)
        self.jobs.finished.connect(self.annotate.finetune.job_done)
        self.jobs.clicked.connect(self._show_job)
        self.annotate.finetune.submitted.connect(self.jobs.poll)
        self.train.changed.connect(self.jobs.poll)
        self.tabs.currentChanged.connect(self._tab_chosen)

    def _tab_chosen(self) -> None:
        """Give the study's place to training, which needs none that is open."""
        self.study.setVisible(self.tabs.currentWidget() is not self.train_tab)

    def _show_job(self, name: str) -> None:
        self.train.show_job(name)
        self.tabs.setCurrentWidget(self.train_tab)

    def sizeHint(self) -> QSize:
        """Ask for no more width than the tabs need: the rest belongs to the image."""
        return QSize(390, super().sizeHint().height())

    def event(self, event: QEvent | None) -> bool:
        """Let go of what runs, and save, when the dock's own cross takes this out of the window: it does not close."""
        done = bool(super().event(event))
        if event is not None and event.type() == QEvent.Type.ParentChange and self.parent() is None:
            self._abandon()
        return done

    def _abandon(self) -> None:
        for panel in self._panels:
            panel.abandon()

    def showEvent(self, event: QEvent | None) -> None:
        """Watch the window this widget now lives in, and napari's where that is a dock that floats over it."""
        super().showEvent(event)
        window: QWidget | None = self.window()
        while window is not None:
            window.installEventFilter(self)
            parent = window.parentWidget()
            window = parent.window() if parent is not None else None

    def eventFilter(self, watched: QObject | None, event: QEvent | None) -> bool:
        """Let go of what runs in this window once it has closed, before Qt deletes it.

        It has when it hides after it was asked to close: who is asked may say no. A floating dock, which is not
        deleted when it closes, can be shown again.
        """
        if event is None or not isinstance(watched, QWidget):
            return False
        if event.type() == QEvent.Type.Close:
            self._asked = watched if watched.testAttribute(Qt.WidgetAttribute.WA_DeleteOnClose) else None
        elif event.type() == QEvent.Type.Hide and watched.isHidden() and watched is self._asked:
            self._asked = None
            self._abandon()
        return False
