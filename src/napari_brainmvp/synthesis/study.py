"""A whole made-up study: anatomy, lesions, physics and scanner put together, with its truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from napari_brainmvp.study import LabelMap, Scan, Study, modality
from napari_brainmvp.synthesis.acquisition import acquire
from napari_brainmvp.synthesis.anatomy import Anatomy, make_anatomy
from napari_brainmvp.synthesis.draws import Draws, box_mean
from napari_brainmvp.synthesis.lesions import (
    OEDEMA,
    Compartment,
    GliomaPlan,
    make_glioma,
    make_ms,
    make_stroke,
    mass_radius,
)
from napari_brainmvp.synthesis.physics import Tissue, draw_sequence, draw_tissue
from napari_brainmvp.threads import use_threads

__all__ = ["LABEL_NAMES", "LesionKind", "SynthesisSpec", "make_study"]

LesionKind = Literal["none", "glioma", "ms", "stroke", "any"]

LABEL_NAMES: dict[int, str] = {
    1: "CSF",
    2: "grey matter",
    3: "white matter",
    4: "oedema",
    5: "non-enhancing core",
    6: "enhancing tumour",
}
"""What the values of a synthetic study's labels mean."""


@dataclass(frozen=True)
class SynthesisSpec:
    """What kind of study to make.

    Parameters
    ----------
    modalities : tuple of str
        Keys among the eight.
    lesion : {"none", "glioma", "ms", "stroke", "any"}
        ``"any"`` draws one, gliomas most often.
    head : float
        Probability of a skull and scalp around the brain, 0..1.
    """

    modalities: tuple[str, ...] = ("t1", "t1c", "t2", "flair")
    lesion: LesionKind = "any"
    head: float = 0.0

    def __post_init__(self) -> None:
        if self.lesion not in get_args(LesionKind):
            raise ValueError(f"lesion is {self.lesion!r}: choose one of {', '.join(get_args(LesionKind))}.")


def make_study(seed: int, spec: SynthesisSpec | None = None, *, device: str = "cpu") -> Study:
    """Make a study of a person who does not exist, with the truth as its labels.

    Parameters
    ----------
    seed : int
        The same seed on the same machine gives the same study.
    spec : SynthesisSpec, optional
        Modalities and lesions; default four modalities and any lesion.
    device : str
        Where to compute, ``"cpu"`` or ``"cuda"``.

    Returns
    -------
    Study
        All scans float32 on one 1 mm RAS grid; labels uint8 as in :data:`LABEL_NAMES`.

    Examples
    --------
    >>> study = make_study(1, SynthesisSpec(modalities=("t1", "flair"), lesion="ms"))
    >>> sorted(study.scans)
    ['flair', 't1']
    """
    spec = spec or SynthesisSpec()
    with use_threads(1):  # with more, sums are split in ways that may differ from run to run, and lesions too
        return _make_study(Draws(seed, device), seed, spec)


def _make_study(draws: Draws, seed: int, spec: SynthesisSpec) -> Study:
    lesion: str = spec.lesion
    if lesion == "any":
        lesion = draws.choice(("glioma", "ms", "stroke", "none"), (0.66, 0.17, 0.07, 0.1))
    plan = GliomaPlan.draw(draws)
    has_head = draws.chance(spec.head)
    anatomy = make_anatomy(draws, mass_radius(plan) if lesion == "glioma" else 0.0, margin=20 if has_head else 2)
    growers: dict[str, Callable[[], list[Compartment]]] = {
        "glioma": lambda: make_glioma(anatomy, plan, draws),
        "ms": lambda: make_ms(anatomy, draws),
        "stroke": lambda: make_stroke(anatomy, draws),
    }
    lesions = growers[lesion]() if lesion in growers else []
    if lesion != "ms" and draws.chance(0.25):  # incidental white matter spots
        lesions = make_ms(anatomy, draws)[:8] + lesions
    scans = {}
    surroundings = _Surroundings.draw(anatomy, has_head, draws)
    for key in spec.modalities:
        image = _render(key, anatomy, lesions, surroundings, draws)
        scans[key] = Scan(modality(key), image.cpu().numpy(), anatomy.grid)
    truth = _truth(anatomy, lesions).cpu().numpy()
    return Study(f"synthetic-{lesion}-{seed}", scans, labels=LabelMap(truth, anatomy.grid))


