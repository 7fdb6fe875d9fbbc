"""Write results as NIfTI on the grid they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from napari_brainmvp.errors import FileError
from napari_brainmvp.io.atomic import atomic_path
from napari_brainmvp.study import Grid

__all__ = ["write_image", "write_label_map"]


def write_label_map(path: str | Path, data: NDArray[Any], grid: Grid, *, like: Path | None = None) -> Path:
    """Write a label map, integers unchanged.

    Parameters
    ----------
    path : Path
        Ending in ``.nii`` or ``.nii.gz``. It appears complete or not at all.
    data : ndarray of shape (i, j, k), integers
        Stored as uint8 where they fit, else int16 or int32.
    grid : Grid
        Where the voxels are.
    like : Path, optional
        The NIfTI scan the labels belong to: where its grid is the same, its sform, qform, their codes and its units
        are kept as they are.

    Raises
    ------
    FileError
        The name has another ending, or the file cannot be written.
    """
    top, bottom = int(data.max(initial=0)), int(data.min(initial=0))
    dtype = np.uint8 if bottom >= 0 and top < 256 else np.int16 if bottom >= -32768 and top < 32768 else np.int32
    return _write(path, data.astype(dtype), grid, like, "")


def write_image(path: Path, data: NDArray[Any], grid: Grid, *, like: Path | None = None, description: str = "") -> Path:
    """Write intensities, probabilities (also (i, j, k, K)) or other measurements as float32.

    Parameters are those of :func:`write_label_map`; ``description`` (at most 79 characters) goes into the header.
    """
    return _write(path, data.astype(np.float32), grid, like, description)


def _write(path: str | Path, data: NDArray[Any], grid: Grid, like: Path | None, description: str) -> Path:
    path = Path(path)
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise FileError(f"{path} does not end in .nii or .nii.gz: choose such a name.")
    image = nib.Nifti1Image(data, grid.affine)
    _keep_header(image, grid, like)
    image.header["descrip"] = description.encode()[:79]
    with atomic_path(path) as temporary:
        nib.save(image, temporary)
    return path


def _keep_header(image: nib.Nifti1Image, grid: Grid, like: Path | None) -> None:
    """Take both affines, their codes and the units from the source scan, if it lies on the same grid."""
    image.header.set_xyzt_units("mm")
    image.set_sform(grid.affine, code="scanner")
    image.set_qform(grid.affine, code="scanner")
    if like is None or not like.is_file() or not like.name.lower().endswith((".nii", ".nii.gz")):
        return
    source = nib.load(like)
    if not isinstance(source, nib.Nifti1Image) or not Grid(source.shape[:3], source.affine).same_as(grid):
        return
    image.header.set_xyzt_units(*source.header.get_xyzt_units())
    for name in ("pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"):
        image.header[name] = source.header[name]
    for name in ("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"):
        image.header[name] = source.header[name]
