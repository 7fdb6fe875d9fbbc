"""Make the pictures in ``docs/images`` with real windows: ``make screenshots`` (runs under a virtual display)."""

from __future__ import annotations

import time
from pathlib import Path

import napari
from qtpy.QtWidgets import QApplication

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
    viewer.close()


def reconstruction() -> None:
    """Open the glioma sample, make its FLAIR from the others, and photograph both side by side."""
    viewer = napari.Viewer(title="napari", show=True)
    viewer.window.resize(1390, 880)
    _, widget = viewer.window.add_plugin_dock_widget("napari-brainmvp")
    viewer.open_sample("napari-brainmvp", "glioma")
    widget.tabs.setCurrentIndex(widget.tabs.indexOf(widget.reconstruct.parent().parent().parent()))
    settle(1)
    lesion = (viewer.layers["Truth"].data >= 4).nonzero()
    widget.reconstruct.run.button.click()
    while widget.reconstruct.run.busy:
        settle(0.2)
    viewer.dims.set_point(0, viewer.layers["Truth"].data_to_world([axis.mean() for axis in lesion])[0])
    settle(2)
    viewer.screenshot(str(OUT / "reconstructed.png"), canvas_only=False, flash=False)
    viewer.close()


if __name__ == "__main__":
    main()
    reconstruction()
