"""Modality templates as image layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_brainmvp.errors import ModelError
from napari_brainmvp.plugin.layers import Frame, LayerTuple, scan_layer
from napari_brainmvp.study import Grid, Scan, modality

__all__ = ["run_templates", "template_layers"]

_HEAD_MM = 152.0
"""Length given to the left-right axis of a template in the box's frame, which has no millimetres of its own."""


def run_templates(run: Path) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Read the templates of a run: its model's, or as they emerge, its last checkpoint's. Imports torch.

    Parameters
    ----------
    run : Path
        Folder of a pre-training run.

    Returns
    -------
    modalities : tuple of str
    volumes : ndarray of shape (M, X, Y, Z), float32
        Along right, anterior and superior.

    Raises
    ------
    ModelError
        There are none yet.
    """
    from napari_brainmvp.models import find_model, load_model
    from napari_brainmvp.training.checkpoints import last_checkpoint
    from napari_brainmvp.training.pretraining.spec import read_spec

    if (run / "model" / "card.json").is_file():
        loaded = load_model(find_model(run / "model"), "pretraining")
        if loaded.templates is not None:
            return loaded.card.modalities, loaded.templates.volumes.numpy()
    state = last_checkpoint(run) or {}
    volumes = next((v for k, v in state.get("average", {}).items() if k.endswith("templates.volumes")), None)
    if volumes is None:
        raise ModelError(f"{run} has no templates yet: wait for the first checkpoint.")
    return read_spec(run / "spec.json", None, {}).modalities, volumes.float().numpy()


def template_layers(
    modalities: tuple[str, ...], volumes: NDArray[np.float32], frame: Frame | None = None
) -> list[LayerTuple]:
    """Turn templates into napari's layer tuples, one per modality that was learned; the first is visible."""
    size = np.array(volumes.shape[1:])
    affine = np.diag([_HEAD_MM / size[0]] * 3 + [1.0])
    affine[:3, 3] = -affine[0, 0] * (size - 1) / 2
    layers: list[LayerTuple] = []
    for key, volume in zip(modalities, volumes, strict=True):
        if not np.ptp(volume):
            continue  # none of the studies had this modality
        scan = Scan(modality(key), np.ascontiguousarray(volume), Grid(volume.shape, affine))
        data, options, kind = scan_layer(scan, np.eye(4) if frame is None else frame, visible=not layers)
        extra: dict[str, Any] = {"name": f"Template {modality(key).title}", "interpolation2d": "linear"}
        layers.append((data, options | extra, kind))
    return layers
