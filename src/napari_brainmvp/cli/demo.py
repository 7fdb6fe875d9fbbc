"""``brainmvp demo``: the whole line on a study that anyone may have."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from napari_brainmvp.cli.picture import draw_result
from napari_brainmvp.cli.synthesising import write_study
from napari_brainmvp.inference import SegmentOptions, segment
from napari_brainmvp.io import atomic_path, read_study, write_label_map
from napari_brainmvp.progress import ProgressCallback
from napari_brainmvp.synthesis import SynthesisSpec, make_study

__all__ = ["Demo", "run_demo"]

DEMO_SEED = 9_100_003
"""A glioma-like study among the held-out seeds, which no shipped model was trained on."""


@dataclass(frozen=True)
class Demo:
    """What the demonstration made.

    Parameters
    ----------
    study, labels, picture : Path
        The study's folder, the segmentation and the picture of it.
    lines : tuple of str
        What to tell the user.
    """

    study: Path
    labels: Path
    picture: Path
    lines: tuple[str, ...]

    def can_open_napari(self) -> bool:
        """Tell whether there is a display and napari is installed."""
        has_display = sys.platform in ("win32", "darwin") or any(
            os.environ.get(k) for k in ("DISPLAY", "WAYLAND_DISPLAY")
        )
        return has_display and importlib.util.find_spec("napari") is not None

    def open_napari(self) -> None:
        """Open napari on the study, the result and the dock widget; returns when the window is closed."""
        import napari

        viewer = napari.Viewer(title="napari-brainmvp demo")
        viewer.open(str(self.study), plugin="napari-brainmvp")
        viewer.open(str(self.labels), plugin="napari-brainmvp")
        viewer.window.add_plugin_dock_widget("napari-brainmvp")
        napari.run()


def run_demo(out: Path, model: str | None, device: str, progress: ProgressCallback) -> Demo:
    """Make a synthetic study, read it back from its files, segment it, and draw the result.

    Parameters
    ----------
    out : Path
        Folder; files of an earlier demonstration are replaced.
    model, device
        As for :func:`~napari_brainmvp.inference.segment`.
    """
    folder = out / "study"
    made = make_study(DEMO_SEED, SynthesisSpec(lesion="glioma"))
    write_study(folder, made)
    study = read_study(folder, name="demo")
    result = segment(study, model, SegmentOptions(device=device), progress)
    labels = write_label_map(out / "segmentation.nii.gz", result.labels, result.grid)
    picture = out / "segmentation.png"
    with atomic_path(picture) as temporary:
        draw_result(study, result, temporary)
    volumes = ", ".join(f"{s.name} {s.volume_ml:.0f} ml" for s in result.structures if s.voxels)
    lines = (
        f"{result.model} on {result.device} took {result.seconds:.0f} s for a synthetic glioma study: {volumes}.",
        f"Study:        {folder}",
        f"Segmentation: {labels}",
        f"Picture:      {picture}",
    )
    return Demo(folder, labels, picture, lines)
