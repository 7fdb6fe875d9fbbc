"""The probe or a trained model: which is closer to what was painted, and not learned, on a study."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from napari_brainmvp.annotation.content import LabelClass
from napari_brainmvp.annotation.export import Layout, exported_name
from napari_brainmvp.annotation.features import StudyFeatures
from napari_brainmvp.annotation.model_classes import as_classes, background_of, known_classes, region_classes
from napari_brainmvp.annotation.prediction import LabelledVoxels, StudyPredictor
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import StudyError
from napari_brainmvp.inference import SegmentOptions, segment
from napari_brainmvp.models import ModelCard, ModelEntry, list_models, name_digest
from napari_brainmvp.models.sharing import path_digest, without_paths
from napari_brainmvp.progress import CancelToken, ProgressCallback, no_progress
from napari_brainmvp.study import Study
from napari_brainmvp.training.metrics import region_scores

__all__ = [
    "Comparison",
    "ModelPrediction",
    "check_unseen",
    "compare",
    "newest_model",
    "predict_classes",
]

_FOLDS = 3
_TOO_LITTLE = "Paint every class on two slices or more: one to learn from, one to compare on."


@dataclass(frozen=True)
class Comparison:
    """Dice on the labelled voxels of a study, by name of class or region, background aside.

    Parameters
    ----------
    probe : dict of str to float
        Every labelled slice predicted by a probe that had not seen it.
    model : dict of str to float
    slices : int
        Labelled slices.
    """

    probe: dict[str, float]
    model: dict[str, float]
    slices: int

    @property
    def model_is_better(self) -> bool:
        """Whether the model has the higher mean Dice."""
        return float(np.mean(list(self.model.values()))) > float(np.mean(list(self.probe.values())))

    def verdict(self, name: str, study: str = "") -> str:
        """Say which is better.

        Parameters
        ----------
        name : str
            The model's.
        study : str
            On which study, where that is not the one that is open.
        """
        probe, model = (sum(scores.values()) / len(scores) for scores in (self.probe, self.model))
        better = "The model is better here" if self.model_is_better else "The probe is better: go on"
        if study:
            better = f"The {'model' if self.model_is_better else 'probe'} is better there"
        slices = f"{self.slices} painted slices{' of ' * bool(study)}{study}"
        return f"Mean Dice on {slices}: probe {probe:.2f}, {name} {model:.2f}. {better}."


@dataclass(frozen=True, eq=False)
class ModelPrediction:
    """What a model finds in a study, in the project's terms and on the study's own grid.

    Parameters
    ----------
    entry : ModelEntry
        The model.
    labels : ndarray of shape (i, j, k), int64
        Values of the project's classes, the background's among them.
    uncertainty : ndarray of shape (i, j, k), float16
        0 certain, 1 undecided.
    known : tuple of int
        The project's value of each of the network's exclusive classes, see
        :func:`~napari_brainmvp.annotation.model_classes.known_classes`.
    """

    entry: ModelEntry
    labels: NDArray[np.int64]
    uncertainty: NDArray[np.float16]
    known: tuple[int, ...] = ()

    @property
    def model(self) -> str:
        """The model's name."""
        return self.entry.card.name


def newest_model(project: AnnotationProject) -> ModelEntry | None:
    """Find the model that was fine-tuned on this project last.

    By the project's identity; a model whose card names no project, by where its dataset lay.
    """
    found, exported = [], {path_digest(path) for path in (project.folder / "datasets").glob("*")}
    for entry in list_models():
        training = entry.card.training
        if isinstance(projects := training.get("projects"), list) and projects:
            ours = project.identity in projects
        else:
            recipe = training.get("recipe")
            sources = without_paths(recipe).get("data", ()) if isinstance(recipe, dict) else ()
            ours = any(source.get("digest") in exported for source in sources if isinstance(source, dict))
        if entry.card.task == "segmentation" and ours:
            found.append((entry.folder.stat().st_mtime, entry.card.name, entry))
    return max(found, key=lambda f: f[:2])[2] if found else None


