"""Abnormal tissue with its truth: glioma-like, MS-like and stroke-like lesions.

A lesion is a list of :class:`Compartment`: soft fractions inside a box, a tissue, and the label they get.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from napari_brainmvp.synthesis.anatomy import Anatomy
from napari_brainmvp.synthesis.draws import Draws, box_mean
from napari_brainmvp.synthesis.physics import Tissue, draw_tissue

__all__ = ["ENHANCING", "NON_ENHANCING", "OEDEMA", "Compartment", "GliomaPlan", "make_glioma", "make_ms", "make_stroke"]

OEDEMA, NON_ENHANCING, ENHANCING = 4, 5, 6
"""Label values of abnormal tissue; healthy tissue has 1 (CSF), 2 (grey matter), 3 (white matter)."""

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Compartment:
    """One tissue of a lesion.

    Parameters
    ----------
    box : tuple of three slice
        Where it lies in the study.
    fraction : Tensor of the box's shape, float32, 0..1
        How much of each voxel it takes; what lay there before keeps the rest.
    tissue : Tissue
        Its constants.
    label : int
        Truth where the fraction exceeds one half.
    texture : Tensor of the box's shape, float32
        Relative variation of its signal, about 0.
    """

    box: Box
    fraction: Tensor
    tissue: Tissue
    label: int
    texture: Tensor


@dataclass(frozen=True)
class GliomaPlan:
    """The choices that decide a glioma before its brain is made (they steer the mass effect).

    Parameters
    ----------
    radius : float
        Mean radius of the tumour core, mm.
    high_grade : bool
        With an enhancing rim (mostly) around necrosis; otherwise a solid, hardly enhancing core.
    """

    radius: float
    high_grade: bool

    @classmethod
    def draw(cls, draws: Draws) -> GliomaPlan:
        """Draw a plan."""
        return cls(radius=draws.uniform(7, 32), high_grade=draws.chance(0.72))


def _box_around(centre: Tensor, reach: float, shape: tuple[int, ...]) -> Box:
    a, b, c = (
        slice(max(0, int(x - reach)), max(2, min(n, int(x + reach) + 2)))
        for x, n in zip(centre.tolist(), shape, strict=True)
    )
    return a, b, c


def _distance(centre: Tensor, box: Box, radii: Tensor, device: torch.device) -> Tensor:
    """Distance to the centre in units of an ellipsoid's radii: 1 on its surface."""
    axes = [torch.arange(s.start, s.stop, device=device, dtype=torch.float32) for s in box]
    offset = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) - centre.to(device)
    distance: Tensor = (offset / radii.to(device)).norm(dim=-1)
    return distance


def _ellipsoid(draws: Draws, radius: float) -> Tensor:
    return torch.tensor([draws.jitter(radius, 0.2) for _ in range(3)])


def _soft(depth_mm: Tensor, width: float = 0.6) -> Tensor:
    """Fraction of a voxel whose centre lies ``depth_mm`` inside a surface."""
    return torch.sigmoid(depth_mm / width)


def make_glioma(anatomy: Anatomy, plan: GliomaPlan, draws: Draws) -> list[Compartment]:
    """Grow a glioma-like lesion: oedema along white matter, a core with necrosis and an enhancing rim."""
    lesions = _focus(anatomy, anatomy.lesion_centre, plan, draws)
    while plan.high_grade and draws.chance(0.25):  # satellites
        step = torch.tensor([draws.uniform(-1, 1) for _ in range(3)]) * (plan.radius + 14)
        satellite = GliomaPlan(draws.uniform(3, 8), True)
        lesions += _focus(anatomy, anatomy.lesion_centre + step, satellite, draws)
    return lesions


def _focus(anatomy: Anatomy, centre: Tensor, plan: GliomaPlan, draws: Draws) -> list[Compartment]:
    """One focus. ``depth`` is the distance in mm below the core's surface, negative outside."""
    extent = draws.uniform(4, 28) if plan.high_grade else draws.uniform(0, 12)
    box = _box_around(centre, 1.5 * plan.radius + 1.6 * extent + 6, anatomy.grid.shape)
    shape = [s.stop - s.start for s in box]
    if min(shape) < 4:
        return []
    csf, grey, white = anatomy.tissues[(slice(None), *box)]
    brain = anatomy.brain[box].float()
    lobes = 0.35 * draws.smooth(shape, max(4.0, 0.7 * plan.radius)) + 0.12 * draws.smooth(shape, 4)
    depth = (1 - _distance(centre, box, _ellipsoid(draws, plan.radius), draws.device) + lobes) * plan.radius

    spread = extent * (0.75 + 0.5 * draws.smooth(shape, 14) + 0.15 * draws.smooth(shape, 5)).clamp(min=0)
    susceptible = (white + draws.uniform(0.25, 0.9) * grey).clamp(0, 1) * (1 - csf).clamp(0, 1)
    oedema = _soft(depth + spread - 8 * (1 - susceptible).clamp(0, 1) * (depth < 0), 1.0) * (1 - 0.9 * csf) * brain
    core = _soft(depth) * brain * (1 - 0.6 * csf)
    compartments = [
        _compartment(box, oedema * draws.uniform(0.75, 1.0), "oedema", OEDEMA, draws),
        _compartment(box, core, "infiltration", NON_ENHANCING, draws),
    ]
    if plan.high_grade:
        compartments += _rim_and_necrosis(box, depth, core, plan, draws)
    elif draws.chance(0.25):
        nodule = _soft(draws.smooth(shape, 6) * 2 - 3.2) * core
        compartments.append(_compartment(box, nodule, "enhancing", ENHANCING, draws))
    return compartments


