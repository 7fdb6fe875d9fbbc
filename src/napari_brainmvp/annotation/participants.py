"""The classes of whole studies, to and from a BIDS ``participants.tsv``."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path

from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import FileError
from napari_brainmvp.io import class_of, read_participants, write_text_atomic
from napari_brainmvp.io.participants import read_table

__all__ = ["export_participants", "import_participants", "subject_labels", "write_participants"]

_ID, _GROUP = "participant_id", "group"


def import_participants(project: AnnotationProject, path: Path, column: str = "") -> int:
    """Read the studies' classes from a ``participants.tsv``; return how many studies got one.

    Parameters
    ----------
    project : AnnotationProject
    path : Path
    column : str
        Which column holds the class; empty for ``group``, which :func:`export_participants` writes, and where there
        is none for what :func:`~napari_brainmvp.io.read_participants` takes.

    Raises
    ------
    FileError
        The file cannot be read.
    StudyError
        A column is missing or empty, it cannot be told which one is meant, or a participant has two classes.
    """
    columns, _ = read_table(path)
    said = read_participants(path, column or (_GROUP if _GROUP in columns else ""))
    names = [s.name for s in project.studies]
    groups = {name: said[participant] for name, participant in _match(names, said).items()}
    for name in names:
        if name not in groups and "_" in name and (group := class_of(name, said)):  # a session of a subject
            groups[name] = group
    project.set_groups(groups)
    return len(groups)


def export_participants(project: AnnotationProject, path: Path, column: str = _GROUP) -> Path:
    """Write the studies' classes into a ``participants.tsv``; ``n/a`` where nobody said.

    In a table that is there already, only this column of the project's studies is changed, and only where the project
    knows the class: other columns and other participants stay as they are.

    Raises
    ------
    FileError
        The file cannot be written, or one that is there cannot be read.
    StudyError
        A table that is there has no column ``participant_id``.
    """
    columns, rows = read_table(path) if path.exists() else ([_ID, column], [])
    for number, row in enumerate(rows, start=2):
        if None in row:
            raise FileError(f"{path}, line {number}, has more cells than there are columns: correct it.")
    known = {row[_ID].strip(): row for row in rows}
    labels = subject_labels(s.name for s in project.studies)
    matches = _match(labels, known)
    for study in project.studies:
        if study.name not in matches:
            new = {_ID: f"sub-{labels[study.name]}", column: study.group or "n/a"}
            rows.append(dict.fromkeys(columns, "n/a") | new)
        elif study.group:
            known[matches[study.name]][column] = study.group
    return write_participants(path, rows, [*columns, *({column} - {*columns})])


def write_participants(path: Path, rows: Iterable[dict[str, str]], columns: Iterable[str] = (_ID, _GROUP)) -> Path:
    """Write a ``participants.tsv``, complete or not at all; ``n/a`` where a row lacks a column."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="n/a", delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(path, text.getvalue())
    return path


def subject_labels(names: Iterable[str]) -> dict[str, str]:
    """Give every study a BIDS subject label of its own: letters and digits only, without the ``sub-``.

    Where two come to the same, also but for capitals, which not every file system tells apart, the later one gets a
    number: so labels stay when studies are added.

    Examples
    --------
    >>> subject_labels(["sub-01", "p1-2", "p12"])
    {'sub-01': '01', 'p1-2': 'p12', 'p12': 'p12x2'}
    """
    labels: dict[str, str] = {}
    for name in names:
        plain = _plain(name)
        taken, candidate, number = {label.lower() for label in labels.values()}, plain, 2
        while candidate.lower() in taken:
            candidate, number = f"{plain}x{number}", number + 1
        labels[name] = candidate
    return labels


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "", name.removeprefix("sub-")) or "study"


def _match(names: Iterable[str], participants: Iterable[str]) -> dict[str, str]:
    """Find studies' participants, no two the same: by subject label, by name, or by what is left of both."""
    labels, free = subject_labels(names), list(dict.fromkeys(participants))
    rules = (
        lambda name, participant: participant == f"sub-{labels[name]}",
        lambda name, participant: participant in (name, f"sub-{name}"),
        lambda name, participant: _plain(participant) == labels[name],
    )
    found: dict[str, str] = {}
    for rule in rules:
        for name in labels:
            fitting = [p for p in free if name not in found and rule(name, p)]
            if fitting:
                found[name] = fitting[0]
                free.remove(fitting[0])
    return found
