"""Which study to annotate next: where the probe is unsure, and where no annotated study is like it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napari_brainmvp.annotation.features import StudyFeatures
from napari_brainmvp.annotation.prediction import LabelledVoxels, labelled_voxels
from napari_brainmvp.annotation.probe import Probe
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import StudyError
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback, no_progress

__all__ = ["StudySummary", "rank_project", "rank_studies", "sample_voxels", "summarise"]

_SAMPLE = 20_000


@dataclass(frozen=True, eq=False)
class StudySummary:
    """A study in a few numbers.

    Parameters
    ----------
    name : str
    uncertainty : float
        Mean relative entropy of the prediction over the foreground, 0..1.
    content : ndarray of shape (C, F), float32
        Mean features of what is predicted as each class; 0 where a class is absent.
    shares : ndarray of shape (C,), float32
        Share of each class.
    """

    name: str
    uncertainty: float
    content: NDArray[np.float32]
    shares: NDArray[np.float32]


def sample_voxels(features: StudyFeatures) -> LabelledVoxels:
    """Take an even sample of a study's foreground voxels, none of them labelled."""
    values = features.values[:: max(1, features.count // _SAMPLE)].clone()
    return LabelledVoxels(values, np.zeros(len(values), np.int64), features.names)


def summarise(name: str, values: Tensor, probe: Probe) -> StudySummary:
    """Predict a sample (n, F) of a study's voxels and summarise them."""
    probabilities = probe.predict(values)
    entropy = -(probabilities * probabilities.clamp(min=1e-9).log()).sum(1) / np.log(probabilities.shape[1])
    sums = probabilities.T @ values.float()
    total = probabilities.sum(0)
    content = sums / (total + 0.002 * len(values))[:, None]
    return StudySummary(name, float(entropy.mean()), content.numpy(), (total / len(values)).numpy())


def rank_studies(candidates: Sequence[StudySummary], annotated: Sequence[StudySummary]) -> list[StudySummary]:
    """Order studies by what annotating them would teach, most first.

    The score is the rank by uncertainty plus the rank by distance to the nearest annotated study, in class-wise mean
    features; without any annotated study, the least typical come last.
    """
    if not candidates:
        return []
    everything = np.stack([s.content.ravel() for s in (*candidates, *annotated)])
    mine, theirs = everything[: len(candidates)], everything[len(candidates) :]
    if len(theirs):
        distance = np.linalg.norm(mine[:, None] - theirs[None], axis=-1).min(1)
    else:
        distance = -np.linalg.norm(mine - mine.mean(0), axis=-1)
    doubt = np.array([s.uncertainty for s in candidates])
    score = doubt.argsort().argsort() + distance.argsort().argsort()
    return [candidates[k] for k in np.argsort(-score, kind="stable")]


def rank_project(
    project: AnnotationProject,
    read: Callable[[str], StudyFeatures],
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
) -> list[str]:
    """Order a project's studies that nobody has painted on by what annotating them would teach, most first.

    Parameters
    ----------
    project : AnnotationProject
    read : callable
        Gives a study's features by its name.
    progress, cancel
        Reported to and asked at every study.

    Raises
    ------
    StudyError
        No study is painted on yet, or all are.
    BrainMVPError
        Fewer than two classes are painted.
    Cancelled
        When the token was set.
    """
    painted = {s.name: labels for s in project.studies if (labels := project.labels(s.name).labels).any()}
    if not painted or len(painted) == len(project.studies):
        found = "every study" if painted else "no study"
        raise StudyError(f"{found.capitalize()} of the project is painted on: there is nothing to order.")
    labelled: list[LabelledVoxels] = []
    samples: dict[str, LabelledVoxels] = {}
    for number, reference in enumerate(project.studies):
        if cancel is not None:
            cancel.raise_if_cancelled()
        progress(Progress(f"Reading {reference.name}", number, len(project.studies)))
        features = read(reference.name)
        samples[reference.name] = sample_voxels(features)
        if reference.name in painted:
            labelled.append(labelled_voxels(features, painted[reference.name]))
    names = tuple(dict.fromkeys(name for voxels in samples.values() for name in voxels.names))
    probe = Probe(names, project.background.value)
    probe.fit(
        torch.cat([v.columns(names) for v in labelled]),
        np.concatenate([v.labels for v in labelled]),
        unlabelled=torch.cat([v.columns(names)[::20] for v in samples.values()]),
        places=sum(v.places for v in labelled),
    )
    summaries = {name: summarise(name, voxels.columns(names), probe) for name, voxels in samples.items()}
    candidates = [summary for name, summary in summaries.items() if name not in painted]
    return [s.name for s in rank_studies(candidates, [summaries[name] for name in painted])]
