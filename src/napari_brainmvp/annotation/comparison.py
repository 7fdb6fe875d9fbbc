"""The probe or a trained model: which is closer to what was painted, and not learned, on a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_brainmvp.annotation.content import LabelClass
from napari_brainmvp.annotation.features import StudyFeatures
from napari_brainmvp.annotation.prediction import LabelledVoxels, StudyPredictor
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import StudyError
from napari_brainmvp.models import ModelCard, ModelEntry, list_models, name_digest
from napari_brainmvp.models.sharing import path_digest, without_paths
from napari_brainmvp.training.metrics import region_scores

__all__ = ["Comparison", "as_classes", "check_unseen", "compare", "newest_model"]

_FOLDS = 3


@dataclass(frozen=True)
class Comparison:
    """Dice on the labelled voxels of a study, by class name, background aside.

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


def newest_model(project: AnnotationProject) -> ModelEntry | None:
    """Find the model that was fine-tuned on this project last."""
    found, exported = [], {path_digest(path) for path in (project.folder / "datasets").glob("*")}
    for entry in list_models():
        recipe = entry.card.training.get("recipe")
        sources = without_paths(recipe).get("data", ()) if isinstance(recipe, dict) else ()
        digests = {source.get("digest") for source in sources if isinstance(source, dict)}
        if entry.card.task == "segmentation" and digests & exported:
            found.append((entry.folder.stat().st_mtime, entry.card.name, entry))
    return max(found, key=lambda f: f[:2])[2] if found else None


def check_unseen(card: ModelCard, study: str) -> None:
    """Raise :class:`StudyError` where a model was trained on the study of this name."""
    if name_digest(study) in card.training.get("study digests", ()):
        raise StudyError(f"{card.name} was trained on {study}: compare on a study that was painted since.")


def as_classes(found: NDArray[Any], card: ModelCard, classes: Sequence[LabelClass]) -> NDArray[np.int64]:
    """Give a model's labels the project's values: those of the same name, the background's for everything else.

    Raises
    ------
    StudyError
        The model knows none of the classes.
    """
    background = next(c.value for c in classes if c.background)
    values = {c.name.lower(): c.value for c in classes if not c.background}
    pairs = [(label.value, values[label.name.lower()]) for label in card.labels if label.name.lower() in values]
    if not pairs:
        raise StudyError(f"{card.name} knows none of the classes {', '.join(values)}: choose a model of this project.")
    out = np.full(found.shape, background, np.int64)
    for theirs, ours in pairs:
        out[found == theirs] = ours
    return out


def compare(
    features: StudyFeatures,
    labels: NDArray[Any],
    model: NDArray[np.int64],
    classes: Sequence[LabelClass],
    others: tuple[LabelledVoxels, ...] = (),
) -> Comparison:
    """Compare on the labelled slices of a study.

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

    Raises
    ------
    StudyError
        Too little is painted: every class but the background needs two slices or ``others``.
    """
    planes = [(labels != 0).any(tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    axis = int(np.argmin([p.sum() for p in planes]))
    painted = np.flatnonzero(planes[axis])
    folds = min(_FOLDS, len(painted))
    background = next(c.value for c in classes if c.background)
    wanted = [c for c in classes if not c.background and (labels == c.value).any()]
    probe = np.zeros(labels.shape, np.int64)
    for fold in range(folds):
        held = painted[fold::folds]
        rest = np.moveaxis(labels.copy(), axis, 0)
        rest[held] = 0
        known = set(np.unique(rest)) | {int(v) for o in others for v in np.unique(o.labels)}
        if not {background, *(c.value for c in wanted)} <= known or not wanted:
            raise StudyError("Paint every class on two slices or more: one to learn from, one to compare on.")
        predictor = StudyPredictor(features, background)
        predictor.fit(np.moveaxis(rest, 0, axis), others)
        for index in held:
            np.moveaxis(probe, axis, 0)[index] = predictor.predict_slice(axis, int(index))[0]
    return Comparison(_dice(probe, labels, wanted), _dice(model, labels, wanted), len(painted))


def _dice(found: NDArray[Any], painted: NDArray[Any], classes: Sequence[LabelClass]) -> dict[str, float]:
    """Dice of each class where something is painted."""
    seen = painted != 0
    pairs = {c.name: ((found == c.value) & seen, painted == c.value) for c in classes}
    return {name: region_scores(*pair, (1, 1, 1), surface=False).dice for name, pair in pairs.items()}
