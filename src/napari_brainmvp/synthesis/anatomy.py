"""Healthy anatomy of a made-up person: the MNI152 tissue maps, deformed and made individual."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from napari_brainmvp.study import Grid
from napari_brainmvp.synthesis.draws import Draws, box_mean

__all__ = ["Anatomy", "Deformation", "load_template_tissues", "make_anatomy"]

COARSE = 4
"""Spacing in mm at which deformations are composed; they are smooth enough to be interpolated."""
_CANVAS = (52, 60, 56)
"""Coarse voxels around the brain's centre: 208 x 240 x 224 mm."""


@lru_cache(maxsize=2)
def load_template_tissues(device: str = "cpu") -> tuple[Tensor, Grid]:
    """Read the MNI152 maps that nilearn carries (Fonov et al. 2011; no download).

    Returns
    -------
    maps : Tensor of shape (4, 197, 233, 189), float32, 0..1
        Cerebrospinal fluid, grey matter, white matter, brain mask.
    grid : Grid
        1 mm, RAS.
    """
    from nilearn import datasets

    grey = datasets.load_mni152_gm_template(resolution=1)
    maps = [
        np.asarray(image.dataobj, np.float32)
        for image in (
            grey,
            datasets.load_mni152_wm_template(resolution=1),
            datasets.load_mni152_brain_mask(resolution=1),
        )
    ]
    gm, wm, brain = (torch.from_numpy(m).to(device) for m in maps)
    csf = (1 - gm - wm).clamp(0, 1) * brain
    return torch.stack([csf, gm * brain, wm * brain, brain]), Grid(grey.shape, grey.affine)


@dataclass(frozen=True)
class Deformation:
    """Where in the template each point of the new head comes from.

    Parameters
    ----------
    field : Tensor of shape (3, x, y, z), float32
        Template voxel coordinates for the coarse canvas, one value every :data:`COARSE` mm.
    """

    field: Tensor

    def sample(self, maps: Tensor, box: tuple[slice, slice, slice] | None = None) -> Tensor:
        """Pull template maps (C, X, Y, Z) to the coarse canvas, or at 1 mm to a box of coarse voxels.

        A box of n coarse voxels gives (n - 1) * COARSE + 1 voxels along that axis.
        """
        field = self.field
        if box is not None:
            field = field[(slice(None), *box)]
            size = tuple((n - 1) * COARSE + 1 for n in field.shape[1:])
            field = F.interpolate(field[None], size=size, mode="trilinear", align_corners=True)[0]
        return _pull(maps, field)


def _pull(maps: Tensor, coordinates: Tensor) -> Tensor:
    """Interpolate maps (C, X, Y, Z) trilinearly at voxel coordinates (3, x, y, z); 0 outside."""
    sizes = torch.tensor(maps.shape[1:], device=maps.device, dtype=torch.float32).view(3, 1, 1, 1)
    unit = 2 * coordinates / (sizes - 1) - 1
    grid = unit.flip(0).permute(1, 2, 3, 0)  # grid_sample wants the last axis first
    return F.grid_sample(maps[None], grid[None], mode="bilinear", align_corners=True)[0]


def _mesh(shape: tuple[int, ...], device: torch.device) -> Tensor:
    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def _diffeomorphism(draws: Draws, strength: float) -> Tensor:
    """Integrate a random stationary velocity field by scaling and squaring (Arsigny et al. 2006).

    Returns displacements on the coarse canvas, shape (3, x, y, z), in mm.
    """
    velocity = torch.stack([draws.smooth(_CANVAS, 5) + 0.5 * draws.smooth(_CANVAS, 2.5) for _ in range(3)])
    displacement = strength * velocity / 2**6
    mesh = _mesh(_CANVAS, draws.device)
    for _ in range(6):
        displacement = displacement + _pull(displacement, mesh + displacement / COARSE)
    return displacement


def _affine(draws: Draws) -> Tensor:
    """Draw a rotation up to about 10 degrees and a scale per axis; most heads are smaller than MNI152."""
    angles = torch.tensor([draws.uniform(-0.17, 0.17) for _ in range(3)])
    overall = draws.uniform(0.86, 1.06)
    scales = torch.tensor([overall * draws.uniform(0.94, 1.06) for _ in range(3)])
    generator = torch.zeros(3, 3)
    generator[0, 1], generator[0, 2], generator[1, 2] = angles
    rotation = torch.linalg.matrix_exp(generator - generator.T)
    matrix: Tensor = rotation @ torch.diag(1 / scales)
    return matrix.to(draws.device)


@lru_cache(maxsize=2)
def _ventricle_pull(device: str) -> Tensor:
    """Return the gradient of the smoothed ventricles, coarse, longest 1; shape (3, x, y, z), template frame."""
    maps, _ = load_template_tissues(device)
    small = F.avg_pool3d(maps[None], COARSE)[0]
    deep = -F.max_pool3d(-small[3:4], 9, stride=1, padding=4)  # brain eroded by 16 mm
    ventricles = box_mean(small[0] * deep[0], 5)
    gradient = torch.stack(torch.gradient(ventricles))
    length: Tensor = gradient.norm(dim=0)
    return gradient / length.max()


