"""The *Train* panel: start a pre-training run, and watch any job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from napari.utils.notifications import show_error
from qtpy.QtCore import Signal
from qtpy.QtWidgets import QHBoxLayout, QMenu, QToolButton, QVBoxLayout, QWidget

from napari_brainmvp.jobs import Job
from napari_brainmvp.models import list_models
from napari_brainmvp.plugin.job_view import JobView
from napari_brainmvp.plugin.layers import shared_frame
from napari_brainmvp.plugin.pretrain_form import PretrainForm
from napari_brainmvp.plugin.style import link
from napari_brainmvp.plugin.templates import read_templates, template_layers
from napari_brainmvp.plugin.work import Work

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
        self._viewer = viewer
        self._work: Work | None = None
        self.form, self.view = PretrainForm(), JobView()
        self.back = link("‹ New run")
        self.earlier = _menu("Earlier runs ▾", "All jobs, the latest first.")
        self.templates = _menu("Templates ▾", "Show a model's modality templates as image layers.")
        top = QHBoxLayout()
        top.addWidget(self.back)
        top.addStretch(1)
        top.addWidget(self.templates)
        top.addWidget(self.earlier)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addLayout(top)
        for part in (self.view, self.form):
            layout.addWidget(part)
        self.back.clicked.connect(self.show_form)
        self.form.submitted.connect(self.show_job)
        self.view.changed.connect(self.changed)
        self.view.templates_wanted.connect(self.add_templates)
        self.templates.menu().aboutToShow.connect(self._list_models)
        self.show_form()

    def show_form(self) -> None:
        """Show the form of a new run."""
        self._wanted = None
        self.form.show_models()
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

    def _list_models(self) -> None:
        """Offer the models that come with templates."""
        menu = self.templates.menu()
        menu.clear()
        for entry in list_models():
            if entry.card.fill_missing == "template":
                action = menu.addAction(entry.card.title or entry.card.name)
                action.triggered.connect(lambda _=False, folder=entry.folder: self.add_templates(folder))

    def add_templates(self, folder: Path) -> None:
        """Add the templates of a model or a run as layers, in the frame of what is already shown."""
        if self._work is not None:
            return
        frame = shared_frame(self._viewer.layers)
        self.view.templates.setEnabled(False)
        self._work = Work(lambda progress, cancel: template_layers(read_templates(folder), frame))
        self._work.done.connect(self._add_layers)
        self._work.failed.connect(self._refused)
        self._work.crashed.connect(self._crashed)
        self._work.start()

    def _add_layers(self, layers: list[Any]) -> None:
        self._ended()
        for data, options, _ in layers:
            self._viewer.add_image(data, **options)

    def _refused(self, reason: str) -> None:
        self._ended()
        show_error(reason)

    def _crashed(self, error: Exception) -> None:
        self._ended()
        raise error

    def _ended(self) -> None:
        self._work = None
        self.view.templates.setEnabled(True)

    def abandon(self) -> None:
        """Let go of what runs in this window; jobs go on."""
        self.form.abandon()
        if self._work is not None:
            self._work.abandon()
            self._work = None


def _menu(text: str, tooltip: str) -> QToolButton:
    button = link(text)
    button.setPopupMode(QToolButton.ToolButtonPopupMode.InstantPopup)
    button.setMenu(QMenu(button))
    button.setToolTip(tooltip)
    return button
