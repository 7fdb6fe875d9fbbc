"""Classify a study: one pass over the whole brain, calibrated probabilities, and what speaks for the class."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from napari_brainmvp.errors import StudyError
from napari_brainmvp.inference.device import choose_device, choose_dtype
from napari_brainmvp.inference.segment import fill_missing, imputed_warning
from napari_brainmvp.models import LoadedModel, find_model, load_model
from napari_brainmvp.networks.classification import ClassificationNetwork
from napari_brainmvp.preparation import prepare
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback, no_progress
from napari_brainmvp.study import Grid, Study

__all__ = ["ClassificationResult", "classify", "resize_box"]


@dataclass(frozen=True, eq=False)
class ClassificationResult:
    """The class of a study.

    Parameters
    ----------
    probabilities : dict of str to float
        Calibrated, summing to 1, in the order of the model's classes.
    saliency : ndarray of shape (i, j, k), float32, 0..1, or None
        What speaks for :attr:`saliency_class`, on :attr:`grid`; relative to its largest value.
    saliency_class : str
        The class it was made for; empty without one.
    grid : Grid
        Of the study's reference scan.
    model, device : str
    seconds : float
        Time it took.
    warnings : tuple of str
        What the user should know, one sentence each.
    """

    probabilities: dict[str, float]
    saliency: NDArray[np.float32] | None
    saliency_class: str
    grid: Grid
    model: str
    device: str
    seconds: float
    warnings: tuple[str, ...]

    @property
    def best(self) -> str:
        """The most probable class."""
        return max(self.probabilities, key=lambda name: self.probabilities[name])


def classify(
    study: Study,
    model: str | Path | LoadedModel,
    *,
    saliency: bool = False,
    target: str = "",
    device: str = "auto",
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
) -> ClassificationResult:
    """Classify a study.

    Parameters
    ----------
    study : Study
        With at least one of the model's modalities; missing ones are replaced as the model's card says.
    model : str, Path or LoadedModel
        A registered name, a model folder, or a loaded model.
    saliency : bool
        Also show what speaks for a class rather than for the others.
    target : str
        That class; empty for the most probable one.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"mps"``.
    progress, cancel
        Told, and asked, between the steps.

    Raises
    ------
    StudyError
        The study has none of the modalities or no foreground, or the model knows no class of the target's name.
    ModelError
        The model cannot be found or used.
    Cancelled
        When the token was set.
    """
    started = time.perf_counter()
    chosen_device = choose_device(device)
    progress(Progress("Loading the model"))
    loaded = model if isinstance(model, LoadedModel) else load_model(find_model(model), "classification")
    card = loaded.card
    if target and target not in card.classes:
        raise StudyError(f"{card.name} knows no class {target!r}: choose {', '.join(card.classes)}.")
    progress(Progress("Preparing the scans"))
    prepared = prepare(study, card.modalities, card.preparation)
    images, warnings = fill_missing(prepared, loaded)
    warnings += imputed_warning(study, card.modalities)
    if cancel is not None:
        cancel.raise_if_cancelled()
    progress(Progress("Classifying"))
    network = loaded.network
    assert isinstance(network, ClassificationNetwork)
    network.to(chosen_device)
    box = resize_box(images, card.patch_size)[None].to(chosen_device)
    dtype = choose_dtype(chosen_device)
    half = dtype != torch.float32
    with torch.autocast(chosen_device.type, dtype if half else None, enabled=half), torch.no_grad():
        probabilities = network(box).cpu().double().softmax(1)[0].tolist()  # in single precision, sure ones all have 1
    named = dict(zip(card.classes, probabilities, strict=True))
    shown, shown_class = None, ""
    if saliency:
        if cancel is not None:
            cancel.raise_if_cancelled()
        progress(Progress("Looking for what speaks for it"))
        shown_class = target or max(named, key=lambda name: named[name])
        heat = network.saliency(box, card.classes.index(shown_class)).cpu()
        full = F.interpolate(heat[None, None], prepared.grid.shape, mode="trilinear", align_corners=False)[0, 0]
        shown = prepared.restore_image(full * prepared.foreground)
    return ClassificationResult(
        named,
        shown,
        shown_class,
        study.grid,
        card.name,
        str(chosen_device),
        time.perf_counter() - started,
        (*study.warnings, *warnings),
    )


def resize_box(images: Tensor, size: Sequence[int]) -> Tensor:
    """Resize prepared channels (C, X, Y, Z) to a network's input (C, *size), float32, by averaging."""
    return F.interpolate(images[None].float(), tuple(size), mode="area")[0]
