"""From annotated datasets to an endless, reproducible stream of crops with labels."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from napari_brainmvp.errors import StudyError
from napari_brainmvp.io import by_subject
from napari_brainmvp.preparation import PreparationSpec
from napari_brainmvp.progress import CancelToken, ProgressCallback, no_progress
from napari_brainmvp.study import MODALITIES
from napari_brainmvp.training.cache import CachedStudy, Problem, cache_studies, cache_synthetic
from napari_brainmvp.training.finetuning.begun import lacks_all
from napari_brainmvp.training.finetuning.spec import FinetuneSpec
from napari_brainmvp.training.labels import IGNORED, LabelDescription
from napari_brainmvp.training.meaning import describe_labels
from napari_brainmvp.training.sources import find_all

__all__ = ["Batch", "Case", "LabelledCrops", "choose_modalities", "collect", "split"]

Batch = dict[str, Tensor]
"""``image`` (B, C, n, n, n) float32, 0 where a study lacks the modality; ``rows`` (B, n, n, n) int64, see
:meth:`LabelDescription.rows`; ``shown`` (B, V, C) bool, which channels each of V views leaves as they are;
``start``, ``stop`` (B, 3) float32, where the crop lies in the templates' frame."""

logger = logging.getLogger(__name__)
_CANDIDATES = 2000
"""Voxels of each label that crops are placed around."""


@dataclass(frozen=True)
class Case:
    """A prepared study with labels, or a part of it.

    Parameters
    ----------
    study : CachedStudy
    slices : (int, int) or None
        Axial slices, first and one past the last, that are kept back from training and measured; None for all or
        none, whichever the list says that it is in.
    """

    study: CachedStudy
    slices: tuple[int, int] | None = None


def collect(
    spec: FinetuneSpec,
    preparation: PreparationSpec,
    cache: Path,
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
) -> tuple[list[CachedStudy], LabelDescription, list[Problem]]:
    """Find and prepare all studies with labels, and what the labels mean.

    Raises
    ------
    StudyError
        No usable study is left; the message tells the first reason.
    """
    found: list[CachedStudy] = []
    problems: list[Problem] = []
    for source, files, unreadable in find_all(spec.data):
        if (seeds := source.seeds) is not None:
            found += cache_synthetic(seeds, cache, preparation, progress, cancel, labels=True, workers=spec.workers)
            continue
        studies, bad = cache_studies(files, cache, preparation, progress, cancel, labels=True, workers=spec.workers)
        found += studies
        problems += [*(Problem(name, reason) for name, reason in unreadable), *bad]
    labels = spec.labels or describe_labels(spec.data) or _count(found)
    good = []
    for study in found:
        reason = _objection(study, labels, spec.modalities) if labels else "has no label other than 0"
        if reason:
            problems.append(Problem(study.name, reason))
        else:
            good.append(study)
    if not good or labels is None:
        why = f" The first problem: {problems[0].name}: {problems[0].reason}" if problems else ""
        raise StudyError(f"There is no study with labels in {', '.join(s.path for s in spec.data)}.{why}")
    return good, labels, problems


def _count(studies: Sequence[CachedStudy]) -> LabelDescription | None:
    values = {int(v) for study in studies for v in np.unique(study.labels)} - {0}
    return LabelDescription.of_values(values) if values else None


def _objection(study: CachedStudy, labels: LabelDescription, modalities: Sequence[str]) -> str:
    if modalities and (reason := lacks_all(study, modalities)):
        return reason
    values = np.unique(study.labels)
    if labels.strange(values):
        return f"has the label values {labels.strange(values)[:5]}, which are not described"
    return "has no labelled voxel" if set(map(int, values)) == {labels.unlabelled} else ""


def choose_modalities(studies: Sequence[CachedStudy]) -> tuple[str, ...]:
    """Return the modalities that at least half of the studies have, in the project's order."""
    counts = {m: sum(m in s.modalities for s in studies) for s in studies for m in s.modalities}
    often = [m for m, count in counts.items() if 2 * count >= len(studies)] or list(counts)
    known = list(MODALITIES)
    return tuple(sorted(often, key=lambda m: (known.index(m) if m in known else len(known), m)))


