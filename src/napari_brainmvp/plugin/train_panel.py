"""The *Train* panel: start a pre-training run, and watch any job."""

from __future__ import annotations

from typing import Any

from qtpy.QtCore import Signal
from qtpy.QtWidgets import QHBoxLayout, QMenu, QToolButton, QVBoxLayout, QWidget

from napari_brainmvp.jobs import Job
from napari_brainmvp.plugin.job_view import JobView
from napari_brainmvp.plugin.pretrain_form import PretrainForm
from napari_brainmvp.plugin.style import link

__all__ = ["TrainPanel"]


class TrainPanel(QWidget):
    """The form of a new run, or a job.

    Parameters
    ----------
    viewer : napari.Viewer
    """

    changed = Signal()
    """Emitted when a job was started, stopped or resumed here: a good moment to look at the jobs."""

    def __init__(self, viewer: Any) -> None:
        super().__init__()
        self._wanted: str | None = None
        self._opened = False
        self.form, self.view = PretrainForm(), JobView(viewer)
        self.back = link("‹ New run")
        self.earlier = link("Earlier runs ▾")
        self.earlier.setPopupMode(QToolButton.ToolButtonPopupMode.InstantPopup)
        self.earlier.setMenu(QMenu(self.earlier))
        self.earlier.setToolTip("All jobs, the latest first.")
        top = QHBoxLayout()
        top.addWidget(self.back)
        top.addStretch(1)
        top.addWidget(self.earlier)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addLayout(top)
        for part in (self.view, self.form):
            layout.addWidget(part)
        self.back.clicked.connect(self.show_form)
        self.form.submitted.connect(self.show_job)
        self.view.changed.connect(self.changed)
        self.show_form()

    def show_form(self) -> None:
        """Show the form of a new run."""
        self._wanted = None
        self.form.show()
        self.view.hide()
        self.back.hide()

    def show_job(self, name: str) -> None:
        """Show a job, with the next look at the jobs."""
        self._wanted = name
        self.changed.emit()

    def show_jobs(self, jobs: list[Job]) -> None:
        """Take the jobs as they are now; one that already runs when the window opens is shown at once."""
        self._list([job.name for job in jobs])
        if not self._opened:
            self._opened = True
            self._wanted = self._wanted or next((job.name for job in jobs if job.state.active), None)
        if self._wanted is None:
            return
        job = next((job for job in jobs if job.name == self._wanted), None)
        if job is None:
            self.show_form()
            return
        self.form.hide()
        self.back.show()
        self.view.show()
        self.view.show_job(job)

    def _list(self, names: list[str]) -> None:
        """Offer the jobs in the menu."""
        menu = self.earlier.menu()
        self.earlier.setVisible(bool(names))
        if names == [action.text() for action in menu.actions()]:
            return
        menu.clear()
        for name in names:
            menu.addAction(name).triggered.connect(lambda _=False, name=name: self.show_job(name))

    def abandon(self) -> None:
        """Let go of what runs in this window; jobs go on."""
        self.form.abandon()
        self.view.abandon()
