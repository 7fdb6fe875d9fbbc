"""Where voxels are: a shape and an affine to RAS millimetres."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike, NDArray

from napari_brainmvp.errors import StudyError

__all__ = ["Grid"]


@dataclass(frozen=True, eq=False)
class Grid:
    """A voxel grid in RAS millimetres.

    Parameters
    ----------
    shape : tuple of int
        Number of voxels along (i, j, k), as nibabel indexes them.
    affine : ndarray of shape (4, 4), float64
        Takes homogeneous voxel indices (i, j, k, 1) to RAS+ millimetres.

    Raises
    ------
    StudyError
        The shape is not three positive integers, or the affine is not finite and invertible.

    Examples
    --------
    >>> grid = Grid((10, 20, 30), np.diag([-1.0, 2.0, 3.0, 1.0]))
    >>> grid.spacing, grid.axcodes, grid.voxel_volume_ml
    ((1.0, 2.0, 3.0), ('L', 'A', 'S'), 0.006)
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    def __init__(self, shape: tuple[int, ...], affine: ArrayLike) -> None:
        sizes = tuple(int(n) for n in shape)
        if len(sizes) != 3 or min(sizes) < 1:
            raise StudyError(f"A grid needs three positive sizes, got {sizes}: give one 3D volume per scan.")
        matrix = np.array(affine, dtype=np.float64)
        if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or not np.allclose(matrix[3], [0, 0, 0, 1]):
            raise StudyError("The affine is not a finite 4x4 matrix ending in 0 0 0 1: repair the scan's header.")
        lengths = np.linalg.norm(matrix[:3, :3], axis=0)
        if lengths.min() < 1e-6 or abs(np.linalg.det(matrix[:3, :3] / lengths)) < 1e-3:
            raise StudyError(
                "The affine is singular (an axis has no length or two coincide): repair the scan's header."
            )
        matrix.setflags(write=False)
        object.__setattr__(self, "shape", sizes)
        object.__setattr__(self, "affine", matrix)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel edge lengths along (i, j, k) in mm."""
        a, b, c = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(a), float(b), float(c)

    @property
    def voxel_volume_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @property
    def axcodes(self) -> tuple[str, str, str]:
        """Anatomical direction each axis points to most closely, for example ``('R', 'A', 'S')``."""
        a, b, c = nib.orientations.aff2axcodes(self.affine)
        return str(a), str(b), str(c)

    @property
    def is_oblique(self) -> bool:
        """Whether an axis leaves its anatomical direction by more than half a degree."""
        directions = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        return bool(np.abs(directions).max(axis=0).min() < np.cos(np.deg2rad(0.5)))

    def same_as(self, other: Grid, tolerance_mm: float = 0.05) -> bool:
        """Whether both grids have one shape and no corner lies further apart than the tolerance in mm."""
        if self.shape != other.shape:
            return False
        return bool(np.abs(self.corners() - other.corners()).max() <= tolerance_mm)

    def corners(self) -> NDArray[np.float64]:
        """Centres of the eight corner voxels, shape (8, 3), RAS mm."""
        index = np.stack(np.meshgrid(*[(0, n - 1) for n in self.shape], indexing="ij"), -1).reshape(-1, 3)
        return self.to_world(index)

    def to_world(self, index: ArrayLike) -> NDArray[np.float64]:
        """Take voxel indices of shape (..., 3) to RAS mm of the same shape."""
        world: NDArray[np.float64] = np.asarray(index, np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]
        return world

    def to_index(self, world: ArrayLike) -> NDArray[np.float64]:
        """Take RAS mm of shape (..., 3) to fractional voxel indices of the same shape."""
        inverse = np.linalg.inv(self.affine)
        index: NDArray[np.float64] = np.asarray(world, np.float64) @ inverse[:3, :3].T + inverse[:3, 3]
        return index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and self.shape == other.shape and np.array_equal(self.affine, other.affine)

    def __hash__(self) -> int:
        return hash((self.shape, self.affine.tobytes()))
