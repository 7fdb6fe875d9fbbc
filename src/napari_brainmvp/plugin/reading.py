"""What the probe needs to read, in a thread of its own: features, and what is painted on other studies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import FileError, StudyError
from napari_brainmvp.progress import CancelToken, ProgressCallback
from napari_brainmvp.study import Study

__all__ = ["labelled_elsewhere", "read_features", "read_predictor"]


def read_predictor(
    study: Study,
    background: int,
    progress: ProgressCallback,
    cancel: CancelToken,
    model: Path | None = None,
    known: Sequence[int] = (),
) -> Any:
    """Return a :class:`~napari_brainmvp.annotation.prediction.StudyPredictor` that knows no strokes yet.

    Parameters
    ----------
    study : Study
    background : int
        Label value of the background class.
    progress, cancel
    model : Path, optional
        Folder of the model to start from; default the one that ships.
    known : sequence of int
        The label value of each of its network's classes, where that is known.
    """
    from napari_brainmvp.annotation.prediction import StudyPredictor

    return StudyPredictor(read_features(study, progress, cancel, model), background, known=known)


def read_features(study: Study, progress: ProgressCallback, cancel: CancelToken, model: Path | None = None) -> Any:
    """Return a study's features by a model's folder, default the model that ships; from the disk where it has them."""
    from napari_brainmvp.annotation.store import FeatureStore
    from napari_brainmvp.models import find_model, load_model

    return FeatureStore().get(study, load_model(find_model(model)), progress, cancel)


def labelled_elsewhere(project: AnnotationProject, but: str, progress: ProgressCallback, cancel: CancelToken) -> Any:
    """Return the labelled voxels of a project's other studies, and the names of those whose scans cannot be read."""
    from napari_brainmvp.annotation.prediction import labelled_voxels

    found, unread = [], []
    for reference in project.studies:
        labels = project.labels(reference.name).labels
        if reference.name == but or not labels.any():
            continue
        try:
            study = project.read(reference.name)
        except (FileError, StudyError):
            unread.append(reference.name)
            continue
        found.append(labelled_voxels(read_features(study, progress, cancel), labels))
    return tuple(found), tuple(unread)
