"""Fine-tune on an annotation project as a job, and compare what came of it with the probe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari.utils.notifications import show_error
from qtpy.QtCore import Signal
from qtpy.QtWidgets import QCheckBox, QComboBox, QHBoxLayout, QPushButton, QVBoxLayout, QWidget

from napari_brainmvp.annotation.export import Task
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import StudyError
from napari_brainmvp.jobs import Job, say_seconds
from napari_brainmvp.plugin.annotation_view import AnnotationView
from napari_brainmvp.plugin.finetune_job import count_folds, submit_finetuning
from napari_brainmvp.plugin.machine_timer import MachineTimer
from napari_brainmvp.plugin.model_offer import ModelOffer
from napari_brainmvp.plugin.style import heading, quiet
from napari_brainmvp.plugin.work import Work
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback
from napari_brainmvp.training.finetuning.cost import estimate_seconds, fits_at_once
from napari_brainmvp.training.finetuning.spec import PRESETS, FinetuneSpec, read_spec

if TYPE_CHECKING:
    from napari_brainmvp.annotation.comparison import Comparison, ModelPrediction

__all__ = ["FinetuneRow"]

_TASKS = {"segmentation": "Segmentation", "classification": "Classification"}
_TIPS = {
    "segmentation": "Train a model on the strokes of all studies, as a background job (Alt+M)",
    "classification": "Train a model to tell the classes of the studies as a whole, as a background job (Alt+M)",
}

_FEW = range(2, 11)
"""Studies of which the fifth that is held out otherwise, or slices of each, tell too little of the model."""


class FinetuneRow(QWidget):
    """Export what is annotated and train a model on it in the background, of strokes or of the studies' classes.

    The dataset goes into the project's folder, as it is now: painting goes on meanwhile.
    """

    submitted = Signal()
    """A job was queued."""
    progressed = Signal(object)

    def __init__(self) -> None:
        super().__init__()
        self._project: AnnotationProject | None = None
        self._view: AnnotationView | None = None
        self._work: Work | None = None
        self._started: dict[str, Path] = {}  # jobs whose models are compared once they are done, and of which project
        self._timer = MachineTimer()
        self.task, self.preset = QComboBox(), QComboBox()
        self.cross = QCheckBox("Measure by cross-validation")
        self.button = QPushButton("Fine-tune")
        self.compare = QPushButton("Probe or model?")
        self.use = ModelOffer(self._run_quietly)
        self.status = quiet("")
        for box in (self.task, self.preset):
            box.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        for key, title in _TASKS.items():
            self.task.addItem(title, key)
        for name in PRESETS:
            self.preset.addItem(name, name)
        self.task.setToolTip("What to learn: where what is painted is, or which class a study as a whole is of.")
        self.preset.setToolTip("How thoroughly to train. The time is an estimate for this machine's processor.")
        self.button.setShortcut("Alt+M")
        self.button.clicked.connect(self.start)
        self.button.setToolTip(_TIPS["segmentation"])
        self.task.currentIndexChanged.connect(self._choose_task)
        self.preset.currentIndexChanged.connect(self._offer)
        self.cross.toggled.connect(self._say_times)
        self.compare.setToolTip(
            "Which is closer to what is painted on this study: the probe, each painted slice predicted from the "
            "others, or the model that was fine-tuned on this project last? (Alt+Q)"
        )
        self.compare.setShortcut("Alt+Q")
        self.compare.clicked.connect(self.find_better)
        self._timer.timed.connect(self._say_times)
        self._timer.failed.connect(self._untimed)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 8, 0, 0)  # apart from the brush's tools
        layout.addWidget(heading("A model of your own"))
        lines = (((self.task, self.preset), (2, 3)), ((self.cross,), (1,)), ((self.button, self.compare), (1, 1)))
        for parts, shares in lines:
            row = QHBoxLayout()
            for part, share in zip(parts, shares, strict=True):
                row.addWidget(part, share)
            layout.addLayout(row)
        layout.addWidget(self.status)
        layout.addWidget(self.use)

    def set_project(self, project: AnnotationProject | None, view: AnnotationView | None) -> None:
        """Train on this project, and compare on the study that is painted on."""
        self._project, self._view = project, view
        idle = project is not None and self._work is None
        self.button.setEnabled(idle and project is not None and not project.read_only)
        ready = view is not None and view.probe.predictor is not None
        self.compare.setEnabled(idle and ready)
        self.use.offer(project, view, self._work is None)
        if ready:  # not before: reading the study goes first
            self._timer.start()
        self._offer()

    def _choose_task(self) -> None:
        self.button.setToolTip(_TIPS[self.task.currentData()])
        self._timer.start()
        self._offer()

    def _count(self) -> int:
        """Count the studies that the task can be learned from."""
        project = self._project
        if project is None:
            return 0
        grouped = [s for s in project.studies if s.group]
        return len(grouped if self.task.currentData() == "classification" else project.painted_on())

    def _offer(self) -> None:
        """Offer cross-validation where it tells more than what is done without, and say what it all takes."""
        count, task = self._count(), self.task.currentData()
        at_once = fits_at_once(read_spec(self.preset.currentData(), {"task": task}), count)
        self.cross.setVisible(count in _FEW and not at_once)  # a linear layer is measured so, asked or not
        folds = count_folds(count)
        self.cross.setToolTip(
            f"First train {folds} more models, each without one share of the {count} studies, and measure each on the "
            "studies it has not seen; then train the one that is kept on all of them. So every study counts, and none "
            f"that was trained on. It takes about {folds + 1} times as long."
        )
        self._say_times()

    def _say_times(self) -> None:
        """Put what each preset takes beside its name, once the machine is timed."""
        if self._project is None or not self._timer.pace:
            return
        count = self._count() or len(self._project.studies)
        for index, name in enumerate(PRESETS):
            seconds = estimate_seconds(self._asked(name, count), count, self._timer.pace)
            self.preset.setItemText(index, f"{name}  –  about {say_seconds(seconds)}")

    def _asked(self, preset: str, count: int) -> FinetuneSpec:
        """Return what shall be trained, on so many studies."""
        crossed = self.cross.isChecked() and not self.cross.isHidden()
        return read_spec(preset, {"task": self.task.currentData(), "folds": count_folds(count) if crossed else 0})

    def _untimed(self, reason: str) -> None:
        self.preset.setToolTip(f"How thoroughly to train. What it takes is not known: {reason}")

    def start(self) -> None:
        """Export and submit."""
        project = self._project
        if project is None or self._work is not None:
            return
        asked = self._asked(self.preset.currentData(), self._count())

        def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
            return submit_finetuning(project, asked, progress, cancel)

        self._run(run, "Exporting what is annotated", lambda made: self._submitted(project.folder, asked.task, *made))

    def _submitted(self, folder: Path, task: Task, job: Any, missing: list[str]) -> None:
        if task == "segmentation":
            self._started[job.name] = folder
        note = f" Left out, as they cannot be read: {', '.join(missing)}." if missing else ""
        self._ended(f"Training {job.name} in the background: see the jobs below.{note}")
        self.submitted.emit()

    def job_done(self, job: Job) -> None:
        """Compare unasked, once a job that was started here is done; what comes of it is said in this row only."""
        folder = self._started.pop(job.name, None)
        self.use.look_again()
        if self._work is None and self._project is not None and self._project.folder == folder:
            self.status.setText(f"{job.name} is done. On a study that was painted since, ask: {self.compare.text()}")
            self._find_better(self._ended)

    def find_better(self) -> None:
        """Compare the probe with the newest model of the project on the study that is painted on."""
        self._find_better(self._failed)

    def _find_better(self, failed: Callable[[str], None]) -> None:
        project, view = self._project, self._view
        if project is None or view is None or view.probe.predictor is None or self._work is not None:
            return
        try:
            labels = view.labels.copy()
        except StudyError as error:  # the layer was moved
            failed(str(error))
            return
        if view.corrected:
            failed(
                f"Your strokes correct {view.corrected}, so they lie where it is wrong and cannot judge it: compare on "
                "a study that you begin without it."
            )
            return
        features, others = view.probe.predictor.features, view.probe.others
        if not labels.any():
            failed(f"Nothing is painted on {view.name} yet: paint every class on two slices, to compare on them.")
            return

        def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
            from napari_brainmvp.annotation.comparison import check_unseen, compare, newest_model, predict_classes

            entry = newest_model(project)
            if entry is None:
                raise StudyError("No model was fine-tuned on this project yet: fine-tune one first.")
            check_unseen(entry.card, project, view.name)
            found = predict_classes(view.study, entry, project.classes, progress, cancel)
            return found, compare(features, labels, found.labels, project.classes, others, project.regions)

        self._run(run, "Comparing", lambda made: self._compared(view, *made), failed)

    def _compared(self, view: AnnotationView, found: ModelPrediction, comparison: Comparison) -> None:
        """Say which is better, and keep what the model predicts."""
        self.use.keep(view, found)
        where = "" if view is self._view else view.name
        self._ended(comparison.verdict(found.model, where))
        if view is self._view and view.model and not view.corrected:  # an older model's, or one that is worse
            try:
                view.use_probe()
            except StudyError as error:  # the layer was moved
                self._failed(str(error))

    def _run_quietly(self, function: Callable[..., Any], doing: str, done: Callable[[Any], None]) -> None:
        """Run something with nothing to say of it but how far it is."""

        def then(made: Any) -> None:
            self._ended("")
            done(made)

        self._run(function, doing, then)

    def _run(
        self,
        function: Callable[..., Any],
        doing: str,
        done: Callable[[Any], None],
        failed: Callable[[str], None] | None = None,
    ) -> None:
        self._work = work = Work(function)
        work.progressed.connect(self.progressed)
        work.done.connect(done)
        work.failed.connect(failed or self._failed)
        work.cancelled.connect(lambda: self._ended("Cancelled."))
        work.crashed.connect(self._crashed)
        self.set_project(self._project, self._view)
        self.status.setText(f"{doing}…")
        self.progressed.emit(Progress(doing))
        work.start()

    def cancel(self) -> None:
        """Ask what is being exported or compared to stop."""
        if self._work is not None:
            self._work.cancel()

    def _failed(self, message: str) -> None:
        self._ended(message)
        show_error(message)

    def _crashed(self, error: Exception) -> None:
        self._ended("Something went wrong; see the notification.")
        raise error

    def _ended(self, message: str) -> None:
        self._work = None
        self.progressed.emit(Progress(""))
        self.status.setText(message)
        self.set_project(self._project, self._view)

    def abandon(self) -> None:
        """Forget what is being exported or timed."""
        self._timer.abandon()
        if self._work is not None:
            self._work.abandon()
            self._work = None
