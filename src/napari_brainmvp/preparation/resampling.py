"""Move a volume from one grid to another: by indexing where that is exact, by interpolation where it is not."""

from __future__ import annotations

from typing import Literal

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from napari_brainmvp.study import Grid

__all__ = ["network_grid", "resample"]

Interpolation = Literal["linear", "nearest"]

_EXACT = 1e-3
"""Millimetres, or voxels, below which a difference is rounding in a header."""


def network_grid(grid: Grid, spacing: float) -> Grid:
    """Return the grid a network works on: closest axes to RAS, isotropic, covering the same volume.

    Oblique grids stay oblique: axes are permuted and flipped, never rotated. A grid that already has the spacing
    keeps its voxels exactly.

    Parameters
    ----------
    grid : Grid
        The reference scan's grid.
    spacing : float
        Edge of the voxels, mm.

    Examples
    --------
    >>> network_grid(Grid((10, 20, 5), np.diag([-1.0, -1.0, 6.0, 1.0])), 1.0).shape
    (10, 20, 30)
    """
    orientation = nib.orientations.io_orientation(grid.affine)
    flipped = grid.affine @ nib.orientations.inv_ornt_aff(orientation, grid.shape)
    shape = np.empty(3, int)
    shape[orientation[:, 0].astype(int)] = grid.shape
    old = np.linalg.norm(flipped[:3, :3], axis=0)
    if np.abs(old - spacing).max() < _EXACT:
        return Grid(tuple(shape), flipped)
    affine = flipped.copy()
    affine[:3, :3] *= spacing / old
    new_shape = np.maximum(1, np.ceil(shape * old / spacing - _EXACT).astype(int))
    # The outer faces of the first voxels coincide, so the first centre moves by half the difference in size.
    affine[:3, 3] += flipped[:3, :3] @ ((spacing / old - 1) / 2)
    return Grid(tuple(new_shape), affine)


def resample(volume: Tensor, source: Grid, target: Grid, interpolation: Interpolation = "linear") -> Tensor:
    """Resample a volume onto another grid.

    Parameters
    ----------
    volume : Tensor of shape ``source.shape``
        Floating point, or integers and booleans with ``"nearest"``.
    source, target : Grid
        Where the voxels are and where they are wanted.
    interpolation : {"linear", "nearest"}
        Trilinear (after a Gaussian blur along axes that are thinned out by more than one and a half), or the
        nearest voxel.

    Returns
    -------
    Tensor of shape ``target.shape``, same dtype
        0 where the target lies outside the source. A mere permutation, flip, cut or padding is exact.
    """
    matrix = np.linalg.inv(source.affine) @ target.affine  # target index -> source index
    linear, offset = matrix[:3, :3], matrix[:3, 3]
    axes = np.abs(linear).argmax(axis=0)  # source axis of each target axis
    along = linear[axes, range(3)]
    reach = np.array(target.shape)
    stray = linear.copy()
    stray[axes, range(3)] = 0
    if sorted(axes) != [0, 1, 2] or (np.abs(stray) @ reach).max() > 0.05:
        return _resample_oblique(
            _smooth(volume, np.abs(linear).max(axis=1), interpolation), matrix, target, interpolation
        )
    volume = volume.permute(*(int(a) for a in axes))
    offset = offset[axes]
    exact = (np.abs(np.abs(along) - 1) * reach).max() < _EXACT and np.abs(offset - np.rint(offset)).max() < _EXACT
    if not exact and interpolation == "linear":
        volume = _smooth(volume, np.abs(along), interpolation)
    for axis in range(3):
        positions = offset[axis] + along[axis] * np.arange(target.shape[axis])
        volume = _pick(volume, axis, positions, "nearest" if exact else interpolation)
    return volume.contiguous()


def _pick(volume: Tensor, axis: int, positions: NDArray[np.float64], interpolation: Interpolation) -> Tensor:
    """Sample one axis at fractional positions; 0 beyond the outer faces of the first and last voxel."""
    last = volume.shape[axis] - 1
    device = volume.device
    outside = (positions < -0.5 - _EXACT) | (positions > last + 0.5 + _EXACT)
    held = np.clip(positions, 0, last)
    if interpolation == "nearest":
        picked = volume.index_select(axis, torch.from_numpy(np.rint(held).astype(np.int64)).to(device))
    else:
        low = np.minimum(held.astype(np.int64), max(0, last - 1))
        shape = [-1 if a == axis else 1 for a in range(3)]
        weight = torch.from_numpy((held - low).astype(np.float32)).to(device).view(shape)
        first = volume.index_select(axis, torch.from_numpy(low).to(device))
        second = volume.index_select(axis, torch.from_numpy(np.minimum(low + 1, last)).to(device))
        picked = torch.lerp(first, second, weight.to(volume.dtype).expand_as(first))
    if outside.any():
        picked.index_fill_(axis, torch.from_numpy(np.flatnonzero(outside)).to(device), 0)
    return picked


def _smooth(volume: Tensor, steps: NDArray[np.float64], interpolation: Interpolation) -> Tensor:
    """Blur along the axes that will be sampled every ``steps`` > 1.5 voxels, against aliasing."""
    if interpolation == "nearest":
        return volume
    for axis, step in enumerate(steps):
        if step > 1.5:
            sigma = 0.4 * float(np.sqrt(step**2 - 1))
            reach = max(1, round(3 * sigma))
            x = torch.arange(-reach, reach + 1, device=volume.device, dtype=volume.dtype)
            kernel = torch.exp(-(x**2) / (2 * sigma**2))
            rows = volume.movedim(axis, -1)
            padded = F.pad(rows.reshape(1, -1, rows.shape[-1]), (reach, reach), mode="replicate")
            blurred = F.conv1d(padded.movedim(0, 1), (kernel / kernel.sum())[None, None])
            volume = blurred.reshape(rows.shape).movedim(-1, axis)
    return volume


def _resample_oblique(
    volume: Tensor, matrix: NDArray[np.float64], target: Grid, interpolation: Interpolation
) -> Tensor:
    """Resample through a full affine, slab by slab so that the coordinates never exist all at once."""
    device = volume.device
    sizes = torch.tensor(volume.shape, dtype=torch.float32, device=device)
    to_source = torch.from_numpy(matrix.astype(np.float32)).to(device)
    rows = [torch.arange(n, dtype=torch.float32, device=device) for n in target.shape[1:]]
    plane = torch.stack(torch.meshgrid(*rows, indexing="ij"), -1)
    values = volume[None, None].float()
    slabs = []
    for start in range(0, target.shape[0], 16):
        i = torch.arange(start, min(start + 16, target.shape[0]), dtype=torch.float32, device=device)
        index = i.view(-1, 1, 1, 1) * to_source[:3, 0] + (plane @ to_source[:3, 1:3].T + to_source[:3, 3])
        unit = (2 * index + 1) / sizes - 1
        mode = "bilinear" if interpolation == "linear" else "nearest"
        slab = F.grid_sample(values, unit.flip(-1)[None], mode=mode, padding_mode="border", align_corners=False)[0, 0]
        slabs.append(torch.where((unit.abs() <= 1 + _EXACT).all(-1), slab, 0.0))
    return torch.cat(slabs).to(volume.dtype)
