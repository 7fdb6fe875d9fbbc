"""Which study to annotate next: where the probe is unsure, and where no annotated study is like it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from napari_brainmvp.annotation.features import StudyFeatures
from napari_brainmvp.annotation.probe import Probe

__all__ = ["StudySummary", "rank_studies", "summarise"]

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


def summarise(name: str, features: StudyFeatures, probe: Probe) -> StudySummary:
    """Predict an even sample of a study's voxels and summarise them."""
    values = features.values[:: max(1, features.count // _SAMPLE)]
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
