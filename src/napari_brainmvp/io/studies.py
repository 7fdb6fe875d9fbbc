"""From folders, files and datalist entries to studies."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from napari_brainmvp.errors import FileError, StudyError
from napari_brainmvp.io.dicom import holds_dicom
from napari_brainmvp.io.images import is_image_path, read_label_map, read_scan, readable
from napari_brainmvp.io.names import stem
from napari_brainmvp.io.sorting import StudyFiles, sort_files
from napari_brainmvp.study import Modality, Scan, Study, modality

__all__ = ["find_studies", "folder_name", "read_datalist", "read_study", "study_folder"]

_BIDS_FOLDERS = ("anat", "dwi", "swi", "angio")
_DEEPEST = 6


def read_study(
    source: str | Path | Sequence[str | Path] | Mapping[str, Any],
    *,
    modalities: Mapping[str, str | Path] | None = None,
    reference: str | None = None,
    name: str | None = None,
    base: str | Path | None = None,
) -> Study:
    """Read a study.

    Parameters
    ----------
    source : path, sequence of paths, or mapping
        A folder with one file (or DICOM folder) per modality; the files themselves; or a datalist entry
        ``{"image": [...], "label": ...}``.
    modalities : mapping of str to path, optional
        Says which file is which modality; goes before what names suggest, and adds files.
    reference : str, optional
        Modality on whose grid results are given; default the scan with the most voxels.
    name : str, optional
        Default the folder's name.
    base : path, optional
        Folder a datalist's relative paths start from; they may not leave it.

    Returns
    -------
    Study
        Scans in the order of :data:`napari_brainmvp.study.MODALITIES`, then user-defined ones.

    Raises
    ------
    FileError
        A file or folder is missing, empty or damaged.
    StudyError
        No modality is recognised, two files claim the same one, or a scan makes no sense.

    Examples
    --------
    >>> study = read_study("BraTS-GLI-00000-000")  # doctest: +SKIP
    >>> sorted(study.scans)  # doctest: +SKIP
    ['flair', 't1', 't1c', 't2']
    """
    named = {modality(key): Path(path).expanduser() for key, path in (modalities or {}).items()}
    if isinstance(source, Mapping):
        files = _from_datalist(source, Path(base) if base is not None else None, named)
    elif isinstance(source, (str, Path)):
        files = _from_path(Path(source).expanduser(), named)
    else:
        paths = [Path(p).expanduser() for p in source]
        files = sort_files(paths, named, _common_name(paths))
    return _read(files, reference, name)


def _read(files: StudyFiles, reference: str | None, name: str | None) -> Study:
    scans: dict[str, Scan] = {}
    warnings = list(files.warnings)
    for key, path in files.scans.items():
        scans[key], repaired = read_scan(path, modality(key))
        warnings += repaired
    labels = None
    if files.labels:
        try:
            labels = read_label_map(files.labels)
        except StudyError as error:  # a mask of probabilities, perhaps; whoever needs labels reads them by themselves
            if files.labels_said:
                raise
            warnings.append(f"Labels were left out: {error}")
    chosen = "" if reference is None else modality(reference).key
    return Study(name or files.name, scans, chosen, labels, tuple(warnings))


def _from_path(path: Path, named: Mapping[Modality, Path]) -> StudyFiles:
    with readable(path):
        if not path.exists():
            raise FileError(f"{path} does not exist: check the path.")
        if path.is_file():
            return sort_files([path], named, stem(path))
        series = holds_dicom(path)
    if series:
        return sort_files([path], named, path.name)
    return sort_files(_members(path), named, path.resolve().name)


def _members(folder: Path, closed: list[tuple[str, str]] | None = None) -> list[Path]:
    """List the images of one study's folder: files, DICOM series folders, BIDS data type folders.

    ``closed`` takes the folders in it that cannot be read, and why; without it the first one is an error.
    """
    members = []
    with readable(folder):
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    for entry in entries:
        try:
            with readable(entry):
                if entry.is_dir() and entry.name in _BIDS_FOLDERS:
                    members += _members(entry, closed)
                elif holds_dicom(entry) if entry.is_dir() else is_image_path(entry) and not _is_series(entry):
                    members.append(entry)
        except FileError as error:
            if closed is None:
                raise
            closed.append((folder_name(entry), str(error)))
    return members


def _is_series(path: Path) -> bool:
    """Tell a diffusion series of several volumes by its b-values, a file beside it as BIDS has it."""
    values = path.with_name(f"{stem(path)}.bval")
    return values.is_file() and len(values.read_bytes().split()) > 1


def _common_name(paths: Sequence[Path]) -> str:
    return paths[0].resolve().parent.name if paths else "study"


def _from_datalist(entry: Mapping[str, Any], base: Path | None, named: Mapping[Modality, Path]) -> StudyFiles:
    images = entry.get("image")
    if isinstance(images, str):
        images = [images]
    if not images or not all(isinstance(path, (str, Path)) for path in images):
        raise StudyError('A datalist entry needs "image": a path or a list of paths.')
    # The authors' lists name a scan again where a modality is missing.
    paths = list(dict.fromkeys(_inside(Path(path), base) for path in images))
    files = sort_files(paths, named, _common_name(paths), of_many=True)
    label = entry.get("label")
    if not isinstance(label, (str, Path)):
        return files
    return replace(files, labels=_inside(Path(label), base), labels_said=True)


def read_datalist(path: Path, base: Path | None = None) -> tuple[list[StudyFiles], list[tuple[str, str]]]:
    """Read a JSON datalist ``{"training": [{"image": [...], "label": ...}, ...], ...}``, as MONAI and the authors do.

    Parameters
    ----------
    path : Path
    base : Path, optional
        Folder its relative paths start from; default the datalist's own.

    Returns
    -------
    list of StudyFiles
        Of all sections; files are not opened.
    list of (str, str)
        Entries that are no study, and why.

    Raises
    ------
    FileError
        The file is no such datalist.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path} is not a readable JSON file ({error}): correct it.") from error
    sections = content if isinstance(content, dict) else {"training": content}
    entries = [e for s in sections.values() if isinstance(s, list) for e in s if isinstance(e, dict) and "image" in e]
    if not entries:
        raise FileError(f'{path} lists no study: it needs {{"training": [{{"image": [...]}}, ...]}}.')
    studies: list[StudyFiles] = []
    problems: list[tuple[str, str]] = []
    for index, entry in enumerate(entries):
        try:
            studies.append(_from_datalist(entry, base or path.resolve().parent, {}))
        except (FileError, StudyError) as error:
            problems.append((f"{path.name}, entry {index + 1}", str(error)))
    if len({study.name for study in studies}) < len(studies):  # their names do not tell them apart
        studies = [replace(study, name=_shared_name(study)) for study in studies]
    return studies, problems


