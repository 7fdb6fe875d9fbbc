"""Measure models on studies whose answer is known, and compare them with each other."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from napari_brainmvp.errors import BrainMVPError, Cancelled, StudyError
from napari_brainmvp.inference import SegmentOptions, classify, segment
from napari_brainmvp.io import StudyFiles, read_label_map, read_study
from napari_brainmvp.models import LoadedModel
from napari_brainmvp.preparation.resampling import resample
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback, no_progress
from napari_brainmvp.training.cache import Problem
from napari_brainmvp.training.labels import LabelDescription
from napari_brainmvp.training.metrics import CaseScores, region_scores

__all__ = [
    "ClassifiedCase",
    "Comparison",
    "classes_csv",
    "compare_segmentations",
    "evaluate_classification",
    "evaluate_segmentation",
    "mcnemar",
    "scores_csv",
]

Case = TypeVar("Case")
logger = logging.getLogger(__name__)


def evaluate_segmentation(
    model: LoadedModel,
    studies: Sequence[StudyFiles],
    labels: LabelDescription,
    *,
    values: Mapping[int, int] | None = None,
    options: SegmentOptions | None = None,
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
) -> tuple[list[CaseScores], list[Problem]]:
    """Segment studies on their own grids and compare with their labels.

    Parameters
    ----------
    model : LoadedModel
    studies : sequence of StudyFiles
        With labels, and each with a name of its own, by which models are compared; one without labels, or one that
        cannot be read, is a problem and left out.
    labels : LabelDescription
        What the studies' labels mean; its regions, or else its labels, are measured.
    values : mapping of int to int, optional
        The dataset's value for each of the model's; the model's other values become background. Default: the same.
    options : SegmentOptions, optional
    progress, cancel
        Called and asked once a study.

    Raises
    ------
    StudyError
        Not one study could be measured.
    """
    return _each(
        studies, lambda files: _measure(model, files, labels, values, options), model.card.name, progress, cancel
    )


def _each(
    studies: Sequence[StudyFiles],
    measure: Callable[[StudyFiles], Case],
    name: str,
    progress: ProgressCallback,
    cancel: CancelToken | None,
) -> tuple[list[Case], list[Problem]]:
    """Measure study by study; a bad one is reported and left out."""
    found: list[Case] = []
    problems: list[Problem] = []
    for number, files in enumerate(studies):
        if cancel is not None:
            cancel.raise_if_cancelled()
        try:
            found.append(measure(files))
        except Cancelled:
            raise
        except BrainMVPError as error:
            logger.warning("Left out %s: %s", files.name, error)
            problems.append(Problem(files.name, str(error)))
        progress(Progress(f"Evaluating {name}", number + 1, len(studies)))
    if not found:
        why = f" The first problem: {problems[0].name}: {problems[0].reason}" if problems else ""
        raise StudyError(f"There is no study to measure on.{why}")
    return found, problems


def _measure(
    model: LoadedModel,
    files: StudyFiles,
    labels: LabelDescription,
    values: Mapping[int, int] | None,
    options: SegmentOptions | None,
) -> CaseScores:
    truth_file = files.truth
    study = read_study(tuple(files.scans.values()), modalities=files.scans, name=files.name)
    truth = read_label_map(truth_file)
    true: NDArray[np.int64] = truth.data.astype(np.int64)
    if not truth.grid.same_as(study.grid):
        true = resample(torch.from_numpy(true), truth.grid, study.grid, "nearest").numpy()
    labels.rows(true)  # says which value is not described
    found = segment(study, model, options)
    regions = _same_regions(model, labels, found.regions) if values is None else {}
    result = found.labels
    if values is not None:
        lookup = np.zeros(int(result.max(initial=0)) + 1, np.int64)
        for own, theirs in values.items():
            if own < len(lookup):
                lookup[own] = theirs
        result = lookup[result]
    seen = np.ones(true.shape, bool) if labels.unlabelled is None else true != labels.unlabelled
    scores = {}
    for name, members in zip(labels.names, labels.members, strict=True):
        mask = regions[name] if name in regions else np.isin(result, members)
        surface, voxel = labels.unlabelled is None, study.grid.voxel_volume_ml
        pair = (mask & seen, np.isin(true, members) & seen)
        scores[name] = region_scores(*pair, study.grid.spacing, surface=surface, voxel_ml=voxel)
    return CaseScores(files.name, scores)


def _same_regions(
    model: LoadedModel, labels: LabelDescription, found: NDArray[np.bool_] | None
) -> dict[str, NDArray[np.bool_]]:
    """Return where the model's own regions are that are measured: of those that overlap, labels show the last only."""
    if found is None:
        return {}
    names = {0: "", **{label.value: label.name for label in model.card.labels}}
    own = LabelDescription.of_card(model.card).regions
    pairs = {names[value]: mask for value, mask in zip(model.card.channels, found, strict=True)}
    return {n: pairs[n] for n, of in labels.regions.items() if n in pairs and set(own.get(n, of)) == set(of)}


