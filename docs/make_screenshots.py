"""Make the pictures in ``docs/images`` with real windows: ``make screenshots`` (runs under a virtual display).

``python docs/make_screenshots.py annotation train_form`` makes some of them.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import napari
import numpy as np
from qtpy.QtWidgets import QApplication, QWidget

from napari_brainmvp.cli.synthesising import write_study
from napari_brainmvp.jobs import list_jobs, stop_job
from napari_brainmvp.models import import_model
from napari_brainmvp.synthesis import SynthesisSpec, make_study
from napari_brainmvp.training.finetuning import FinetuneSpec, finetune
from napari_brainmvp.training.sources import DataSource

OUT = Path(__file__).parent / "images"


def settle(seconds: float) -> None:
    """Let Qt draw."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        QApplication.processEvents()
        time.sleep(0.01)


def segmentation() -> None:
    """Open the glioma sample, segment it, and photograph before and after."""
    OUT.mkdir(exist_ok=True)
    viewer = napari.Viewer(title="napari", show=True)
    viewer.window.resize(1390, 880)
    _, widget = viewer.window.add_plugin_dock_widget("napari-brainmvp")
    settle(1)
    viewer.screenshot(str(OUT / "empty.png"), canvas_only=False, flash=False)
    viewer.open_sample("napari-brainmvp", "glioma")
    settle(1)
    widget.segment.uncertainty.setChecked(True)
    widget.segment.button.click()
    settle(3)
    viewer.screenshot(str(OUT / "running.png"), canvas_only=False, flash=False)
    while widget.segment.run.busy:
        settle(0.2)
    lesion = next(k for k, s in enumerate(widget.segment.volumes.structures) if s.value == 6)
    widget.segment.volumes.table.cellClicked.emit(lesion, 0)
    settle(1)
    viewer.screenshot(str(OUT / "segmented.png"), canvas_only=False, flash=False)
    classified(viewer, widget)
    viewer.close()


def classified(viewer: napari.Viewer, widget: QWidget) -> None:
    """Fit a probe on twelve synthetic studies, in a registry of its own, and classify the sample."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"BRAINMVP_HOME": folder}):
        data, lines = Path(folder) / "studies", ["participant_id\tlesion"]
        for seed in range(12):
            lesion = ("glioma", "ms", "stroke")[seed % 3]
            study = make_study(seed, SynthesisSpec(lesion=lesion))
            write_study(data / study.name, study)
            lines.append(f"{study.name}\t{lesion}")
        (data / "participants.tsv").write_text("\n".join(lines) + "\n")
        spec = FinetuneSpec(task="classification", data=(DataSource(path=str(data)),))
        import_model(finetune(spec, Path(folder) / "run"), "lesion-type")
        widget.tabs.setCurrentIndex([widget.tabs.tabText(k) for k in range(widget.tabs.count())].index("Classify"))
        for layer in viewer.layers[4:]:
            layer.visible = False
        widget.classify.refresh_models()
        widget.classify.button.click()
        while widget.classify.run.busy:
            settle(0.2)
        settle(1)
        viewer.screenshot(str(OUT / "classified.png"), canvas_only=False, flash=False)


def _train_tab() -> tuple[napari.Viewer, QWidget]:
    os.environ.setdefault("BRAINMVP_HOME", tempfile.mkdtemp(prefix="brainmvp-"))
    viewer = napari.Viewer(title="napari", show=True)
    viewer.window.resize(1390, 880)
    _, widget = viewer.window.add_plugin_dock_widget("napari-brainmvp")
    widget.tabs.setCurrentWidget(widget.train_tab)
    return viewer, widget


def train_form() -> None:
    """Choose data with gaps."""
    viewer, widget = _train_tab()
    form = widget.train.form
    form.sources.add_sources([str(_studies_with_gaps(Path(tempfile.gettempdir()) / "studies")), "synthetic:16"])
    form.sources.setCurrentRow(0)
    form.sources.change_chosen(weight=3.0)
    while "an estimate" not in form.cost.text():
        settle(1)
    viewer.screenshot(str(OUT / "train_form.png"), canvas_only=False, flash=False)
    viewer.close()


def train_running() -> None:
    """Pre-train on sixteen synthetic studies for some minutes."""
    viewer, widget = _train_tab()
    form = widget.train.form
    form.sources.add_sources(["synthetic:16"])
    form.size.setCurrentIndex(form.size.findData(0))
    form.steps.setValue(600)
    settle(2)
    form.button.click()
    while not widget.train.view.pictures.paths or int(widget.train.view.pictures.paths[-1].stem) < 360:
        settle(1)
    widget.train.view.templates.click()
    settle(10)
    for layer in viewer.layers:
        layer.visible = layer.name == "Template FLAIR"
    settle(1)
    viewer.screenshot(str(OUT / "train_running.png"), canvas_only=False, flash=False)
    widget.train.view.stop.click()
    viewer.close()


def _studies_with_gaps(folder: Path) -> Path:
    """Lay out files as a BIDS tree of 40 subjects, some of whom lack a scan: only names are looked at."""
    rng = np.random.default_rng(0)
    for number in range(40):
        name = f"sub-{number + 1:02d}"
        (folder / name / "anat").mkdir(parents=True, exist_ok=True)
        for suffix, share in {"T1w": 1.0, "T2w": 0.8, "FLAIR": 0.9, "ce-gadolinium_T1w": 0.4}.items():
            if rng.random() < share:
                (folder / name / "anat" / f"{name}_{suffix}.nii.gz").write_bytes(b"placeholder")
    return folder


def reconstruction() -> None:
    """Open the glioma sample, make its FLAIR from the others, and photograph both side by side."""
    viewer = napari.Viewer(title="napari", show=True)
    viewer.window.resize(1390, 880)
    _, widget = viewer.window.add_plugin_dock_widget("napari-brainmvp")
    viewer.open_sample("napari-brainmvp", "glioma")
    titles = [widget.tabs.tabText(k) for k in range(widget.tabs.count())]
    widget.tabs.setCurrentIndex(titles.index("Reconstruct"))
    settle(1)
    lesion = (viewer.layers["Truth"].data >= 4).nonzero()
    widget.reconstruct.run.button.click()
    while widget.reconstruct.run.busy:
        settle(0.2)
    viewer.dims.set_point(0, viewer.layers["Truth"].data_to_world([axis.mean() for axis in lesion])[0])
    settle(2)
    viewer.screenshot(str(OUT / "reconstructed.png"), canvas_only=False, flash=False)
    viewer.close()


def annotation() -> None:
    """Annotate the glioma sample: two strokes and what they predict, then a correction and the uncertainty."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"BRAINMVP_HOME": folder}):
        viewer, widget, lesion, k = _two_strokes(Path(folder) / "project")
        panel = widget.annotate
        viewer.screenshot(str(OUT / "annotate_strokes.png"), canvas_only=False, flash=False)
        for _ in range(3):
            wrong = lesion[k] & (viewer.layers["Prediction"].data[k] == 1)
            missed = lesion[k] & ~wrong
            row, errors = (1, wrong) if wrong.sum() > 50 else (0, (viewer.layers["Prediction"].data[k] == 2) & ~missed)
            _draw(panel, k, row, np.argwhere(errors))
            while panel.view.probe.busy:
                settle(0.2)
        panel.uncertainty.setChecked(True)
        settle(1)
        viewer.screenshot(str(OUT / "annotate_corrected.png"), canvas_only=False, flash=False)
        viewer.close()