def _shared_name(study: StudyFiles) -> str:
    """Name a study by what its files' names begin with, up to the last separator; else by two folders around them."""
    letters = zip(*(stem(path) for path in study.scans.values()), strict=False)
    shared = re.match(r"(.*)[^A-Za-z0-9]", "".join(same[0] for same in takewhile(lambda a: len(set(a)) == 1, letters)))
    folder = next(iter(study.scans.values())).absolute().parent
    if shared and shared[1]:
        return shared[1]
    return f"{folder.parent.name}_ses-{folder.name}"


def _inside(path: Path, base: Path | None) -> Path:
    """Resolve a datalist's path and hold it inside its base folder."""
    if base is None:
        return path
    resolved = (base / path).resolve()
    if not resolved.is_relative_to(base.resolve()):
        raise FileError(
            f"The datalist names {path}, which lies outside {base}: move the data or change the base folder."
        )
    return resolved


def find_studies(folder: str | Path, problems: list[tuple[str, str]] | None = None) -> list[StudyFiles]:
    """Find all studies below a folder: folders that hold scans, and the sessions of BIDS trees.

    Parameters
    ----------
    folder : path
    problems : list of (str, str), optional
        Takes the names of folders that are passed over, and why: they cannot be read, or hold images of no recognisable
        modality, or two of one.

    Raises
    ------
    FileError
        The folder does not exist, or may not be read itself.
    """
    root = Path(folder).expanduser()
    with readable(root):
        if not root.is_dir():
            raise FileError(f"{root} is not a folder: choose a folder of studies.")
    found = list(_walk(root, 0, [] if problems is None else problems, set()))
    return _named_apart(found, root)