def _truth(anatomy: Anatomy, lesions: list[Compartment]) -> Tensor:
    """Label every voxel by its largest tissue, lesions where they take more than half."""
    csf, grey, white = anatomy.tissues
    labels = torch.where(grey > csf, 2, 1).to(torch.uint8)
    labels[white > torch.maximum(csf, grey)] = 3
    labels[~anatomy.brain] = 0
    for part in lesions:
        # A faint oedema is still annotated: its threshold follows its strength.
        threshold = 0.5 * float(part.fraction.max()) if part.label == OEDEMA else 0.5
        region = labels[part.box]
        region[(part.fraction > threshold) & anatomy.brain[part.box]] = part.label
    return labels


@dataclass(frozen=True)
class _Surroundings:
    """What is neither brain nor lesion: vessels, and skull and scalp where the head is whole.

    All fractions have shape (X, Y, Z), 0..1; ``tissues`` are the study's constants of everything healthy.
    """

    vessels: Tensor
    bone: Tensor | None
    scalp: Tensor | None
    keep: Tensor
    tissues: dict[str, Tissue]

    @classmethod
    def draw(cls, anatomy: Anatomy, has_head: bool, draws: Draws) -> _Surroundings:
        names = ("csf", "grey", "white", "blood", "bone", "scalp")
        tissues = {name: draw_tissue(name, draws) for name in names}
        brain = anatomy.brain.float()
        vessels = _vessels(anatomy, draws)
        if not has_head:
            return cls(vessels, None, None, anatomy.brain, tissues)
        shells = [brain]
        for width in (draws.integer(2, 4), draws.integer(4, 9), draws.integer(4, 10)):
            shells.append(_grow(shells[-1], width))
        bone, scalp = shells[2] - shells[1], shells[3] - shells[2]
        return cls(vessels, bone, scalp, shells[3] > 0, tissues)


def _grow(mask: Tensor, width: int) -> Tensor:
    """Dilate a mask (X, Y, Z) of 0 and 1 by about ``width`` voxels, nearly round."""
    for _ in range(width):
        mask = (box_mean(mask, 3) > 0.2).float()
    return mask


def _vessels(anatomy: Anatomy, draws: Draws) -> Tensor:
    """Thin bright tubes near the surface: where two smooth fields vanish together there is a curve."""
    shape = anatomy.grid.shape
    scale = draws.uniform(9, 16)
    distance = draws.smooth(shape, scale) ** 2 + draws.smooth(shape, scale) ** 2
    tubes = torch.sigmoid((draws.uniform(0.003, 0.012) - distance) / 0.004)
    csf = box_mean(anatomy.tissues[0], 7)
    edge = 1 - box_mean(anatomy.brain.float(), 9)
    sinus = torch.sigmoid(8 * (draws.smooth(shape, 14) - 1.3)) * (edge > 0.3)
    return (tubes * (2.5 * csf + 1.5 * edge).clamp(0, 1) + sinus).clamp(0, 1) * anatomy.brain


def _render(key: str, anatomy: Anatomy, lesions: list[Compartment], around: _Surroundings, draws: Draws) -> Tensor:
    """Compute the scan of one modality, (X, Y, Z) float32, scaled to about 1000."""
    signal = draw_sequence(key, draws)
    csf, grey, white = (signal(around.tissues[name]) for name in ("csf", "grey", "white"))
    image = csf * anatomy.tissues[0] + grey * anatomy.tissues[1] + white * anatomy.tissues[2]
    image *= 1 + draws.uniform(0.01, 0.05) * draws.smooth(image.shape, 10)
    image += around.vessels * (signal(around.tissues["blood"]) - image)
    for part in lesions:
        region = image[part.box]
        region += part.fraction * (signal(part.tissue) * (1 + part.texture) - region)
    if around.bone is not None and around.scalp is not None:
        image += around.bone * signal(around.tissues["bone"]) + around.scalp * signal(around.tissues["scalp"])
        fluid = around.keep & (image == 0)
        image[fluid] = csf
    image = acquire(image.clamp(min=0), draws)
    scale = 1000 / float(image.max().clamp(min=1e-6))
    return torch.where(around.keep, (scale * image).clamp(min=0.5), 0.0) if around.bone is None else scale * image
