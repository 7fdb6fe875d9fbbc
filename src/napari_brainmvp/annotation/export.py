"""A project as a dataset that others, and fine-tuning, can read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Literal

import numpy as np

from napari_brainmvp.annotation.participants import export_participants, subject_label
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import FileError, StudyError
from napari_brainmvp.io import write_label_map, write_text_atomic
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback, no_progress

__all__ = ["export_dataset"]

_BIDS = {"t1": "T1w", "t1c": "ce-gadolinium_T1w", "t2": "T2w", "flair": "FLAIR", "pd": "PDw", "mra": "angio"}


def export_dataset(
    project: AnnotationProject,
    folder: Path,
    layout: Literal["brats", "bids"] = "brats",
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
) -> Path:
    """Write the annotated studies as a dataset.

    ``"brats"``: one folder a study with ``NAME_MODALITY`` and ``NAME_seg`` files. ``"bids"``: ``sub-NAME/anat`` with
    BIDS names and ``dseg`` files. Both with a ``dataset.json`` that says what label values mean (0 is unlabelled, so
    that sparse labels train as they are) and, where studies have a class, a ``participants.tsv``. Scans are copied.

    Parameters
    ----------
    project : AnnotationProject
    folder : Path
        New or empty.
    layout : {"brats", "bids"}
    progress, cancel
        Told, and asked, once a study.

    Raises
    ------
    FileError
        The folder holds something, or cannot be written.
    StudyError
        Nothing is annotated, or a label value does not fit into a NIfTI file.
    Cancelled
        What is written so far stays.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileError(f"{folder} is not empty: choose a new folder for the dataset.")
    chosen = [s for s in project.studies if project.labels(s.name).labels.any()]
    if not chosen:
        raise StudyError("No study of the project has a label yet: paint some strokes first.")
    used: set[int] = set()
    for done, reference in enumerate(chosen):
        if cancel is not None:
            cancel.raise_if_cancelled()
        progress(Progress("Exporting", done, len(chosen)))
        labels = project.labels(reference.name).labels
        values = {int(v) for v in np.unique(labels)} - {0}
        strange = [v for v in values if not 0 < v <= 65535]
        if strange:
            raise StudyError(
                f"{reference.name} holds the label {strange[0]}, which a dataset cannot: give that class a number "
                "between 1 and 65535."
            )
        used |= values
        study = project.read(reference.name)
        target, name = _place(folder, reference.name, layout)
        target.mkdir(parents=True, exist_ok=True)
        for key, scan in study.scans.items():
            assert scan.path is not None, "a study that was read from files"
            ending = "".join(re.findall(r"\.nii\.gz$|\.[^.]+$", scan.path.name))
            copy = target / f"{name}_{_suffix(key, layout)}{ending}"
            if scan.path.is_dir():
                shutil.copytree(scan.path, target / f"{name}_{_suffix(key, layout)}")
            else:
                shutil.copyfile(scan.path, copy)
        like = study.scans[study.reference].path
        ending = "dseg" if layout == "bids" else "seg"
        write_label_map(target / f"{name}_{ending}.nii.gz", labels, study.grid, like=like)
    _describe(project, folder, used)
    progress(Progress("Exporting", len(chosen), len(chosen)))
    return folder


def _place(folder: Path, name: str, layout: str) -> tuple[Path, str]:
    if layout == "brats":
        return folder / name, name
    subject = f"sub-{subject_label(name)}"
    return folder / subject / "anat", subject


def _suffix(key: str, layout: str) -> str:
    return _BIDS.get(key, key) if layout == "bids" else key


def _describe(project: AnnotationProject, folder: Path, used: set[int]) -> None:
    """Write ``dataset.json``: classes that nobody has painted yet are left out, they cannot be learned."""
    classes = [c for c in project.classes if not c.background and c.value in used]
    if not classes:
        raise StudyError("Only background is labelled: paint some of what you are looking for, too.")
    content = {
        "name": project.folder.name,
        "labels": {str(c.value): c.name for c in classes},
        "colors": {str(c.value): c.color for c in classes},
        "background": project.background.value,
        "unlabelled": 0,
    }
    write_text_atomic(folder / "dataset.json", json.dumps(content, indent=2) + "\n")
    description = {"Name": project.folder.name, "BIDSVersion": "1.9.0", "DatasetType": "raw"}
    write_text_atomic(folder / "dataset_description.json", json.dumps(description, indent=2) + "\n")
    if any(s.group for s in project.studies):
        export_participants(project, folder / "participants.tsv")