def scores_csv(results: Mapping[str, Sequence[CaseScores]]) -> str:
    """Return a line for each model, case and name: Dice, HD95 in mm, volumes and the volume's error in ml."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("model", "case", "name", "dice", "hd95_mm", "volume_ml", "truth_ml", "volume_error_ml"))
    for model, cases in results.items():
        for case in cases:
            for name, s in case.scores.items():
                numbers = (s.dice, s.hd95, s.volume_ml, s.truth_ml, s.volume_error_ml)
                writer.writerow((model, case.case, name, *(f"{value:.4f}" for value in numbers)))
    return text.getvalue()


@dataclass(frozen=True)
class Comparison:
    """One model on one region, beside the first model on the same cases.

    Parameters
    ----------
    model, name : str
    dice, hd95, volume_error : float
        Means over the cases; HD95 in mm, absolute volume error in ml.
    difference : float
        Mean difference in Dice to the first model.
    p : float
        Of a two-sided Wilcoxon signed-rank test of these differences; 1 where there is none, not a number for the
        first model.
    n : int
        Cases that both have.
    """

    model: str
    name: str
    dice: float
    hd95: float
    volume_error: float
    difference: float
    p: float
    n: int


def compare_segmentations(results: Mapping[str, Sequence[CaseScores]]) -> list[Comparison]:
    """Average every model's scores and test the difference in Dice to the first model, case by case."""
    first = {case.case: case.scores for case in next(iter(results.values()))}
    rows = []
    for number, (model, cases) in enumerate(results.items()):
        mine = {case.case: case.scores for case in cases if case.case in first}
        for name in next(iter(first.values())):
            scores = [s[name] for s in mine.values()]
            differences = np.array([s[name].dice - first[case][name].dice for case, s in mine.items()])
            p = float("nan")
            if number:
                p = float(stats.wilcoxon(differences).pvalue) if np.any(differences != 0) else 1.0
            rows.append(
                Comparison(
                    model,
                    name,
                    float(np.mean([s.dice for s in scores])),
                    float(np.mean([s.hd95 for s in scores])),
                    float(np.mean([abs(s.volume_error_ml) for s in scores])),
                    float(differences.mean()),
                    p,
                    len(scores),
                )
            )
    return rows


@dataclass(frozen=True)
class ClassifiedCase:
    """A study's true class, and the probabilities a model gave to all of its classes."""

    case: str
    truth: str
    probabilities: dict[str, float]

    @property
    def right(self) -> bool:
        """Whether the most probable class is the true one."""
        return max(self.probabilities, key=lambda name: self.probabilities[name]) == self.truth


def evaluate_classification(
    model: LoadedModel,
    studies: Sequence[StudyFiles],
    classes: Mapping[str, str],
    *,
    device: str = "auto",
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
) -> tuple[list[ClassifiedCase], list[Problem]]:
    """Classify studies whose class is known.

    Parameters
    ----------
    model : LoadedModel
    studies : sequence of StudyFiles
        Each with a name of its own, by which models are compared.
    classes : mapping of str to str
        Class by the name of the study; one that is not in it, or has a class the model does not know, is a problem and
        left out. :func:`~napari_brainmvp.io.class_of` finds a study's class in a table of participants.
    device, progress, cancel
        As in :func:`evaluate_segmentation`.

    Raises
    ------
    StudyError
        Not one study could be measured.
    """

    def measure(files: StudyFiles) -> ClassifiedCase:
        truth = classes.get(files.name)
        if truth is None:
            raise StudyError(f"{files.name} has no class in the table.")
        if truth not in model.card.classes:
            raise StudyError(f"{files.name} is {truth!r}, which {model.card.name} does not know.")
        study = read_study(tuple(files.scans.values()), modalities=files.scans, name=files.name)
        return ClassifiedCase(files.name, truth, classify(study, model, device=device).probabilities)

    return _each(studies, measure, model.card.name, progress, cancel)


def classes_csv(results: Mapping[str, Sequence[ClassifiedCase]]) -> str:
    """Return a line for each model, case and class: the probability, and whether it is the true class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("model", "case", "truth", "class", "probability"))
    for model, cases in results.items():
        for case in cases:
            for name, probability in case.probabilities.items():
                writer.writerow((model, case.case, case.truth, name, f"{probability:.4f}"))
    return text.getvalue()


def mcnemar(first: Sequence[ClassifiedCase], second: Sequence[ClassifiedCase]) -> float:
    """Test whether two models are right equally often on the same studies (McNemar, exact, two-sided): the p-value."""
    right = {case.case: case.right for case in first}
    pairs = [(right[case.case], case.right) for case in second if case.case in right]
    only_first, only_second = (sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second, 0.5).pvalue)
