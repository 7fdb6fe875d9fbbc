"""The *Classify* panel: one button, a bar for each class, and what speaks for one as a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from napari.utils import Colormap
from napari.utils.notifications import show_warning
from qtpy.QtCore import QRectF, QSize, Qt, Signal
from qtpy.QtGui import QColor, QPainter, QPaintEvent
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QFormLayout,
    QSizePolicy,
    QVBoxLayout,
    QWidget,
)

from napari_brainmvp.errors import StudyError
from napari_brainmvp.models import list_models
from napari_brainmvp.plugin.layers import Frame, scan_layer
from napari_brainmvp.plugin.run_bar import RunBar
from napari_brainmvp.plugin.study_panel import StudyPanel
from napari_brainmvp.plugin.style import ACCENT, heading, quiet
from napari_brainmvp.progress import CancelToken, ProgressCallback
from napari_brainmvp.study import Modality, Scan

if TYPE_CHECKING:
    from napari_brainmvp.inference import ClassificationResult

__all__ = ["ClassifyPanel", "ProbabilityBars"]

_ROW, _GAP, _PERCENT = 30, 6, 48
_LEVELS = (0.0, 0.4, 0.7, 1.0)
_GLOW = ((0.8, 0.2, 0.2, 0.0), (0.8, 0.2, 0.2, 0.0), (0.95, 0.5, 0.15, 0.45), (1.0, 0.9, 0.4, 0.75))
"""Nothing below two fifths of the largest saliency; then from red to yellow, ever less transparent."""


class ProbabilityBars(QWidget):
    """A horizontal bar for each class, the most probable one on top and in colour."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, float]] = []
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setAccessibleName("Class probabilities")
        self.hide()

    def show_probabilities(self, probabilities: dict[str, float]) -> None:
        """Draw the bars."""
        self.rows = sorted(probabilities.items(), key=lambda row: -row[1])
        self.setAccessibleDescription(", ".join(f"{name} {p:.0%}" for name, p in self.rows))
        self.setFixedHeight(self.sizeHint().height())
        self.show()
        self.update()

    def sizeHint(self) -> QSize:
        """Return the height of all rows."""
        return QSize(200, len(self.rows) * (_ROW + _GAP))

    def paintEvent(self, event: QPaintEvent | None) -> None:
        """Paint track, bar, name and percentage of every class."""
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        painter.setPen(Qt.PenStyle.NoPen)
        width = float(self.width() - _PERCENT)
        for index, (name, probability) in enumerate(self.rows):
            row = QRectF(0, index * (_ROW + _GAP), width, _ROW)
            painter.setBrush(QColor(127, 134, 146, 50))
            painter.drawRoundedRect(row, 5, 5)
            painter.setBrush(QColor(ACCENT if index == 0 else "#6b7480"))
            painter.drawRoundedRect(QRectF(row.x(), row.y(), max(4.0, width * probability), _ROW), 5, 5)
            painter.setPen(self.palette().text().color() if probability < 0.35 else QColor("white"))
            left = Qt.AlignmentFlag.AlignVCenter | Qt.AlignmentFlag.AlignLeft
            painter.drawText(row.adjusted(10, 0, -6, 0), left, name)
            painter.setPen(self.palette().text().color())
            right = Qt.AlignmentFlag.AlignVCenter | Qt.AlignmentFlag.AlignRight
            painter.drawText(QRectF(width, row.y(), _PERCENT, _ROW), right, f"{probability:.0%}")
            painter.setPen(Qt.PenStyle.NoPen)


