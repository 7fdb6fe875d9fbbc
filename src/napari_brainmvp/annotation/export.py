"""A project as a dataset that others, and fine-tuning, can read."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np

from napari_brainmvp import __version__
from napari_brainmvp.annotation.content import StudyReference
from napari_brainmvp.annotation.participants import subject_labels, write_participants
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.annotation.project_file import session_free
from napari_brainmvp.annotation.regions import painted_regions
from napari_brainmvp.errors import BrainMVPError, FileError, StudyError
from napari_brainmvp.io import image_files, make_folder, write_image, write_label_map, write_text_atomic
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback, no_progress
from napari_brainmvp.study import Scan, Study

__all__ = ["Layout", "Task", "export_dataset", "exported_name", "left_out"]

_BIDS = {"t1": "T1w", "t1c": "ce-gadolinium_T1w", "t2": "T2w", "flair": "FLAIR", "pd": "PDw", "mra": "angio"}
_LEFT_OUT = "left_out.txt"
_LARGEST = 65535
"""Label value that readers take."""
logger = logging.getLogger(__name__)

Layout = Literal["brats", "bids"]
Task = Literal["segmentation", "classification"]


def export_dataset(
    project: AnnotationProject,
    folder: Path,
    layout: Layout = "brats",
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
    *,
    task: Task = "segmentation",
    link: bool = False,
) -> Path:
    """Write the studies that one can learn a task from as a dataset, complete or not at all.

    ``"brats"``: one folder a study with ``NAME_MODALITY`` and ``NAME_seg`` files. ``"bids"``: ``sub-NAME/anat`` with
    BIDS names and ``dseg`` files. For segmentation, the studies with strokes, and a ``dataset.json`` that says what
    label values and regions mean (0 is unlabelled, so that sparse labels train as they are; a class whose number no
    label map can hold gets a free one); for classification, the studies with a class, without strokes. With a
    ``participants.tsv`` where studies have a class. Scans are copied, those whose voxels are in a second file (NRRD)
    as NIfTI. A study whose scans cannot be read is left out, and ``left_out.txt`` says why.

    Parameters
    ----------
    project : AnnotationProject
    folder : Path
        New or empty.
    layout : {"brats", "bids"}
    progress, cancel
        Told, and asked, once a study.
    task : {"segmentation", "classification"}
    link : bool
        Give scans a second name in place of a copy, where the file system can: for a dataset that nobody edits.

    Raises
    ------
    FileError
        The folder holds something, or cannot be written.
    StudyError
        Too little is annotated, or none of it can be read.
    Cancelled
        Nothing is written.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileError(f"{folder} is not empty: choose a new folder for the dataset.")
    wanted = [s for s in project.studies if (s.group if task == "classification" else _values(project, s.name))]
    _check(project, wanted, task)

    def fill(made: Path) -> None:
        dataset = _Dataset(project, made, layout, task, link)
        for done, reference in enumerate(wanted):
            if cancel is not None:
                cancel.raise_if_cancelled()
            progress(Progress("Exporting", done, len(wanted)))
            dataset.add(reference)
        dataset.describe()
        progress(Progress("Exporting", len(wanted), len(wanted)))

    return make_folder(folder, fill, may_be_empty=True)


