"""Studies with a class each: found, resized to one shape, and drawn with all classes alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from napari_brainmvp.errors import FileError, StudyError
from napari_brainmvp.inference.classify import resize_box
from napari_brainmvp.io import class_of, read_participants
from napari_brainmvp.networks import ModalityTemplates
from napari_brainmvp.preparation import PreparationSpec
from napari_brainmvp.progress import CancelToken, ProgressCallback, no_progress
from napari_brainmvp.training.cache import CachedStudy, Problem, cache_studies, cache_synthetic
from napari_brainmvp.training.finetuning.spec import FinetuneSpec
from napari_brainmvp.training.sources import DataSource, find_all, own_name

__all__ = ["ClassifiedStudies", "Subject", "collect_classes", "load_volume", "stratified_folds"]


@dataclass(frozen=True)
class Subject:
    """A prepared study and its class."""

    study: CachedStudy
    label: str


def collect_classes(
    spec: FinetuneSpec,
    preparation: PreparationSpec,
    cache: Path,
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
) -> tuple[list[Subject], list[Problem]]:
    """Find and prepare all studies that have a class.

    Raises
    ------
    FileError
        There is no table of classes.
    StudyError
        Fewer than two classes are left; the message tells the first reason.
    """
    subjects: list[Subject] = []
    problems: list[Problem] = []
    for source, files, unreadable in find_all(spec.data):
        if (seeds := source.seeds) is not None:
            made = cache_synthetic(seeds, cache, preparation, progress, cancel, labels=True, workers=spec.workers)
            subjects += [Subject(study, study.name.split("-")[1]) for study in made]
            continue
        classes = _table(source, spec)
        named = [f for f in files if class_of(own_name(f.name), classes) is not None]
        problems += [Problem(f.name, "has no class in the table") for f in files if f not in named]
        studies, bad = cache_studies(named, cache, preparation, progress, cancel, workers=spec.workers)
        problems += [*(Problem(name, reason) for name, reason in unreadable), *bad]
        for study in studies:
            if spec.modalities and not set(spec.modalities) & set(study.modalities):
                problems.append(Problem(study.name, f"has none of {', '.join(spec.modalities)}"))
            else:
                subjects.append(Subject(study, class_of(own_name(study.name), classes) or ""))
    found = sorted({subject.label for subject in subjects})
    if len(found) < 2:
        why = f" The first problem: {problems[0].name}: {problems[0].reason}." if problems else ""
        raise StudyError(f"Two classes are needed, and there is {' and '.join(found) or 'none'}.{why}")
    return subjects, problems


def _table(source: DataSource, spec: FinetuneSpec) -> Mapping[str, str]:
    path = Path(source.path).expanduser()
    table = (
        Path(spec.participants) if spec.participants else (path if path.is_dir() else path.parent) / "participants.tsv"
    )
    if not table.is_file():
        raise FileError(f"{table} does not exist: a table participants.tsv must say the class of every study.")
    return read_participants(table, spec.column)


def load_volume(
    study: CachedStudy, modalities: Sequence[str], templates: ModalityTemplates, size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Resize a study to one shape.

    Returns
    -------
    image : Tensor of shape (C, *size), float16
        Templates where modalities are missing.
    present : Tensor of shape (C,), bool
    """
    there = [m in study.modalities for m in modalities]
    image = torch.zeros(len(modalities), *size)
    for channel, modality in enumerate(modalities):
        if there[channel]:
            values = torch.from_numpy(np.array(study.volumes[study.modalities.index(modality)]))
            image[channel] = resize_box(values[None], size)[0]
    present = torch.tensor(there)
    template = templates.fill(size) * (image > 0).any(0)
    return torch.where(present[:, None, None, None], image, template).half(), present


def stratified_folds(labels: Sequence[str], people: Sequence[Sequence[int]], folds: int, seed: int) -> list[list[int]]:
    """Deal the subjects of every class out to folds in turn, in a random order: indices held out by each.

    Parameters
    ----------
    labels : sequence of str
        The class of each study; a subject counts to that of the first one.
    people : sequence of sequences of int
        The studies of each subject, as :func:`~napari_brainmvp.io.by_subject` gives them.
    folds, seed : int
    """
    rng = np.random.default_rng(seed)
    dealt: list[list[int]] = [[] for _ in range(folds)]
    turn = 0
    for name in sorted(set(labels)):
        members = [k for k, studies in enumerate(people) if labels[studies[0]] == name]
        for k in rng.permutation(members):
            dealt[turn % folds] += people[int(k)]
            turn += 1
    return [sorted(fold) for fold in dealt]


class ClassifiedStudies(IterableDataset[dict[str, Tensor]]):
    """Endless batches of whole studies, every class as often; batch number k is always the same.

    Parameters
    ----------
    volumes : sequence of (Tensor, Tensor)
        As :func:`load_volume` gives them.
    targets : sequence of int
        Their classes.
    templates : Tensor of shape (C, *size), float32
        What may stand in for each channel.
    spec : FinetuneSpec
        Gives batch, augmentation and seed.
    first : int
        Number of the first batch.
    """

    def __init__(
        self,
        volumes: Sequence[tuple[Tensor, Tensor]],
        targets: Sequence[int],
        templates: Tensor,
        spec: FinetuneSpec,
        first: int = 0,
    ) -> None:
        self.volumes, self.targets, self.templates = volumes, list(targets), templates
        self.spec, self.first = spec, first

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        number, step = (self.first, 1) if worker is None else (self.first + worker.id, worker.num_workers)
        while True:
            rows = [self.sample(number * self.spec.batch + k) for k in range(self.spec.batch)]
            yield {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            number += step

    def sample(self, index: int) -> dict[str, Tensor]:
        """Draw one study by its number in the run: mirrored, moved, its intensities and some channels changed."""
        spec = self.spec
        rng = np.random.default_rng([spec.seed, index])
        kinds = sorted(set(self.targets))
        target = kinds[int(rng.integers(len(kinds)))]
        members = [k for k, t in enumerate(self.targets) if t == target]
        stored, present = self.volumes[members[int(rng.integers(len(members)))]]
        image = stored.float()
        there = present.nonzero()[:, 0].numpy()
        if rng.random() < spec.mixing:
            hidden = rng.permutation(there)[: rng.integers(0, len(there))]
            image[hidden] = self.templates[hidden] * (image > 0).any(0)
        inside = image > 0
        for channel in range(len(image)):
            scale, shift = (
                1 + rng.uniform(-spec.intensity, spec.intensity),
                rng.uniform(-spec.intensity, spec.intensity),
            )
            image[channel] = torch.where(inside[channel], image[channel] * scale + shift, 0.0)
        mirrored = [axis + 1 for axis in range(3) if rng.random() < spec.flip[axis]]
        moved = [int(step) for step in rng.integers(-4, 5, 3)]
        return {"image": _move(image.flip(mirrored), moved), "target": torch.tensor(target)}


def _move(image: Tensor, steps: Sequence[int]) -> Tensor:
    """Move an image (C, X, Y, Z) by so many voxels; 0 comes in, and what goes out is gone."""
    most = max(map(abs, steps))
    x, y, z = (slice(most - step, most - step + n) for step, n in zip(steps, image.shape[1:], strict=True))
    return F.pad(image, [most] * 6)[:, x, y, z]
