"""The file ``project.json``, read and written, and the names that studies have in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from napari_brainmvp.annotation.content import CLASS_COLUMN, ProjectContent, check_classes
from napari_brainmvp.annotation.regions import check_regions
from napari_brainmvp.errors import FileError, StudyError
from napari_brainmvp.io import readable, write_text_atomic

__all__ = ["check_in_place", "free_name", "read_content", "session_free", "study_name", "write_content"]

_FILE = "project.json"
_UNUSED = {"regions": {}, "removed": (), "removed_classes": (), "class_column": CLASS_COLUMN, "identity": ""}
"""What is not written: versions that are older than these fields read a project that has no use for them."""


def check_in_place(folder: Path) -> None:
    """Make sure that a project's folder is where it was: else writing would make it anew, with what comes from now on.

    Raises
    ------
    FileError
        It is not, or may not be looked into.
    """
    with readable(folder):
        if not (folder / _FILE).is_file():
            raise FileError(
                f"The project {folder.name} is no longer in {folder.parent}, so nothing that is painted is saved: put "
                "its folder back, or open it where it is now."
            )


def read_content(folder: Path) -> ProjectContent:
    """Read a project's file.

    Raises
    ------
    FileError
        There is none, or it is damaged.
    """
    try:
        content = ProjectContent.model_validate(json.loads((folder / _FILE).read_text(encoding="utf-8")))
        check_regions(content.regions.items(), check_classes(content.classes))
    except OSError as error:
        raise FileError(f"{folder} holds no annotation project ({error.strerror}): choose its folder.") from error
    except (ValidationError, ValueError, StudyError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise FileError(f"{folder / _FILE} is damaged ({why}): correct or restore it.") from error
    return content


def write_content(folder: Path, content: ProjectContent) -> None:
    """Write a project's file, complete or not at all."""
    unused = {name for name, value in _UNUSED.items() if getattr(content, name) == value}
    write_text_atomic(folder / _FILE, content.model_dump_json(indent=2, exclude=unused) + "\n")


def study_name(name: str) -> str:
    """Return the name that a study gets in a project: one for a folder, too."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")
    return session_free(plain)[:100] or "study"


def session_free(name: str) -> str:
    """Return a study's name that does not begin as a session's folder does: readers of datasets add to such a one.

    Examples
    --------
    >>> session_free("ses-2"), session_free("sub-01_ses-2")
    ('study-ses-2', 'sub-01_ses-2')
    """
    return f"study-{name}" if name.startswith("ses-") else name


def free_name(name: str, taken: Iterable[str]) -> str:
    """Give a name that is taken, in whatever capitals, a number: not every file system tells capitals apart."""
    known = {other.lower() for other in taken}
    numbered = (f"{name}-{k}" for k in range(2, len(known) + 3))
    return next(n for n in (name, *numbered) if n.lower() not in known)
