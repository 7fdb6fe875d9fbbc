"""How good a result is, in numbers; edge cases are defined here and nowhere else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from numpy.typing import NDArray
from sklearn import metrics as sklearn_metrics

__all__ = ["CaseScores", "ClassScores", "RegionScores", "class_scores", "region_scores"]

_DRAWS = 1000


@dataclass(frozen=True)
class RegionScores:
    """One region of one case.

    Parameters
    ----------
    dice : float
        2 |A and B| / (|A| + |B|). Both empty: 1. One empty: 0.
    hd95 : float
        The larger of the 95th percentiles of the distances from either surface to the other, mm. Both empty: 0. One
        empty: the diagonal of the volume, the largest distance there could be. Not a number where it was not wanted.
    volume_ml, truth_ml : float
    """

    dice: float
    hd95: float
    volume_ml: float
    truth_ml: float

    @property
    def volume_error_ml(self) -> float:
        """Found minus true volume: positive where too much was found."""
        return self.volume_ml - self.truth_ml


@dataclass(frozen=True)
class CaseScores:
    """The scores of one case, by name of label or region."""

    case: str
    scores: dict[str, RegionScores]


def region_scores(
    found: NDArray[np.bool_],
    true: NDArray[np.bool_],
    spacing: Sequence[float],
    *,
    surface: bool = True,
    voxel_ml: float = 0.0,
) -> RegionScores:
    """Compare two masks.

    Parameters
    ----------
    found, true : ndarray of shape (X, Y, Z), bool
    spacing : sequence of three float
        Voxel edges, mm.
    surface : bool
        Also measure the distance of the surfaces.
    voxel_ml : float
        Volume of a voxel; 0 for the product of its edges, which it is where they are at right angles.

    Examples
    --------
    >>> nothing = np.zeros((4, 4, 4), bool)
    >>> region_scores(nothing, nothing, (1, 1, 1)).dice
    1.0
    """
    millilitres = voxel_ml or float(np.prod(spacing)) / 1000
    volumes = float(found.sum() * millilitres), float(true.sum() * millilitres)
    if not (found.any() and true.any()):
        same = not (found.any() or true.any())
        diagonal = float(np.linalg.norm(np.array(found.shape) * np.array(spacing)))
        distance = (0.0 if same else diagonal) if surface else float("nan")
        return RegionScores(float(same), distance, *volumes)
    index = np.argwhere(found | true)
    box = tuple(slice(int(a), int(b) + 1) for a, b in zip(index.min(0), index.max(0), strict=True))
    a, b = (torch.from_numpy(np.pad(mask[box], 1))[None, None].float() for mask in (found, true))
    dice = float(compute_dice(a, b, include_background=True)[0, 0])
    distance = float("nan")
    if surface:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MONAI warns of its own use of an old argument
            distance = float(compute_hausdorff_distance(a, b, True, percentile=95, spacing=list(spacing))[0, 0])
    return RegionScores(dice, distance, *volumes)


@dataclass(frozen=True)
class ClassScores:
    """How well studies were classified; each value with its 95 % bootstrap interval (lower, upper).

    Parameters
    ----------
    accuracy, auc, f1 : float
        Share that is right; area under the receiver operating characteristic, of each class against the rest,
        averaged over the classes that occur (not a number where only one does); F1, averaged likewise.
    accuracy_ci, auc_ci, f1_ci : (float, float)
    n : int
        Studies.
    """

    accuracy: float
    auc: float
    f1: float
    accuracy_ci: tuple[float, float]
    auc_ci: tuple[float, float]
    f1_ci: tuple[float, float]
    n: int


def class_scores(probabilities: NDArray[np.floating], truth: NDArray[np.integer], seed: int = 0) -> ClassScores:
    """Score class probabilities.

    Parameters
    ----------
    probabilities : ndarray of shape (N, K)
    truth : ndarray of shape (N,), 0 to K - 1
    seed : int
        Of the bootstrap: 1000 draws of N studies with replacement, percentiles 2.5 and 97.5.
    """
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, len(truth), len(truth)) for _ in range(_DRAWS)]

    def interval(score: Callable[[NDArray[np.floating], NDArray[np.integer]], float]) -> tuple[float, float]:
        values = np.array([score(probabilities[d], truth[d]) for d in draws])
        if np.isnan(values).all():
            return float("nan"), float("nan")
        low, high = np.nanpercentile(values, (2.5, 97.5))
        return float(low), float(high)

    return ClassScores(
        _accuracy(probabilities, truth),
        _auc(probabilities, truth),
        _f1(probabilities, truth),
        interval(_accuracy),
        interval(_auc),
        interval(_f1),
        len(truth),
    )


def _accuracy(probabilities: NDArray[np.floating], truth: NDArray[np.integer]) -> float:
    return float((probabilities.argmax(1) == truth).mean())


def _auc(probabilities: NDArray[np.floating], truth: NDArray[np.integer]) -> float:
    present = np.unique(truth)
    if len(present) < 2:
        return float("nan")
    return float(np.mean([sklearn_metrics.roc_auc_score(truth == k, probabilities[:, k]) for k in present]))


def _f1(probabilities: NDArray[np.floating], truth: NDArray[np.integer]) -> float:
    found = probabilities.argmax(1)
    return float(sklearn_metrics.f1_score(truth, found, labels=np.unique(truth), average="macro", zero_division=0))