def _deform(draws: Draws, mass: tuple[Tensor, float, float] | None = None) -> Deformation:
    """Compose mass effect, random diffeomorphism, affine and ventricle size, coarse canvas to template voxels."""
    mesh = _mesh(_CANVAS, draws.device)
    if mass is not None:
        centre, radius, push = mass
        offset = mesh - centre.view(3, 1, 1, 1)
        nearness = torch.exp(-(offset**2).sum(0) * COARSE**2 / (2 * radius**2))
        mesh = mesh - push * offset * nearness
    moved = mesh * COARSE + _pull(_diffeomorphism(draws, draws.uniform(1.5, 6.0)), mesh)
    middle = torch.tensor(_CANVAS, device=draws.device, dtype=torch.float32).view(3, 1, 1, 1) * COARSE / 2
    brain_middle = torch.tensor([98.0, 117.0, 78.0], device=draws.device).view(3, 1, 1, 1)
    template = torch.einsum("ij,jxyz->ixyz", _affine(draws), moved - middle) + brain_middle
    pull = _pull(_ventricle_pull(str(draws.device)), (template - 1.5) / COARSE)
    return Deformation(template + draws.uniform(-2.0, 7.0) * pull)


@dataclass(frozen=True)
class Anatomy:
    """The healthy tissue of one person.

    Parameters
    ----------
    tissues : Tensor of shape (3, X, Y, Z), float32, 0..1
        Fractions of cerebrospinal fluid, grey and white matter; they add up to 1 in the brain and 0 outside.
    brain : Tensor of shape (X, Y, Z), bool
        The brain with the fluid around it.
    grid : Grid
        1 mm, RAS, near MNI152 coordinates.
    lesion_centre : Tensor of shape (3,), float32
        Voxel around which the mass effect (if any) pushes.
    """

    tissues: Tensor
    brain: Tensor
    grid: Grid
    lesion_centre: Tensor


def make_anatomy(draws: Draws, mass_radius: float = 0.0, margin: int = 2) -> Anatomy:
    """Make one person's healthy brain.

    Parameters
    ----------
    draws : Draws
        The study's random stream.
    mass_radius : float
        Radius in mm of a growth that pushes its surroundings away; 0 for none.
    margin : int
        Millimetres kept around the brain (more to leave room for a skull).
    """
    device = str(draws.device)
    maps, template_grid = load_template_tissues(device)
    state = draws.integer(0, 2**31)
    deformation = _deform(Draws(state, device))
    white = deformation.sample(maps[2:3])[0]
    centre = draws.voxel(white.clamp(min=0) ** 2)
    if mass_radius > 0:
        push = draws.uniform(0.15, 0.55)
        deformation = _deform(Draws(state, device), (centre.to(draws.device), mass_radius, push))
    box = _bounding_box(deformation.sample(maps[3:4])[0] > 0.05, 1 + margin // COARSE)
    warped = deformation.sample(maps, box)
    tissues, brain = _individualise(warped, draws)
    start = torch.tensor([s.start for s in box], dtype=torch.float32)
    offset = start * COARSE - torch.tensor(_CANVAS) * COARSE / 2 + torch.tensor([98.0, 117.0, 78.0])
    affine = template_grid.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ offset.double().numpy()
    return Anatomy(tissues, brain, Grid(tuple(brain.shape), affine), (centre.cpu() - start) * COARSE)


def _bounding_box(mask: Tensor, margin: int) -> tuple[slice, slice, slice]:
    """Smallest box around a mask (X, Y, Z), grown by a margin and held inside the volume."""
    index = mask.nonzero()
    low, high = index.amin(0) - margin, index.amax(0) + 1 + margin
    a, b, c = (slice(max(0, int(lo)), min(n, int(hi))) for lo, hi, n in zip(low, high, mask.shape, strict=True))
    return a, b, c


def _individualise(warped: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Turn the smooth population maps (4, X, Y, Z) into one person's crisp folds and an imperfect brain mask.

    Population maps blur the cortex of 152 people. Their logarithms are sharpened and disturbed by fine noise, so
    that the undecided ribbon between grey matter and fluid breaks up into something like sulci.
    """
    shape = warped.shape[1:]
    sharpness = draws.uniform(1.3, 4.0)
    noise = draws.uniform(0.2, 1.6)
    scores = sharpness * (warped[:3] + 0.02).log()
    fine = noise * draws.smooth(shape, draws.uniform(3.0, 5.0))
    scores[0] += fine + draws.uniform(-0.3, 0.7)
    scores[2] -= 0.4 * fine + draws.uniform(0.1, 0.6) * draws.smooth(shape, 6.0)
    edge = 0.5 + draws.uniform(-0.2, 0.15) + 0.12 * draws.smooth(shape, 12.0)
    brain = box_mean(warped[3], 5) > edge
    return scores.softmax(0) * brain, brain
