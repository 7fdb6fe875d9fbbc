"""Reconstruct one modality from others: hide it, predict it, put it on the scan's own grid, compare.

The network sees one scan at a time, as in pre-training: the target with blocks replaced by a template or by another
modality, or another modality alone. Predictions from several sources, masks and windows are averaged, each voxel with
the inverse of the variance to be expected there as its weight. A source that fails to predict the other given scans at
a voxel is trusted less about the target there. The masks belong to the volume, so where windows lie does not matter.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from napari_brainmvp.errors import ModelError, StudyError
from napari_brainmvp.inference.device import Precision, choose_device, choose_dtype
from napari_brainmvp.inference.masking import block_masks
from napari_brainmvp.inference.reconstruction import (
    TEMPLATE,
    Comparison,
    ReconstructionResult,
    prepared_scan,
    template_of,
)
from napari_brainmvp.inference.windows import SlidingWindow
from napari_brainmvp.models import DEFAULT_ENCODER, LoadedModel, find_model, load_model
from napari_brainmvp.networks import STRIDE, PretrainingNetwork, ReconstructionNetwork, UNet3DPretrainingNetwork
from napari_brainmvp.preparation import PreparedStudy, prepare
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback, no_progress
from napari_brainmvp.study import Scan, Study, modality

__all__ = ["ReconstructionOptions", "impute", "impute_missing", "reconstruct", "template_scan"]


@dataclass(frozen=True)
class ReconstructionOptions:
    """How to reconstruct.

    Parameters
    ----------
    mode : {"whole", "trained"}
        ``"whole"``: complementary masks, so that every voxel is predicted while it is hidden. ``"trained"``: one
        random mask, as in pre-training; the network's output everywhere, judged where it was hidden.
    mask_rate : float
        Share of the target's 8^3 blocks that is hidden at a time, 0 to 1. At 1 nothing of the target is given; at 0
        nothing is hidden and the network is a plain autoencoder.
    seed : int
        Of the masks.
    device, overlap, precision, window_batch
        As in :class:`~napari_brainmvp.inference.SegmentOptions`.
    """

    mode: Literal["whole", "trained"] = "whole"
    mask_rate: float = 1.0
    seed: int = 0
    device: str = "auto"
    overlap: float = 0.5
    precision: Precision = "auto"
    window_batch: int = 0


def reconstruct(
    study: Study,
    model: str | Path | LoadedModel | None,
    target: str,
    sources: Sequence[str] = (),
    options: ReconstructionOptions | None = None,
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
) -> ReconstructionResult:
    """Reconstruct a modality of a study from others.

    Parameters
    ----------
    study : Study
        Without the target only ``mask_rate`` 1 makes sense.
    model : str, Path, LoadedModel or None
        A pre-trained model: name, folder or loaded; None for the one that ships.
    target : str
        Modality wanted, one the model knows.
    sources : sequence of str
        Modalities that stand in for what is hidden, each by itself, and ``"template"``; default all others that the
        study has and the model knows, else the template.
    options : ReconstructionOptions, optional
    progress, cancel
        Reported to and asked at every window.

    Raises
    ------
    StudyError
        The target or a source is not there, not known, or there is nothing to reconstruct from.
    ModelError
        The model cannot be used, or has no templates where they are asked for.
    BrainMVPError
        The mask rate is not between 0 and 1.
    Cancelled
        When the token was set.

    Examples
    --------
    >>> from napari_brainmvp.synthesis import make_study
    >>> result = reconstruct(make_study(1), None, "flair", ("t1", "t2"))  # doctest: +SKIP
    >>> round(result.similarity[0].psnr, 1)  # doctest: +SKIP
    """
    options = options or ReconstructionOptions()
    started = time.perf_counter()
    device = choose_device(options.device)
    progress(Progress("Loading the model"))
    loaded = _load(model)
    key, chosen, warnings = _check(study, loaded, target, sources, options)
    progress(Progress("Preparing the scans"))
    prepared = prepare(study, (key, *(k for k in chosen if k != TEMPLATE)), loaded.card.preparation)
    masks = block_masks(prepared.grid.shape, options.mask_rate, options.seed, complementary=options.mode == "whole")
    window = SlidingWindow(
        patch_size=loaded.card.patch_size,
        overlap=options.overlap,
        batch=options.window_batch,
        device=device,
        dtype=choose_dtype(device, options.precision),
        align=STRIDE,
        step="Reconstructing",
        warnings=warnings,
    )
    fills = _fills(prepared, chosen, loaded, key)
    sums = torch.zeros(len(fills), 3, *prepared.grid.shape)
    for number, (part, source, fill) in enumerate(zip(sums, fills, fills.values(), strict=True)):
        predictor = _Predictor(loaded, key, source, [k for k in fills if k not in (source, TEMPLATE)])
        given = [fills[k] for k in predictor.others]
        for place, mask in enumerate(masks):
            shown = torch.where(mask, fill, prepared.images[0])
            counted = mask if options.mode == "whole" and mask.any() else torch.ones_like(mask)
            report = _part_of(progress, number * len(masks) + place, len(fills) * len(masks))
            seen = torch.stack([shown, counted, *given])
            part += window(predictor, seen, prepared.foreground, _unchanged, report, cancel)
    progress(Progress("Comparing"))
    if cancel is not None:
        cancel.raise_if_cancelled()
    judged = masks[0] if options.mode == "trained" and masks[0].any() else torch.ones_like(masks[0])
    shown = torch.where(masks[0], next(iter(fills.values())), prepared.images[0])
    result = Comparison(study, loaded, key, prepared, sums, judged, tuple(fills), options.mask_rate).result(shown)
    return replace(
        result,
        device=str(window.device),
        seconds=time.perf_counter() - started,
        warnings=(*study.warnings, *warnings),
    )


def impute(
    study: Study,
    model: str | Path | LoadedModel | None,
    target: str,
    sources: Sequence[str] = (),
    options: ReconstructionOptions | None = None,
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
) -> ReconstructionResult:
    """Make a modality the study does not have; see :func:`reconstruct`. ``study.with_scan(result.scan)`` adds it.

    Raises
    ------
    StudyError
        The study has that modality.
    """
    key = modality(target).key
    if key in study.scans:
        raise StudyError(f"{study.name} has a {modality(key).title} scan: nothing to impute. Reconstruct compares it.")
    options = replace(options or ReconstructionOptions(), mode="whole", mask_rate=1.0)
    return reconstruct(study, model, key, sources, options, progress, cancel)


def impute_missing(
    study: Study,
    wanted: Sequence[str],
    model: str | Path | LoadedModel | None,
    options: ReconstructionOptions | None = None,
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
) -> Study:
    """Return the study with every wanted modality that it lacks and the model knows imputed from the scans it has."""
    missing = [key for key in wanted if key not in study.scans]
    if not missing:
        return study
    loaded = _load(model)
    filled = study
    for key in missing:
        if key in loaded.card.modalities:
            filled = filled.with_scan(impute(study, loaded, key, (), options, progress, cancel).scan)
    return filled


def template_scan(study: Study, model: str | Path | LoadedModel | None, target: str) -> Scan:
    """Return a model's template of a modality laid over a study, as a scan in the target's or nominal units.

    Raises
    ------
    StudyError, ModelError
        As :func:`reconstruct`.
    """
    loaded = _load(model)
    key, _, _ = _check(study, loaded, target, (TEMPLATE,), ReconstructionOptions())
    keys = (key, *(k for k in study.scans if k in loaded.card.modalities and k != key))
    prepared = prepare(study, keys, loaded.card.preparation)
    volume = template_of(loaded, key, prepared) * prepared.foreground
    return prepared_scan(study, loaded, key, prepared, volume)


def _load(model: str | Path | LoadedModel | None) -> LoadedModel:
    return model if isinstance(model, LoadedModel) else load_model(find_model(model or DEFAULT_ENCODER), "pretraining")


def _check(
    study: Study, model: LoadedModel, target: str, sources: Sequence[str], options: ReconstructionOptions
) -> tuple[str, tuple[str, ...], list[str]]:
    """Return the target's key, the sources and what the user should know."""
    key, known = modality(target).key, model.card.modalities
    if model.card.network.in_channels != 1:
        raise ModelError(f"{model.card.name} looks at several modalities at once: choose a pre-trained model of one.")
    if key not in known:
        raise StudyError(f"{model.card.name} does not know {target!r}: choose one of {', '.join(known)}.")
    present = [k for k in study.scans if k in known and k != key]
    chosen = tuple(dict.fromkeys(k if k == TEMPLATE else modality(k).key for k in sources)) or tuple(present)
    chosen = chosen or (TEMPLATE,)
    if (wrong := [k for k in chosen if k not in (*present, TEMPLATE)]) != []:
        others = ", ".join([*present, TEMPLATE])
        raise StudyError(f"{wrong[0]!r} cannot be a source for {key} here: choose among {others}.")
    if key not in study.scans and (options.mask_rate < 1 or not present):
        why = "only mask rate 1 can be used" if present else "nor any other scan the model knows"
        raise StudyError(f"{study.name} has no {modality(key).title} scan, {why}: add a scan.")
    made = [study.scans[k].title for k in (key, *chosen) if k in study.scans and study.scans[k].imputed]
    warnings = [f"{title} is itself no real scan." for title in made]
    if options.mask_rate > 0.95 and not isinstance(model.network, ReconstructionNetwork):
        warnings.append(f"{model.card.name} is not told which modality is wanted: it sees that only from what is left.")
    return key, chosen, warnings


