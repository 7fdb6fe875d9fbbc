"""Where the probe decides, and how what it decides reaches every voxel: smoothed, on the device it was predicted on.

A classifier of single voxels is fitted to a few strokes and speckles; what it finds with its neighbours' votes counted
is far better than what each voxel says by itself. With votes counted not every voxel has to be asked, either: of each
cell of 2 x 2 x 2 voxels two opposite ones are, the lattice that covers a space most evenly. Their probabilities are
averaged by cell, smoothed by a Gaussian and interpolated linearly, which is three small matrix products each. A visible
slice asks the layers of cells that it touches only, and one voxel a cell of those beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from napari_brainmvp.progress import CancelToken
from napari_brainmvp.study import Grid

__all__ = ["Part", "Placement", "Votes"]

_REACH = 2.5
"""Standard deviations of the Gaussian that are counted."""
_OWN_VARIANCE = 1.0
"""What averaging by cell (1/3) and interpolating (2/3) smooth by themselves, square voxels."""


@dataclass(frozen=True, eq=False)
class Part:
    """A part of the study's own grid, and the cells it takes.

    Parameters
    ----------
    asked : Tensor of shape (m,), int64, or None
        Which of :attr:`Placement.rows` have to be predicted; None for all.
    cells : tuple of slice
        In the order of the features' axes.
    smoothing, interpolation : list of 3 Tensor
        A matrix an axis, from cells to cells and from cells to voxels.
    voxels : tuple of slice
        In the order of the study's own axes. All others lie outside the head.
    """

    asked: Tensor | None
    cells: tuple[slice, ...]
    smoothing: list[Tensor]
    interpolation: list[Tensor]
    voxels: tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Votes:
    """What is certain of some voxels, by cell.

    Parameters
    ----------
    cells : Tensor of shape (n, 3), int64
    columns : Tensor of shape (n,), int64
        A class each, as a column of the probabilities.
    weights : Tensor of shape (n,), float32
        How many predicted voxels each weighs as much as.
    """

    cells: Tensor
    columns: Tensor
    weights: Tensor


class Placement:
    """Two voxels of each cell, and the way from there to the study's own grid.

    Parameters
    ----------
    rows : ndarray of shape ``grid.shape``, int32
        The feature row of each voxel, -1 for none.
    grid : Grid
        Of the features.
    source : Grid
        Of the study. Axes may be permuted, flipped and of any spacing, but not oblique to those of ``grid``.
    """

    def __init__(self, rows: NDArray[np.int32], grid: Grid, source: Grid) -> None:
        place = np.nonzero(rows >= 0)
        cells = [axis >> 1 for axis in place]
        self._shape = tuple(-(-n // 2) for n in rows.shape)
        flat = np.ravel_multi_index(cells, self._shape)
        asked = (place[0] % 2 == place[1] % 2) & (place[1] % 2 == place[2] % 2)
        heard = np.zeros(math.prod(self._shape), bool)
        heard[flat[asked]] = True
        silent = np.flatnonzero(~heard[flat])  # a cell at the rim may have neither of its two
        asked[silent[np.unique(flat[silent], return_index=True)[1]]] = True
        self.rows = torch.from_numpy(rows[tuple(axis[asked] for axis in place)])
        leads = np.zeros(len(self.rows), bool)
        leads[np.unique(flat[asked], return_index=True)[1]] = True
        self._leads = torch.from_numpy(leads)
        self._cells = torch.from_numpy(np.stack([axis[asked] for axis in cells], 1))
        self._cell_of_row = flat.astype(np.int64)
        to_cells = np.linalg.inv(grid.affine @ np.diag([2.0, 2.0, 2.0, 1.0])) @ source.affine
        self._axes = np.abs(to_cells[:3, :3]).argmax(1)  # of the study's own grid, by the features' axis
        self._step = to_cells[range(3), self._axes]
        self._first = to_cells[:3, 3] - 0.25  # cell c lies between the voxels 2c and 2c + 1
        self._voxels = tuple(source.shape[axis] for axis in self._axes)

    def to(self, device: torch.device) -> None:
        """Move to the device on which probabilities are predicted; :attr:`rows` stay where features are."""
        self._cells, self._leads = self._cells.to(device), self._leads.to(device)

    def part(self, sigma: float, plane: tuple[int, int] | None = None) -> Part:
        """Find what a plane takes, or the volume.

        Parameters
        ----------
        sigma : float
            Standard deviation of all smoothing, voxels of the features; less than 1 is taken for 1.
        plane : (axis, index), optional
            Of the study's own grid.
        """
        spread = math.sqrt(max(0.0, sigma**2 - _OWN_VARIANCE)) / 2
        cells, smoothing, interpolation = [], [], []
        voxels = [slice(None)] * 3
        asked = None
        for axis, count in enumerate(self._shape):
            own = int(self._axes[axis])
            positions = self._first[axis] + self._step[axis] * np.arange(self._voxels[axis])
            low, high = 0, count
            voxels[own] = _inside(positions, count)
            if plane is not None and plane[0] == own:
                voxels[own] = slice(plane[1], plane[1] + 1)
                around = max(1.0, abs(float(self._step[axis]))) + min(1, round(_REACH * spread))
                held = float(np.clip(positions[plane[1]], 0, count - 1))
                low, high = max(0, math.ceil(held - around)), min(count, math.floor(held + around) + 1)
                mine = self._cells[:, axis]
                near = (mine - held).abs() < max(1.0, abs(float(self._step[axis])))
                asked = (near | (self._leads & (mine >= low) & (mine < high))).nonzero()[:, 0]
            cells.append(slice(low, high))
            smoothing.append(_gaussian(high - low, spread))
            hat = _hat(positions[voxels[own]], count, abs(float(self._step[axis])))
            interpolation.append(hat[:, low:high].contiguous())
        return Part(asked, tuple(cells), smoothing, interpolation, tuple(voxels))

    def votes(self, rows: NDArray[np.int32], columns: NDArray[np.int64], weight: float) -> Votes:
        """Count voxels by cell and class.

        Parameters
        ----------
        rows : ndarray of shape (n,), int32
            Of the features.
        columns : ndarray of shape (n,), int64
            The class of each.
        weight : float
            How many predicted voxels each weighs as much as.
        """
        count = 1 + int(columns.max(initial=0))
        found, often = np.unique(self._cell_of_row[rows] * count + columns, return_counts=True)
        cells = np.stack(np.unravel_index(found // count, self._shape), 1)
        return Votes(torch.from_numpy(cells), torch.from_numpy(found % count), torch.from_numpy(often).float() * weight)

    def spread(
        self,
        probabilities: Tensor,
        classes: NDArray[Any],
        part: Part,
        painted: Votes | None = None,
        cancel: CancelToken | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Smooth and interpolate, and take the class with the largest share.

        Parameters
        ----------
        probabilities : Tensor of shape (m, K), float32
            Of the rows that the part asks for.
        classes : ndarray of shape (K,), int32 or int64
            Label values.
        part : Part
        painted : Votes, optional
            What labelled voxels say, besides.
        cancel : CancelToken, optional
            Asked at every class.

        Returns
        -------
        labels : Tensor of the part's shape on the study's own grid, of the type of ``classes``
        uncertainty : Tensor of the same shape, float16
            Entropy over its maximum, 0..1.

        Raises
        ------
        Cancelled
            ``cancel`` was.
        """
        device, count = probabilities.device, len(classes)
        shape = [s.stop - s.start for s in part.cells]
        cells = self._cells if part.asked is None else self._cells.index_select(0, part.asked)
        votes = torch.zeros(math.prod(shape), count + 1, device=device)
        votes.index_add_(0, _flat(cells, part), F.pad(probabilities, (0, 1), value=1.0))
        if painted is not None:
            low, high = torch.tensor([[s.start, s.stop] for s in part.cells]).T
            near = ((painted.cells >= low) & (painted.cells < high)).all(1)
            at = _flat(painted.cells[near], part) * (count + 1)
            for column in (painted.columns[near], count):
                votes.view(-1).index_add_(0, (at + column).to(device), painted.weights[near].to(device))
        shares = _along_axes(votes.T.reshape(-1, *shape), part.smoothing)
        shares = shares[:count] / shares[count:].clamp(min=1e-6)
        labels = largest = None
        for value, share in zip(classes, shares, strict=True):  # one at a time: a volume of each is too much
            if cancel is not None:
                cancel.raise_if_cancelled()
            placed = _along_axes(share[None], part.interpolation)[0]
            if labels is None or largest is None:
                labels = torch.full(placed.shape, int(value), dtype=torch.from_numpy(classes).dtype, device=device)
                largest = placed
            else:
                labels.masked_fill_(placed > largest, int(value))
                torch.maximum(largest, placed, out=largest)
        assert labels is not None
        entropy = -torch.xlogy(shares, shares).sum(0, keepdim=True) / math.log(count)
        doubt = _along_axes(entropy.clamp_(0, 1), part.interpolation)[0]
        order = tuple(int(axis) for axis in np.argsort(self._axes))
        return labels.permute(order), doubt.half().permute(order)


