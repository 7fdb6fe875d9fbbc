"""Prepared studies on disk, from which training reads crops without loading volumes.

One study is one ``.npy`` file, memory-mapped: float16, shape (C, X, Y, Z), prepared intensities cut to the foreground
box; and a ``.json`` file, written last, that says what it holds. The name of the latter is a hash of the preparation
and of the content of the scans and labels, so that a cache may serve any number of runs and a changed scan is prepared
again; the name of the former is a hash of what it holds, so that it is there once, however often labels change. Labels,
where they are asked for, are a file of shape (X, Y, Z), uint8 or int16, values unchanged.

The time of its last change says when a file was used last, to a day; see
:func:`~napari_brainmvp.training.cache_space.shrink_cache`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_brainmvp.errors import BrainMVPError, FileError, StudyError
from napari_brainmvp.io import StudyFiles, image_files, read_label_map, read_study
from napari_brainmvp.io.atomic import atomic_path, remove_partial, write_text_atomic
from napari_brainmvp.io.images import readable
from napari_brainmvp.preparation import PreparationSpec, prepare
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback, no_progress
from napari_brainmvp.study import Grid, Study
from napari_brainmvp.synthesis import SynthesisSpec, make_study
from napari_brainmvp.training.cache_space import mark_used
from napari_brainmvp.training.workers import each

__all__ = ["CachedStudy", "Problem", "cache_studies", "cache_synthetic"]

_CHUNK = 1 << 16
_LONG = 3600.0
"""Seconds; more than writing a study takes."""
_EIGHT = ("t1", "t1c", "t2", "flair", "dwi", "adc", "mra", "pd")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedStudy:
    """A prepared study on disk.

    Parameters
    ----------
    name : str
    modalities : tuple of str
        Keys of the channels, in order.
    path : Path
        The ``.npy`` file.
    labels_path : Path or None
        Its labels' ``.npy`` file.
    thickness : float
        Of the axial slices of the scan itself, in voxels of the volumes; 0 where that is not known.
    """

    name: str
    modalities: tuple[str, ...]
    path: Path
    labels_path: Path | None = None
    thickness: float = 0.0

    @property
    def volumes(self) -> NDArray[np.float16]:
        """The memory map: (C, X, Y, Z), float16, healthy median 1 and background 0 with the robust preparation.

        It is made anew each time, which takes a tenth of a millisecond: one that is kept holds a file descriptor, and a
        process has far fewer of them than a dataset has studies.
        """
        mark_used(self.path)
        mapped: NDArray[np.float16] = np.load(self.path, mmap_mode="r")
        return mapped

    @property
    def labels(self) -> NDArray[np.integer[Any]]:
        """The memory map of the labels, made anew too: (X, Y, Z), uint8 or int16, as in the file they came from."""
        assert self.labels_path is not None, "prepared without labels"
        mark_used(self.labels_path)
        mapped: NDArray[np.integer[Any]] = np.load(self.labels_path, mmap_mode="r")
        return mapped


@dataclass(frozen=True)
class Problem:
    """A study that could not be used, and why, in a sentence."""

    name: str
    reason: str


def cache_studies(
    studies: Sequence[StudyFiles],
    folder: Path,
    spec: PreparationSpec,
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
    *,
    labels: bool = False,
    workers: int = 0,
) -> tuple[list[CachedStudy], list[Problem]]:
    """Prepare the studies that are not prepared yet; a bad one is reported and skipped.

    Parameters
    ----------
    studies : sequence of StudyFiles
    folder : Path
        The cache; created where missing.
    spec : PreparationSpec
    progress, cancel
        Called and asked once a study.
    labels : bool
        With their labels; a study that has none is a problem.
    workers : int
        Processes that prepare, each with one thread and a study in memory; below 2, this one does.

    Returns
    -------
    list of CachedStudy, list of Problem
        In the order of ``studies``.

    Raises
    ------
    Cancelled
        Prepared studies stay.
    FileError
        The cache cannot be written, or a process that prepares was killed.
    """
    remove_partial(folder, _LONG)
    good: list[CachedStudy] = []
    bad: list[Problem] = []
    prepare_one = partial(_cache_files, folder=folder, spec=spec, labels=labels)
    for index, entry in enumerate(each(prepare_one, studies, workers, cancel)):
        if isinstance(entry, CachedStudy):
            good.append(entry)
        else:
            logger.warning("Skipped %s: %s", entry.name, entry.reason)
            bad.append(entry)
        progress(Progress("Preparing studies", index + 1, len(studies)))
    return good, bad


def cache_synthetic(
    seeds: range,
    folder: Path,
    spec: PreparationSpec,
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
    *,
    labels: bool = False,
    workers: int = 0,
) -> list[CachedStudy]:
    """Make and prepare synthetic studies: any lesion, and each with its own subset of two to eight modalities.

    With ``labels`` they have T1, T1c, T2 and FLAIR each, and their truth. See :func:`cache_studies`.
    """
    made = []
    make_one = partial(_cache_seed, folder=folder, spec=spec, labels=labels)
    for index, study in enumerate(each(make_one, seeds, workers, cancel)):
        made.append(study)
        progress(Progress("Making studies", index + 1, len(seeds)))
    return made


def _cache_files(files: StudyFiles, folder: Path, spec: PreparationSpec, labels: bool) -> CachedStudy | Problem:
    try:
        key = _content_key(files, spec, labels)
        entry = _entry(folder, key, partial(_read, files, labels), spec, labels)
    except _CacheError:
        raise
    except BrainMVPError as error:
        return Problem(files.name, str(error))
    return replace(entry, name=files.name)  # the same content may have had another name before


def _cache_seed(seed: int, folder: Path, spec: PreparationSpec, labels: bool) -> CachedStudy:
    rng = np.random.default_rng([seed, 8])
    kept = sorted(rng.permutation(len(_EIGHT))[: rng.integers(2, len(_EIGHT) + 1)])
    modalities = _EIGHT[:4] if labels else tuple(_EIGHT[k] for k in kept)
    synthesis = SynthesisSpec(modalities, head=0.12)
    key = _hash("synthetic", str(seed), repr(synthesis), spec.model_dump_json(), *["labels"] * labels)
    return _entry(folder, key, partial(make_study, seed, synthesis), spec, labels)


class _CacheError(FileError):
    """The cache itself fails: not the fault of any study."""


def _read(files: StudyFiles, labels: bool) -> Study:
    study = read_study(tuple(files.scans.values()), modalities=files.scans, name=files.name)
    if not labels:
        return study
    found = read_label_map(files.truth)
    if (largest := int(found.data.max())) > 32767:
        raise StudyError(f"{files.truth} holds the label value {largest}: keep values between 0 and 32767.")
    return replace(study, labels=found)


def _entry(folder: Path, key: str, make: Callable[[], Study], spec: PreparationSpec, labels: bool) -> CachedStudy:
    """Find a cached study by its key, or make, prepare and store it."""
    said = folder / f"{key}.json"
    labels_path = folder / f"{key}.labels.npy" if labels else None
    found = _find(said, labels_path)
    if found is not None:
        return found
    study = make()
    modalities = tuple(study.scans)
    prepared = prepare(study, modalities, spec, with_labels=labels)
    try:
        data = _store_images(folder, prepared.images.half().numpy())
        if labels_path is not None and prepared.labels is not None:
            values = prepared.labels.numpy()
            _store(labels_path, values.astype(np.uint8) if values.min() >= 0 and values.max() < 256 else values)
        about = {"name": study.name, "modalities": modalities, "images": data.name, "bytes": data.stat().st_size}
        about["thickness"] = thickness = _thickness(prepared.source) / prepared.grid.spacing[0]
        write_text_atomic(said, json.dumps(about))
    except FileError as error:
        raise _CacheError(str(error)) from error
    return CachedStudy(study.name, modalities, data, labels_path, thickness)


def _thickness(grid: Grid) -> float:
    """Return how far apart the slices of a scan lie along the axis closest to the head's, mm."""
    axis = int(np.abs(grid.affine[2, :3]).argmax())
    return float(grid.spacing[axis])


