"""The *Reconstruct* panel: a scan from the others, side by side with the truth, and what is missing filled in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from napari.utils.notifications import show_info, show_warning
from qtpy.QtCore import Qt, Signal
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QFormLayout,
    QHBoxLayout,
    QLabel,
    QPushButton,
    QSlider,
    QVBoxLayout,
    QWidget,
)
from superqt import QCollapsible

from napari_brainmvp.errors import StudyError
from napari_brainmvp.models import list_models
from napari_brainmvp.plugin.layers import LayerTuple, is_imputed
from napari_brainmvp.plugin.reconstruction_layers import SideBySide, reconstruction_layers, template_layer
from napari_brainmvp.plugin.run_bar import RunBar
from napari_brainmvp.plugin.similarity_table import SimilarityTable
from napari_brainmvp.plugin.study_panel import StudyPanel
from napari_brainmvp.plugin.style import heading
from napari_brainmvp.plugin.toggle_row import ToggleRow
from napari_brainmvp.progress import CancelToken, ProgressCallback
from napari_brainmvp.study import modality

__all__ = ["ReconstructPanel"]

_TEMPLATE = "template"
_NO_MODEL = "No pre-trained model is installed: brainmvp models import FILE adds one."


class ReconstructPanel(QWidget):
    """Reconstruct one scan of a Study panel's study from others, or make one that is missing.

    Parameters
    ----------
    viewer : napari.Viewer
    study : StudyPanel
    """

    finished = Signal()
    """Emitted when a run has ended, however it ended."""

    def __init__(self, viewer: Any, study: StudyPanel) -> None:
        super().__init__()
        self._viewer, self._study = viewer, study
        self._compared: list[Any] = []
        self._grid = SideBySide(viewer)
        self.model = QComboBox()
        self.target, self.sources = ToggleRow(exclusive=True), ToggleRow(exclusive=False)
        self.rate = QSlider(Qt.Orientation.Horizontal)
        self.rate_text = QLabel()
        self.trained = QCheckBox("One random mask, as in training")
        self.device = QComboBox()
        self.run = RunBar("Reconstruct")
        self.fill = QPushButton("Fill in")
        self.side_by_side = QPushButton("Side by side")
        self.template = QPushButton("Show template")
        self.table = SimilarityTable()
        self._of: dict[str, Any] = {}  # the layers of the study that is worked on
        self._build()
        self.refresh_models()

    def _build(self) -> None:
        self.model.setToolTip("Pre-trained models: those that ship, and those in your models folder.")
        self.device.addItems(["auto", "cpu", "cuda", "mps"])
        self.rate.setRange(1, 20)
        self.rate.setValue(20)
        self.rate.setToolTip("How much of the scan is hidden at a time. At 100 % nothing of it is used.")
        self.trained.setToolTip("Hide once, at random; else every voxel is predicted while it is hidden.")
        self.side_by_side.setCheckable(True)
        self.side_by_side.setToolTip("Truth, reconstruction and error in a grid with shared slices and zoom.")
        self.template.setToolTip("The average that the model distilled for this modality, laid over the study.")
        options = QCollapsible("Options")
        inside = QWidget()
        form = QFormLayout(inside)
        form.addRow("Compute on", self.device)
        form.addRow(self.trained)
        options.addWidget(inside)
        rate = QHBoxLayout()
        rate.addWidget(self.rate, 1)
        rate.addWidget(self.rate_text)
        chooser = QFormLayout()
        chooser.addRow("Model", self.model)
        chooser.addRow("Make", self.target)
        chooser.addRow("From", self.sources)
        chooser.addRow("Hidden", rate)
        views = QHBoxLayout()
        views.addWidget(self.side_by_side)
        views.addWidget(self.template)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(heading("Reconstruct"))
        layout.addLayout(chooser)
        for part in (options, self.run, self.fill, self.table):
            layout.addWidget(part)
        layout.addLayout(views)
        self.run.button.clicked.connect(self.start)
        self.run.done.connect(self._done)
        self.run.finished.connect(self._run_ended)
        self.fill.clicked.connect(self.fill_in)
        self.template.clicked.connect(self.show_template)
        self.side_by_side.toggled.connect(self._show_side_by_side)
        self.rate.valueChanged.connect(self._update)
        self.target.changed.connect(self._offer)
        self.sources.changed.connect(self._update)
        self.model.currentIndexChanged.connect(self._offer)
        self._study.changed.connect(self._offer)

    def refresh_models(self) -> None:
        """List the installed pre-trained models again."""
        chosen = self.model.currentText()
        self.model.blockSignals(True)
        self.model.clear()
        for entry in list_models():
            if entry.card.task == "pretraining" and entry.card.network.in_channels == 1:
                self.model.addItem(entry.card.title or entry.card.name, entry)
                self.model.setItemData(self.model.count() - 1, entry.card.description, Qt.ItemDataRole.ToolTipRole)
        self.model.setCurrentIndex(max(0, self.model.findText(chosen)))
        self.model.blockSignals(False)
        self._offer()

    def missing(self) -> tuple[str, ...]:
        """Return the modalities the Study panel asks for, lacks, and this model can make."""
        entry, present = self.model.currentData(), self._study.assigned_with_others()
        if entry is None or not any(key in entry.card.modalities for key in present):
            return ()
        return tuple(k for k in self._study.wanted() if k not in present and k in entry.card.modalities)

    def start(self) -> None:
        """Make the chosen target."""
        self._start(self.target.chosen())

    def fill_in(self) -> None:
        """Make every modality that is missing from all that is there."""
        self._start(self.missing(), everything=True)

    def _start(self, targets: tuple[str, ...], everything: bool = False) -> None:
        folder, sources, device = self.model.currentData().folder, self.sources.chosen(), self.device.currentText()
        rate, trained = self.rate.value() / 20, self.trained.isChecked()
        frame = self._study.frame()

        def work(study: Any, progress: ProgressCallback, cancel: CancelToken) -> Any:
            from napari_brainmvp.inference import ReconstructionOptions, reconstruct

            results, layers = [], []
            for target in targets:
                truth = study.scans.get(target)
                if truth is not None and truth.imputed:  # made before: make it again
                    study, truth = study.with_modalities(tuple(k for k in study.scans if k != target)), None
                options = ReconstructionOptions(
                    mode="trained" if trained and truth is not None else "whole",
                    mask_rate=rate if truth is not None else 1.0,
                    device=device,
                )
                chosen = () if everything else tuple(key for key in sources if key != target)
                results.append(reconstruct(study, folder, target, chosen, options, progress, cancel))
                layers += reconstruction_layers(results[-1], truth, frame)
            return results, layers

        self._run(work)

    def show_template(self) -> None:
        """Add the model's template of the chosen target as a layer."""
        folder, (target,), frame = self.model.currentData().folder, self.target.chosen(), self._study.frame()

        def work(study: Any, progress: ProgressCallback, cancel: CancelToken) -> Any:
            from napari_brainmvp.inference import template_scan

            return [], [template_layer(template_scan(study, folder, target), study.scans.get(target), frame)]

        self._run(work)

    def _run(self, work: Callable[[Any, ProgressCallback, CancelToken], Any]) -> None:
        try:
            make_study = self._study.study(with_others=True)
        except StudyError as error:
            show_warning(str(error))
            return
        self._of = self._study.assigned_with_others()
        self.run.start(lambda progress, cancel: work(make_study(), progress, cancel))
        self._update()

    def abandon(self) -> None:
        """Forget a run because the window closes."""
        self.run.abandon()

    def _done(self, made: tuple[list[Any], list[LayerTuple]]) -> None:
        results, tuples = made
        if self._study.replaced(self._of.values()):
            self.run.status.setText("Another study was opened meanwhile, so the result is not shown.")
            return
        self.side_by_side.setChecked(False)
        for layer in self._viewer.layers:
            layer.visible = False
        layers = [self._viewer.add_image(data, **options) for data, options, _ in tuples]
        if not results:
            return
        result = results[-1]
        self.table.show_similarities(result.similarity)
        warnings = [w for r in results for w in r.warnings]
        self.run.status.setText(
            f"Done in {sum(r.seconds for r in results):.0f} s on {result.device}. {' '.join(warnings)}"
        )
        if warnings:
            show_info("\n".join(warnings))
        self._compared = []
        if result.error is not None:
            masked, made_layer, disagreement, error = layers
            truth = self._of.get(result.scan.modality.key)
            second = [masked, made_layer] if result.mask_rate < 1 else [made_layer, disagreement]
            self._compared = [layer for layer in (truth, *second, error) if layer is not None]
            self.side_by_side.setChecked(True)
        self._update()

    def _run_ended(self) -> None:
        self._update()
        self.finished.emit()

    def _show_side_by_side(self, on: bool) -> None:
        there = [layer for layer in self._compared if layer in self._viewer.layers]
        if on and there:
            self._grid.enter(there)
        else:
            self._grid.leave()

    def _offer(self) -> None:
        """Offer what the model knows and the study has."""
        entry, present = self.model.currentData(), self._study.assigned_with_others()
        known = entry.card.modalities if entry is not None else ()
        kinds = [modality(key) for key in known]
        default = "flair" if "flair" in known else next(iter(known), "")
        self.target.offer(
            ((k.key, k.title, self._tip(k.meaning, k.key in present), k.key not in present) for k in kinds), default
        )
        target = self.target.chosen()
        choices = [(k.key, k.title, k.meaning, False) for k in kinds if k.key in present and k.key not in target]
        choices.append((_TEMPLATE, "Template", "The model's own average of the target.", False))
        self.sources.offer(choices, off=(_TEMPLATE,))
        self._update()

    @staticmethod
    def _tip(meaning: str, present: bool) -> str:
        return meaning if present else f"{meaning}; missing: it is imputed"

    def _update(self) -> None:
        target, present = self.target.chosen(), self._study.assigned_with_others()
        title = modality(target[0]).title if target else ""
        has_truth = bool(target) and target[0] in present and not is_imputed(present[target[0]])
        self.rate.setEnabled(has_truth)
        self.trained.setEnabled(has_truth)
        self.rate_text.setText(f"{5 * self.rate.value() if has_truth else 100} %")
        self.run.button.setText(f"Reconstruct {title}" if has_truth or not present else f"Fill in {title}")
        missing = self.missing()
        self.fill.setText(f"Fill in missing {', '.join(modality(key).title for key in missing)}")
        self.fill.setVisible(bool(missing))
        known = self.model.currentData()
        usable = known is not None and any(key in known.card.modalities for key in present)
        ready = usable and not self.run.busy and bool(target)
        self.run.button.setEnabled(ready and bool(self.sources.chosen()))
        self.fill.setEnabled(ready)
        self.template.setEnabled(ready)
        self.side_by_side.setEnabled(bool(self._compared))
        if self.run.busy:
            return
        hints = (
            "" if known is not None else _NO_MODEL,
            "" if usable else "Choose at least one layer in the Study panel.",
        )
        hint = next((h for h in hints if h), "" if self.sources.chosen() else "Choose what to make it from.")
        if hint:
            self.run.status.setText(hint)
        elif not self.run.status.text().startswith(("Done", "Cancelled", "Another study")):
            self.run.status.setText("")
