"""The annotation project: a folder with studies by reference, their classes, labels and history."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from napari_brainmvp.annotation.history import LabelHistory
from napari_brainmvp.annotation.lock import ProjectLock
from napari_brainmvp.errors import FileError, StudyError
from napari_brainmvp.io import read_study, write_image, write_text_atomic
from napari_brainmvp.study import Grid, Study

__all__ = ["AnnotationProject", "LabelClass", "StudyReference", "default_classes"]

_COLORS = ("#d1495b", "#f2c14e", "#2fbf9b", "#9b6dd6", "#e07a3f", "#6fb98f", "#c06c84")
BACKGROUND_COLOR = "#4a90d9"
_FILE = "project.json"


class LabelClass(BaseModel):
    """A class one paints.

    Parameters
    ----------
    value : int
        In label maps; any integer but 0, which means unlabelled.
    name : str
    color : str
        ``"#rrggbb"``.
    background : bool
        Whether it means "nothing of all this". A project has one such class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: int
    name: str = Field(min_length=1)
    color: str = Field(pattern=r"^#[0-9a-fA-F]{6}$")
    background: bool = False

    @field_validator("value")
    @classmethod
    def _not_unlabelled(cls, value: int) -> int:
        if value == 0:
            raise ValueError("0 means unlabelled: give the class another number")
        return value