class ClassifyPanel(QWidget):
    """Classify the study of a Study panel.

    Parameters
    ----------
    viewer : napari.Viewer
    study : StudyPanel
        Says what to classify.
    """

    finished = Signal()
    """Emitted when a run has ended, however it ended."""

    def __init__(self, viewer: Any, study: StudyPanel) -> None:
        super().__init__()
        self._viewer, self._study = viewer, study
        self.result: ClassificationResult | None = None
        self.model = QComboBox()
        self.saliency = QCheckBox("Show what speaks for the class")
        self.run = RunBar("Classify")
        self.button, self.status = self.run.button, self.run.status
        self.bars = ProbabilityBars()
        self.measured = quiet("")
        self._build()
        self.refresh_models()

    def _build(self) -> None:
        self.model.setToolTip("Classification models in your models folder.")
        self.saliency.setToolTip("A layer: bright where the scan speaks for the most probable class.")
        self.saliency.setChecked(True)
        self.button.setToolTip("Classify the study")
        form = QFormLayout()
        form.addRow("Model", self.model)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(heading("Classify"))
        layout.addLayout(form)
        layout.addWidget(self.saliency)
        for part in (self.run, self.bars, self.measured):
            layout.addWidget(part)
        self.button.clicked.connect(self.start)
        self.run.done.connect(self._done)
        self.run.finished.connect(self._run_ended)
        self.model.currentIndexChanged.connect(self._update)
        self.model.activated.connect(lambda _: self._study.set_modalities(self.model.currentData().card.modalities))
        self._study.changed.connect(self._update)

    def refresh_models(self) -> None:
        """List the installed classification models again."""
        chosen = self.model.currentText()
        self.model.clear()
        for entry in list_models():
            if entry.card.task == "classification":
                self.model.addItem(entry.card.name, entry)
                self.model.setItemData(self.model.count() - 1, entry.card.description, 3)  # Qt.ToolTipRole
        self.model.setCurrentIndex(max(0, self.model.findText(chosen)))
        self._update()

    def _update(self) -> None:
        if self.run.busy:
            return
        entry, missing = self.model.currentData(), self._missing()
        self.button.setEnabled(not missing)
        self.status.setText(missing)
        self.measured.setText("" if entry is None else _said(entry.card))

    def _missing(self) -> str:
        """Say what has to be there first; empty where all is."""
        if self.model.currentData() is None:
            return (
                "No classification model yet: give studies a class in the Annotate tab and press Fine-tune there, or "
                "use brainmvp finetune --task classification."
            )
        return "" if self._study.assigned() else "Choose at least one layer in the Study panel."

    def start(self) -> None:
        """Classify in the background."""
        if self.run.busy:
            return
        self._study.set_modalities(self.model.currentData().card.modalities)
        try:
            make_study = self._study.study()
        except StudyError as error:
            show_warning(str(error))
            return
        folder, saliency, frame = self.model.currentData().folder, self.saliency.isChecked(), self._study.frame()

        def run(progress: ProgressCallback, cancel: CancelToken) -> Any:
            from napari_brainmvp.inference.classify import classify

            result = classify(make_study(), folder, saliency=saliency, progress=progress, cancel=cancel)
            return result, None if result.saliency is None else _layer(result, frame)

        self.run.start(run)

    def abandon(self) -> None:
        """Forget a run because the window closes."""
        self.run.abandon()

    def _done(self, made: tuple[ClassificationResult, Any]) -> None:
        result, layer = made
        self.result = result
        if layer is not None:
            data, options, _ = layer
            self._viewer.add_image(data, **options)
        self.bars.show_probabilities(result.probabilities)
        self.status.setText(" ".join((f"Done in {result.seconds:.0f} s on {result.device}.", *result.warnings)))

    def _run_ended(self) -> None:
        self.button.setEnabled(not self._missing())
        self.finished.emit()


def _said(card: Any) -> str:
    """Say what was measured of a model, as its card has it."""
    found = {m.name: m for m in card.metrics}
    if "accuracy" not in found:
        return "This model was not measured on studies it had not seen."
    metric, interval = found["accuracy"], card.training.get("95 % intervals", {}).get("accuracy")
    spread = f" ({interval[0]:.0%} to {interval[1]:.0%})" if interval else ""
    return f"Right in {metric.value:.0%}{spread} of {metric.n} studies ({metric.data})."


def _layer(result: ClassificationResult, frame: Frame) -> Any:
    """Make the layer tuple of the saliency."""
    name = f"Speaks for {result.saliency_class}"
    scan = Scan(Modality("result", name, ""), np.asarray(result.saliency, np.float32), result.grid)
    data, options, kind = scan_layer(scan, frame)
    options |= {"colormap": Colormap(_GLOW, controls=_LEVELS, name="glow"), "contrast_limits": (0, 1), "name": name}
    return data, options | {"blending": "translucent_no_depth"}, kind
