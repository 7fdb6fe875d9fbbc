"""How well hidden parts of held-out studies are reconstructed, as numbers and as a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.fabric import Fabric
from monai.metrics.regression import compute_ssim_and_cs
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from napari_brainmvp.io.atomic import atomic_path
from napari_brainmvp.training.cache import CachedStudy
from napari_brainmvp.training.loop import may_fail
from napari_brainmvp.training.pretraining.data import Batch, read_sample
from napari_brainmvp.training.pretraining.model import PretrainingModel
from napari_brainmvp.training.pretraining.tasks import psnr

__all__ = ["central_batch", "validate"]

_PEAK = 2.0
"""Prepared intensity shown as white: twice the median tissue."""


@torch.no_grad()
def validate(
    model: PretrainingModel, studies: Sequence[CachedStudy], picture: Path | None, fabric: Fabric
) -> dict[str, float]:
    """Reconstruct the central crop of every modality of held-out studies, masked always in the same way.

    Parameters
    ----------
    model : PretrainingModel
    studies : sequence of CachedStudy
    picture : Path or None
        PNG to write: per modality the original, masked, reconstructed and template slice, and the error.
    fabric : Fabric
        Device and precision.

    Returns
    -------
    dict of str to float
        ``psnr_KEY`` in dB and ``ssim_KEY``, hidden voxels inside the head and the whole crop, of view A; with
        ``_from_other`` for view B. Means over the studies that have the modality. Where only hidden voxels are
        learned, the shown ones are taken as they are.
    """
    model.eval()
    found: dict[str, list[float]] = defaultdict(list)
    rows: dict[str, NDArray[np.float32]] = {}
    for number, study in enumerate(studies):
        for channel, key in enumerate(study.modalities):
            if key not in model.spec.modalities:
                continue
            batch = central_batch(model, study, channel, number, fabric.device)
            views = model.views(batch, 1.0)
            masks, image = views.masks, views.image
            with fabric.autocast():
                mean = model.predict(views.shown, views.source).of(batch["target"].repeat(2)).means.float()
            if model.spec.masked_loss:  # what is shown is no task then, and what comes out there means nothing
                mean = torch.where(masks, mean, image)
            for row, suffix in enumerate(("", "_from_other") if batch["other"] != batch["target"] else ("",)):
                hidden = masks[row : row + 1] & views.head
                found[f"psnr_{key}{suffix}"].append(psnr(mean[row : row + 1], image, hidden))
                similarity, _ = compute_ssim_and_cs(
                    mean[row : row + 1],
                    image,
                    3,
                    (7, 7, 7),
                    (1.5, 1.5, 1.5),
                    data_range=float(image.max().clamp(min=1)),
                )
                found[f"ssim_{key}{suffix}"].append(float(similarity.mean()))
            rows.setdefault(key, _row(image, views.shown[:1], mean[:1], views.template, mean[:1] - image))
    if picture is not None and rows:
        grey = np.concatenate([rows[key] for key in model.spec.modalities if key in rows])
        with may_fail(str(picture)), atomic_path(picture) as temporary:
            Image.fromarray((255 * grey.clip(0, 1)).astype(np.uint8)).save(temporary)
    return {name: float(np.nanmean(values)) for name, values in found.items() if not np.isnan(values).all()}


def central_batch(
    model: PretrainingModel, study: CachedStudy, channel: int, number: int, device: torch.device
) -> Batch:
    """Cut the crop in the middle of a study, a batch of one; the other modality is the next one it has."""
    spec = model.spec
    usable = [key for key in study.modalities if key in spec.modalities]
    target = study.modalities[channel]
    other = usable[(usable.index(target) + 1) % len(usable)]
    start = (np.array(study.volumes.shape[1:]) - spec.crop) // 2
    sample = read_sample(study, spec, start, target, other)
    return {key: value[None].to(device) for key, value in sample.items()} | {"number": torch.tensor(number)}


def _row(image: Tensor, masked: Tensor, mean: Tensor, template: Tensor, error: Tensor) -> NDArray[np.float32]:
    """Lay middle axial slices side by side, anterior up; the error is grey where there is none."""
    middle = image.shape[-1] // 2
    shown = [part[0, 0, :, :, middle] / _PEAK for part in (image, masked, mean, template)]
    shown.append(0.5 + error[0, 0, :, :, middle])
    tiles = [tile.float().cpu().numpy().T[::-1] for tile in shown]
    return np.concatenate(tiles, 1)