def fine_tuning() -> None:
    """Fine-tune on the two strokes from the panel, and photograph the job on its way."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"BRAINMVP_HOME": folder}):
        viewer, widget, _, _ = _two_strokes(Path(folder) / "project")
        row = widget.annotate.finetune
        while "about" not in row.preset.currentText():
            settle(0.5)
        row.button.click()
        while not any(job.state == "running" and job.fraction > 0.05 for job in list_jobs()):
            settle(1)
        widget.tabs.currentWidget().ensureWidgetVisible(row)
        settle(2)
        viewer.screenshot(str(OUT / "annotate_finetune.png"), canvas_only=False, flash=False)
        for job in list_jobs():
            stop_job(job.name)
        while any(job.state.active for job in list_jobs()):  # it writes into the folder
            settle(0.5)
        viewer.close()


def _two_strokes(project: Path) -> tuple[napari.Viewer, QWidget, np.ndarray, int]:
    """Open the glioma sample and paint a stroke of each class; return the lesion (z, y, x), and the slice, as well."""
    viewer = napari.Viewer(title="napari", show=True)
    viewer.window.resize(1390, 980)
    _, widget = viewer.window.add_plugin_dock_widget("napari-brainmvp")
    viewer.open_sample("napari-brainmvp", "glioma")
    panel = widget.annotate
    widget.tabs.setCurrentIndex([widget.tabs.tabText(k) for k in range(widget.tabs.count())].index("Annotate"))
    panel.create_project(project)
    viewer.layers.selection = {viewer.layers["FLAIR"]}
    panel.annotate()
    while panel.view.probe.predictor is None:
        settle(0.2)
    lesion = viewer.layers["Truth"].data >= 4
    k = int(lesion.sum((1, 2)).argmax())
    viewer.dims.set_point(0, panel.view.layer.data_to_world((k, 0, 0))[0])
    _draw(panel, k, 1, np.argwhere(lesion[k]))
    _draw(panel, k, 0, np.argwhere(viewer.layers["Truth"].data[k] == 3))
    while panel.view.probe.busy:
        settle(0.2)
    settle(1)
    return viewer, widget, lesion, k


def _draw(panel: QWidget, k: int, row: int, pixels: np.ndarray) -> None:
    """Paint a straight stroke of a class through the middle of some pixels (y, x) of slice k."""
    if not len(pixels):
        return
    panel.classes.choose(row)
    layer = panel.view.layer
    middle = pixels[np.abs(pixels - np.median(pixels, 0)).sum(1).argmin()]
    inside = {tuple(p) for p in pixels}
    with layer.block_history():
        for step in range(-12, 13):
            y, x = middle[0] + step // 3, middle[1] + step
            if (y, x) in inside:
                layer.paint((k, y, x), layer.selected_label)
    layer.events.paint(value=[])
    settle(1)


def main() -> None:
    """Make those that are named, or all."""
    makers = (segmentation, annotation, fine_tuning, reconstruction, train_form, train_running)
    for maker in makers:
        if maker.__name__ in sys.argv[1:] or not sys.argv[1:]:
            maker()


if __name__ == "__main__":
    main()
