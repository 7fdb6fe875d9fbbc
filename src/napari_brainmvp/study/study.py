"""The domain's nouns: a scan, a label map, and the study they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_brainmvp.errors import StudyError
from napari_brainmvp.study.grid import Grid
from napari_brainmvp.study.modality import Modality

__all__ = ["LabelMap", "Scan", "Study"]


def _frozen(array: NDArray[Any], grid: Grid, what: str) -> NDArray[Any]:
    if array.shape != grid.shape:
        raise StudyError(f"{what} has shape {array.shape} but its grid says {grid.shape}: they must be equal.")
    view = array.view()
    view.setflags(write=False)
    return view


@dataclass(frozen=True, eq=False)
class Scan:
    """One 3D image of one modality.

    Parameters
    ----------
    modality : Modality
        What kind of scan it is.
    data : ndarray of shape (i, j, k), float32
        Intensities in the scanner's (or file's) arbitrary units, finite; held read-only.
    grid : Grid
        Where the voxels are.
    path : Path or None
        The file or folder it came from.
    imputed : bool
        Made by a network from other scans, not by a scanner. Everything that shows or writes it says so.
    """

    modality: Modality
    data: NDArray[np.float32]
    grid: Grid
    path: Path | None = None
    imputed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", _frozen(self.data, self.grid, f"The {self.modality.title} scan"))

    @property
    def title(self) -> str:
        """The name shown to people: ``"FLAIR"``, or ``"FLAIR (imputed)"``."""
        return f"{self.modality.title} (imputed)" if self.imputed else self.modality.title


@dataclass(frozen=True, eq=False)
class LabelMap:
    """A segmentation: one integer per voxel, 0 is background or unlabelled.

    Parameters
    ----------
    data : ndarray of shape (i, j, k), any integer dtype
        Label values; held read-only.
    grid : Grid
        Where the voxels are.
    path : Path or None
        The file it came from.
    """

    data: NDArray[Any]
    grid: Grid
    path: Path | None = None

    def __post_init__(self) -> None:
        if not np.issubdtype(self.data.dtype, np.integer):
            raise StudyError(f"A label map needs integers, got {self.data.dtype}: round and convert it first.")
        object.__setattr__(self, "data", _frozen(self.data, self.grid, "The label map"))


@dataclass(frozen=True, eq=False)
class Study:
    """The co-registered scans of one subject at one time.

    Scans may lie on different grids as long as their world coordinates agree; ``reference`` names the one whose
    grid results are given on.

    Parameters
    ----------
    name : str
        Shown to people and used in file names.
    scans : mapping of str to Scan
        Scans by modality key; at least one.
    reference : str
        Modality key of the reference scan; empty chooses the scan with the most voxels.
    labels : LabelMap or None
        A segmentation that came with the study.
    warnings : tuple of str
        What was repaired or looked odd on reading, one sentence each.

    Examples
    --------
    >>> from napari_brainmvp.study import modality
    >>> t1 = Scan(modality("t1"), np.zeros((4, 4, 4), np.float32), Grid((4, 4, 4), np.eye(4)))
    >>> study = Study("sub-01", {"t1": t1})
    >>> study.grid.shape, study.on_one_grid
    ((4, 4, 4), True)
    """

    name: str
    scans: Mapping[str, Scan]
    reference: str = ""
    labels: LabelMap | None = None
    warnings: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.scans:
            raise StudyError(f"The study {self.name!r} has no scan: give at least one modality.")
        scans = dict(self.scans)
        for key, scan in scans.items():
            if key != scan.modality.key:
                raise StudyError(f"The scan under {key!r} says it is {scan.modality.key!r}: use one name.")
        object.__setattr__(self, "scans", MappingProxyType(scans))
        reference = self.reference or max(scans, key=lambda key: scans[key].data.size)
        if reference not in scans:
            raise StudyError(
                f"The reference {reference!r} is not among the scans {', '.join(scans)}: choose one of them."
            )
        object.__setattr__(self, "reference", reference)

    @property
    def grid(self) -> Grid:
        """The reference scan's grid."""
        return self.scans[self.reference].grid

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Modalities present, in the order of ``scans``."""
        return tuple(scan.modality for scan in self.scans.values())

    def with_scan(self, scan: Scan) -> Study:
        """Return the study with one more scan, or with another of its modality; the reference stays."""
        return replace(self, scans={**self.scans, scan.modality.key: scan})

    @property
    def on_one_grid(self) -> bool:
        """Whether every scan already lies on the reference grid."""
        return all(scan.grid.same_as(self.grid) for scan in self.scans.values())

    def with_reference(self, reference: str) -> Study:
        """Return the same study with another scan as reference."""
        return replace(self, reference=reference)

    def with_modalities(self, keys: tuple[str, ...]) -> Study:
        """Return the study with only the given modality keys."""
        scans = {key: scan for key, scan in self.scans.items() if key in keys}
        return replace(self, scans=scans, reference=self.reference if self.reference in scans else "")