def split(
    studies: Sequence[CachedStudy], spec: FinetuneSpec, labels: LabelDescription
) -> tuple[list[Case], list[Case]]:
    """Part cases to train on from those held out; with few studies, slices of each are held out instead.

    With ``spec.held_out`` None, a fifth of four or more subjects is held out, spread evenly; of fewer, every study
    keeps back a block of a fifth of its labelled axial slices, one of three or four. The block is the one nearest to
    the middle that shows something and leaves some of every class to train on; where there is none, or fewer than
    three slices are labelled, the study keeps back nothing. Slices of the scan count: those of the network's grid that
    lie in one slice of a thick-sliced scan have the same labels, and stay together.
    """
    people = by_subject([study.name for study in studies])
    count = len(people) // 5 or 1 if spec.held_out is None else min(spec.held_out, len(people) - 1)
    if spec.held_out is None and len(people) < 4:
        cases = [Case(study, _slices(study, labels)) for study in studies]
        kept = [case for case in cases if case.slices]
        if not kept:
            logger.warning(
                "Nothing is held out: training does not stop early, nothing is measured, and probabilities are not "
                "calibrated. Label every class on three slices or more, or give four studies."
            )
        return cases, kept
    chosen = {round((k + 0.5) * len(people) / count - 0.5) for k in range(count)} if count else set()
    held = {index for k in chosen for index in people[k]}
    train = [Case(study) for k, study in enumerate(studies) if k not in held]
    return train, [Case(study) for k, study in enumerate(studies) if k in held]


def _slices(study: CachedStudy, labels: LabelDescription) -> tuple[int, int] | None:
    rows = labels.rows(np.asarray(study.labels))
    known = [row for row in np.unique(rows) if row != IGNORED]
    occurs = np.stack([(rows == row).any((0, 1)) for row in known])  # (classes, slices)
    something: NDArray[np.bool_] = np.any(occurs[[row > 0 for row in known]], axis=0)
    z = np.flatnonzero(something if labels.unlabelled is None else occurs.any(0))
    if len(z) < 3:
        return None
    slices = _of_the_scan(z, rows, study.thickness)
    if len(slices) < 3:
        return None
    count = len(slices) // 5 or 1
    middle = round(0.4 * len(slices))
    for first in sorted(range(len(slices) - count + 1), key=lambda k: abs(k - middle)):
        block = slice(int(slices[first][0]), int(slices[first + count - 1][-1]) + 1)
        rest = occurs.copy()
        rest[:, block] = False
        if something[block].any() and rest.any(1).all():
            return block.start, block.stop
    return None


def _of_the_scan(z: NDArray[np.int64], rows: NDArray[np.int64], thickness: float) -> list[NDArray[np.int64]]:
    """Put those of some axial slices together that lie in one of the scan: alike, side by side, and as many at most."""
    most = math.ceil(thickness - 0.25) if thickness else len(z)
    slices: list[list[int]] = []
    for here in z:
        same = slices and slices[-1][-1] == here - 1 and (rows[..., here] == rows[..., here - 1]).all()
        if same and len(slices[-1]) < most:
            slices[-1].append(int(here))
        else:
            slices.append([int(here)])
    return [np.array(members) for members in slices]


