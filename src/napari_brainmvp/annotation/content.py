"""What a project file says: classes and references to studies. Validated on load."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from napari_brainmvp.errors import StudyError
from napari_brainmvp.study import Grid

__all__ = [
    "CLASS_COLORS",
    "CLASS_COLUMN",
    "LabelClass",
    "ProjectContent",
    "StudyReference",
    "check_classes",
    "classes_of",
    "default_classes",
]

CLASS_COLORS = ("#d1495b", "#f2c14e", "#2fbf9b", "#9b6dd6", "#e07a3f", "#6fb98f", "#c06c84")
CLASS_COLUMN = "group"
"""What tables call the studies' classes where no other name is known."""

_BACKGROUND_COLOR = "#4a90d9"


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


class ProjectContent(BaseModel):
    """The project file.

    Parameters
    ----------
    version : int
    classes : tuple of LabelClass
    removed_classes : tuple of LabelClass
        Classes that were removed: nobody else gets their numbers, and a stroke that is undone can bring them back.
    regions : dict of str to tuple of int
        Class values that make up each region, see :mod:`~napari_brainmvp.annotation.regions`; empty where the classes
        exclude each other, as in files that are older than regions.
    studies : tuple of StudyReference
    removed : tuple of StudyReference
        Studies that were taken off the list, to be found again with their strokes.
    class_column : str
        What tables call the studies' classes: the column that they were read from last.
    identity : str
        By which models know the project wherever its folder is: hexadecimal digits, drawn with the first export.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    classes: tuple[LabelClass, ...]
    removed_classes: tuple[LabelClass, ...] = ()
    regions: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    studies: tuple[StudyReference, ...] = ()
    removed: tuple[StudyReference, ...] = ()
    class_column: str = Field(CLASS_COLUMN, min_length=1)
    identity: str = Field("", pattern=r"^[0-9a-f]*$")


def default_classes() -> tuple[LabelClass, ...]:
    """Return the classes of a new project: background and lesion."""
    return (
        LabelClass(value=1, name="Background", color=_BACKGROUND_COLOR, background=True),
        LabelClass(value=2, name="Lesion", color=CLASS_COLORS[0]),
    )


def classes_of(
    values: Iterable[int], classes: tuple[LabelClass, ...], removed: Iterable[LabelClass]
) -> tuple[LabelClass, ...]:
    """Make a class for every label value that has none: the one that was removed, if there was one, else a new one."""
    known, names, gone = {c.value for c in classes}, {c.name for c in classes}, {c.value: c for c in removed}
    made: list[LabelClass] = []
    for value in sorted({v for v in values if v != 0} - known):
        back = gone.get(value)
        color = back.color if back else CLASS_COLORS[(len(classes) + len(made)) % len(CLASS_COLORS)]
        wanted = [*([back.name] if back else []), f"Label {value}", *(f"Label {value} ({k})" for k in range(2, 9))]
        name = next(name for name in wanted if name not in names)
        names.add(name)
        made.append(LabelClass(value=value, name=name, color=color))
    return tuple(made)


def check_classes(classes: tuple[LabelClass, ...]) -> tuple[LabelClass, ...]:
    """Return the classes as they are.

    Raises
    ------
    StudyError
        Two have one value or name, or there is not exactly one background.
    """
    values, names = [c.value for c in classes], [c.name for c in classes]
    if len(set(values)) != len(values) or len(set(names)) != len(names):
        raise StudyError("Two classes have the same number or name: give each its own.")
    if sum(c.background for c in classes) != 1:
        raise StudyError("A project needs exactly one background class: mark one.")
    return classes