def left_out(dataset: Path) -> list[str]:
    """Return the names of the studies that an export left out because their scans cannot be read."""
    path = dataset / _LEFT_OUT
    return [line.split(":")[0] for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def exported_name(project: AnnotationProject, name: str, layout: Layout) -> str:
    """Return what a study of the project is called in a dataset: as readers name it, unlike all others."""
    names = [s.name for s in project.studies]
    if layout == "bids":
        return f"sub-{subject_labels(names)[name]}"
    plain = session_free(name)  # an older project may have a study of such a name
    while plain != name and plain in names:
        plain = f"study-{plain}"
    return plain


def _values(project: AnnotationProject, name: str) -> set[int]:
    """Return the label values of a study; empty where nothing is painted."""
    labels = project.labels(name).labels
    return {int(v) for v in np.unique(labels[labels != 0])}


def _check(project: AnnotationProject, studies: Sequence[StudyReference], task: Task) -> None:
    """Refuse studies that nothing can be learned from."""
    if task == "classification":
        groups = sorted({s.group for s in studies})
        if len(groups) < 2:
            raise StudyError(
                f"To tell classes apart takes two, and the studies are {groups[0] if groups else 'of none'}: say the "
                "class of more studies."
            )
        return
    if not studies:
        raise StudyError("No study of the project has a label yet: paint some strokes first.")
    used: set[int] = set()
    for reference in studies:
        used |= _values(project, reference.name)
    if used <= {project.background.value}:
        raise StudyError("Only background is labelled: paint some of what you are looking for, too.")
    if project.regions and not painted_regions(project.regions, used):
        raise StudyError(
            f"No class of the region {next(iter(project.regions))!r} or of another is painted: paint one of them, or "
            "take the regions away."
        )


def _numbers(project: AnnotationProject, studies: Iterable[StudyReference]) -> dict[int, int]:
    """Return the values that a label map cannot hold, and in their place the lowest numbers that no class has."""
    values = {c.value for c in project.classes}.union(*(_values(project, s.name) for s in studies))
    free = (number for number in count(1) if number not in values)
    return {value: next(free) for value in sorted(values) if not 0 < value <= _LARGEST}


def _link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where that cannot be, as on another disk."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


class _Dataset:
    """A dataset being written into a folder."""

    def __init__(self, project: AnnotationProject, folder: Path, layout: Layout, task: Task, link: bool) -> None:
        self.project, self.folder, self.layout, self.task = project, folder, layout, task
        self._put = _link if link else shutil.copyfile
        self.numbers = _numbers(project, project.studies if task == "segmentation" else ())
        self.written: list[StudyReference] = []
        self.left_out: list[str] = []

    def add(self, reference: StudyReference) -> None:
        """Copy a study's scans and write its labels, or note why it is left out."""
        try:
            study = self.project.read(reference.name)
        except BrainMVPError as error:
            logger.warning("Left out %s: %s", reference.name, error)
            self.left_out.append(f"{reference.name}: {error}")
            return
        self.written.append(reference)
        self._write(study)

    def _write(self, study: Study) -> None:
        name = self._identity(study.name)
        target = self.folder / name / "anat" if self.layout == "bids" else self.folder / name
        target.mkdir(parents=True, exist_ok=True)
        for key, scan in study.scans.items():
            self._copy(scan, target / f"{name}_{_BIDS.get(key, key) if self.layout == 'bids' else key}")
        if self.task == "segmentation":
            ending = "dseg" if self.layout == "bids" else "seg"
            painted, like = self.project.labels(study.name).labels, study.scans[study.reference].path
            labels = painted.copy()
            for value, number in self.numbers.items():
                labels[painted == value] = number
            write_label_map(target / f"{name}_{ending}.nii.gz", labels, study.grid, like=like)

    def _copy(self, scan: Scan, to: Path) -> None:
        """Put a scan's file or folder in a place without an ending."""
        path = scan.path
        assert path is not None, "a study that was read from files"
        if path.is_dir():
            shutil.copytree(path, to, copy_function=self._put)
        elif len(image_files(path)) > 1:  # the header names the second file, which may be called as another scan's is
            write_image(to.with_name(f"{to.name}.nii.gz"), scan.data, scan.grid)
        else:
            ending = "".join(re.findall(r"\.nii\.gz$|\.[^.]+$", path.name))
            self._put(path, to.with_name(f"{to.name}{ending}"))

    def _identity(self, name: str) -> str:
        """Name a study in the dataset: as its folder is called, which is where readers look for its class."""
        return exported_name(self.project, name, self.layout)

    def _number(self, value: int) -> int:
        return self.numbers.get(value, value)

    def describe(self) -> None:
        """Write what the dataset is, once all studies are in it."""
        if self.left_out:
            write_text_atomic(self.folder / _LEFT_OUT, "\n".join(self.left_out) + "\n")
        try:
            _check(self.project, self.written, self.task)
        except StudyError as error:
            if not self.left_out:
                raise
            raise StudyError(f"Too few studies can be read. The first problem: {self.left_out[0]}") from error
        if self.task == "segmentation":
            self._describe_labels()
        if self.layout == "bids":
            self._describe_derivative()
        if any(s.group for s in self.written):
            column = self.project.class_column
            rows = [{"participant_id": self._identity(s.name), column: s.group or "n/a"} for s in self.written]
            write_participants(self.folder / "participants.tsv", rows, ("participant_id", column))

    def _describe_labels(self) -> None:
        """Write ``dataset.json``: what nobody has painted yet, class or region, is left out, it cannot be learned."""
        used = set().union(*(_values(self.project, s.name) for s in self.written))
        classes = [c for c in self.project.classes if not c.background and c.value in used]
        content: dict[str, object] = {
            "name": self.project.folder.name,
            **({"project": identity} if (identity := self.project.identify()) else {}),
            "labels": {str(self._number(c.value)): c.name for c in classes},
            "colors": {str(self._number(c.value)): c.color for c in classes},
            "background": self._number(self.project.background.value),
            "unlabelled": 0,
        }
        if self.project.regions:
            regions = painted_regions(self.project.regions, used)
            content["regions"] = {name: [self._number(v) for v in values] for name, values in regions.items()}
        write_text_atomic(self.folder / "dataset.json", json.dumps(content, indent=2) + "\n")

    def _describe_derivative(self) -> None:
        content = {
            "Name": self.project.folder.name,
            "BIDSVersion": "1.9.0",
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "napari-brainmvp", "Version": __version__}],
        }
        write_text_atomic(self.folder / "dataset_description.json", json.dumps(content, indent=2) + "\n")
        write_text_atomic(self.folder / ".bidsignore", f"dataset.json\n{_LEFT_OUT}\n")
