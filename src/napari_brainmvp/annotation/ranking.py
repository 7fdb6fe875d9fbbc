"""Which study to annotate next: one that is undecided, like others that are, and unlike those that are annotated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napari_brainmvp.annotation.features import CLASS, StudyFeatures
from napari_brainmvp.annotation.labelled import Lesson
from napari_brainmvp.annotation.prediction import LabelledVoxels, labelled_voxels
from napari_brainmvp.annotation.probe import Probe
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import FileError, StudyError
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback, no_progress

__all__ = ["StudySummary", "fit_probe", "rank_project", "rank_studies", "sample_voxels", "summarise"]

_SAMPLE = 20_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StudySummary:
    """A study in a few numbers.

    Parameters
    ----------
    name : str
    undecided : float
        How undecided it is between background and anything else: the mean of p (1 - p) over the foreground, 0..0.25.
    content : ndarray of shape (C, F), float32
        Mean features of what is predicted as each class; 0 where a class is absent.
    """

    name: str
    undecided: float
    content: NDArray[np.float32]


def sample_voxels(features: StudyFeatures) -> LabelledVoxels:
    """Take an even sample of a study's foreground voxels, none of them labelled."""
    values = features.values[:: max(1, features.count // _SAMPLE)].clone()
    return LabelledVoxels(values, np.zeros(len(values), np.int64), features.names)


def summarise(name: str, values: Tensor, probe: Probe) -> StudySummary:
    """Predict a sample (n, F) of a study's voxels and summarise them."""
    probabilities = probe.predict(values)
    sums = probabilities.T @ values.float()
    total = probabilities.sum(0)
    content = sums / (total + 0.002 * len(values))[:, None]
    undecided = 0.0
    if probe.background in probe.classes:
        background = probabilities[:, probe.classes.index(probe.background)]
        undecided = float((background * (1 - background)).mean())
    return StudySummary(name, undecided, content.numpy())


def rank_studies(candidates: Sequence[StudySummary], annotated: Sequence[StudySummary]) -> list[StudySummary]:
    """Order studies by what annotating them would teach, most first.

    What a study k teaches of a study j is s_jk - max_a s_ja, where that is positive: how like it is, beyond the most
    like of the annotated ones a, with s_jk = exp(-(d_jk / h)^2), d the distance of their class-wise mean features and h
    its median. The score of k is the sum over all j, each by how undecided the prediction is there (facility location;
    Wei et al., ICML 2015). So a study comes first that is undecided itself and like others that are, and unlike what is
    annotated already.
    """
    if not candidates:
        return []
    studies = (*candidates, *annotated)
    content = np.stack([s.content.ravel() for s in studies])
    distance = np.linalg.norm(content[:, None] - content[None], axis=-1)
    apart = distance[distance > 0]
    likeness = np.exp(-((distance / (np.median(apart) if len(apart) else 1.0)) ** 2))
    count = len(candidates)
    known = likeness[:, count:].max(1, initial=0)
    undecided = np.array([s.undecided for s in studies])
    score = undecided @ (likeness[:, :count] - known[:, None]).clip(0)
    return [candidates[k] for k in np.argsort(-score, kind="stable")]


def fit_probe(
    labelled: Sequence[LabelledVoxels], others: Sequence[LabelledVoxels], background: int
) -> tuple[Probe, tuple[str, ...]]:
    """Fit a probe to the strokes of several studies; return it with the columns it reads.

    Parameters
    ----------
    labelled, others : sequence of LabelledVoxels
        Of the studies that are painted on, and samples of those that are not.
    background : int
        Label value of what is nothing of interest.
    """
    every = dict.fromkeys(name for voxels in (*labelled, *others) for name in voxels.names)
    names = tuple(sorted(every, key=lambda name: name.startswith(CLASS)))  # log probabilities come last
    probe = Probe(names, background)
    lesson = Lesson(
        torch.cat([v.columns(names) for v in labelled]),
        np.concatenate([v.labels for v in labelled]),
        sum(v.places for v in labelled),
    )
    probe.fit(lesson, unlabelled=torch.cat([v.columns(names)[::20] for v in others]))
    return probe, names


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

    Returns
    -------
    list of str
        Names; without those whose scans cannot be read.

    Raises
    ------
    StudyError
        No study is painted on yet, or all that can be read are.
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
        try:
            features = read(reference.name)
        except (FileError, StudyError) as error:
            logger.warning("%s is left out: %s", reference.name, error)
            continue
        samples[reference.name] = sample_voxels(features)
        if reference.name in painted:
            labelled.append(labelled_voxels(features, painted[reference.name]))
    if not labelled or len(labelled) == len(samples):
        raise StudyError("Of the studies that can be read, none or all are painted on: there is nothing to order.")
    unpainted = [voxels for name, voxels in samples.items() if name not in painted]
    probe, names = fit_probe(labelled, unpainted, project.background.value)
    summaries = {name: summarise(name, voxels.columns(names), probe) for name, voxels in samples.items()}
    candidates = [summary for name, summary in summaries.items() if name not in painted]
    return [s.name for s in rank_studies(candidates, [summaries[name] for name in painted if name in summaries])]