def _rim_and_necrosis(box: Box, depth: Tensor, core: Tensor, plan: GliomaPlan, draws: Draws) -> list[Compartment]:
    shape = depth.shape
    width = draws.uniform(1.8, 0.5 * plan.radius + 2.5) * (1 + 0.5 * draws.smooth(shape, 7)).clamp(min=0.25)
    inner = _soft(depth - width)
    patchy = draws.uniform(-0.8, 2.5) + draws.smooth(shape, draws.uniform(5, 12))  # where the rim is interrupted
    rim = (core * _soft(3 * patchy)) * (1 - inner)
    if draws.chance(0.3):  # islands of enhancement inside
        rim = torch.maximum(rim, inner * core * _soft(6 * (draws.smooth(shape, 5) - 0.7)))
    return [
        _compartment(box, inner * core, "necrosis", NON_ENHANCING, draws),
        _compartment(box, rim, "enhancing", ENHANCING, draws),
    ]


def make_ms(anatomy: Anatomy, draws: Draws) -> list[Compartment]:
    """Scatter MS-like plaques: small, ovoid, in white matter and preferably around the ventricles."""
    csf, _, white = anatomy.tissues
    deep = box_mean(anatomy.brain.float(), 21) > 0.99
    weights = white * (0.15 + 3 * box_mean(csf, 9)) * deep
    lesions = []
    for _ in range(draws.integer(4, 45)):
        radius = min(9.0, draws.jitter(2.4, 0.5))
        centre = draws.voxel(weights)
        box = _box_around(centre, 2 * radius + 4, anatomy.grid.shape)
        shape = [s.stop - s.start for s in box]
        depth = (
            1 - _distance(centre, box, _ellipsoid(draws, radius), draws.device) + 0.2 * draws.smooth(shape, 3)
        ) * radius
        plaque = _soft(depth, 0.8) * (1 - csf[box]) * anatomy.brain[box] * draws.uniform(0.6, 1.0)
        lesions.append(_compartment(box, plaque, "demyelination", OEDEMA, draws))
        if draws.chance(0.06):
            lesions.append(_compartment(box, plaque * _soft(1.5 - (depth - 1.5).abs()), "enhancing", ENHANCING, draws))
    return lesions


def make_stroke(anatomy: Anatomy, draws: Draws) -> list[Compartment]:
    """Make a stroke-like lesion: a wedge of cortex and white matter towards the surface, or a lacune."""
    centre = anatomy.lesion_centre
    radius = draws.uniform(4, 32)
    box = _box_around(centre, 1.6 * radius + 4, anatomy.grid.shape)
    shape = [s.stop - s.start for s in box]
    outward = centre - torch.tensor(anatomy.grid.shape) / 2
    outward = outward / (outward.norm() + 1e-6)
    axes = [torch.arange(s.start, s.stop, device=draws.device, dtype=torch.float32) for s in box]
    offset = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) - centre.to(draws.device)
    along = offset @ outward.to(draws.device) / radius
    across = (offset.norm(dim=-1) ** 2 / radius**2 - along**2).clamp(min=0).sqrt()
    lobes = 0.3 * draws.smooth(shape, max(4.0, 0.5 * radius)) + 0.1 * draws.smooth(shape, 4)
    depth = radius * (1 - torch.maximum(along.abs(), across * (1.5 - 0.5 * along.clamp(-1, 1))) + lobes)
    infarct = _soft(depth, 1.0) * (1 - anatomy.tissues[0][box]) * anatomy.brain[box] * draws.uniform(0.7, 1.0)
    return [_compartment(box, infarct, "infarct", OEDEMA, draws)]


def _compartment(box: Box, fraction: Tensor, tissue: str, label: int, draws: Draws) -> Compartment:
    texture = draws.uniform(0.02, 0.12) * draws.smooth(fraction.shape, draws.uniform(2.5, 8))
    return Compartment(box, fraction.clamp(0, 1), draw_tissue(tissue, draws), label, texture)


def mass_radius(plan: GliomaPlan) -> float:
    """Reach of a glioma's mass effect, mm."""
    return plan.radius * math.sqrt(2.0)
