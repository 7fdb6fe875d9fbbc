"""The annotation project: a folder with studies by reference, their classes, labels and history."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from uuid import uuid4

import numpy as np

from napari_brainmvp.annotation.content import (
    LabelClass,
    ProjectContent,
    StudyReference,
    check_classes,
    classes_of,
    default_classes,
)
from napari_brainmvp.annotation.history import LabelHistory
from napari_brainmvp.annotation.lock import ProjectLock
from napari_brainmvp.annotation.project_file import check_in_place, free_name, read_content, study_name, write_content
from napari_brainmvp.annotation.references import find_reference, make_reference, named, scan_paths
from napari_brainmvp.annotation.regions import Regions, check_regions
from napari_brainmvp.annotation.removal import leaving_class
from napari_brainmvp.errors import FileError, LockedError, StudyError
from napari_brainmvp.io import read_study, readable
from napari_brainmvp.io.participants import is_missing
from napari_brainmvp.study import Study

__all__ = ["AnnotationProject"]

logger = logging.getLogger(__name__)


class AnnotationProject:
    """An open project. Use :meth:`create` or :meth:`open`, and :meth:`close` in the end.

    Where another window has it open already, it opens read-only: see :attr:`read_only`.
    """

    def __init__(self, folder: Path, content: ProjectContent, lock: ProjectLock) -> None:
        self.folder, self._content, self._lock = folder, content, lock
        self._histories: dict[str, LabelHistory] = {}
        self._labelled = {path.name for path in (folder / "labels").glob("*")}
        self._loading, self._changing = threading.Lock(), threading.Lock()

    @classmethod
    def create(cls, folder: str | Path, classes: tuple[LabelClass, ...] = ()) -> AnnotationProject:
        """Make a project in a folder that does not exist yet or is empty.

        Raises
        ------
        FileError
            The folder holds something else, or cannot be written.
        """
        path = Path(folder).expanduser().resolve()
        with readable(path):
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise FileError(f"{path} is not empty: choose a new folder for the project, or open the one in it.")
        content = ProjectContent(classes=check_classes(classes or default_classes()))
        write_content(path, content)
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
        content = read_content(path)
        lock = ProjectLock(path)
        lock.acquire()
        return cls(path, content, lock)

    def close(self) -> None:
        """Write snapshots and let others write. Without a snapshot, on a full disk, the strokes are all there still."""
        try:
            if self._lock.still_held():
                self._writable()
                for history in self._histories.values():
                    if history.stroke:
                        history.compact()
        except FileError as error:
            logger.warning("%s was closed without a snapshot, its strokes are saved: %s", self.folder.name, error)
        finally:
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
    def removed_classes(self) -> tuple[LabelClass, ...]:
        """Classes that were removed, whose numbers no other class shall have."""
        return self._content.removed_classes

    @property
    def regions(self) -> Regions:
        """The regions that are learned in place of the classes; empty where classes exclude each other."""
        return self._content.regions

    @property
    def background(self) -> LabelClass:
        """The class that means "nothing of all this"."""
        return next(c for c in self.classes if c.background)

    @property
    def studies(self) -> tuple[StudyReference, ...]:
        """The studies, in the order in which they were added."""
        return self._content.studies

    @property
    def removed(self) -> tuple[StudyReference, ...]:
        """What was taken off the list of studies: nobody else gets their names, beneath which their strokes are."""
        return self._content.removed

    @property
    def class_column(self) -> str:
        """What tables call the studies' classes: the column that they were read from last."""
        return self._content.class_column

    @property
    def identity(self) -> str:
        """By which models know the project wherever its folder is; empty before the first export."""
        return self._content.identity

    def identify(self) -> str:
        """Return :attr:`identity`, drawn now where there is none; none where the project cannot be written."""
        if not self.identity:
            try:
                self._update(identity=uuid4().hex)
            except FileError as error:
                logger.warning("%s has no identity: %s", self.folder.name, error)
        return self.identity

    def study(self, name: str) -> StudyReference:
        """Find a study.

        Raises
        ------
        StudyError
            There is none of this name.
        """
        return named(name, self.studies)

    def find(self, study: Study, removed: bool = False) -> StudyReference | None:
        """Find an opened study by its files, or its content where it came from none; or among those removed."""
        return find_reference(study, self.removed if removed else self.studies, self.folder)

    def add_study(self, study: Study) -> StudyReference:
        """Add a study by reference; scans that are in no file yet are written into the project.

        The labels that came with the study become its first stroke. One that was removed comes back with its own
        name, class and strokes; labels that come with it count only where it has no stroke.

        Raises
        ------
        FileError
            The project is open elsewhere, or cannot be written.
        """
        self._writable()
        back = self.find(study, removed=True)
        name = free_name(study_name(study.name), (s.name for s in (*self.studies, *self.removed)))
        reference = make_reference(study, name, self.folder, back)
        removed = tuple(s for s in self.removed if s is not back)
        self._update(studies=(*self.studies, reference), removed=removed)
        labels = self.labels(reference.name)
        if study.labels is not None and study.labels.grid.same_as(study.grid) and not labels.stroke:
            self.know_values(int(v) for v in np.unique(study.labels.data))
            labels.record(study.labels.data)
        elif back is not None:
            self.know_values(int(v) for v in np.unique(labels.labels))
        return reference

    def remove_study(self, name: str) -> None:
        """Take a study off the list; its strokes and scans stay on the disk, and come back when it is added again.

        Raises
        ------
        StudyError
            The project has no study of this name.
        FileError
            The project is open elsewhere, or cannot be written.
        """
        gone = self.study(name)
        self._update(studies=tuple(s for s in self.studies if s is not gone), removed=(*self.removed, gone))

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
        paths = scan_paths(reference, self.folder)
        study = read_study(
            tuple(paths.values()), modalities=dict(paths), reference=reference.reference, name=reference.name
        )
        if not study.grid.same_as(reference.grid):
            raise StudyError(f"The scans of {name} lie on another grid than when they were added: put them back.")
        return study

    def labels(self, name: str) -> LabelHistory:
        """Return the labels of a study, also a removed one, with their history: one object for all, in any thread.

        Raises
        ------
        FileError
            They are damaged.
        """
        with self._loading:
            if name not in self._histories:
                shape = named(name, (*self.studies, *self.removed)).shape
                self._histories[name] = LabelHistory(self.folder / "labels" / name, shape, self._writable)
            return self._histories[name]

    def painted_on(self) -> list[str]:
        """List the studies with strokes; of labels that nobody has opened yet, by whether there were any on opening."""
        known = self._histories
        names = [s.name for s in self.studies]
        return [n for n in names if (known[n].stroke > 0 if n in known else n in self._labelled)]

    def set_classes(self, classes: tuple[LabelClass, ...]) -> None:
        """Replace the classes.

        Raises
        ------
        StudyError
            Two have one value or name, there is not exactly one background, or a class that a region is made of is
            gone, has another number or has become the background.
        FileError
            The project is open elsewhere, or cannot be written.
        """
        check_regions(self.regions.items(), check_classes(classes))
        back = {c.value for c in classes}
        self._update(classes=classes, removed_classes=tuple(c for c in self.removed_classes if c.value not in back))

    def set_regions(self, regions: Mapping[str, Iterable[int]]) -> None:
        """Say which unions of classes shall be learned, larger ones first; none for the classes themselves.

        Raises
        ------
        StudyError
            A region has no name, that of another, no class, the background, or a number that no class has.
        FileError
            The project is open elsewhere, or cannot be written.
        """
        self._update(regions=check_regions(regions.items(), self.classes))

    def know_values(self, values: Iterable[int]) -> None:
        """Add a class for every label value that has none yet, or bring back the one that was removed."""
        if added := classes_of(values, self.classes, self.removed_classes):
            self.set_classes((*self.classes, *added))

    def remove_class(self, value: int) -> None:
        """Take a class out of the project; its number stays its own: a stroke of it that is undone brings it back.

        Raises
        ------
        StudyError
            It is painted on a study, is the background, or part of a region.
        """
        gone = leaving_class(value, self._content, self.folder, self._histories)
        classes = tuple(c for c in self.classes if c is not gone)
        self._update(classes=classes, removed_classes=(*self.removed_classes, gone))

    def set_groups(self, groups: Mapping[str, str], column: str = "") -> None:
        """Say which class whole studies belong to.

        Parameters
        ----------
        groups : mapping of str to str
            By study name; empty, or "n/a" as in BIDS, for none.
        column : str
            What the table that they are from calls them, which export keeps; empty to leave that as it is.

        Raises
        ------
        StudyError
            The project has no study of a name.
        """
        said = {self.study(name).name: "" if is_missing(group) else group.strip() for name, group in groups.items()}
        studies = (s.model_copy(update={"group": said[s.name]}) if s.name in said else s for s in self.studies)
        self._update(studies=tuple(studies), class_column=column or self.class_column)

    def _writable(self) -> None:
        check_in_place(self.folder)
        if not self._lock.held or not self._lock.still_held():
            raise LockedError(
                f"The project {self.folder.name} is open for writing elsewhere ({self.owner}), so nothing that is "
                "painted here is saved: close it there, and open it again here."
            )

    def _update(self, **changes: object) -> None:
        with self._changing:  # an export is a thread of its own
            self._writable()
            content = self._content.model_copy(update=changes)
            write_content(self.folder, content)
            self._content = content
