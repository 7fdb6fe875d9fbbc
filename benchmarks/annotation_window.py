"""What a user waits for while painting: from lifting the brush to the slice and the volume, in a real window.

    xvfb-run -a -s "-screen 0 1400x900x24" python benchmarks/annotation_window.py --out window.json

Opens a synthetic glioma study in napari, makes a project, and paints strokes on the slice with the most of the lesion,
one after the other, each once the volume has followed the one before. Saving the stroke, copying labels between
threads, the events of napari's layers and drawing are part of the times, as they are of the wait; the drawing itself
is done by a virtual display in software.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import napari
import numpy as np
from qtpy.QtCore import QEventLoop, QTimer
from qtpy.QtWidgets import QApplication

from annotation import HELD_OUT
from napari_brainmvp.plugin.layers import study_layers
from napari_brainmvp.synthesis import SynthesisSpec, make_study


def wait_for(done: Any) -> None:
    """Let Qt work until something is so; it is looked at seldom, as looking takes the computation's time."""
    loop, timer = QEventLoop(), QTimer()
    timer.timeout.connect(lambda: done() and loop.quit())
    timer.start(100)
    loop.exec()
    timer.stop()


def paint_stroke(layer: Any, k: int, middle: np.ndarray, value: int) -> float:
    """Paint a short straight stroke, not drawn yet when the brush is lifted; return the time when it is."""
    layer.selected_label = value
    with layer.block_history():
        for step in range(-10, 11):
            layer.paint((k, int(middle[0]), int(middle[1]) + step), value)
        return time.perf_counter()


def main() -> None:
    """Paint, time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strokes", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BRAINMVP_HOME"] = folder
        times = measure(Path(folder), arguments.strokes)
    arguments.out.write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")
    for name, seconds in times.items():
        print(
            f"{name}: best {min(seconds):.3f} s, median {statistics.median(seconds):.3f} s, worst {max(seconds):.3f} s"
        )


def measure(folder: Path, strokes: int) -> dict[str, list[float]]:
    """Return the times of every stroke but the first, which has no prediction to follow it."""
    study = make_study(HELD_OUT, SynthesisSpec(lesion="glioma"))
    viewer = napari.Viewer(show=True)
    viewer.window.resize(1390, 880)
    _, widget = viewer.window.add_plugin_dock_widget("napari-brainmvp")
    for data, options, kind in study_layers(study):
        getattr(viewer, f"add_{kind}")(data, **options)
    panel = widget.annotate
    panel.create_project(folder / "project")
    viewer.layers.selection = {viewer.layers[0]}
    began = time.perf_counter()
    panel.annotate()
    wait_for(lambda: panel.view is not None and panel.view.probe.predictor is not None)
    times: dict[str, list[float]] = {"features": [time.perf_counter() - began], "return to the user": [], "slice": []}
    times["volume"] = []
    view = panel.view
    shape = view.layer.data.shape
    k = shape[0] // 2
    viewer.dims.set_point(0, view.layer.data_to_world((k, 0, 0))[0])
    background, *others = (c.value for c in panel.project.classes)
    rng = np.random.default_rng(0)
    seen: list[tuple[bool, float]] = []
    view.probe.updated.connect(lambda whole: seen.append((whole, time.perf_counter())))
    for number in range(strokes + 1):
        value = background if number % 2 == 0 else others[number // 2 % len(others)]
        middle = np.array(shape[1:]) // 2 + rng.integers(-35, 36, 2)
        QApplication.processEvents()
        seen.clear()
        lifted = paint_stroke(view.layer, k, middle, value)
        back = time.perf_counter() - lifted
        if number == 0:  # one class only: nothing to predict yet
            wait_for(lambda: not view.probe.busy)
            continue
        wait_for(lambda: any(whole for whole, _ in seen))
        times["return to the user"].append(back)
        times["slice"].append(next(at for _, at in seen) - lifted)
        times["volume"].append(next(at for whole, at in seen if whole) - lifted)
        wait_for(lambda: not view.probe.busy)
    viewer.close()
    return times


if __name__ == "__main__":
    main()
