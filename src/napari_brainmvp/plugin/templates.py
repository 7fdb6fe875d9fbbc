"""Modality templates as image layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from napari_brainmvp.errors import ModelError
from napari_brainmvp.plugin.layers import Frame, LayerTuple, scan_layer
from napari_brainmvp.study import Grid, Modality, Scan, modality

__all__ = ["Templates", "read_templates", "template_layers"]

_HEAD_MM = 152.0
"""Length given to the left-right axis of a template in the box's frame, which has no millimetres of its own."""


class Templates(NamedTuple):
    """Of all modalities of a model or run: volumes (M, X, Y, Z), float32, along right, anterior and superior.

    ``frame`` is ``"box"``, over a study's foreground, or ``"centred"``, of 1 mm voxels.
    """

    modalities: tuple[str, ...]
    volumes: NDArray[np.float32]
    frame: str


def read_templates(folder: Path) -> Templates:
    """Read the templates of a model, or of a run: its model's, or as they emerge, its last checkpoint's. Imports torch.

    Parameters
    ----------
    folder : Path
        Of a model, or of a pre-training run.

    Raises
    ------
    ModelError
        There are none, or none yet.
    """
    from napari_brainmvp.models import find_model, load_model
    from napari_brainmvp.training.checkpoints import last_checkpoint
    from napari_brainmvp.training.pretraining.spec import read_spec

    for place in (folder, folder / "model"):
        if (place / "card.json").is_file():
            entry = find_model(place)
            templates = load_model(entry, entry.card.task).templates
            if templates is None:
                raise ModelError(f"The model {entry.card.name} has no templates: choose one that was pre-trained.")
            return Templates(entry.card.modalities, templates.volumes.numpy(), entry.card.template_frame)
    state = last_checkpoint(folder) or {}
    volumes = next((v for k, v in state.get("average", {}).items() if k.endswith("templates.volumes")), None)
    if volumes is None:
        raise ModelError("There are no templates yet: wait for the first checkpoint.")
    spec = read_spec(folder / "spec.json", None, {})
    return Templates(spec.modalities, volumes.float().numpy(), spec.template_frame)


def template_layers(templates: Templates, frame: Frame | None = None) -> list[LayerTuple]:
    """Turn templates into napari's layer tuples, one per modality that was learned; the first is visible."""
    size = np.array(templates.volumes.shape[1:])
    voxel = 1.0 if templates.frame == "centred" else _HEAD_MM / size[0]
    affine = np.diag([voxel] * 3 + [1.0])
    affine[:3, 3] = -voxel * (size - 1) / 2
    layers: list[LayerTuple] = []
    for key, volume in zip(templates.modalities, templates.volumes, strict=True):
        if not np.ptp(volume):
            continue  # none of the studies had this modality
        looked_at = Modality("result", modality(key).title, "")  # and no scan of the study
        scan = Scan(looked_at, np.ascontiguousarray(volume), Grid(volume.shape, affine), imputed=True)
        data, options, kind = scan_layer(scan, np.eye(4) if frame is None else frame, visible=not layers)
        extra: dict[str, Any] = {"name": f"Template {modality(key).title}", "interpolation2d": "linear"}
        layers.append((data, options | extra, kind))
    return layers