def check_unseen(card: ModelCard, project: AnnotationProject, study: str) -> None:
    """Raise :class:`StudyError` where a model was trained on the project's study of this name, in any layout."""
    names = {study, *(exported_name(project, study, layout) for layout in get_args(Layout))}
    if {name_digest(name) for name in names} & {*card.training.get("study digests", ())}:
        raise StudyError(f"{card.name} was trained on {study}: compare on a study that was painted since.")


def predict_classes(
    study: Study,
    entry: ModelEntry,
    classes: Sequence[LabelClass],
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
) -> ModelPrediction:
    """Segment a study and give the result the project's values.

    Raises
    ------
    StudyError
        The model knows none of the classes, or the study has none of its modalities.
    Cancelled
    """
    card = entry.card
    options = SegmentOptions(probabilities=card.activation == "sigmoid", uncertainty=True)
    found = segment(study, entry.folder, options, progress, cancel)
    assert found.uncertainty is not None, "asked for"
    if found.probabilities is None:
        labels = as_classes(found.labels, card, classes)
    else:
        labels = region_classes(found.probabilities, card, classes)
    return ModelPrediction(entry, labels, found.uncertainty.astype(np.float16), known_classes(card, classes))


def compare(
    features: StudyFeatures,
    labels: NDArray[Any],
    model: NDArray[np.int64],
    classes: Sequence[LabelClass],
    others: tuple[LabelledVoxels, ...] = (),
    regions: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> Comparison:
    """Compare on the labelled slices of a study, class by class or, where there are regions, region by region.

    The slices are dealt out to a few folds; each is predicted by a probe fitted to the rest (and to ``others``). So
    both are judged on voxels they did not learn from, as long as the model was not trained on the study.

    Parameters
    ----------
    features : StudyFeatures
    labels, model : ndarray of shape (i, j, k), integers
        What was painted (0 is nothing), and what the model found, in the project's values.
    classes : sequence of LabelClass
    others : tuple of LabelledVoxels
        Of other studies, where the probe learns from them too.
    regions : mapping of str to collection of int
        The class values that make up each region of the project.

    Raises
    ------
    StudyError
        Too little is painted: every class but the background needs two slices or ``others``.
    """
    planes = [(labels != 0).any(tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    axis = int(np.argmin([p.sum() for p in planes]))
    painted = np.flatnonzero(planes[axis])
    folds = min(_FOLDS, len(painted))
    background = background_of(classes)
    wanted = {c.value: c.name for c in classes if not c.background and (labels == c.value).any()}
    parts = {name: values for name, values in regions.items() if not wanted.keys().isdisjoint(values)}
    if not regions:
        parts = {name: (value,) for value, name in wanted.items()}
    if wanted and not parts:
        raise StudyError(f"Nothing of {', '.join(regions)} is painted on this study: paint some, to compare on it.")
    if not parts:
        raise StudyError(_TOO_LITTLE)
    probe = np.zeros(labels.shape, np.int64)
    for fold in range(folds):
        held = painted[fold::folds]
        rest = np.moveaxis(labels.copy(), axis, 0)
        rest[held] = 0
        known = set(np.unique(rest)) | {int(v) for o in others for v in np.unique(o.labels)}
        if not {background, *wanted} <= known:
            raise StudyError(_TOO_LITTLE)
        predictor = StudyPredictor(features, background)
        predictor.fit(np.moveaxis(rest, 0, axis), others)
        for index in held:
            np.moveaxis(probe, axis, 0)[index] = predictor.predict_slice(axis, int(index))[0]
    return Comparison(_dice(probe, labels, parts), _dice(model, labels, parts), len(painted))


def _dice(found: NDArray[Any], painted: NDArray[Any], parts: Mapping[str, Collection[int]]) -> dict[str, float]:
    """Dice of each class or region, by its values, where something is painted."""
    seen = painted != 0
    pairs = {n: (np.isin(found, list(v)) & seen, np.isin(painted, list(v))) for n, v in parts.items()}
    return {name: region_scores(*pair, (1, 1, 1), surface=False).dice for name, pair in pairs.items()}