def _find(said: Path, labels_path: Path | None) -> CachedStudy | None:
    """Find a study that is complete, and mark its files as used: first, so that no other run removes them meanwhile."""
    try:
        known = json.loads(said.read_text(encoding="utf-8"))
        data = said.with_name(known["images"])
        for path in (said, data, labels_path or data):
            mark_used(path)
        if data.stat().st_size != known["bytes"] or (labels_path is not None and not labels_path.is_file()):
            return None
        thickness = float(known.get("thickness", 0.0))
        return CachedStudy(known["name"], tuple(known["modalities"]), data, labels_path, thickness)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there yet, or damaged


def _store_images(folder: Path, images: NDArray[np.float16]) -> Path:
    """Store images under a name that tells their content: labels that change have most of them unchanged."""
    digest = hashlib.sha256(np.ascontiguousarray(images).data)
    path = folder / f"{_hash(str(images.shape), digest.hexdigest())}.npy"
    if not _holds(path, images.shape):
        _store(path, images)
    mark_used(path)
    return path


def _holds(path: Path, shape: tuple[int, ...]) -> bool:
    """Tell whether an array of a shape is stored, and not cut off."""
    with suppress(OSError, ValueError):
        return bool(np.load(path, mmap_mode="r").shape == shape)
    return False


def _store(path: Path, values: NDArray[Any]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, values)


def _content_key(files: StudyFiles, spec: PreparationSpec, labels: bool) -> str:
    parts = [spec.model_dump_json()]
    sources = sorted(files.scans.items()) + ([("labels", files.truth)] if labels else [])
    for modality, path in sources:
        members = image_files(path)
        with readable(path):
            parts += [modality, *(_fingerprint(member) for member in members)]
    return _hash(*parts)


def _fingerprint(path: Path) -> str:
    """Identify a file's content: its size, beginning and end for gzip, whose end is a checksum; else all of it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix != ".gz" or size <= 2 * _CHUNK:
            return hashlib.file_digest(file, "sha256").hexdigest()
        head = file.read(_CHUNK)
        file.seek(-_CHUNK, os.SEEK_END)
        return f"{size}-{hashlib.sha256(head + file.read()).hexdigest()}"


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
