"""What a model finds, in the terms of a project: by the names of classes, whatever the model makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from napari_brainmvp.annotation.content import LabelClass
from napari_brainmvp.errors import StudyError
from napari_brainmvp.models import ModelCard
from napari_brainmvp.networks import Unions
from napari_brainmvp.training.labels import LabelDescription

__all__ = ["as_classes", "background_of", "known_classes", "region_classes"]

_RARE = 1e-3
"""Probability below which, and one minus which above, a region is not told from one that is certain."""


def known_classes(card: ModelCard, classes: Sequence[LabelClass]) -> tuple[int, ...]:
    """Return the project's value of each of a network's exclusive classes: the background's where it has none.

    Empty where the network tells no exclusive classes apart, but regions one by one; and where the project's classes
    leave nothing of them to tell apart.

    Raises
    ------
    StudyError
        The model knows none of the classes.
    """
    parts, background = card.network.parts, background_of(classes)
    if card.activation == "softmax":
        values = dict(_shared({label.value: label.name for label in card.labels}, card, classes))
        channels = [part[0] for part in parts] or range(len(card.channels))
        known = tuple(values.get(card.channels[channel], background) for channel in channels)
    else:
        kinds = _kinds(card, classes) if parts else {}
        known = tuple(kinds.get(tuple(sorted(part)), background) for part in parts)
    return known if background in known and len(set(known)) > 1 else ()


def _kinds(card: ModelCard, classes: Sequence[LabelClass]) -> dict[tuple[int, ...], int]:
    """Return the project's value of each combination of regions that is a class of the same name: the first such."""
    described, kinds = LabelDescription.of_card(card), dict[tuple[int, ...], int]()
    within = {v: tuple(r for r, members in enumerate(described.members) if v in members) for v in described.labels}
    for theirs, ours in _shared({v: name for v, name in described.labels.items() if within[v]}, card, classes):
        kinds.setdefault(within[theirs], ours)
    return kinds


def as_classes(found: NDArray[Any], card: ModelCard, classes: Sequence[LabelClass]) -> NDArray[np.int64]:
    """Give a model's labels the project's values: those of the same name, the background's for everything else.

    Raises
    ------
    StudyError
        The model knows none of the classes.
    """
    out = np.full(found.shape, background_of(classes), np.int64)
    for theirs, ours in _shared({label.value: label.name for label in card.labels}, card, classes):
        out[found == theirs] = ours
    return out


def region_classes(
    probabilities: NDArray[np.floating], card: ModelCard, classes: Sequence[LabelClass]
) -> NDArray[np.int64]:
    """Give every voxel the class whose regions fit a model of regions best.

    Where the model tells exclusive classes apart, that is the one whose regions are the most probable combination, as
    the model itself decides, and the background where no class of the project is like that. Otherwise it is the class
    with the largest product of p(r) over the regions r it is in, and 1 - p(r) over the others; the background is in
    none. What the model paints would not do: where two regions overlap and neither holds the other, the later one hides
    whether the earlier one is there, too, and a region that its parts make up has no class of its own. Of classes in
    the same regions, which no such model tells apart, it is the first.

    Parameters
    ----------
    probabilities : ndarray of shape (R, i, j, k)
        Of each of the model's regions, 0..1.
    card : ModelCard
        That says which classes the regions are made of.
    classes : sequence of LabelClass

    Raises
    ------
    StudyError
        The model knows none of the classes.
    """
    kinds, background = _kinds(card, classes), background_of(classes)
    given = probabilities.astype(np.float32)
    unions = Unions(card.network.parts, overlapping=True) if card.network.parts else None
    if unions is not None and (shares := unions.split(torch.from_numpy(given))) is not None:
        values = np.array([kinds.get(kind, background) for kind in unions.kinds], np.int64)
        decided: NDArray[np.int64] = values[shares.argmax(0).numpy()]
        return decided
    sure = given.clip(_RARE, 1 - _RARE)  # of half precision, 0 and 1 are no certainty
    best = np.prod(1 - sure, axis=0)
    out = np.full(best.shape, background, np.int64)
    for kind, ours in kinds.items():
        within = np.isin(np.arange(len(sure)), kind)
        found = np.prod(sure[within], axis=0) * np.prod(1 - sure[~within], axis=0)
        better = found > best
        out[better], best[better] = ours, found[better]
    return out


def background_of(classes: Sequence[LabelClass]) -> int:
    """Return the value that means nothing of all this."""
    return next(c.value for c in classes if c.background)


def _shared(named: Mapping[int, str], card: ModelCard, classes: Sequence[LabelClass]) -> list[tuple[int, int]]:
    """Pair a model's values with the project's of the same name."""
    values = {c.name.lower(): c.value for c in classes if not c.background}
    pairs = [(value, values[name.lower()]) for value, name in named.items() if name.lower() in values]
    if not pairs:
        raise StudyError(f"{card.name} knows none of the classes {', '.join(values)}: choose a model of this project.")
    return pairs
