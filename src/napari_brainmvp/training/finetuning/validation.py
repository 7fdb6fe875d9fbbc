"""What fine-tuning measures: a quick score on crops while it runs, and whole held-out volumes at its end."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from napari_brainmvp.inference.device import choose_dtype
from napari_brainmvp.inference.windows import SlidingWindow
from napari_brainmvp.io.atomic import atomic_path, write_text_atomic
from napari_brainmvp.models import Metric
from napari_brainmvp.networks import Unions
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback
from napari_brainmvp.training.finetuning.data import Batch, Case, LabelledCrops
from napari_brainmvp.training.finetuning.model import SegmentationModel
from napari_brainmvp.training.finetuning.objective import Activation, segmentation_loss, truth
from napari_brainmvp.training.finetuning.temperature import fit_temperature
from napari_brainmvp.training.labels import LabelDescription
from napari_brainmvp.training.loop import may_fail
from napari_brainmvp.training.metrics import CaseScores, region_scores

__all__ = ["CropValidation", "card_metrics", "measure", "mix_in", "write_scores"]

_CROPS, _KINDS = 8, 8
"""Crops of each held-out case that are looked at during training, at least; labels that some are cut around, at most:
with more of them, the rarest."""
_VOXELS = 4000
"""Voxels of each of them that the temperature is fitted on."""
_PRICE = 0.1
"""Loss of Dice on slices of the training cases that is put up with for a larger share of the start."""


class CropValidation:
    """The same crops of held-out cases, looked at again and again.

    Parameters
    ----------
    crops : LabelledCrops
        Of the held-out cases.
    labels : LabelDescription
    fabric : Fabric
    """

    def __init__(self, crops: LabelledCrops, labels: LabelDescription, fabric: Fabric) -> None:
        self.labels, self.fabric = labels, fabric
        self.batches = [self._to_device(b) for case in crops.cases for b in _centred(crops, case)]

    def _to_device(self, batch: Batch) -> Batch:
        return {key: value[None].to(self.fabric.device) for key, value in batch.items()}

    @torch.no_grad()
    def __call__(self, model: SegmentationModel, picture: Path | None) -> dict[str, float]:
        """Return the pooled Dice of every name that occurs, their mean as ``score``, and the ``loss``.

        Parameters
        ----------
        model : SegmentationModel
            In eval mode.
        picture : Path or None
            PNG to write: the first channel, the truth and the prediction, a row for each crop.
        """
        if not self.batches:
            return {}
        names, first = self.labels.names, 0 if self.labels.regions else 1
        sums = np.zeros((3, len(names)))
        losses, rows = [], []
        for batch in self.batches:
            with self.fabric.autocast():
                logits = model.predict(batch).float()
            target, labelled = truth(batch["rows"], model.table)
            losses.append(float(segmentation_loss(logits, target, labelled, model.activation, model.spec.dice)))
            found = decide(logits, model.activation, model.network.unions) * labelled
            pairs = ((found * target), found, target)
            sums += [part[:, first:].sum((0, 2, 3, 4)).cpu().numpy() for part in pairs]
            rows.append(_row(batch["image"], target[:, first:], found[:, first:]))
        overlap, found_sum, true_sum = sums
        scores = {
            f"dice_{name}": float(2 * overlap[k] / (found_sum[k] + true_sum[k]))
            for k, name in enumerate(names)
            if found_sum[k] + true_sum[k]
        }
        if picture is not None:
            grey = np.concatenate(rows[:8])
            with may_fail(str(picture)), atomic_path(picture) as temporary:
                Image.fromarray((255 * grey.clip(0, 1)).astype(np.uint8)).save(temporary)
        mean = float(np.mean(list(scores.values()))) if scores else 0.0
        every = {f"dice_{name}": scores.get(f"dice_{name}", float("nan")) for name in names}
        return {"score": mean, "loss": float(np.mean(losses)), **every}

    @torch.no_grad()
    def temperature(self, model: SegmentationModel) -> float:
        """Find the T in 0.25..4 for which class logits / T are most likely on held-out voxels; 1 with none held out."""
        logits, targets = [], []
        for batch in self.batches:
            with self.fabric.autocast():
                made = model.predict_classes(batch).float()
            target, labelled = truth(batch["rows"], model.table)
            index = labelled.flatten().nonzero()[:, 0]
            index = index[:: max(1, len(index) // _VOXELS)]
            logits.append(made.movedim(1, -1).flatten(0, 3)[index])
            targets.append(target.movedim(1, -1).flatten(0, 3)[index])
        if not logits:
            return 1.0
        return fit_temperature(torch.cat(logits), torch.cat(targets), model.activation, model.network.unions)


@torch.no_grad()
def mix_in(
    start: Mapping[str, Tensor],
    model: SegmentationModel,
    validation: CropValidation,
    share: float,
    *,
    whole_cases: bool,
) -> tuple[float, dict[float, float]]:
    """Mix the weights that training started from into those it led to, in place.

    w = s w_start + (1 - s) w_trained (Wortsman et al., CVPR 2022). On held-out cases the best of s, s / 2 and 0 is
    taken. Slices of the cases trained on cannot show what is forgotten of other people: there s is halved, and then 0,
    only where the Dice falls by more than 0.1. With nothing held out s is as it is.

    Parameters
    ----------
    start : mapping of str to Tensor
        The model's state before training.
    model : SegmentationModel
        Trained, in eval mode.
    validation : CropValidation
    share : float
        s, 0..1.
    whole_cases : bool
        Whether whole cases were held out, not slices.

    Returns
    -------
    share : float
        What was taken.
    scores : dict of float to float
        The score of each share on what is held out; empty with nothing held out.
    """
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    shares = [s for s in (share, share / 2) if s > 0] + [0.0]

    def mixed(s: float) -> dict[str, Tensor]:
        pairs = {key: (start[key].to(value.device), value) for key, value in trained.items()}
        return {k: torch.lerp(b, a, s) if b.is_floating_point() else b for k, (a, b) in pairs.items()}

    scores: dict[float, float] = {}
    for s in shares if validation.batches else ():
        model.load_state_dict(mixed(s))
        scores[s] = validation(model, None)["score"]
    chosen = share
    if scores:
        enough = max(scores.values()) if whole_cases else scores[0.0] - _PRICE
        chosen = next(s for s, score in scores.items() if score >= enough)
    model.load_state_dict(mixed(chosen))
    return chosen, scores


def decide(logits: Tensor, activation: Activation, unions: Unions | None = None) -> Tensor:
    """Turn logits (B, K, ...) into 0 and 1 of the same shape, as :func:`~napari_brainmvp.inference.segment` decides."""
    if activation == "sigmoid":
        return _regions(logits.sigmoid().movedim(1, 0), unions).movedim(0, 1).float()
    return F.one_hot(logits.argmax(1), logits.shape[1]).movedim(-1, 1).float()


def _centred(crops: LabelledCrops, case: Case) -> list[Batch]:
    """Cut crops of the part of a case that is held out: around voxels of every label in turn, and just anywhere.

    The latter are half of all, or false alarms far from what is looked for would never be seen.
    """
    size, shape = crops.spec.crop, np.array(case.study.volumes.shape[1:])
    rows = crops.labels.rows(np.asarray(case.study.labels))
    if case.slices:
        outside = np.ones(rows.shape[2], bool)
        outside[slice(*case.slices)] = False
        rows[..., outside] = -1
    rng = np.random.default_rng(crops.spec.seed)
    values, counts = np.unique(rows, return_counts=True)
    kinds = [int(row) for row in values[np.argsort(counts, kind="stable")] if row > 0][:_KINDS] or [0]
    found = []
    for k in range(max(_CROPS, 2 * len(kinds))):
        places = np.flatnonzero(rows == kinds[k // 2 % len(kinds)])
        if len(places) == 0:
            continue
        voxel = np.array(np.unravel_index(places[rng.integers(len(places))], rows.shape))
        if k % 2:
            voxel[:2] = rng.integers(0, shape[:2])
            voxel[2] = voxel[2] if case.slices else rng.integers(0, shape[2])
        start = np.clip(voxel - size // 2, np.minimum(0, shape - size), np.maximum(0, shape - size))
        found.append(crops.cut(case, start, training=False))
    return found


def _row(image: Tensor, target: Tensor, found: Tensor) -> NDArray[np.float32]:
    """Lay the slice with most truth side by side, anterior up: first channel, truth, prediction."""
    middle = int(target.sum((0, 1, 2, 3)).argmax())
    shown = image[0, int(image[0].sum((1, 2, 3)).argmax()), :, :, middle] / 2
    steps = torch.arange(1, target.shape[1] + 1, device=target.device)[:, None, None] / target.shape[1]
    maps = [(part[0, ..., middle] * steps).amax(0) for part in (target, found)]
    return np.concatenate([tile.float().cpu().numpy().T[::-1] for tile in (shown, *maps)], 1)


def measure(
    model: SegmentationModel,
    cases: Sequence[Case],
    crops: LabelledCrops,
    patch: tuple[int, int, int],
    spacing: float,
    fabric: Fabric,
    progress: ProgressCallback,
    cancel: CancelToken | None,
) -> list[CaseScores]:
    """Segment whole held-out cases and compare, on the network's grid; of slices held out, only those.

    Where labels are sparse, only labelled voxels are compared, and surfaces are not. ``spacing`` is the edge of the
    grid's voxels in mm.
    """
    labels, found = crops.labels, []
    modalities = list(crops.modalities)
    for number, case in enumerate(cases):
        study = case.study
        shape = study.volumes.shape[1:]
        images = torch.zeros(len(modalities), *shape)
        there = [m in study.modalities for m in modalities]
        for channel, modality in enumerate(modalities):
            if there[channel]:
                images[channel] = torch.from_numpy(np.array(study.volumes[study.modalities.index(modality)])).float()
        foreground = (images > 0).any(0)
        if not all(there):
            missing = [k for k, present in enumerate(there) if not present]
            images[missing] = model.templates.fill(shape).cpu()[missing] * foreground
        window = SlidingWindow(patch, 0.5, 0, fabric.device, choose_dtype(fabric.device))
        sigmoid = model.activation == "sigmoid"
        probabilities = window(model.network, images, foreground, torch.sigmoid if sigmoid else _softmax, cancel=cancel)
        decided = _regions(probabilities, model.network.unions) if sigmoid else _one_hot(probabilities)[1:]
        rows = labels.rows(np.asarray(study.labels))
        part = (slice(None), slice(None), slice(*case.slices) if case.slices else slice(None))
        seen = rows[part] >= 0
        table = labels.table[:, 0 if labels.regions else 1 :]
        scores = {}
        for k, name in enumerate(labels.names):
            true = (table[rows[part].clip(0), k] > 0) & seen
            mask = decided[k].numpy()[part] & seen
            scores[name] = region_scores(mask, true, [spacing] * 3, surface=labels.unlabelled is None)
        found.append(CaseScores(study.name, scores))
        progress(Progress("Measuring held-out cases", number + 1, len(cases)))
    return found


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(1)


def _regions(probabilities: Tensor, unions: Unions | None) -> Tensor:
    return probabilities > 0.5 if unions is None else unions.decide(probabilities)


def _one_hot(probabilities: Tensor) -> Tensor:
    return F.one_hot(probabilities.argmax(0), len(probabilities)).movedim(-1, 0) > 0


def write_scores(path: Path, found: Sequence[CaseScores]) -> None:
    """Write a CSV with a line for each case and name."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("case", "name", "dice", "hd95_mm", "volume_ml", "truth_ml"))
    for case in found:
        for name, s in case.scores.items():
            writer.writerow((case.case, name, *(f"{value:.4f}" for value in (s.dice, s.hd95, s.volume_ml, s.truth_ml))))
    write_text_atomic(path, text.getvalue())


def card_metrics(found: Sequence[CaseScores], data: str) -> tuple[Metric, ...]:
    """Average the scores over cases for a model's card, of what at least one of them shows."""
    metrics = []
    for name in found[0].scores if found else ():
        if not any(case.scores[name].truth_ml for case in found):
            continue  # a Dice of 1 for finding nothing would say that it is found
        for what, values in (
            ("Dice", [case.scores[name].dice for case in found]),
            ("HD95 in mm", [case.scores[name].hd95 for case in found]),
        ):
            if not np.isnan(values).any():
                value = round(float(np.mean(values)), 4)
                metrics.append(
                    Metric(data=data, name=f"{what}, {name}", value=value, n=len(found), script="brainmvp finetune")
                )
    return tuple(metrics)
