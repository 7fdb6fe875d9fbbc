"""Open scans and study folders as layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from napari_brainmvp.errors import StudyError
from napari_brainmvp.io import guess_modality, is_image_path, is_label_name, read_label_map, read_scan, read_study, stem
from napari_brainmvp.io.dicom import holds_dicom
from napari_brainmvp.plugin.layers import (
    KEY,
    Frame,
    LayerTuple,
    labels_layer,
    scan_layer,
    shared_frame,
    study_layers,
    upright_frame,
)
from napari_brainmvp.study import Modality

__all__ = ["get_reader", "read_layers"]


def get_reader(path: str | Sequence[str]) -> Callable[[str | Sequence[str]], list[LayerTuple]] | None:
    """Return a reader where this plugin can read all the paths (napari's reader contribution)."""
    paths = [Path(p) for p in ([path] if isinstance(path, str) else path)]
    return read_layers if paths and all(_readable(p) for p in paths) else None


def _readable(path: Path) -> bool:
    if not path.is_dir():
        return is_image_path(path)
    try:
        return holds_dicom(path) or any(is_image_path(p) or (p.is_dir() and _readable(p)) for p in path.iterdir())
    except OSError:
        return False


def read_layers(path: str | Sequence[str]) -> list[LayerTuple]:
    """Read study folders, DICOM folders and files into layer tuples.

    Files whose modality cannot be told open all the same, under their own names. Everything is shown in the frame of
    what the viewer already shows, so that it lies on top of it.
    """
    paths = [Path(p) for p in ([path] if isinstance(path, str) else path)]
    frame = _frame_on_screen()
    layers: list[LayerTuple] = []
    for one in paths:
        opened = _study(one, frame) if one.is_dir() and not holds_dicom(one) else _file(one, frame)
        frame = opened[0][1]["metadata"][KEY].frame
        layers += opened
    return layers


def _frame_on_screen() -> Frame | None:
    import napari

    viewer = napari.current_viewer()
    return None if viewer is None else shared_frame(viewer.layers)


def _study(folder: Path, frame: Frame | None) -> list[LayerTuple]:
    try:
        return study_layers(read_study(folder), frame)
    except StudyError:
        children = [p for p in folder.iterdir() if p.is_dir()]
        if len(children) != 1:
            raise
        return study_layers(read_study(children[0]), frame)  # a folder around the study's folder


def _file(path: Path, frame: Frame | None) -> list[LayerTuple]:
    if is_label_name(path):
        labels = read_label_map(path)
        return [labels_layer(labels, upright_frame(labels.grid) if frame is None else frame)]
    kind = guess_modality(path) or Modality(stem(path).lower(), stem(path), "unknown")
    scan, _ = read_scan(path, kind)
    return [scan_layer(scan, upright_frame(scan.grid) if frame is None else frame)]
