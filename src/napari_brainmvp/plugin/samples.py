"""Sample data: three synthetic studies, made on the spot."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from napari_brainmvp.plugin.layers import LayerTuple, study_layers

if TYPE_CHECKING:
    from napari_brainmvp.synthesis import LesionKind

__all__ = ["glioma", "multiple_sclerosis", "stroke"]

SEED = 9_200_000
"""Among the held-out seeds: no shipped model was trained on these studies."""


def _sample(name: str, seed: int, lesion: LesionKind, modalities: tuple[str, ...]) -> list[LayerTuple]:
    from napari_brainmvp.synthesis import SynthesisSpec, make_study

    study = make_study(seed, SynthesisSpec(modalities, lesion))
    layers = study_layers(replace(study, name=name))
    for _, options, kind in layers:
        if kind == "labels":
            options |= {"name": "Truth", "visible": False}
    return layers


def glioma() -> list[LayerTuple]:
    """Make a glioma-like study: T1, T1c, T2, FLAIR and the true labels."""
    return _sample("glioma", SEED + 4, "glioma", ("t1", "t1c", "t2", "flair"))


def multiple_sclerosis() -> list[LayerTuple]:
    """Make an MS-like study: T1, T2, FLAIR and the true labels."""
    return _sample("ms", SEED + 1, "ms", ("t1", "t2", "flair"))


def stroke() -> list[LayerTuple]:
    """Make a stroke-like study: FLAIR, DWI, ADC and the true labels."""
    return _sample("stroke", SEED + 2, "stroke", ("flair", "dwi", "adc"))
