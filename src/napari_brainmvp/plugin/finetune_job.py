"""What fine-tuning on a project submits: its dataset, as it is now, and a job that trains on it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from napari_brainmvp.annotation.export import Task, export_dataset, left_out
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.jobs import free_name, submit_job, training_job
from napari_brainmvp.progress import CancelToken, ProgressCallback
from napari_brainmvp.training.finetuning.spec import FinetuneSpec
from napari_brainmvp.training.sources import DataSource

__all__ = ["count_folds", "submit_finetuning"]

_FOLDS = 3


def count_folds(studies: int) -> int:
    """Return to how many folds so many studies are dealt out; 0 where one would have none to learn from."""
    return min(_FOLDS, studies) if studies > 1 else 0


def submit_finetuning(
    project: AnnotationProject, asked: FinetuneSpec, progress: ProgressCallback, cancel: CancelToken
) -> tuple[Any, list[str]]:
    """Export a project and queue a job; return the job, and the names of studies that cannot be read."""
    name = free_name(_model_name(project.folder, asked.task))
    folder = _free_folder(project.folder / "datasets" / name)
    data = export_dataset(project, folder, progress=progress, cancel=cancel, task=asked.task, link=True)
    exported = sum(path.is_dir() for path in data.iterdir())
    folds = count_folds(exported) if asked.folds else 0
    spec = asked.model_copy(update={"data": (DataSource(path=str(data)),), "folds": folds})
    cancel.raise_if_cancelled()
    job = submit_job(training_job("finetune", spec, name))
    return job, left_out(data)


def _free_folder(folder: Path) -> Path:
    """Return a folder that is not there yet: a dataset stays when its job and its model are removed."""
    numbered = (folder.with_name(f"{folder.name}-{k}") for k in itertools.count(2))
    return folder if not folder.exists() else next(f for f in numbered if not f.exists())


def _model_name(folder: Path, task: Task) -> str:
    letters = "".join(c if c.isascii() and c.isalnum() else "-" for c in folder.name.lower()).strip("-")
    return (letters[:45].strip("-") or "project") + ("-classes" if task == "classification" else "")
