"""From datasets to an endless, reproducible stream of crops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from napari_brainmvp.errors import StudyError
from napari_brainmvp.io import StudyFiles, by_subject
from napari_brainmvp.progress import CancelToken, ProgressCallback, no_progress
from napari_brainmvp.training.cache import CachedStudy, Problem, cache_studies, cache_synthetic
from napari_brainmvp.training.pretraining.spec import PretrainingSpec
from napari_brainmvp.training.sources import DataSource, find_all

__all__ = ["Batch", "CropStream", "Dataset", "collect", "read_sample"]

Batch = dict[str, Tensor]
"""``scans`` (B, M, n, n, n) float16, 0 for a modality that is not ``present`` (B, M) bool; ``target``, ``other`` (B,)
int64, the modality to learn and the one to learn it from, the same where there is only one; ``start``, ``stop`` (B, 3)
float32, where the crop lies in the templates' frame; ``study`` (B,) int64, which one it is of; ``number`` () int64,
which batch."""


@dataclass(frozen=True)
class Dataset:
    """Prepared studies, and how often they are drawn."""

    studies: tuple[CachedStudy, ...]
    weight: float


def collect(
    spec: PretrainingSpec,
    cache: Path,
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
) -> tuple[list[Dataset], list[CachedStudy], list[Problem]]:
    """Find and prepare all studies of a run.

    Returns
    -------
    list of Dataset
        To train on.
    list of CachedStudy
        Held out, spread evenly over all that were found, with all sessions of each subject.
    list of Problem
        Studies left out, and why.

    Raises
    ------
    StudyError
        Nothing is left to train on.
    """
    datasets, problems = [], []
    for source, files, unreadable in find_all(spec.data):
        studies, bad = _prepare(source, files, spec, cache, progress, cancel)
        bad += [Problem(name, reason) for name, reason in unreadable]
        for study in studies:
            if not set(study.modalities) & set(spec.modalities):
                bad.append(Problem(study.name, f"has none of {', '.join(spec.modalities)}"))
        datasets.append(([s for s in studies if set(s.modalities) & set(spec.modalities)], source.weight))
        problems += bad
    every = [study for studies, _ in datasets for study in studies]
    if not every:
        why = f" The first problem: {problems[0].name}: {problems[0].reason}" if problems else ""
        raise StudyError(f"There is no study to train on in {[s.path for s in spec.data]}: check the folders.{why}")
    people = by_subject([study.name for study in every])
    count = min(spec.held_out, max(len(people) // 5, len(people) >= 3))
    chosen = [people[round((k + 0.5) * len(people) / count)] for k in range(count)]
    held = {every[index].path for studies in chosen for index in studies}
    kept = [Dataset(tuple(s for s in studies if s.path not in held), weight) for studies, weight in datasets]
    return [d for d in kept if d.studies], [s for s in every if s.path in held], problems


def _prepare(
    source: DataSource,
    files: list[StudyFiles],
    spec: PretrainingSpec,
    cache: Path,
    progress: ProgressCallback,
    cancel: CancelToken | None,
) -> tuple[list[CachedStudy], list[Problem]]:
    if (seeds := source.seeds) is not None:
        return cache_synthetic(seeds, cache, spec.preparation, progress, cancel, workers=spec.workers), []
    return cache_studies(files, cache, spec.preparation, progress, cancel, workers=spec.workers)


def read_sample(
    study: CachedStudy, spec: PretrainingSpec, start: NDArray[np.int64], target: str, other: str
) -> dict[str, Tensor]:
    """Read a cube at ``start``, 0 beyond the volume: one sample of a :data:`Batch`.

    It holds every known modality where every one is learned, and else the two that are asked for.
    """
    learned = spec.modalities if spec.learns_every_modality else (target, other)
    present = [key in study.modalities and key in learned for key in spec.modalities]
    shape, size = np.array(study.volumes.shape[1:]), spec.crop
    low, high = np.maximum(start, 0), np.minimum(start + size, shape)
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    x, y, z = (slice(int(a), int(b)) for a, b in zip(low - start, high - start, strict=True))
    scans = torch.zeros(len(spec.modalities), size, size, size, dtype=torch.float16)
    for row in np.flatnonzero(present):
        channel = study.modalities.index(spec.modalities[row])
        scans[row, x, y, z] = torch.from_numpy(np.array(study.volumes[channel][box]))
    span = shape if spec.template_frame == "box" else np.array(spec.template_shape)
    first, last = ((voxel - (shape - 1) / 2) / ((span - 1) / 2) for voxel in (start, start + size - 1))
    return {
        "scans": scans,
        "present": torch.tensor(present),
        "target": torch.tensor(spec.modalities.index(target)),
        "other": torch.tensor(spec.modalities.index(other)),
        "start": torch.from_numpy(first.astype(np.float32)),
        "stop": torch.from_numpy(last.astype(np.float32)),
    }


class CropStream(IterableDataset[Batch]):
    """Endless batches of crops; batch number k is the same whenever and by however many processes it is read.

    Parameters
    ----------
    datasets : sequence of Dataset
    spec : PretrainingSpec
        Gives modalities, crop, batch and seed.
    first : int
        Number of the first batch.
    rank, world : int
        This process reads every ``world``-th sample of each global batch, from ``rank`` on.
    """

    def __init__(
        self, datasets: Sequence[Dataset], spec: PretrainingSpec, first: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        self.datasets, self.spec, self.first, self.rank, self.world = list(datasets), spec, first, rank, world
        weights = np.array([d.weight for d in self.datasets])
        self.shares = weights / weights.sum()
        self.offsets = np.cumsum([0, *(len(d.studies) for d in self.datasets)])

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, step = (self.first, 1) if worker is None else (self.first + worker.id, worker.num_workers)
        while True:
            yield self.batch(number)
            number += step

    def batch(self, number: int) -> Batch:
        """Read one batch by its number."""
        width = self.spec.batch * self.world
        rows = [self.sample(number * width + k) for k in range(self.rank, width, self.world)]
        stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        return {**stacked, "number": torch.tensor(number)}

    def sample(self, index: int) -> Batch:
        """Draw one sample by its number in the whole run: study, modality to learn, another one, place, mirror."""
        spec = self.spec
        rng = np.random.default_rng([spec.seed, index])
        dataset = int(rng.choice(len(self.datasets), p=self.shares))
        studies = self.datasets[dataset].studies
        chosen = int(rng.integers(len(studies)))
        study = studies[chosen]
        order = rng.permutation([key for key in study.modalities if key in spec.modalities])
        shape = np.array(study.volumes.shape[1:])
        start = rng.integers(np.minimum(-8, (shape - spec.crop) // 2), np.maximum(shape - spec.crop + 8, 1))
        sample = read_sample(study, spec, start, str(order[0]), str(order[-1]))
        sample["study"] = torch.tensor(int(self.offsets[dataset]) + chosen)
        if rng.random() < 0.5:  # left and right are alike; the template is read mirrored along
            sample["scans"] = sample["scans"].flip(1)
            first, last = sample["start"], sample["stop"]
            sample["start"] = torch.cat([last[:1], first[1:]])
            sample["stop"] = torch.cat([first[:1], last[1:]])
        return sample
