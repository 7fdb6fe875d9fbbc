"""Fine-tune on an annotation project: a preset, a button, and a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from napari.utils.notifications import show_error
from qtpy.QtCore import Signal
from qtpy.QtWidgets import QComboBox, QHBoxLayout, QPushButton, QVBoxLayout, QWidget

from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.plugin.style import quiet
from napari_brainmvp.plugin.work import Work
from napari_brainmvp.progress import CancelToken, ProgressCallback

__all__ = ["FinetuneRow"]

_TIMES = {"minutes": "minutes on a CPU", "hour": "about an hour on a CPU", "paper": "days on a CPU, hours on a GPU"}


class FinetuneRow(QWidget):
    """Export what is annotated and train a model on it in the background.

    The dataset goes into the project's folder, as it is now: painting goes on meanwhile.
    """

    submitted = Signal()
    """A job was queued."""

    def __init__(self) -> None:
        super().__init__()
        self._project: AnnotationProject | None = None
        self._work: Work | None = None
        self.preset = QComboBox()
        self.button = QPushButton("Fine-tune")
        self.status = quiet("")
        for name, time in _TIMES.items():
            self.preset.addItem(f"{name}  –  {time}", name)
        self.button.setToolTip("Train a model on the strokes of all studies, as a background job (Alt+F)")
        self.button.setShortcut("Alt+F")
        self.button.clicked.connect(self.start)
        row = QHBoxLayout()
        row.addWidget(self.preset, 1)
        row.addWidget(self.button)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addLayout(row)
        layout.addWidget(self.status)

    def set_project(self, project: AnnotationProject | None) -> None:
        """Train on this project."""
        self._project = project
        self.button.setEnabled(project is not None and not project.read_only and self._work is None)

    def start(self) -> None:
        """Export and submit."""
        project, preset = self._project, self.preset.currentData()
        if project is None or self._work is not None:
            return

        def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
            return _submit(project, preset, progress, cancel)

        self._work = work = Work(run)
        work.done.connect(lambda job: self._ended(f"Training {job.name} in the background: see the jobs below."))
        work.failed.connect(self._failed)
        work.cancelled.connect(lambda: self._ended("Cancelled."))
        work.crashed.connect(self._crashed)
        self.button.setEnabled(False)
        self.status.setText("Exporting what is annotated…")
        work.start()

    def _failed(self, message: str) -> None:
        self._ended(message)
        show_error(message)

    def _crashed(self, error: Exception) -> None:
        self._ended("Something went wrong; see the notification.")
        raise error

    def _ended(self, message: str) -> None:
        self._work = None
        self.status.setText(message)
        self.set_project(self._project)
        self.submitted.emit()

    def abandon(self) -> None:
        """Forget what is being exported."""
        if self._work is not None:
            self._work.abandon()
            self._work = None


def _submit(project: AnnotationProject, preset: str, progress: ProgressCallback, cancel: CancelToken) -> Any:
    from napari_brainmvp.annotation.export import export_dataset
    from napari_brainmvp.jobs import free_name, submit_job, training_job
    from napari_brainmvp.training.finetuning.spec import read_spec

    name = free_name(_model_name(project.folder))
    data = export_dataset(project, project.folder / "datasets" / name, "brats", progress, cancel)
    return submit_job(training_job("finetune", read_spec(preset, {"data": [{"path": str(data)}]}), name))


def _model_name(folder: Path) -> str:
    letters = "".join(c if c.isascii() and c.isalnum() else "-" for c in folder.name.lower()).strip("-")
    return letters[:50] or "project"
