"""One job, live: how far it is, its curves and pictures, and what can be done with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from napari.utils.notifications import show_error
from qtpy.QtCore import QUrl, Signal
from qtpy.QtGui import QDesktopServices
from qtpy.QtWidgets import QHBoxLayout, QLabel, QVBoxLayout, QWidget

from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.jobs import Job, JobState, MetricsTable, left_out, resume_job, stop_job
from napari_brainmvp.plugin.curves import CurvePlot, Series
from napari_brainmvp.plugin.run_pictures import RunPictures
from napari_brainmvp.plugin.style import STATE_COLORS, heading, quiet, slim_bar, small_button
from napari_brainmvp.study import MODALITIES

__all__ = ["JobView"]

_LOSSES = {
    "template": "from template",
    "other": "from other modality",
    "distillation": "templates",
    "contrast": "contrast",
}
_NO_LOSS = ("learning_rate", "samples_per_second", "likelihood", "activation")
_CAPTIONS = {
    "pretrain": ("original", "masked", "reconstructed", "template", "error"),
    "finetune": ("scan", "truth", "prediction"),
}


class JobView(QWidget):
    """Shows one job of the list it is given."""

    changed = Signal()
    """Emitted when something was asked of the job."""
    templates_wanted = Signal(object)
    """Emits the folder of a run whose templates shall be shown."""

    def __init__(self) -> None:
        super().__init__()
        self.job: Job | None = None
        self._losses, self._held_out = MetricsTable(Path()), MetricsTable(Path())
        self.title, self.state, self.text = heading(""), QLabel(), quiet("")
        self.bar = slim_bar()
        self.losses = CurvePlot("The losses appear with the first step.", 190)
        self.quality = CurvePlot("Held-out studies appear with the first validation.", 150, smoothed=False)
        self.pictures = RunPictures()
        self.stop = small_button("Stop", "A checkpoint is written first; it can be resumed.")
        self.resume = small_button("Resume", "Go on from the last checkpoint.")
        self.folder = small_button("Open folder", "Logs, metrics, pictures, checkpoints and the model.")
        self.templates = small_button("Show templates", "Add the templates as image layers, as they are now.")
        self._build()

    def _build(self) -> None:
        top = QHBoxLayout()
        top.addWidget(self.title, 1)
        top.addWidget(self.state)
        buttons = QHBoxLayout()
        for button in (self.stop, self.resume, self.templates, self.folder):
            buttons.addWidget(button)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addLayout(top)
        for part in (self.bar, self.text):
            layout.addWidget(part)
        layout.addLayout(buttons)
        for part in (self.losses, self.quality, self.pictures):
            layout.addWidget(part)
        self.stop.clicked.connect(lambda: self._ask(stop_job))
        self.resume.clicked.connect(lambda: self._ask(resume_job))
        self.folder.clicked.connect(self._open_folder)
        self.templates.clicked.connect(lambda: self.job and self.templates_wanted.emit(self.job.run))

    def show_job(self, job: Job) -> None:
        """Show a job as it is now."""
        if self.job is None or self.job.folder != job.folder:
            self._losses, self._held_out = (MetricsTable(job.run / f"{n}.csv") for n in ("metrics", "validation"))
            for plot in (self.losses, self.quality):
                plot.show_series(())
        self.job = job
        self.title.setText(job.title)
        self.state.setText(f"● {job.state}")
        self.state.setStyleSheet(f"color: {STATE_COLORS[job.state.value]}; font-weight: 600;")
        self.text.setText(_describe(job))
        self.bar.setValue(round(1000 * job.fraction))
        self.stop.setVisible(job.state.active)
        self.stop.setEnabled(job.state is not JobState.stopping)
        self.resume.setVisible(not job.state.active)
        self.resume.setEnabled(job.state in (JobState.stopped, JobState.failed) and job.spec is not None)
        self.templates.setVisible(job.spec is not None and job.spec.kind == "pretrain")
        if self._losses.update():
            self.losses.show_series(_loss_series(self._losses))
        if self._held_out.update():
            self.quality.show_series(_quality_series(self._held_out))
        if job.spec is not None:
            captions = _CAPTIONS.get(job.spec.kind, ())
            self.pictures.show_folder(job.run / "pictures", captions, self._rows(job) if captions else ())

    def _rows(self, job: Job) -> list[str]:
        """Name the modalities in the rows of a picture: those that were validated, in the order of the run."""
        keys = job.spec.settings.get("modalities", ()) if job.spec else ()
        return [_title(key) for key in keys if f"psnr_{key}" in self._held_out.columns]

    def _ask(self, act: Any) -> None:
        assert self.job is not None
        try:
            act(self.job.name)
        except BrainMVPError as error:
            show_error(str(error))
        self.changed.emit()

    def _open_folder(self) -> None:
        assert self.job is not None
        QDesktopServices.openUrl(QUrl.fromLocalFile(str(self.job.folder)))


def _describe(job: Job) -> str:
    done = job.state is JobState.done
    text = f"The model {job.model} is in the list of models." if done else job.progress or "Starting…"
    return f"{text}\n{left_out(job.run)}".rstrip()


def _loss_series(table: MetricsTable) -> tuple[Series, ...]:
    """Draw the parts of the loss; the loss itself where it has none."""
    parts = [name for name in table.columns if name not in (*_NO_LOSS, "loss")] or [*table.columns][:1]
    parts.sort(key=lambda name: [*_LOSSES, name].index(name))
    return tuple(_series(table, name, _LOSSES.get(name, name.replace("_", " "))) for name in parts)


def _quality_series(table: MetricsTable) -> tuple[Series, ...]:
    """Draw PSNR in dB by modality, masked from the template; or Dice by structure; or whatever was validated."""
    for measure in ("psnr_", "dice_"):
        names = [n for n in table.columns if n.startswith(measure) and not n.endswith("_from_other")]
        if names:
            keys = sorted((n.removeprefix(measure) for n in names), key=lambda key: [*MODALITIES, key].index(key))
            return tuple(_series(table, f"{measure}{key}", _title(key)) for key in keys)
    return tuple(_series(table, name, name.replace("_", " ")) for name in list(table.columns)[:6])


def _title(key: str) -> str:
    return MODALITIES[key].title if key in MODALITIES else key


def _series(table: MetricsTable, name: str, title: str) -> Series:
    return Series(title, np.array(table.steps, float), np.array(table.columns[name], float))
