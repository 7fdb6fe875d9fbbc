"""Read one volume: NIfTI, NRRD, or a folder with a DICOM series. Nothing is trusted before it is checked."""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from napari_brainmvp.errors import FileError, StudyError
from napari_brainmvp.io.dicom import read_dicom_series
from napari_brainmvp.study import Grid, LabelMap, Modality, Scan

__all__ = ["IMAGE_SUFFIXES", "image_files", "is_image_path", "read_image", "read_label_map", "read_scan", "readable"]

IMAGE_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr")
_MOST_VOXELS = 2048**3 // 8
"""A gigavoxel: no clinical head scan comes near, and a declared shape beyond it is a broken header."""
_ROUNDED = 1e-3
"""How far from a whole number a label may lie: floating-point maps that a tool has stored scaled to short integers."""

logger = logging.getLogger(__name__)


def is_image_path(path: Path) -> bool:
    """Tell whether a file's name ends like a format that can be read."""
    return path.name.lower().endswith(IMAGE_SUFFIXES)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the system says of a file or folder that cannot be read into a sentence.

    Raises
    ------
    FileError
        Of an OSError in the block.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError(f"{path} cannot be read ({reason}): check the path and its permissions.") from error


def read_image(path: Path) -> tuple[NDArray[np.float32], Grid, tuple[str, ...]]:
    """Read a volume.

    Parameters
    ----------
    path : Path
        ``.nii``, ``.nii.gz``, ``.nrrd``, ``.nhdr``, or a folder with one DICOM series.

    Returns
    -------
    data : ndarray of shape (i, j, k), float32
        Finite intensities in the file's units.
    grid : Grid
        RAS mm.
    warnings : tuple of str
        What was repaired.

    Raises
    ------
    FileError
        The file is missing, unreadable, truncated or of an unknown kind.
    StudyError
        It is not one 3D volume of numbers with a usable affine.
    """
    data, grid = _read_volume(path)
    values = np.asarray(data, np.float32)
    warnings = []
    broken = ~np.isfinite(values)
    if broken.any():
        values = np.where(broken, np.float32(0), values)
        warnings.append(f"{path.name}: {int(broken.sum())} voxels were not finite numbers and were set to 0.")
    if not values.any():
        raise StudyError(f"{path} holds nothing but zeros: check that the scan was exported completely.")
    return values, grid, tuple(warnings)


def image_files(path: Path) -> tuple[Path, ...]:
    """List the files of an image: of a DICOM folder those in it, of a detached NRRD header itself and its data.

    Raises
    ------
    FileError
        The file or folder cannot be read, or is no NRRD file though it is named so, or its data lie outside its folder.
    """
    with readable(path):
        if path.is_dir():
            return tuple(sorted(p for p in path.iterdir() if p.is_file()))
        if not path.name.lower().endswith((".nrrd", ".nhdr")):
            return (path,)
        with _valid_nrrd(path) as nrrd:
            data = _detached(path, nrrd.read_header(str(path)))
    return (path,) if data is None else (path, data)


def read_scan(path: Path, modality: Modality) -> tuple[Scan, tuple[str, ...]]:
    """Read a scan of a known modality; see :func:`read_image`. Scans of a single slice are refused.

    A NIfTI file whose description says ``(imputed)`` becomes a scan that is marked so.
    """
    data, grid, warnings = read_image(path)
    if min(data.shape) < 2:
        raise StudyError(f"{path} has a single slice {data.shape}: give the whole series as one 3D volume.")
    return Scan(modality, data, grid, path, imputed=_says_imputed(path)), warnings


def _says_imputed(path: Path) -> bool:
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return False
    return b"(imputed)" in bytes(nib.load(path).header["descrip"])


def read_label_map(path: Path) -> LabelMap:
    """Read a label map with its integers unchanged.

    Raises
    ------
    FileError, StudyError
        As :func:`read_image`; also where values are not whole numbers of at least 0.
    """
    data, grid = _read_volume(path)
    whole = np.rint(data) if data.dtype.kind == "f" else data
    near = whole is data or (np.isfinite(data).all() and np.abs(data - whole).max() <= _ROUNDED)
    if not near or whole.min() < 0 or whole.max() > 65535:
        raise StudyError(f"{path} is not a label map: its values are not whole numbers from 0 to 65535.")
    dtype = np.uint8 if whole.max() < 256 else np.uint16
    return LabelMap(whole.astype(dtype), grid, path)


def _read_volume(path: Path) -> tuple[NDArray[Any], Grid]:
    """Read one 3D volume and its grid."""
    array, affine = _read_any(path)
    data = _three_dimensional(array, path)
    try:
        return data, Grid(data.shape, affine)
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from error


