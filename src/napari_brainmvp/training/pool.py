"""A pool of prepared synthetic studies on disk, from which training reads crops without loading volumes.

One ``.npy`` file per study, memory-mapped: uint8, shape (C + 1, X, Y, Z), the prepared intensities times
:data:`SCALE` and, last, the labels. A byte resolves a hundredth of the median tissue's intensity, below the noise.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from napari_brainmvp.preparation.intensity import foreground_mask, normalise
from napari_brainmvp.preparation.spec import PreparationSpec
from napari_brainmvp.progress import Progress, ProgressCallback, no_progress
from napari_brainmvp.study import Study
from napari_brainmvp.synthesis import SynthesisSpec, make_study

__all__ = ["SCALE", "Crop", "Pool", "fill_pool"]

SCALE = 100
logger = logging.getLogger(__name__)


def fill_pool(
    folder: Path,
    seeds: range,
    spec: SynthesisSpec,
    preparation: PreparationSpec,
    progress: ProgressCallback = no_progress,
) -> None:
    """Make the studies of a range of seeds; those already there are kept, so an interrupted run goes on.

    Parameters
    ----------
    folder : Path
        Created where missing. Each study is written to a temporary file first and then renamed.
    seeds : range
        One study each.
    spec, preparation
        What to make, and how intensities are prepared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for done, seed in enumerate(seeds):
        path = folder / f"{seed:08d}.npy"
        if not path.exists():
            temporary = path.with_suffix(f".{os.getpid()}.part")
            with temporary.open("wb") as file:
                np.save(file, _pack(make_study(seed, spec), spec.modalities, preparation))
            temporary.replace(path)
        progress(Progress("Making studies", done + 1, len(seeds)))


def _pack(study: Study, modalities: tuple[str, ...], preparation: PreparationSpec) -> NDArray[np.uint8]:
    """Prepare a synthetic study (already 1 mm, RAS) and crop it to its foreground box."""
    channels, union = [], np.zeros(study.grid.shape, bool)
    for key in modalities:
        volume = torch.from_numpy(study.scans[key].data.copy())
        mask = foreground_mask(volume)
        union |= mask.numpy()
        channels.append((normalise(volume, mask, preparation) * SCALE).round().clamp(0, 255).to(torch.uint8).numpy())
    assert study.labels is not None
    index = np.argwhere(union)
    low = np.maximum(index.min(0) - preparation.margin, 0)
    high = index.max(0) + 1 + preparation.margin
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    return np.stack([*channels, study.labels.data])[(slice(None), *box)]


@dataclass(frozen=True)
class Crop:
    """A cube of one study.

    Parameters
    ----------
    images : ndarray of shape (C, n, n, n), uint8
        Prepared intensities times :data:`SCALE`.
    labels : ndarray of shape (n, n, n), uint8
    corner : tuple of float
        Position of the first voxel in the study's box, each axis 0..1 from first to last voxel (may be outside).
    extent : tuple of float
        Length of the crop in the same units.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    corner: tuple[float, float, float]
    extent: tuple[float, float, float]


class Pool:
    """The studies of a folder, opened as memory maps.

    Parameters
    ----------
    folder : Path
        As :func:`fill_pool` wrote it.
    seeds : range
        Which studies to use, those that exist.
    """

    def __init__(self, folder: Path, seeds: range) -> None:
        paths = [folder / f"{seed:08d}.npy" for seed in seeds]
        self.studies = [np.load(path, mmap_mode="r") for path in paths if path.exists()]

    def __len__(self) -> int:
        return len(self.studies)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        return iter(self.studies)

    def crop(self, size: int, rng: np.random.Generator, foreground: float = 0.5) -> Crop:
        """Cut a random cube; with probability ``foreground`` around a voxel of abnormal tissue, if there is one."""
        study = self.studies[rng.integers(len(self.studies))]
        shape = np.array(study.shape[1:])
        if rng.random() < foreground and (centre := self._lesion_voxel(study, rng)) is not None:
            start = centre - size // 2 + rng.integers(-size // 4, size // 4 + 1, 3)
        else:
            start = rng.integers(-8, np.maximum(shape - size + 8, -7))
        start = np.clip(start, np.minimum(0, shape - size), np.maximum(0, shape - size))
        box, pad = _window(start, size, shape)
        cut = np.pad(study[(slice(None), *box)], ((0, 0), *pad))
        corner, extent = start / (shape - 1), (size - 1) / (shape - 1)
        return Crop(cut[:-1], cut[-1], tuple(corner.tolist()), tuple(extent.tolist()))

    @staticmethod
    def _lesion_voxel(study: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.int64] | None:
        labels = study[-1, ::3, ::3, ::3]
        present = [value for value in (4, 5, 6) if (labels == value).any()]
        if not present:
            return None
        candidates = np.argwhere(labels == rng.choice(present))
        voxel: NDArray[np.int64] = candidates[rng.integers(len(candidates))] * 3
        return voxel


def _window(
    start: NDArray[np.int64], size: int, shape: NDArray[np.int64]
) -> tuple[tuple[slice, ...], tuple[tuple[int, int], ...]]:
    """Part of a cube inside the volume, and what must be padded on each side."""
    low, high = np.maximum(start, 0), np.minimum(start + size, shape)
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    pad = tuple((int(a - s), int(s + size - b)) for s, a, b in zip(start, low, high, strict=True))
    return box, pad
