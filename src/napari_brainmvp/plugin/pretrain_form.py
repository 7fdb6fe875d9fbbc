"""The form of a new pre-training run: data, what was found in them, recipe, size, and what it will cost."""

from __future__ import annotations

import os
from typing import Any

import psutil
from napari.utils.notifications import show_error
from qtpy.QtCore import Qt, Signal
from qtpy.QtWidgets import (
    QComboBox,
    QFileDialog,
    QFormLayout,
    QHBoxLayout,
    QInputDialog,
    QLineEdit,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)
from superqt import QCollapsible

from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.jobs import free_name, gpu_count, say_seconds, submit_job, training_job
from napari_brainmvp.models import list_models
from napari_brainmvp.plugin.machine_timer import MachineTimer
from napari_brainmvp.plugin.modality_matrix import ModalityMatrix
from napari_brainmvp.plugin.source_list import SourceList
from napari_brainmvp.plugin.style import heading, main_button, quiet, small_button
from napari_brainmvp.plugin.work import Work
from napari_brainmvp.training.pretraining.spec import PretrainingSpec, fits, read_spec
from napari_brainmvp.training.pretraining.survey import Survey, estimate, survey

__all__ = ["PretrainForm"]

_RECIPES = {
    "compact": "Compact, for a laptop",
    "default": "Default, for a GPU",
    "paper": "As published",
    "release": "As the published code",
}
_SIZES = {"A try": 200, "Short": 2000, "Long": 20_000, "Very long": 100_000}