def _fills(prepared: PreparedStudy, sources: Sequence[str], model: LoadedModel, key: str) -> dict[str, Tensor]:
    """Return what replaces hidden blocks, per source: (X, Y, Z)."""
    scans = iter(prepared.images[1:])
    return {source: template_of(model, key, prepared) if source == TEMPLATE else next(scans) for source in sources}


def _part_of(progress: ProgressCallback, part: int, parts: int) -> ProgressCallback:
    """Report the progress of one of several equal parts as progress of the whole."""
    return lambda p: progress(replace(p, done=p.done + part * p.total, total=p.total * parts))


def _unchanged(sums: Tensor) -> Tensor:
    return sums


class _Predictor(nn.Module):
    """Maps a shown crop, where it counts, and other given scans, (B, 2 + N, x, y, z), to sums for a weighted mean.

    The sums, (B, 3, x, y, z), are weight times prediction, weight, and weight times predicted variance. With the
    predicted variance s^2 of the target, and z_k the error in predicting the k-th other given scan in its predicted
    standard deviations, the weight is 1 / (s^2 (1 + min_k z_k^2)): what one scan shows of a lesion, a vessel or an
    artefact and another does not is seen in the errors of all that is predicted from it.
    """

    def __init__(self, model: LoadedModel, key: str, source: str, others: Sequence[str]) -> None:
        super().__init__()
        self.network = model.network
        order = (*model.card.modalities, TEMPLATE)
        self.target, self.source = order.index(key), order.index(source)
        self.others = tuple(others)
        self.rows = [order.index(k) for k in others]

    def forward(self, x: Tensor) -> Tensor:
        shown, counted, given = x[:, :1], x[:, 1:2], x[:, 2:]
        if not isinstance(self.network, ReconstructionNetwork):
            network = cast(PretrainingNetwork | UNet3DPretrainingNetwork, self.network)
            return torch.cat([counted * network.reconstruct(shown).float(), counted, counted], 1)
        source = torch.full((len(x),), self.source, device=x.device)
        means, log_variances = self.network.decode(self.network.encode(shown), source)
        wanted = [self.target, *self.rows]
        means, variances = means[:, wanted].float(), log_variances[:, wanted].float().clamp(-10, 5).exp()
        weight = counted / variances[:, :1]
        if self.rows:
            weight = weight / (1 + ((means[:, 1:] - given) ** 2 / variances[:, 1:]).amin(1, keepdim=True))
        return torch.cat([weight * means[:, :1], weight, weight * variances[:, :1]], 1)
