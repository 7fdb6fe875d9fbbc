"""Segment a study: prepare, run the network in windows, decide on the scan's own grid, measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napari_brainmvp.errors import StudyError
from napari_brainmvp.inference.device import Precision, choose_device, choose_dtype
from napari_brainmvp.inference.reconstruct import ReconstructionOptions, impute_missing
from napari_brainmvp.inference.result import SegmentationResult, measure
from napari_brainmvp.inference.windows import SlidingWindow
from napari_brainmvp.models import LoadedModel, ModelCard, find_model, load_model
from napari_brainmvp.networks import Unions
from napari_brainmvp.preparation import PreparedStudy, prepare
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback, no_progress
from napari_brainmvp.study import Grid, Study, modality

__all__ = ["SegmentOptions", "activation", "decide_labels", "decide_regions", "fill_missing", "segment"]


@dataclass(frozen=True)
class SegmentOptions:
    """How to segment; the defaults suit nearly everyone.

    Parameters
    ----------
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"mps"``.
    overlap : float
        Share of a window that its neighbour covers, 0 to 0.9.
    mirror : bool
        Average with the left-right mirror image: twice the time, a little more accurate.
    precision : {"auto", "float32", "bfloat16"}
    window_batch : int
        Windows computed together; 0 chooses one on a CPU, and a few small ones elsewhere.
    probabilities, uncertainty : bool
        Also return these maps.
    target : str
        Modality key of the scan on whose grid the result is given; empty for the study's reference.
    impute : str
        Name or folder of a pre-trained model that imputes missing modalities first; empty leaves it to the model's
        templates.
    """

    device: str = "auto"
    overlap: float = 0.5
    mirror: bool = False
    precision: Precision = "auto"
    window_batch: int = 0
    probabilities: bool = False
    uncertainty: bool = False
    target: str = ""
    impute: str = ""


def segment(
    study: Study,
    model: str | Path | LoadedModel | None = None,
    options: SegmentOptions | None = None,
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
) -> SegmentationResult:
    """Segment a study.

    Parameters
    ----------
    study : Study
        With at least one of the model's modalities; missing ones are replaced as the model's card says.
    model : str, Path or LoadedModel, optional
        A registered name, a model folder, or a loaded model; default the one that ships.
    options : SegmentOptions, optional
    progress, cancel
        Reported to and asked after every layer of every window.

    Returns
    -------
    SegmentationResult
        On the grid of the study's reference scan, or of ``options.target``.

    Raises
    ------
    StudyError
        The study has none of the modalities, no foreground, or no scan of the target's name.
    ModelError
        The model cannot be found or used.
    Cancelled
        When the token was set.

    Examples
    --------
    >>> from napari_brainmvp.synthesis import make_study
    >>> result = segment(make_study(1))  # doctest: +SKIP
    >>> {s.name: round(s.volume_ml) for s in result.structures}  # doctest: +SKIP
    """
    options = options or SegmentOptions()
    started = time.perf_counter()
    target = _target_grid(study, options.target)
    device = choose_device(options.device)
    progress(Progress("Loading the model"))
    loaded = model if isinstance(model, LoadedModel) else load_model(find_model(model))
    card = loaded.card
    if options.impute:
        how = ReconstructionOptions(device=options.device, precision=options.precision)
        study = impute_missing(study, card.modalities, options.impute, how, progress, cancel)
    progress(Progress("Preparing the scans"))
    prepared = prepare(study, card.modalities, card.preparation)
    images, warnings = fill_missing(prepared, loaded)
    warnings += imputed_warning(study, card.modalities)
    window = SlidingWindow(
        patch_size=card.patch_size,
        overlap=options.overlap,
        batch=options.window_batch,
        device=device,
        dtype=choose_dtype(device, options.precision),
        mirror=options.mirror,
        warnings=warnings,
    )
    probabilities = window(loaded.network, images, prepared.foreground, activation(card), progress, cancel)
    progress(Progress("Measuring"))
    regions = decide_regions(probabilities, prepared, card, target) if card.activation == "sigmoid" else None
    labels = _classes(probabilities, prepared, card, target) if regions is None else _paint(regions, card)
    if cancel is not None:
        cancel.raise_if_cancelled()
    return SegmentationResult(
        labels=labels,
        regions=regions,
        grid=target,
        structures=measure(
            labels, target, card.labels, None if regions is None else dict(zip(card.channels, regions, strict=True))
        ),
        probabilities=_restore_all(probabilities, prepared, target) if options.probabilities else None,
        channel_names=_channel_names(card),
        uncertainty=_uncertainty(probabilities, prepared, card, target) if options.uncertainty else None,
        model=card.name,
        device=str(window.device),
        seconds=time.perf_counter() - started,
        warnings=(*study.warnings, *warnings),
    )


def _target_grid(study: Study, target: str) -> Grid:
    if not target:
        return study.grid
    key = modality(target).key
    if key not in study.scans:
        raise StudyError(f"{study.name} has no {target!r} scan to give the result on: choose {', '.join(study.scans)}.")
    return study.scans[key].grid


def activation(card: ModelCard) -> Callable[[Tensor], Tensor]:
    """Return what turns a model's logits (B, K, x, y, z) into probabilities."""
    return _softmax if card.activation == "softmax" else torch.sigmoid


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(1)