class PretrainForm(QWidget):
    """Says what to pre-train on and how; starts a job."""

    submitted = Signal(str)
    """Emits the name of the job that was started."""
    surveyed = Signal()
    """Emitted when the data were looked through."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Survey | None = None
        self._work: Work | None = None
        self._timer = MachineTimer()
        self.sources = SourceList()
        self.add_folder = small_button("Folder…", "Folders of studies, or a BIDS tree.")
        self.add_list = small_button("Datalist…", "A JSON datalist, as MONAI and the authors use it.")
        self.add_synthetic = small_button("Synthetic…", "Made-up studies: to try it out, or beside your own.")
        self.change = small_button("Change", "Weight or base folder of the chosen line; or take it out (Delete).")
        self.summary = quiet("")
        self.matrix = ModalityMatrix()
        self.problems = QCollapsible("Problems")
        self.problem_list = quiet("")
        self.recipe, self.size, self.device, self.init = QComboBox(), QComboBox(), QComboBox(), QComboBox()
        self.steps, self.crop, self.batch, self.seed = QSpinBox(), QSpinBox(), QSpinBox(), QSpinBox()
        self.workers = QSpinBox()
        self.name = QLineEdit()
        self.cost = quiet("")
        self.button = main_button("Start pre-training")
        self._build()
        self.sources.changed.connect(self.look)
        self._timer.timed.connect(self._say_cost)
        self._timer.failed.connect(self._untimed)
        self.add_folder.clicked.connect(self._ask_folder)
        self.add_list.clicked.connect(self._ask_list)
        self.add_synthetic.clicked.connect(self._ask_synthetic)
        self.change.setMenu(self.sources.menu)
        self.size.currentIndexChanged.connect(self._size_chosen)
        self.recipe.currentIndexChanged.connect(self._recipe_chosen)
        for box in (self.steps, self.crop, self.batch, self.workers):
            box.valueChanged.connect(self._say_cost)
        self.device.currentIndexChanged.connect(self._say_cost)
        self.button.clicked.connect(self.start)
        self._size_chosen()
        self._recipe_chosen()
        self.look()

    def _build(self) -> None:
        self.problem_list.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self.problems.addWidget(self.problem_list)
        for key, title in _RECIPES.items():
            self.recipe.addItem(title, key)
        for title, count in _SIZES.items():
            self.size.addItem(f"{title} ({count:,} steps)".replace(",", "\u2009"), count)
        self.size.addItem("As in the options", 0)
        for box in (self.recipe, self.size, self.init):
            box.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
            box.setMinimumContentsLength(12)
        self.size.setCurrentIndex(1)
        self.steps.setRange(1, 10_000_000)
        self.crop.setRange(16, 256)
        self.crop.setSingleStep(16)
        self.crop.setToolTip("Edge of the cubes that are cut out, in mm: a smaller one needs less memory.")
        self.batch.setRange(2, 64)
        self.batch.setToolTip("Studies in each step: fewer need less memory.")
        gpus = gpu_count()
        self.device.addItems(["auto", "cpu", "cuda", *(f"cuda:{k}" for k in range(gpus) if gpus > 1), "mps"])
        self.device.setToolTip(
            "auto takes a GPU where there is one, and of several that with the fewest jobs. "
            "Jobs for the same device wait for each other."
        )
        self.workers.setMaximum(os.cpu_count() or 1)
        self.workers.setValue(min(8, (os.cpu_count() or 1) // 2) if gpus else 0)
        self.workers.setToolTip(
            "Processes that prepare studies and read crops beside the one that trains: for thousands of studies, and "
            "for a GPU, which one process cannot feed."
        )
        self.seed.setMaximum(2**31 - 1)
        self.seed.setToolTip("The same seed gives the same run on the same machine.")
        self.init.setToolTip("Go on from a pre-trained model: those are listed that the recipe and modalities fit.")
        self.name.setPlaceholderText(free_name("encoder"))
        self.name.setToolTip("Name of the model, and of the job that makes it.")
        buttons = QHBoxLayout()
        buttons.setSpacing(4)
        for button in (self.add_folder, self.add_list, self.add_synthetic, self.change):
            buttons.addWidget(button)
        form = QFormLayout()
        form.addRow("Recipe", self.recipe)
        form.addRow("Length", self.size)
        form.addRow("Model name", self.name)
        inside = QWidget()
        more = QFormLayout(inside)
        more.addRow("Start from", self.init)
        more.addRow("Steps", self.steps)
        more.addRow("Crop", self.crop)
        more.addRow("Studies a step", self.batch)
        more.addRow("Compute on", self.device)
        more.addRow("Workers", self.workers)
        more.addRow("Seed", self.seed)
        options = QCollapsible("Options")
        options.addWidget(inside)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(heading("Pre-train on your own studies"))
        layout.addWidget(self.sources)
        layout.addLayout(buttons)
        for part in (self.summary, self.matrix, self.problems):
            layout.addWidget(part)
        layout.addLayout(form)
        for part in (options, self.cost, self.button):
            layout.addWidget(part)

    # --- data ---------------------------------------------------------------------------------------------------

    def _ask_folder(self) -> None:
        if path := QFileDialog.getExistingDirectory(self, "A folder of studies"):
            self.sources.add_sources([path])

    def _ask_list(self) -> None:
        paths, _ = QFileDialog.getOpenFileNames(self, "A datalist", "", "Datalist (*.json)")
        self.sources.add_sources(paths)

    def _ask_synthetic(self) -> None:
        count, agreed = QInputDialog.getInt(self, "Synthetic studies", "How many?", 16, 1, 10_000)
        if agreed:
            self.sources.add_sources([f"synthetic:{count}"])

    def look(self) -> None:
        """Look through the chosen data in the background."""
        if self._work is not None:
            self._work.abandon()
        self.found = None
        sources = self.sources.sources()
        if not sources:
            self._show_survey(Survey((), 0, ()))
            return
        self.summary.setText("Looking…")
        self._work = Work(lambda progress, cancel: survey(sources, progress, cancel))
        self._work.done.connect(self._show_survey)
        self._work.crashed.connect(self._crashed)
        self._work.start()
        self._say_cost()

    def abandon(self) -> None:
        """Let go of what is going on in the background."""
        self._timer.abandon()
        if self._work is not None:
            self._work.abandon()
            self._work = None

    def _crashed(self, error: Exception) -> None:
        self.summary.setText("Something went wrong; see the notification.")
        raise error

    def _show_survey(self, found: Survey) -> None:
        self._work, self.found = None, found
        parts = [f"{len(found.studies)} studies"] if found.studies else []
        if found.synthetic:
            parts.append(f"{found.synthetic} synthetic studies of two to eight modalities")
        nothing = "Add folders of studies with any modalities, labelled or not; or drop them into the list."
        self.summary.setText(
            " and ".join(parts) + "." if parts else nothing if not self.sources.count() else "Nothing."
        )
        self.matrix.show_studies(found.studies)
        self.problems.setVisible(bool(found.problems))
        self.problems.setText(f"{len(found.problems)} problems: the rest is used")
        self.problem_list.setText("\n".join(f"{name}: {reason}" for name, reason in found.problems[:100]))
        self.show_models()
        self._say_cost()
        self.surveyed.emit()

    # --- settings -----------------------------------------------------------------------------------------------

    def _size_chosen(self) -> None:
        count = self.size.currentData()
        self.steps.setEnabled(count == 0)
        if count:
            self.steps.setValue(count)

    def _recipe_chosen(self) -> None:
        self._timer.recipe = self.recipe.currentData()
        usual = read_spec(None, self.recipe.currentData(), {})
        self.crop.setValue(usual.crop)
        self.batch.setValue(usual.batch)
        self.show_models()
        self._say_cost()

    def show_models(self) -> None:
        """List the models that the run could go on from."""
        spec, chosen = self.spec(), self.init.currentData()
        names = [entry.card.name for entry in list_models() if fits(entry.card, spec)]
        self.init.clear()
        self.init.addItem("Random weights", "")
        for name in names:
            self.init.addItem(name, name)
        self.init.setCurrentIndex(max(0, self.init.findData(chosen)))

    def spec(self) -> PretrainingSpec:
        """Return the run as it is set in the form."""
        changes: dict[str, Any] = {
            "data": self.sources.sources(),
            "max_steps": self.steps.value(),
            "crop": self.crop.value() // 16 * 16,
            "batch": self.batch.value(),
            "seed": self.seed.value(),
            "workers": self.workers.value(),
            "accelerator": self.device.currentText(),
            "init": self.init.currentData() or "",
            "validate_every": max(20, min(200, self.steps.value() // 10)),
        }
        known = {key for _, keys in self.found.studies for key in keys} if self.found else set()
        standard = PretrainingSpec.model_fields["modalities"].default
        changes["modalities"] = (*standard, *sorted(known - set(standard)))
        return read_spec(None, self.recipe.currentData(), changes)

    def _say_cost(self) -> None:
        ready = self.found is not None and self.found.count > 0
        self.button.setEnabled(ready)
        self.cost.setVisible(ready)
        if self.found is None or not ready:
            return
        if not self._timer.pace:
            self.cost.setText("Timing this machine, to estimate what the run will take…")
            self._timer.start()
            return
        cost = estimate(self.spec(), self.found.count, self._timer.pace)
        free = psutil.virtual_memory().available / 1e9
        said = f"About {say_seconds(cost.seconds)} on this machine's processor"
        memory = f"and up to {cost.gigabytes:.1f} of the {free:.0f} GB of memory that are free"
        note = {"cpu": "", "auto": " A GPU is faster."}.get(self.device.currentText(), " A GPU was not measured.")
        self.cost.setText(f"{said}, {memory}: an estimate, the job will know better.{note}")

    def _untimed(self, reason: str) -> None:
        self.cost.setText(f"What the run will take is not known: {reason}")

    def start(self) -> None:
        """Submit the job."""
        name = self.name.text().strip() or free_name("encoder")
        try:
            job = submit_job(training_job("pretrain", self.spec(), name))
        except BrainMVPError as error:
            show_error(str(error))
            return
        self.name.clear()
        self.name.setPlaceholderText(free_name("encoder"))
        self.submitted.emit(job.name)
