"""The classes of whole studies, to and from a BIDS ``participants.tsv``."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from napari_brainmvp.annotation.project import AnnotationProject
from napari_brainmvp.errors import FileError
from napari_brainmvp.io import write_text_atomic

__all__ = ["export_participants", "import_participants", "subject_label"]


def import_participants(project: AnnotationProject, path: Path, column: str = "group") -> int:
    """Read the studies' classes from a ``participants.tsv``; return how many studies got one.

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
    if "participant_id" not in columns or column not in columns:
        have = ", ".join(map(str, columns)) or "nothing"
        raise FileError(f"{path} needs the columns participant_id and {column}, and has {have}.")
    said = {subject_label(row["participant_id"] or ""): (row[column] or "").strip() for row in table}
    known = {s.name: said.get(subject_label(s.name), "n/a") for s in project.studies}
    groups = {name: group for name, group in known.items() if group not in ("", "n/a")}
    project.set_groups(groups)
    return len(groups)


def export_participants(project: AnnotationProject, path: Path, column: str = "group") -> Path:
    """Write the studies' classes as a ``participants.tsv``; ``n/a`` where nobody said.

    Raises
    ------
    FileError
        The file cannot be written.
    """
    lines = [f"participant_id\t{column}"]
    lines += [f"sub-{subject_label(s.name)}\t{s.group or 'n/a'}" for s in project.studies]
    write_text_atomic(path, "\n".join(lines) + "\n")
    return path


def subject_label(name: str) -> str:
    """Return a BIDS subject label, letters and digits only, without the ``sub-``."""
    return re.sub(r"[^A-Za-z0-9]", "", name.removeprefix("sub-"))
