"""Read a folder that holds one DICOM series of a 3D scan."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_brainmvp.errors import FileError, StudyError

__all__ = ["holds_dicom", "read_dicom_series", "series_description"]


_PREAMBLE = 132
"""Bytes before a DICOM file's own content."""
_NO_AGENT = ("", "no", "none", "nil", "n/a", "without")


def _is_dicom(path: Path) -> bool:
    """Look for the DICOM preamble."""
    with path.open("rb") as file:
        return file.read(_PREAMBLE)[128:] == b"DICM"


def _seems_dicom(path: Path) -> bool:
    try:
        return _is_dicom(path)
    except OSError:
        return False


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))


def holds_dicom(folder: Path) -> bool:
    """Tell whether a folder directly holds DICOM files (looks at the first few files only)."""
    return any(_seems_dicom(path) for path in _files(folder)[:3])


def series_description(folder: Path) -> str:
    """Return the protocol's words from the first file's header, for guessing the modality."""
    import pydicom

    for path in _files(folder):
        if _seems_dicom(path):
            header = pydicom.dcmread(path, stop_before_pixels=True)
            agent = str(header.get("ContrastBolusAgent", "")).strip().lower()
            contrast = "" if agent in _NO_AGENT else "contrast"
            return " ".join(str(header.get(k, "")) for k in ("SeriesDescription", "ProtocolName")) + f" {contrast}"
    return ""


def read_dicom_series(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Read the slices of one series, sorted by position.

    Returns
    -------
    data : ndarray of shape (columns, rows, slices), float32
        With slope and intercept applied.
    affine : ndarray of shape (4, 4)
        To RAS mm.

    Raises
    ------
    FileError
        There is no DICOM file, or one is damaged.
    OSError
        A file cannot be opened or read.
    StudyError
        More than one series, colours, several frames, or slices that do not make a volume.
    """
    import pydicom

    try:
        files = {path: pydicom.dcmread(path) for path in _files(folder) if _is_dicom(path)}
    except OSError:  # passed over, a slice at either end would be missing unnoticed
        raise
    except Exception as error:  # pydicom raises many kinds on damaged files
        raise FileError(f"{folder} holds a DICOM file that cannot be read ({error}): copy the series again.") from error
    slices = [s for s in files.values() if "PixelData" in s]
    if not slices:
        raise FileError(f"{folder} is not a scan: it holds no DICOM images and is not an image file.")
    if broken := _broken(folder, files):
        raise FileError(f"{folder} holds a DICOM file that is cut short ({broken.name}): copy the series again.")
    if len({s.get("SeriesInstanceUID") for s in slices}) > 1:
        raise StudyError(f"{folder} holds several DICOM series: put each series in a folder of its own.")
    if any(s.get("SamplesPerPixel", 1) != 1 for s in slices):
        raise StudyError(f"{folder} holds colours (RGB), not intensities: give the original grey-scale series.")
    if any("ImagePositionPatient" not in s or "ImageOrientationPatient" not in s for s in slices):
        raise StudyError(
            f"{folder}: slices without position or orientation; multi-frame DICOM must be converted first."
        )
    return _stack(slices, folder)


def _broken(folder: Path, files: dict[Path, Any]) -> Path | None:
    """Find a slice that was copied in part: passed over, one at either end would be missing unnoticed."""
    images = {path: s.file_meta.get("MediaStorageSOPClassUID") for path, s in files.items() if "PixelData" in s}
    names, kinds = {_series_name(path) for path in images}, set(images.values()) - {None}
    for path in _files(folder):
        if path in files:
            cut = path not in images and files[path].file_meta.get("MediaStorageSOPClassUID") in kinds
        else:
            cut = _series_name(path) in names and path.stat().st_size < _PREAMBLE and not path.read_bytes().strip(b"\0")
        if cut:
            return path
    return None


def _series_name(path: Path) -> str:
    """Return what the names of a series' files have in common: the suffix, or without one all but the digits."""
    return path.suffix or re.sub(r"\d+", "", path.name)


def _stack(slices: list[Any], folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    along_row, along_column = np.array(slices[0].ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(along_row, along_column)
    slices.sort(key=lambda s: float(np.dot(s.ImagePositionPatient, normal)))
    if len({(s.Rows, s.Columns) for s in slices}) > 1:
        raise StudyError(f"{folder}: slices differ in size; remove localisers from the folder.")
    if len(slices) < 2:
        raise StudyError(f"{folder} has a single slice: give the whole series.")
    positions = np.array([np.dot(s.ImagePositionPatient, normal) for s in slices])
    gaps = np.diff(positions)
    if gaps.min() < 1e-3:
        raise StudyError(f"{folder}: two slices at one position (several echoes or times?); split the series.")
    if gaps.max() - gaps.min() > 0.1 * gaps.mean() + 0.01:
        raise StudyError(f"{folder}: slices are not evenly spaced; some are missing.")
    try:
        planes = [s.pixel_array * float(s.get("RescaleSlope", 1)) + float(s.get("RescaleIntercept", 0)) for s in slices]
    except Exception as error:  # missing decoders and damaged pixel data alike
        raise FileError(f"{folder}: pixels cannot be decoded ({error}); convert the series to NIfTI.") from error
    data = np.stack(planes, -1).astype(np.float32).transpose(1, 0, 2)
    row_spacing, column_spacing = (float(x) for x in slices[0].PixelSpacing)
    first, last = (np.array(s.ImagePositionPatient, float) for s in (slices[0], slices[-1]))
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_spacing  # neighbouring columns lie along the row direction
    affine[:3, 1] = along_column * row_spacing
    affine[:3, 2] = (last - first) / (len(slices) - 1)
    affine[:3, 3] = first
    return data, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM is LPS