class StudyReference(BaseModel):
    """Where a study's scans are, and what its labels are on.

    Parameters
    ----------
    name : str
        Of the study in this project, and of its folder.
    scans : dict of str to str
        File by modality key; absolute, or relative to the project's folder.
    reference : str
        Modality on whose grid one paints.
    shape, affine
        That grid, RAS mm, to tell when the scans were replaced.
    group : str
        The study's class, for classification; empty where nobody said.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    scans: dict[str, str]
    reference: str
    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    group: str = ""

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(f"{name!r} is not a name for a study: use up to 100 letters, digits, '.', '_' and '-'")
        return name

    @property
    def grid(self) -> Grid:
        """The grid one paints on."""
        return Grid(self.shape, np.array(self.affine))


class _ProjectFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int = 1
    classes: tuple[LabelClass, ...]
    studies: tuple[StudyReference, ...] = ()


def default_classes() -> tuple[LabelClass, ...]:
    """Return the classes of a new project: background and lesion."""
    return (
        LabelClass(value=1, name="Background", color=BACKGROUND_COLOR, background=True),
        LabelClass(value=2, name="Lesion", color=_COLORS[0]),
    )


class AnnotationProject:
    """An open project. Use :meth:`create` or :meth:`open`, and :meth:`close` in the end.

    Where another window has it open already, it opens read-only: see :attr:`read_only`.
    """

    def __init__(self, folder: Path, content: _ProjectFile, lock: ProjectLock) -> None:
        self.folder, self._content, self._lock = folder, content, lock
        self._histories: dict[str, LabelHistory] = {}

    @classmethod
    def create(cls, folder: str | Path, classes: tuple[LabelClass, ...] = ()) -> AnnotationProject:
        """Make a project in a folder that does not exist yet or is empty.

        Raises
        ------
        FileError
            The folder holds something else, or cannot be written.
        """
        path = Path(folder).expanduser().resolve()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileError(f"{path} is not empty: choose a new folder for the project, or open the one that is there.")
        content = _ProjectFile(classes=_checked(classes or default_classes()))
        write_text_atomic(path / _FILE, content.model_dump_json(indent=2) + "\n")
        return cls.open(path)

    @classmethod
    def open(cls, folder: str | Path) -> AnnotationProject:
        """Open a project.

        Raises
        ------
        FileError
            There is no project in the folder, or its file is damaged.
        """
        path = Path(folder).expanduser().resolve()
        try:
            text = (path / _FILE).read_text(encoding="utf-8")
            content = _ProjectFile.model_validate(json.loads(text))
            _checked(content.classes)
        except OSError as error:
            raise FileError(f"{path} holds no annotation project ({error.strerror}): choose its folder.") from error
        except (ValidationError, ValueError) as error:
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise FileError(f"{path / _FILE} is damaged ({why}): correct or restore it.") from error
        lock = ProjectLock(path)
        lock.acquire()
        return cls(path, content, lock)

    def close(self) -> None:
        """Write snapshots and let others write."""
        if not self.read_only:
            for history in self._histories.values():
                if history.stroke:
                    history.compact()
        self._lock.release()

    @property
    def read_only(self) -> bool:
        """Whether somebody else has it open for writing."""
        return not self._lock.held

    @property
    def owner(self) -> str:
        """Who has it open for writing, for people."""
        return self._lock.owner

    @property
    def classes(self) -> tuple[LabelClass, ...]:
        """The classes, background first."""
        return self._content.classes

    @property
    def background(self) -> LabelClass:
        """The class that means "nothing of all this"."""
        return next(c for c in self.classes if c.background)

    @property
    def studies(self) -> tuple[StudyReference, ...]:
        """The studies, in the order in which they were added."""
        return self._content.studies

    def study(self, name: str) -> StudyReference:
        """Find a study.

        Raises
        ------
        StudyError
            There is none of this name.
        """
        for reference in self.studies:
            if reference.name == name:
                return reference
        known = ", ".join(s.name for s in self.studies) or "none"
        raise StudyError(f"The project has no study {name!r}. There are: {known}.")

    def find(self, study: Study) -> StudyReference | None:
        """Find the reference of an opened study: the same files, or the same name and grid."""
        paths = {str(scan.path.resolve()) for scan in study.scans.values() if scan.path is not None}
        for reference in self.studies:
            same = paths & {str(self._resolved(p)) for p in reference.scans.values()}
            if reference.grid.same_as(study.grid) and (same or reference.name == _study_name(study.name)):
                return reference
        return None

    def add_study(self, study: Study) -> StudyReference:
        """Add a study by reference; scans that are in no file yet are written into the project.

        The labels that came with the study become its first stroke.

        Raises
        ------
        FileError
            The project is open elsewhere, or cannot be written.
        """
        self._writable()
        name = self._free_name(_study_name(study.name))
        scans = {}
        for key, scan in study.scans.items():
            path = scan.path
            if path is None or not path.exists():
                path = write_image(self.folder / "scans" / name / f"{name}_{key}.nii.gz", scan.data, scan.grid)
            path = path.resolve()
            inside = path.is_relative_to(self.folder)
            scans[key] = path.relative_to(self.folder).as_posix() if inside else str(path)
        affine = tuple(tuple(float(v) for v in row) for row in study.grid.affine)
        reference = StudyReference(
            name=name, scans=scans, reference=study.reference, shape=study.grid.shape, affine=affine
        )
        self._update(studies=(*self.studies, reference))
        if study.labels is not None and study.labels.grid.same_as(study.grid):
            self.know_values(int(v) for v in np.unique(study.labels.data))
            self.labels(name).record(study.labels.data)
        return reference

    def read(self, name: str) -> Study:
        """Read a study's scans.

        Raises
        ------
        FileError
            A scan was moved or deleted.
        StudyError
            It lies on another grid than when it was added.
        """
        reference = self.study(name)
        paths = {key: self._resolved(path) for key, path in reference.scans.items()}
        study = read_study(
            tuple(paths.values()), modalities=dict(paths), reference=reference.reference, name=reference.name
        )
        if not study.grid.same_as(reference.grid):
            raise StudyError(f"The scans of {name} lie on another grid than when they were added: put them back.")
        return study

    def labels(self, name: str) -> LabelHistory:
        """Return the labels of a study, with their history."""
        if name not in self._histories:
            self._histories[name] = LabelHistory(self.folder / "labels" / name, self.study(name).shape)
        return self._histories[name]

    def set_classes(self, classes: tuple[LabelClass, ...]) -> None:
        """Replace the classes.

        Raises
        ------
        StudyError
            Two have one value or name, or there is not exactly one background.
        FileError
            The project is open elsewhere, or cannot be written.
        """
        self._update(classes=_checked(classes))

    def know_values(self, values: object) -> None:
        """Add a class for every label value that has none yet; values are kept as they are."""
        known = {c.value for c in self.classes}
        new = [v for v in sorted(set(values)) if v != 0 and v not in known]  # type: ignore[call-overload]
        if new:
            start = len(self.classes)
            added = (
                LabelClass(value=v, name=f"Label {v}", color=_COLORS[(start + k) % len(_COLORS)])
                for k, v in enumerate(new)
            )
            self.set_classes((*self.classes, *added))

    def set_group(self, name: str, group: str) -> None:
        """Say which class a whole study belongs to; empty for none."""
        self.study(name)
        studies = (s.model_copy(update={"group": group.strip()}) if s.name == name else s for s in self.studies)
        self._update(studies=tuple(studies))

    def import_participants(self, path: Path, column: str = "group") -> int:
        """Read the studies' classes from a BIDS ``participants.tsv``; return how many studies got one.

        Raises
        ------
        FileError
            The file cannot be read, or has no such column.
        """
        try:
            table = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), delimiter="\t"))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise FileError(f"{path} is not a readable participants.tsv ({error}): check the file.") from error
        columns = list(table[0]) if table else []
        if not table or "participant_id" not in columns or column not in columns:
            have = ", ".join(columns) or "nothing"
            raise FileError(f"{path} needs the columns participant_id and {column}, and has {have}.")
        said = {_subject(row["participant_id"] or ""): (row[column] or "").strip() for row in table}
        groups = {s.name: said[_subject(s.name)] for s in self.studies if said.get(_subject(s.name), "n/a") != "n/a"}
        self._update(studies=tuple(s.model_copy(update={"group": groups.get(s.name, s.group)}) for s in self.studies))
        return len(groups)

    def export_participants(self, path: Path, column: str = "group") -> Path:
        """Write the studies' classes as a BIDS ``participants.tsv``; ``n/a`` where nobody said."""
        lines = [f"participant_id\t{column}"]
        lines += [f"sub-{_subject(s.name)}\t{s.group or 'n/a'}" for s in self.studies]
        write_text_atomic(path, "\n".join(lines) + "\n")
        return path

    def _resolved(self, path: str) -> Path:
        return (self.folder / path).resolve()

    def _free_name(self, name: str) -> str:
        taken = {s.name for s in self.studies}
        numbered = (f"{name}-{k}" for k in range(2, len(taken) + 3))
        return name if name not in taken else next(n for n in numbered if n not in taken)

    def _writable(self) -> None:
        if not self._lock.held or not self._lock.still_held():
            raise FileError(
                f"The project {self.folder.name} is open for writing elsewhere ({self.owner}): close it there."
            )

    def _update(self, **changes: object) -> None:
        self._writable()
        content = self._content.model_copy(update=changes)
        write_text_atomic(self.folder / _FILE, content.model_dump_json(indent=2) + "\n")
        self._content = content


def _checked(classes: tuple[LabelClass, ...]) -> tuple[LabelClass, ...]:
    values, names = [c.value for c in classes], [c.name for c in classes]
    if len(set(values)) != len(values) or len(set(names)) != len(names):
        raise StudyError("Two classes have the same number or name: give each its own.")
    if sum(c.background for c in classes) != 1:
        raise StudyError("A project needs exactly one background class: mark one.")
    return classes


def _study_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:100] or "study"


def _subject(name: str) -> str:
    """Return a BIDS subject label: letters and digits only."""
    return re.sub(r"[^A-Za-z0-9]", "", name.removeprefix("sub-"))