def _read_any(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Read an array and its RAS affine from any supported kind of file."""
    try:
        if not path.exists():  # an error itself within a folder that may not be entered
            raise FileError(f"{path} does not exist: check the path.")
        if path.is_dir():
            return read_dicom_series(path)
        if path.name.lower().endswith((".nrrd", ".nhdr")):
            return _read_nrrd(path)
        if path.name.lower().endswith((".nii", ".nii.gz")):
            return _read_nifti(path)
    except PermissionError as error:
        raise FileError(f"{path} may not be read: change its permissions.") from error
    except (OSError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FileError(f"{path} is truncated or damaged ({error}): copy it again from its source.") from error
    raise FileError(f"{path} is not an image this program reads: use {', '.join(IMAGE_SUFFIXES)} or a DICOM folder.")


def _read_nifti(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    with path.open("rb"):
        pass  # nibabel says of a file it may not read that it is no image
    try:
        image = nib.load(path)
    except (ImageFileError, HeaderDataError, ValueError) as error:
        raise FileError(f"{path} is not a valid NIfTI file ({error}): check the file or its name.") from error
    if not isinstance(image, nib.Nifti1Image):
        raise FileError(f"{path} is named like NIfTI but is something else: rename or convert it.")
    if image.get_data_dtype().fields is not None:
        raise StudyError(f"{path} holds colours (RGB), not intensities: give the original grey-scale scan.")
    header = image.header
    if not (header["sform_code"] or header["qform_code"]):
        raise StudyError(f"{path} has no affine (sform and qform codes are 0): where its voxels lie is unknown.")
    _check_size(path, image.shape, image.get_data_dtype().itemsize)
    try:
        if path.name.lower().endswith(".gz"):
            image = _unpack(path, image)
        return np.asanyarray(image.dataobj), np.asarray(image.affine, np.float64)
    except (HeaderDataError, ValueError) as error:  # nibabel reports a short file this way
        raise FileError(f"{path} is truncated or damaged ({error}): copy it again from its source.") from error


def _unpack(path: Path, image: nib.Nifti1Image) -> nib.Nifti1Image:
    """Read a compressed file to its very end, where its checksum is: nibabel stops before and misses damage."""
    size = int(image.dataobj.offset) + int(np.prod(image.shape)) * image.get_data_dtype().itemsize
    with gzip.open(path) as file:
        content = file.read(size)
        if file.read(1 << 16) and file.read(1):
            raise FileError(f"{path} goes on after its last voxel: its header is damaged.")
    return type(image).from_bytes(content)


def _check_size(path: Path, shape: tuple[int, ...], itemsize: int) -> None:
    """Refuse a declared shape that the file cannot hold, before anything of that size is allocated."""
    voxels = int(np.prod([int(n) for n in shape], dtype=np.float64)) if shape else 0
    # Deflate shrinks by a factor of 1032 at most.
    most_bytes = path.stat().st_size * (1032 if path.name.lower().endswith(".gz") else 1)
    if voxels <= 0 or voxels > _MOST_VOXELS or voxels * itemsize > most_bytes:
        raise FileError(f"{path} says its shape is {shape}, which does not fit in the file: its header is damaged.")


@contextmanager
def _valid_nrrd(path: Path) -> Iterator[Any]:
    """Give pynrrd, and turn what it says of a file that is no NRRD file into a sentence."""
    import nrrd

    try:
        yield nrrd
    except (nrrd.NRRDError, ValueError, KeyError, StopIteration) as error:
        reason = str(error) or "it is empty"
        raise FileError(f"{path} is not a valid NRRD file ({reason}): check the file.") from error


def _read_nrrd(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    with _valid_nrrd(path) as nrrd:
        _check_nrrd(path, nrrd.read_header(str(path)))
        data, header = nrrd.read(str(path))
    directions, origin = header.get("space directions"), header.get("space origin")
    if directions is None or origin is None or np.shape(directions) != (3, 3):
        raise StudyError(f"{path} has no space directions and origin for three axes: where its voxels lie is unknown.")
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(directions, float).T
    affine[:3, 3] = origin
    space = str(header.get("space", "left-posterior-superior")).lower()
    letters = {"lps": "left-posterior-superior", "ras": "right-anterior-superior", "las": "left-anterior-superior"}
    signs = [-1.0 if word in ("left", "posterior") else 1.0 for word in letters.get(space, space).split("-")[:3]]
    return data, np.diag([*signs, 1.0]) @ affine


def _check_nrrd(path: Path, header: dict[str, Any]) -> None:
    shape = tuple(int(n) for n in header.get("sizes", ()))
    if header.get("kinds") and any("color" in str(kind).lower() for kind in header["kinds"]):
        raise StudyError(f"{path} holds colours (RGB), not intensities: give the original grey-scale scan.")
    if _detached(path, header) is not None:
        return
    packed = str(header.get("encoding", "raw")).lower() != "raw"
    voxels = int(np.prod(shape, dtype=np.float64)) if shape else 0
    if voxels <= 0 or voxels > _MOST_VOXELS or voxels > path.stat().st_size * (1032 if packed else 1):
        raise FileError(f"{path} says its shape is {shape}, which does not fit in the file: its header is damaged.")


def _detached(path: Path, header: dict[str, Any]) -> Path | None:
    """Find the file of the voxels where a header stands alone."""
    said = header.get("datafile", header.get("data file"))  # in pynrrd's order: what is checked is what is read
    if said is None:
        return None
    data = (path.parent / str(said)).resolve()
    if not data.is_relative_to(path.parent.resolve()):
        raise FileError(f"{path} points to data outside its folder ({said}): put both files side by side.")
    return data


def _three_dimensional(array: NDArray[Any], path: Path) -> NDArray[Any]:
    """Drop trailing axes of length one; refuse anything that is not one volume of real numbers."""
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        raise StudyError(f"{path} has {array.ndim} axes {array.shape}: give one 3D volume per file.")
    if np.iscomplexobj(array):
        raise StudyError(f"{path} holds complex numbers: give the magnitude image.")
    return array
