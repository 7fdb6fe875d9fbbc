"""Make the pictures in ``docs/images`` with real windows: ``make screenshots`` (runs under a virtual display)."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from unittest import mock

import napari
from qtpy.QtWidgets import QApplication, QWidget

from napari_brainmvp.models import import_model
from napari_brainmvp.training.finetuning import FinetuneSpec, finetune
from napari_brainmvp.training.sources import DataSource

OUT = Path(__file__).parent / "images"


def settle(seconds: float) -> None:
    """Let Qt draw."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        QApplication.processEvents()
        time.sleep(0.01)


def main() -> None:
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
    while widget.segment._work is not None:
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
        spec = FinetuneSpec(task="classification", data=(DataSource(path="synthetic:12"),))
        import_model(finetune(spec, Path(folder) / "run"), "lesion-type")
        widget.tabs.setCurrentIndex([widget.tabs.tabText(k) for k in range(widget.tabs.count())].index("Classify"))
        for layer in viewer.layers[4:]:
            layer.visible = False
        widget.classify.refresh_models()
        widget.classify.button.click()
        while widget.classify._work is not None:
            settle(0.2)
        settle(1)
        viewer.screenshot(str(OUT / "classified.png"), canvas_only=False, flash=False)


if __name__ == "__main__":
    main()
