"""Which class a study belongs to: the table ``participants.tsv`` of a BIDS dataset. No torch here."""

from __future__ import annotations

import csv
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from napari_brainmvp.errors import FileError, StudyError

__all__ = [
    "by_subject",
    "class_of",
    "is_missing",
    "likely_column",
    "participant_of",
    "read_participants",
    "read_table",
    "subject_of",
]

_ID = "participant_id"
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
    if _ID not in columns:
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
    chosen = column or likely_column(columns)
    if not chosen:
        others = ", ".join(c for c in columns if c != _ID)
        raise StudyError(f"{path}: say which column holds the class: {others or 'there is none'}.")
    if chosen not in columns:
        raise StudyError(f"{path} has no column {chosen!r}: choose one of {', '.join(columns[1:])}.")
    classes: dict[str, str] = {}
    for row in rows:
        name, value = (row[_ID] or "").strip(), (row[chosen] or "").strip()
        if is_missing(value):
            continue
        if classes.setdefault(name, value) != value:
            raise StudyError(f"{path} gives {name} two classes, {classes[name]!r} and {value!r}: keep one.")
    if not classes:
        raise StudyError(f"{path}: the column {chosen!r} is empty.")
    return classes


def likely_column(columns: Sequence[str]) -> str:
    """Return the column that holds the class: the only one, or the one that is called so; empty where that is open."""
    others = [c for c in columns if c != _ID]
    usual = [c for c in others if c.lower() in _USUAL]
    found = others if len(others) == 1 else usual
    return found[0] if len(found) == 1 else ""


def subject_of(name: str) -> str:
    """Return the subject of a study that is a session by its name, as BIDS or BraTS have it; else the name.

    What is before a slash is the dataset that both are of.

    Examples
    --------
    >>> subject_of("sub-01_ses-2"), subject_of("case_ses-2"), subject_of("p_2"), subject_of("BraTS-GLI-00005-101")
    ('sub-01', 'case', 'p_2', 'BraTS-GLI-00005')
    """
    source, slash, own = name.rpartition("/")
    if visit := re.fullmatch(r"(BraTS-\w+-\d{5})-\d{3}", own):
        return f"{source}{slash}{visit[1]}"
    return source + slash + own.split("_" if own.startswith("sub-") else "_ses-")[0]  # p_2 is no part of p


def by_subject(names: Sequence[str]) -> list[list[int]]:
    """Put studies of one subject together, whom nobody may learn from and be measured on at once.

    Examples
    --------
    >>> by_subject(["sub-01_ses-1", "sub-02", "sub-01_ses-2"])
    [[0, 2], [1]]
    """
    found: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        found.setdefault(subject_of(name), []).append(index)
    return list(found.values())


def participant_of(name: str, participants: Container[str]) -> str | None:
    """Return the participant that a study is of: by its name, or its subject's, with or without ``sub-``."""
    subject = subject_of(name)
    plain = name.removeprefix("sub-"), subject.removeprefix("sub-")
    candidates = (name, subject, f"sub-{name}", f"sub-{subject}", *plain)
    return next((c for c in candidates if c in participants), None)


def class_of(name: str, classes: Mapping[str, str]) -> str | None:
    """Return a study's class by its name: that of the study, of its BIDS subject, or with or without ``sub-``.

    Examples
    --------
    >>> class_of("sub-01_ses-2", {"sub-01": "patient"}), class_of("x7", {"sub-x7": "control"}), class_of("y", {})
    ('patient', 'control', None)
    """
    participant = participant_of(name, classes)
    return None if participant is None else classes[participant]
