"""References to studies: made, found by what an opened study is, and where their files are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from napari_brainmvp.annotation.content import StudyReference
from napari_brainmvp.errors import StudyError
from napari_brainmvp.io import read_scan, write_image
from napari_brainmvp.study import Study

__all__ = ["find_reference", "make_reference", "named", "scan_paths"]


def scan_paths(reference: StudyReference, folder: Path) -> dict[str, Path]:
    """Return where the scans of a study of the project in a folder are, by modality key.

    A link is not followed: what it points to may have a name that says nothing.
    """
    return {key: _placed(folder / path) for key, path in reference.scans.items()}


def _placed(path: Path) -> Path:
    return path.parent.resolve() / path.name


def named(name: str, references: Sequence[StudyReference]) -> StudyReference:
    """Return the reference of a name.

    Raises
    ------
    StudyError
        There is none of this name.
    """
    for reference in references:
        if reference.name == name:
            return reference
    known = ", ".join(s.name for s in references) or "none"
    raise StudyError(f"The project has no study {name!r}. There are: {known}.")


def make_reference(study: Study, name: str, folder: Path, back: StudyReference | None = None) -> StudyReference:
    """Refer to a study that is new in a project; scans that are in no file yet are written into its folder.

    Where it was there before (``back``) it has the name and class of then, and the scans of now: a wrong one may have
    been why it left.

    Raises
    ------
    FileError
        They cannot be written.
    """
    if back is not None:
        if any(scan.path is None for scan in study.scans.values()):
            return back  # found by its content, which lies in the folder already
        name = back.name
    scans = {}
    for key, scan in study.scans.items():
        path = scan.path
        if path is None or not path.exists():
            said = scan.title if scan.imputed else ""  # read back as imputed, then
            path = folder / "scans" / name / f"{name}_{key}.nii.gz"
            path = write_image(path, scan.data, scan.grid, description=said)
        path = _placed(path)
        scans[key] = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
    affine = tuple(tuple(float(v) for v in row) for row in study.grid.affine)
    made = StudyReference(name=name, scans=scans, reference=study.reference, shape=study.grid.shape, affine=affine)
    return made if back is None else made.model_copy(update={"group": back.group})


def find_reference(study: Study, references: Iterable[StudyReference], folder: Path) -> StudyReference | None:
    """Find an opened study among references: by its files, or by its content where it came from none.

    Parameters
    ----------
    study : Study
    references : iterable of StudyReference
    folder : Path
        The project's.
    """
    paths = {scan.path.resolve() for scan in study.scans.values() if scan.path is not None}
    for reference in references:
        if not reference.grid.same_as(study.grid):
            continue
        ours = scan_paths(reference, folder)
        same = paths & {path.resolve() for path in ours.values()}
        if same or (not paths and _is_copy(ours.get(study.reference), study, folder)):
            return reference
    return None


def _is_copy(path: Path | None, study: Study, folder: Path) -> bool:
    """Tell whether the project's own copy of a study has the same voxels."""
    if path is None or not path.is_file() or not path.is_relative_to(folder):
        return False
    scan = study.scans[study.reference]
    kept, _ = read_scan(path, scan.modality)
    return kept.data.shape == scan.data.shape and bool(np.array_equal(kept.data, scan.data))
