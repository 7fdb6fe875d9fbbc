"""The classes of whole studies, to and from a BIDS ``participants.tsv``."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from napari_brainmvp.annotation.content import CLASS_COLUMN, StudyReference
from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import FileError
from napari_brainmvp.io import class_of, read_participants, write_text_atomic
from napari_brainmvp.io.participants import likely_column, participant_of, read_table, subject_of

__all__ = [
    "class_column",
    "export_participants",
    "import_participants",
    "mixed_subjects",
    "subject_labels",
    "title_of",
    "write_participants",
]

_ID = "participant_id"
_LONG = 24
"""Letters of a value that tell enough of it."""


def class_column(project: AnnotationProject, columns: Sequence[str]) -> str:
    """Return the column of a table that holds the studies' classes; empty where that is open.

    The one that the project has them from, ``group``, or what
    :func:`~napari_brainmvp.io.participants.likely_column` finds.
    """
    known = (c for c in (project.class_column, CLASS_COLUMN) if c in columns)
    return next(known, "") or likely_column(columns)


def title_of(column: str, rows: Sequence[Mapping[str, str]]) -> str:
    """Name a column of a table together with the first values in it, by which one knows it.

    Examples
    --------
    >>> title_of("grade", [{"grade": "II"}, {"grade": ""}, {"grade": "IV"}])
    'grade  –  II, IV'
    """
    values = list(dict.fromkeys(row[column][:_LONG] for row in rows if row[column]))
    return f"{column}  –  {', '.join(values[:3])}{', …' * (len(values) > 3)}" if values else column


def import_participants(project: AnnotationProject, path: Path, column: str = "") -> int:
    """Read the studies' classes from a ``participants.tsv``; return how many studies got one.

    The project remembers the column's name for :func:`export_participants`.

    Parameters
    ----------
    project : AnnotationProject
    path : Path
    column : str
        Which column holds the class; empty for what :func:`class_column` finds.

    Raises
    ------
    FileError
        The file cannot be read.
    StudyError
        A column is missing or empty, it cannot be told which one is meant, or a participant has two classes.
    """
    columns, _ = read_table(path)
    chosen = column or class_column(project, columns)
    said = read_participants(path, chosen)
    names = [s.name for s in project.studies]
    groups = {name: said[participant] for name, participant in _match(names, said).items()}
    for name in names:
        if name not in groups and "_" in name and (group := class_of(name, said)):  # a session of a subject
            groups[name] = group
    project.set_groups(groups, chosen)
    return len(groups)


def export_participants(project: AnnotationProject, path: Path, column: str = "") -> Path:
    """Write the studies' classes into a ``participants.tsv``; ``n/a`` where nobody said.

    In a table that is there already, only this column of the project's studies is changed, and only where the project
    knows the class: other columns and other participants stay as they are. Sessions of one subject share its row where
    no two are of different classes; the sessions of :func:`mixed_subjects` get a row each.

    Parameters
    ----------
    project : AnnotationProject
    path : Path
    column : str
        Empty for the one that the classes were imported from, or else ``group``.

    Raises
    ------
    FileError
        The file cannot be written, or one that is there cannot be read.
    StudyError
        A table that is there has no column ``participant_id``.
    """
    column = column or project.class_column
    columns, rows = read_table(path) if path.exists() else ([_ID, column], [])
    for number, row in enumerate(rows, start=2):
        if None in row:
            raise FileError(f"{path}, line {number}, has more cells than there are columns: correct it.")
    known = {row[_ID].strip(): row for row in rows}
    for name, participant in _rows_of(project.studies, known).items():
        if participant not in known:
            known[participant] = dict.fromkeys(columns, "n/a") | {_ID: participant, column: "n/a"}
            rows.append(known[participant])
        if group := project.study(name).group:
            known[participant][column] = group
    return write_participants(path, rows, [*columns, *({column} - {*columns})])


def mixed_subjects(project: AnnotationProject) -> list[str]:
    """List the subjects whose sessions are of different classes: no one row can tell them."""
    return [subject for subject, sessions in _sessions(project.studies).items() if _differ(sessions)]


def _sessions(studies: Iterable[StudyReference]) -> dict[str, list[StudyReference]]:
    """Sort the studies that are sessions by their name, by subject."""
    found: dict[str, list[StudyReference]] = {}
    for study in studies:
        if (subject := subject_of(study.name)) != study.name:
            found.setdefault(subject, []).append(study)
    return found


def _differ(studies: Iterable[StudyReference]) -> bool:
    return len({s.group for s in studies} - {""}) > 1


def _rows_of(studies: Sequence[StudyReference], participants: Collection[str]) -> dict[str, str]:
    """Say in which participant's row each study belongs, in their order; some of the participants may be new."""
    labels = subject_labels(s.name for s in studies)
    found = _match(labels, participants)
    owners = {participant: name for name, participant in found.items()}
    for subject, sessions in _sessions(studies).items():
        plain = re.fullmatch(r"(sub-)?([A-Za-z0-9]+)", subject)
        shared = participant_of(subject, participants) or (f"sub-{plain[2]}" if plain else None)
        if shared is None:
            continue
        own = [s for s in studies if s.name == owners.get(shared) or f"sub-{labels[s.name]}" == shared]
        if not _differ([*own, *sessions]):
            found |= {s.name: shared for s in sessions if s.name not in found}
    return {s.name: found.get(s.name, f"sub-{labels[s.name]}") for s in studies}


def write_participants(
    path: Path, rows: Iterable[dict[str, str]], columns: Iterable[str] = (_ID, CLASS_COLUMN)
) -> Path:
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
