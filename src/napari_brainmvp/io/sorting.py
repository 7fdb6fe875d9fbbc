"""Which of a study's files is which modality, and which holds its labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from napari_brainmvp.errors import FileError, StudyError
from napari_brainmvp.io.dicom import holds_dicom, series_description
from napari_brainmvp.io.names import guess_modality, is_label_name, modality_in_text
from napari_brainmvp.study import MODALITIES, Modality

__all__ = ["StudyFiles", "sort_files"]


@dataclass(frozen=True)
class StudyFiles:
    """The files of one study, sorted but not read.

    Parameters
    ----------
    name : str
    scans : dict of str to Path
        By modality key.
    labels : Path or None
    warnings : tuple of str
        What was left out, and why.
    labels_said : bool
        Whether somebody said that these are the labels; else their file's name does.
    """

    name: str
    scans: dict[str, Path]
    labels: Path | None = None
    warnings: tuple[str, ...] = field(default=())
    labels_said: bool = False

    @property
    def truth(self) -> Path:
        """The labels, where training or measuring needs them.

        Raises
        ------
        StudyError
            There are none, or several.
        """
        if self.labels is None:
            several = [f": {w} Keep one." for w in self.warnings if w.startswith("Labels were left out")]
            reason = several[0] if several else " has no labels: add a file named like *_seg.nii.gz."
            raise StudyError(f"{self.name}{reason}")
        return self.labels


def sort_files(
    paths: Iterable[Path], named: Mapping[Modality, Path], name: str, *, of_many: bool = False
) -> StudyFiles:
    """Decide which file is which modality, from names (and DICOM headers) unless it is said.

    Parameters
    ----------
    paths : iterable of Path
    named : mapping of Modality to Path
        What is said.
    name : str
        The study's.
    of_many : bool
        Whether it is one of a dataset's, where nothing is said file by file: the remedies are others.

    Raises
    ------
    FileError
        There is no image at all.
    StudyError
        No modality is recognised, or two files claim the same one.
    """
    said = {path.resolve() for path in named.values()}
    scans: dict[Modality, Path] = dict(named)
    labels: list[Path] = []
    unknown: list[Path] = []
    paths = list(paths)
    # Where names say it without the study's name, that name says nothing for the others either.
    whole = not any(guess_modality(path, whole=False) for path in paths if not is_label_name(path))
    for path in paths:
        if path.resolve() in said:
            continue
        guess = guess_modality(path, whole=whole)
        if is_label_name(path):
            labels.append(path)
            continue
        if guess is None and path.is_dir() and holds_dicom(path):
            guess = modality_in_text(series_description(path))
        if guess is None:
            unknown.append(path)
        elif guess in named:
            continue
        elif guess in scans:
            raise StudyError(
                f"{name}: both {scans[guess].name} and {path.name} look like {guess.title}; "
                + (
                    "rename the one that is none, or list the files that are meant in a datalist (.json)."
                    if of_many
                    else f"say which one is meant, on the command line with --scan {guess.key}={path}, or rename one."
                )
            )
        else:
            scans[guess] = path
    if not paths and not named:
        raise FileError(f"{name} holds no image (.nii, .nii.gz, .nrrd or a DICOM folder): choose a study's folder.")
    if not scans:
        seen = ", ".join(path.name for path in unknown or labels)
        remedy = "" if of_many else ", or say it on the command line, for example with --scan t1=FILE"
        raise StudyError(f"{name}: no modality recognised in {seen}; name the files so, like {name}_t1.nii.gz{remedy}.")
    warnings = [f"{path.name} was left out: its name does not tell the modality." for path in unknown]
    if len(labels) > 1:
        warnings.append(f"Labels were left out, because there are {len(labels)}: {', '.join(p.name for p in labels)}.")
    ordered = {m.key: scans[m] for m in sorted(scans, key=_rank)}
    return StudyFiles(name, ordered, labels[0] if len(labels) == 1 else None, tuple(warnings))


def _rank(kind: Modality) -> tuple[int, str]:
    known = list(MODALITIES)
    return (known.index(kind.key) if kind.key in known else len(known), kind.key)