def _named_apart(studies: list[StudyFiles], root: Path) -> list[StudyFiles]:
    """Name studies by all folders down to theirs where the names of these repeat.

    Where there are no more names of the last folders than of those around them, as in ``P1/pre``, ``P1/post`` and
    ``P2/pre``, they are sessions of a subject, and named so; else, as in ``site1/P1``, subjects.
    """
    if len({study.name for study in studies}) == len(studies):
        return studies
    places = [study_folder(next(iter(s.scans.values()))).relative_to(root.absolute()).parts for s in studies]
    sessions = len({p[-1:] for p in places}) <= len({p[:-1] for p in places})
    named = []
    for study, (*above, last) in zip(studies, [p or (root.name,) for p in places], strict=True):
        told = last if last.startswith(("ses-", "sub-")) or not (sessions and above) else f"ses-{last}"
        named.append(replace(study, name="_".join((*above, told))))
    return named


def _walk(folder: Path, depth: int, problems: list[tuple[str, str]], seen: set[Path]) -> Iterable[StudyFiles]:
    seen.add(folder.resolve())
    closed: list[tuple[str, str]] = []
    members = _members(folder, closed)
    problems += closed
    shut = {name for name, _ in closed}
    if members:
        try:
            own = sort_files(members, {}, folder_name(folder), of_many=True)
        except (FileError, StudyError) as error:
            problems.append((folder_name(folder), str(error)))
        else:
            below: list[tuple[str, str]] = []
            used = {*members, *(path.parent for path in members)}
            others = list(_below(folder, depth, shut, below, seen, used)) if depth == 0 else []
            many = len(others) > 1 and all(len(other.scans) >= len(own.scans) for other in others)
            if many:
                names = ", ".join(path.name for path in members)
                problems += [(folder_name(folder), f"{names}: left out, beside folders of studies."), *below]
            yield from others if many else [own]
            return
    yield from _below(folder, depth, shut, problems, seen)


def _below(
    folder: Path,
    depth: int,
    shut: set[str],
    problems: list[tuple[str, str]],
    seen: set[Path],
    used: Collection[Path] = (),
) -> Iterable[StudyFiles]:
    if depth == _DEEPEST:
        return
    passed = (".", "derivatives")
    children = [p for p in folder.iterdir() if not p.name.startswith(passed) and p not in used]
    inside = [p for p in children if folder_name(p) not in shut and p.is_dir()]
    for child in sorted(inside, key=lambda p: (p.is_symlink(), p)):  # a link to one of the others is the same study
        if child.resolve() not in seen:
            yield from _walk(child, depth + 1, problems, seen)


def folder_name(folder: Path) -> str:
    """Name a study by its folder; a session, a folder ``ses-…``, by the folder around it, too."""
    return f"{folder.parent.name}_{folder.name}" if folder.name.startswith("ses-") else folder.name


def study_folder(path: Path) -> Path:
    """Return the folder of the study that a scan is of: where it lies, but for the data types of a BIDS tree.

    A link is not followed: data managers link to files named by their content.
    """
    folder = path.absolute().parent
    return folder.parent if folder.name in _BIDS_FOLDERS else folder
