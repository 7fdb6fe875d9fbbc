"""Fine-tune on an annotation project as a job, and compare what came of it with the probe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari.utils.notifications import show_error
from qtpy.QtCore import Signal
from qtpy.QtWidgets import QComboBox, QHBoxLayout, QPushButton, QVBoxLayout, QWidget

from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import StudyError
from napari_brainmvp.plugin.annotation_view import AnnotationView
from napari_brainmvp.plugin.style import quiet
from napari_brainmvp.plugin.work import Work
from napari_brainmvp.progress import CancelToken, ProgressCallback

if TYPE_CHECKING:
    from napari_brainmvp.annotation.comparison import Comparison

__all__ = ["FinetuneRow"]

_TIMES = {"minutes": "minutes on a CPU", "hour": "an hour or more on a CPU", "paper": "hours on a GPU"}


class FinetuneRow(QWidget):
    """Export what is annotated and train a model on it in the background.

    The dataset goes into the project's folder, as it is now: painting goes on meanwhile.
    """

    submitted = Signal()
    """A job was queued."""

    def __init__(self) -> None:
        super().__init__()
        self._project: AnnotationProject | None = None
        self._view: AnnotationView | None = None
        self._work: Work | None = None
        self.preset = QComboBox()
        self.button = QPushButton("Fine-tune")
        self.compare = QPushButton("Probe or model?")
        self.status = quiet("")
        self.preset.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        for name, time in _TIMES.items():
            self.preset.addItem(f"{name}  –  {time}", name)
        self.button.setToolTip("Train a model on the strokes of all studies, as a background job (Alt+F)")
        self.button.setShortcut("Alt+F")
        self.button.clicked.connect(self.start)
        self.compare.setToolTip(
            "Which is closer to what is painted on this study: the probe, each painted slice predicted from the "
            "others, or the model that was fine-tuned on this project last?"
        )
        self.compare.clicked.connect(self.find_better)
        row = QHBoxLayout()
        row.addWidget(self.preset, 1)
        row.addWidget(self.button)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addLayout(row)
        layout.addWidget(self.compare)
        layout.addWidget(self.status)

    def set_project(self, project: AnnotationProject | None, view: AnnotationView | None) -> None:
        """Train on this project, and compare on the study that is painted on."""
        self._project, self._view = project, view
        idle = project is not None and self._work is None
        self.button.setEnabled(idle and project is not None and not project.read_only)
        self.compare.setEnabled(idle and view is not None and view.probe.predictor is not None)

    def start(self) -> None:
        """Export and submit."""
        project, preset = self._project, self.preset.currentData()
        if project is None or self._work is not None:
            return

        def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
            return _submit(project, preset, progress, cancel)

        self._run(run, "Exporting what is annotated…", self._submitted)

    def _submitted(self, job: Any) -> None:
        self._ended(f"Training {job.name} in the background: see the jobs below.")
        self.submitted.emit()

    def find_better(self) -> None:
        """Compare the probe with the newest model of the project on the study that is painted on."""
        project, view = self._project, self._view
        if project is None or view is None or view.probe.predictor is None or self._work is not None:
            return
        features, labels, others = view.probe.predictor.features, view.labels.copy(), view.probe.others

        def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
            from napari_brainmvp.annotation.comparison import as_classes, check_unseen, compare, newest_model
            from napari_brainmvp.inference import segment

            entry = newest_model(project)
            if entry is None:
                raise StudyError("No model was fine-tuned on this project yet: fine-tune one first.")
            check_unseen(entry.card, view.name)
            found = segment(view.study, entry.card.name, progress=progress, cancel=cancel)
            values = as_classes(found.labels, entry.card, project.classes)
            return entry.card.name, compare(features, labels, values, project.classes, others)

        self._run(run, "Comparing…", lambda found: self._ended(_verdict(*found)))

    def _run(self, function: Callable[..., Any], doing: str, done: Callable[[Any], None]) -> None:
        self._work = work = Work(function)
        work.done.connect(done)
        work.failed.connect(self._failed)
        work.cancelled.connect(lambda: self._ended("Cancelled."))
        work.crashed.connect(self._crashed)
        self.set_project(self._project, self._view)
        self.status.setText(doing)
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
        self.set_project(self._project, self._view)

    def abandon(self) -> None:
        """Forget what is being exported."""
        if self._work is not None:
            self._work.abandon()
            self._work = None


def _verdict(name: str, found: Comparison) -> str:
    probe, model = (sum(scores.values()) / len(scores) for scores in (found.probe, found.model))
    better = "The model is better: use it in the Segment tab" if found.model_is_better else "The probe is better: go on"
    return f"Mean Dice on {found.slices} painted slices: probe {probe:.2f}, {name} {model:.2f}. {better}."


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