def _flat(cells: Tensor, part: Part) -> Tensor:
    """Return the numbers of cells (n, 3) within a part."""
    first = torch.tensor([s.start for s in part.cells], device=cells.device)
    _, y, z = (s.stop - s.start for s in part.cells)
    return ((cells - first) * torch.tensor([y * z, z, 1], device=cells.device)).sum(1)


def _inside(positions: NDArray[np.float64], count: int) -> slice:
    """Return the voxels whose centres lie in cells."""
    inside = np.flatnonzero((positions >= -0.5) & (positions <= count - 0.5))
    return slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)


def _along_axes(volumes: Tensor, matrices: list[Tensor]) -> Tensor:
    """Multiply (C, X, Y, Z) by a matrix (X', X), (Y', Y), (Z', Z) along each axis."""
    x, y, z = (matrix.to(volumes.device) for matrix in matrices)
    count, *shape = volumes.shape
    volumes = (x @ volumes.reshape(count, shape[0], -1)).view(count, -1, *shape[1:])
    return (y @ volumes) @ z.T


def _gaussian(count: int, sigma: float) -> Tensor:
    """Return the weights (count, count) of a Gaussian about each cell, which add up to 1 where none is cut off."""
    away = torch.arange(count)[:, None] - torch.arange(count)
    weights = torch.exp(-(away**2) / (2 * max(sigma, 1e-3) ** 2))
    weights[away.abs() > round(_REACH * sigma)] = 0
    return weights / max(1e-6, float(weights.sum(1).max()))


def _hat(positions: NDArray[np.float64], count: int, step: float) -> Tensor:
    """Return the weights (n, count) of linear interpolation, over a wider hat where voxels are larger than cells."""
    away = np.abs(np.clip(positions, 0, count - 1)[:, None] - np.arange(count)) / max(1.0, step)
    weights = np.clip(1 - away, 0, None)
    return torch.from_numpy((weights / weights.sum(1, keepdims=True)).astype(np.float32))