class LabelledCrops(IterableDataset[Batch]):
    """Endless batches of crops; batch number k is the same whenever and by however many processes it is read.

    Parameters
    ----------
    cases : sequence of Case
    modalities : sequence of str
        Channels.
    labels : LabelDescription
    spec : FinetuneSpec
        Gives crop, batch, augmentation and seed.
    first : int
        Number of the first batch.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        modalities: Sequence[str],
        labels: LabelDescription,
        spec: FinetuneSpec,
        first: int = 0,
    ) -> None:
        self.cases, self.modalities, self.labels, self.spec, self.first = list(cases), modalities, labels, spec, first
        self._voxels: dict[Case, list[NDArray[np.int64]]] = {}

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, step = (self.first, 1) if worker is None else (self.first + worker.id, worker.num_workers)
        while True:
            yield self.batch(number)
            number += step

    def batch(self, number: int) -> Batch:
        """Read one batch by its number."""
        rows = [self.sample(number * self.spec.batch + k) for k in range(self.spec.batch)]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def sample(self, index: int) -> Batch:
        """Draw one sample by its number in the run; every case comes once before any comes again."""
        spec = self.spec
        rng = np.random.default_rng([spec.seed, index])
        turn, position = divmod(index, len(self.cases))
        order = np.random.default_rng([spec.seed, 1, turn]).permutation(len(self.cases))
        case = self.cases[int(order[position])]
        sample = self.cut(case, self._start(case, rng), training=True)
        image = sample["image"]
        inside = image > 0
        for channel in range(len(image)):
            scale, shift = (
                1 + rng.uniform(-spec.intensity, spec.intensity),
                rng.uniform(-spec.intensity, spec.intensity),
            )
            image[channel] = torch.where(inside[channel], image[channel] * scale + shift, 0.0)
        for axis in range(3):
            if rng.random() < spec.flip[axis]:
                sample["image"] = sample["image"].flip(axis + 1)
                sample["rows"] = sample["rows"].flip(axis)
                first, last = sample["start"][axis].clone(), sample["stop"][axis].clone()
                sample["start"][axis], sample["stop"][axis] = last, first
        views = 2 if spec.consistency else 1
        sample["shown"] = torch.stack([self._view(sample["shown"][0], rng) for _ in range(views)])
        return sample

    def _view(self, present: Tensor, rng: np.random.Generator) -> Tensor:
        """Choose the channels of a view that keep their scan: at least one of those that are there."""
        shown = present.clone()
        there = present.nonzero()[:, 0].numpy()
        if rng.random() < self.spec.mixing:
            shown[rng.permutation(there)[: rng.integers(0, len(there))]] = False
        return shown

    def _start(self, case: Case, rng: np.random.Generator) -> NDArray[np.int64]:
        crop, shape = self.spec.crop, np.array(case.study.volumes.shape[1:])
        kinds = self.voxels(case)
        if kinds and rng.random() < self.spec.foreground:
            voxels = kinds[int(rng.integers(len(kinds)))]
            start = voxels[int(rng.integers(len(voxels)))] - crop // 2 + rng.integers(-crop // 4, crop // 4 + 1, 3)
        else:
            start = rng.integers(-8, np.maximum(shape - crop + 8, -7))
        held: NDArray[np.int64] = np.clip(start, np.minimum(0, shape - crop), np.maximum(0, shape - crop))
        return held

    def voxels(self, case: Case) -> list[NDArray[np.int64]]:
        """List some voxels of every label in the part of a case that is trained on, (n, 3) each.

        Where labels are sparse and there is none, some of the labelled background.
        """
        known = self._voxels.get(case)
        if known is None:
            rows = self.labels.rows(np.asarray(case.study.labels))
            if case.slices:
                rows[..., slice(*case.slices)] = IGNORED
            wanted = [row for row in np.unique(rows) if row > 0]
            if not wanted and self.labels.unlabelled is not None:
                wanted = [0]
            rng = np.random.default_rng(self.spec.seed)
            known = []
            for row in wanted:
                places = np.flatnonzero(rows == row)
                chosen = rng.choice(places, min(len(places), _CANDIDATES), replace=False)
                known.append(np.stack(np.unravel_index(np.sort(chosen), rows.shape), 1))
            self._voxels[case] = known
        return known

    def cut(self, case: Case, start: NDArray[np.int64], *, training: bool) -> Batch:
        """Read a cube with its corner at ``start``; beyond the volume images are 0 and nothing is labelled.

        Of a case with slices held back, the labels are those outside of them in training, and those inside otherwise.
        """
        crop, study = self.spec.crop, case.study
        shape = np.array(study.volumes.shape[1:])
        low, high = np.maximum(start, 0), np.minimum(start + crop, shape)
        box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        x, y, z = (slice(int(a), int(b)) for a, b in zip(low - start, high - start, strict=True))
        image = torch.zeros(len(self.modalities), crop, crop, crop)
        present = torch.tensor([m in study.modalities for m in self.modalities])
        for channel, modality in enumerate(self.modalities):
            if present[channel]:
                values = np.array(study.volumes[study.modalities.index(modality)][box])
                image[channel, x, y, z] = torch.from_numpy(values).float()
        rows = torch.full((crop, crop, crop), IGNORED)
        rows[x, y, z] = torch.from_numpy(self.labels.rows(np.array(study.labels[box])))
        if case.slices:
            inside = torch.zeros(crop, dtype=torch.bool)
            inside[max(0, case.slices[0] - int(start[2])) : max(0, case.slices[1] - int(start[2]))] = True
            rows[..., inside if training else ~inside] = IGNORED
        centre = (shape - 1) / 2
        first, last = ((voxel - centre) / centre for voxel in (start, start + crop - 1))
        return {
            "image": image,
            "rows": rows,
            "shown": present[None],
            "start": torch.from_numpy(first.astype(np.float32)),
            "stop": torch.from_numpy(last.astype(np.float32)),
        }
