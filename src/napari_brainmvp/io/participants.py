"""Which class a study belongs to: the table ``participants.tsv`` of a BIDS dataset. No torch here."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from napari_brainmvp.errors import FileError, StudyError

__all__ = ["class_of", "is_missing", "read_participants", "read_table"]

_USUAL = ("diagnosis", "group", "class", "label", "dx")
_MISSING = ("", "n/a")  # and nothing else, as in BIDS: "none" may be a class


def is_missing(value: str) -> bool:
    """Tell whether a cell says nothing: it is empty, or "n/a"."""
    return value.strip().lower() in _MISSING


def read_table(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read the columns and rows of a ``participants.tsv``, with or without a byte order mark.

    Raises
    ------
    FileError
        The file cannot be read.
    StudyError
        It has no column ``participant_id``.
    """
    path = Path(path).expanduser()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t", restval="")
            rows, columns = list(reader), list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{path} is no readable table ({error}): give a participants.tsv.") from error
    if "participant_id" not in columns:
        raise StudyError(f"{path} has no column participant_id: it has {', '.join(columns) or 'none'}.")
    return columns, rows


def read_participants(path: str | Path, column: str = "") -> dict[str, str]:
    """Read the class of every participant.

    Parameters
    ----------
    path : path
        Tab-separated, with a column ``participant_id``.
    column : str
        Which column holds the class; empty for the only other one, or one named diagnosis, group, class, label or dx.

    Returns
    -------
    dict of str to str
        Class by participant; those whose class is empty or "n/a", in whatever capitals, are left out.

    Raises
    ------
    FileError
        The file cannot be read.
    StudyError
        A column is missing, it cannot be told which one is meant, or a participant has two classes.
    """
    path = Path(path).expanduser()
    columns, rows = read_table(path)
    chosen = column or _choose(path, columns)
    if chosen not in columns:
        raise StudyError(f"{path} has no column {chosen!r}: choose one of {', '.join(columns[1:])}.")
    classes: dict[str, str] = {}
    for row in rows:
        name, value = (row["participant_id"] or "").strip(), (row[chosen] or "").strip()
        if is_missing(value):
            continue
        if classes.setdefault(name, value) != value:
            raise StudyError(f"{path} gives {name} two classes, {classes[name]!r} and {value!r}: keep one.")
    if not classes:
        raise StudyError(f"{path}: the column {chosen!r} is empty.")
    return classes


def _choose(path: Path, columns: list[str]) -> str:
    others = [c for c in columns if c != "participant_id"]
    usual = [c for c in others if c.lower() in _USUAL]
    found = others if len(others) == 1 else usual
    if len(found) != 1:
        raise StudyError(f"{path}: say which column holds the class: {', '.join(others) or 'there is none'}.")
    return found[0]


def class_of(name: str, classes: Mapping[str, str]) -> str | None:
    """Return a study's class by its name: that of the study, of its BIDS subject, or with or without ``sub-``.

    Examples
    --------
    >>> class_of("sub-01_ses-2", {"sub-01": "patient"}), class_of("x7", {"sub-x7": "control"}), class_of("y", {})
    ('patient', 'control', None)
    """
    subject = name.split("_" if name.startswith("sub-") else "_ses-")[0]  # p_2 is no part of p
    for candidate in (name, subject, f"sub-{name}", name.removeprefix("sub-"), subject.removeprefix("sub-")):
        if candidate in classes:
            return classes[candidate]
    return None
