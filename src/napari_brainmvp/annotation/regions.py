"""Regions of a project: unions of its classes that may overlap, and what fine-tuning learns where there are any."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from napari_brainmvp.annotation.content import LabelClass
from napari_brainmvp.errors import StudyError
from napari_brainmvp.training.labels import LABEL_PRESETS

__all__ = ["Regions", "brats_regions", "check_regions", "painted_regions"]

Regions = dict[str, tuple[int, ...]]
"""The class values that make up each region, larger regions first; empty for exclusive classes."""

_BRATS = LABEL_PRESETS["brats"]
_CALLED: Mapping[int, tuple[str, ...]] = {
    2: ("oedema", "edema"),
    1: ("non-enhancing core", "necrotic core", "necrotic and non-enhancing core"),
    4: ("enhancing tumour", "enhancing tumor", "enhancing tissue"),
}
"""What the classes that mean these values of the preset are called: by the default model, by BraTS, in American."""


def check_regions(regions: Iterable[tuple[str, Iterable[int]]], classes: Sequence[LabelClass]) -> Regions:
    """Return regions in the order in which they are painted: the larger ones first.

    Parameters
    ----------
    regions : iterable of (str, iterable of int)
        Name of each region, and the values of its classes.
    classes : sequence of LabelClass
        Of the project.

    Raises
    ------
    StudyError
        A region has no name, that of another, no class, the background, or a number that no class has.
    """
    names = {c.value: c.name for c in classes if not c.background}
    found: Regions = {}
    for given, numbers in regions:
        name, values = given.strip(), tuple(sorted(set(numbers)))
        if not name:
            raise StudyError("A region has no name: give it one.")
        if name.lower() in map(str.lower, found):
            raise StudyError(f"Two regions are called {name!r}: give each its own name.")
        if not values:
            raise StudyError(f"The region {name!r} has no class: tick one or remove the region.")
        strange = [v for v in values if v not in names]
        if strange:
            raise StudyError(
                f"The region {name!r} has the number {strange[0]}, which is the background's or no class's: take it "
                f"out of the region, or choose among {', '.join(map(str, names)) or 'classes that are to be added'}."
            )
        found[name] = values
    return _larger_first(found)


def painted_regions(regions: Regions, painted: Collection[int]) -> Regions:
    """Return what can be learned of regions: those of their classes that are painted, without what is left empty."""
    kept = {name: tuple(v for v in values if v in painted) for name, values in regions.items()}
    return _larger_first({name: values for name, values in kept.items() if values})


def brats_regions(classes: Sequence[LabelClass]) -> Regions:
    """Return the regions that BraTS measures, of classes that are called as its parts of a tumour are.

    Raises
    ------
    StudyError
        A part is missing.
    """
    ours: dict[int, list[int]] = {}
    for theirs, names in _CALLED.items():
        ours[theirs] = [c.value for c in classes if not c.background and c.name.strip().lower() in names]
        if not ours[theirs]:
            wanted = ", ".join(called[0] for called in _CALLED.values())
            raise StudyError(f"BraTS needs classes named {wanted}: there is no {names[0]} yet, add it.")
    regions = ((name, [v for theirs in members for v in ours[theirs]]) for name, members in _BRATS.regions.items())
    return check_regions(regions, classes)


def _larger_first(regions: Regions) -> Regions:
    """Order as :class:`~napari_brainmvp.training.labels.LabelDescription` wants it: later ones are painted over."""
    return dict(sorted(regions.items(), key=lambda item: -len(item[1])))