def imputed_warning(study: Study, keys: Sequence[str]) -> list[str]:
    """Say which of these modalities were not measured."""
    made = [scan.modality.title for key, scan in study.scans.items() if key in keys and scan.imputed]
    return [f"{', '.join(made)} imputed from the other scans, not measured: expect less accuracy."] if made else []


def fill_missing(prepared: PreparedStudy, model: LoadedModel) -> tuple[Tensor, list[str]]:
    """Put the model's templates where modalities are missing, inside the foreground only; say so in warnings."""
    missing = [k for k, present in enumerate(prepared.present) if not present]
    if not missing:
        return prepared.images, []
    names = ", ".join(modality(model.card.modalities[k]).title for k in missing)
    images = prepared.images.clone()
    if model.templates is not None and model.card.fill_missing == "template":
        images[missing] = model.templates.fill(prepared.images.shape[1:])[missing] * prepared.foreground
        return images, [f"{names} missing: replaced by the model's template, so expect less accuracy."]
    return images, [f"{names} missing: left empty, so expect less accuracy."]


def decide_labels(probabilities: Tensor, prepared: PreparedStudy, card: ModelCard, target: Grid) -> NDArray[Any]:
    """Turn channel probabilities (K, X, Y, Z) into label values on the target grid.

    Exclusive classes by the most probable one, regions made of such by the most probable combination of regions; other
    regions each by itself, where it is more probable than not. Of several regions, a voxel gets the last one's value.
    """
    if card.activation == "softmax":
        return _classes(probabilities, prepared, card, target)
    return _paint(decide_regions(probabilities, prepared, card, target), card)


def decide_regions(probabilities: Tensor, prepared: PreparedStudy, card: ModelCard, target: Grid) -> NDArray[np.bool_]:
    """Turn channel probabilities (R, X, Y, Z) of regions into where each is on the target grid, (R, i, j, k).

    Regions made of exclusive classes by the most probable combination, others each where it is more probable than not.
    """
    unions = Unions(card.network.parts, overlapping=True) if card.network.parts else None
    if unions is not None and (shares := unions.split(probabilities)) is not None:
        kind = prepared.restore_classes(shares, target)
        return np.array([[region in k for k in unions.kinds] for region in range(len(probabilities))])[:, kind]
    return np.stack([prepared.restore_image(region, target) > 0.5 for region in probabilities])


def _paint(regions: NDArray[np.bool_], card: ModelCard) -> NDArray[Any]:
    values = _values(card)
    labels = np.zeros(regions.shape[1:], values.dtype)
    for value, region in zip(values, regions, strict=True):
        labels[region] = value
    return labels


def _classes(probabilities: Tensor, prepared: PreparedStudy, card: ModelCard, target: Grid) -> NDArray[Any]:
    labels: NDArray[Any] = _values(card)[prepared.restore_classes(probabilities, target)]
    return labels


def _values(card: ModelCard) -> NDArray[Any]:
    return np.array(card.channels, np.uint16 if max(card.channels, default=0) > 255 else np.uint8)


def _channel_names(card: ModelCard) -> tuple[str, ...]:
    names = {0: "Background", **{label.value: label.name for label in card.labels}}
    return tuple(names[value] for value in card.channels)


def _restore_all(probabilities: Tensor, prepared: PreparedStudy, target: Grid) -> NDArray[np.float16]:
    restored = np.empty((len(probabilities), *target.shape), np.float16)
    for channel, image in zip(restored, probabilities, strict=True):
        channel[...] = prepared.restore_image(image, target)
    return restored


def _uncertainty(probabilities: Tensor, prepared: PreparedStudy, card: ModelCard, target: Grid) -> NDArray[np.float32]:
    """Entropy over its maximum: of the classes for softmax, averaged over the regions for sigmoid."""
    entropy = torch.zeros(probabilities.shape[1:])
    for p in probabilities:
        entropy -= torch.xlogy(p, p)
        if card.activation == "sigmoid":
            entropy -= torch.xlogy(1 - p, 1 - p)
    largest = np.log(len(probabilities)) if card.activation == "softmax" else len(probabilities) * np.log(2)
    restored: NDArray[np.float32] = prepared.restore_image((entropy / largest).clamp(0, 1), target)
    return restored
