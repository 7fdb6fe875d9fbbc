"""What the values of a label map mean: data, never code. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from napari_brainmvp.errors import FileError, StudyError
from napari_brainmvp.models import Label, ModelCard

__all__ = ["IGNORED", "LABEL_PRESETS", "LabelDescription", "assign_classes", "find_labels", "read_labels"]

IGNORED = -1
"""Row number of voxels that carry no label; see :meth:`LabelDescription.rows`."""

_CLEARLY = 4.0
"""How many times as probable a class must be in a label as in the background to be a part of the label."""
_RARE = 1e-3
"""Mean probability in the background below which a class is not told from one that never occurs there."""
_COLORS = ("#d1495b", "#f2c14e", "#2fbf9b", "#4a90d9", "#9b6dd6", "#e07a3f", "#6fb98f", "#c06c84")
_NAMES_OF_NOTHING = ("background", "unlabelled", "unlabeled", "ignore")


class LabelDescription(BaseModel):
    """The meaning of label values: exclusive labels, or regions that overlap.

    Parameters
    ----------
    labels : dict of int to str
        Names of the values, without those that mean background or nothing.
    regions : dict of str to tuple of int
        Values that make up each region, larger regions first, for example ``{"whole tumour": (1, 2, 4)}``; empty for
        exclusive labels. A region is painted with its first value that no later region has, and none that does not
        hold it.
    background : int
        The value that means "nothing of all this".
    unlabelled : int or None
        The value that means "nobody looked": such voxels carry no loss and are not evaluated. None where every voxel
        is labelled.
    colors : dict of int to str
        ``"#rrggbb"`` by value.

    Examples
    --------
    >>> brats = LABEL_PRESETS["brats"]
    >>> brats.channels, brats.painted
    (('whole tumour', 'tumour core', 'enhancing tumour'), (2, 1, 4))
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: dict[int, str] = Field(default_factory=dict)
    regions: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    background: int = 0
    unlabelled: int | None = None
    colors: dict[int, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _parts_agree(self) -> LabelDescription:
        if not self.labels and not self.regions:
            raise ValueError("there is neither a label nor a region")
        if self.background == self.unlabelled:
            raise ValueError(f"{self.background} cannot mean both background and unlabelled: choose another background")
        special = {self.background, self.unlabelled} & {*self.labels, *(v for r in self.regions.values() for v in r)}
        if special:
            raise ValueError(f"{sorted(map(str, special))} means background or unlabelled, so it cannot be a label")
        if any(value < 0 for value in self.values) or not all(self.regions.values()):
            raise ValueError("label values are 0 or more, and every region has at least one")
        return self

    @property
    def values(self) -> tuple[int, ...]:
        """All values that mean something but background, ascending."""
        return tuple(sorted({*self.labels, *(v for region in self.regions.values() for v in region)}))

    @property
    def names(self) -> tuple[str, ...]:
        """What is learned and evaluated: the regions, else the labels."""
        return tuple(self.regions) or tuple(self.labels[v] for v in self.values)

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """The values that make up each of :attr:`names`."""
        return tuple(self.regions.values()) or tuple((v,) for v in self.values)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of a network's output channels: the regions, or the background and the labels."""
        return self.names if self.regions else ("background", *self.names)

    @property
    def painted(self) -> tuple[int, ...]:
        """The value each of :attr:`names` is painted with."""
        regions = list(self.regions.values())
        spare = max(self.values) + 1
        found = []
        for index, region in enumerate(regions):
            later = {v for other in regions[index + 1 :] for v in other}
            own = [v for v in region if v not in later]
            aside = {v for other in regions[:index] if not set(region) <= set(other) for v in other}
            first = [v for v in own if v not in aside]  # else it would say that the other region is there, too
            found.append((first or own or [spare + index])[0])
        return tuple(found) or self.values

    def rows(self, values: NDArray[Any]) -> NDArray[np.int64]:
        """Replace label values by row numbers of :attr:`table`; :data:`IGNORED` where nobody looked.

        Raises
        ------
        StudyError
            There is a value that is not described.
        """
        strange = self.strange(values)
        if strange:
            raise StudyError(
                f"The labels hold the value {', '.join(map(str, strange[:5]))}, which the label description does not "
                f"name: it knows {', '.join(map(str, (self.background, *self.values)))}."
            )
        known = (self.background, *self.values)
        lookup = np.full(max(*known, self.unlabelled or 0) + 1, IGNORED, np.int64)
        lookup[list(known)] = range(len(known))
        numbered: NDArray[np.int64] = lookup[values]
        return numbered

    def strange(self, values: NDArray[Any]) -> list[int]:
        """List the values that are not described."""
        return sorted(set(map(int, np.unique(values))) - {self.background, *self.values, self.unlabelled})

    @property
    def table(self) -> NDArray[np.float32]:
        """Which output channels each row belongs to: (1 + number of values, channels), 0 or 1."""
        table = np.zeros((1 + len(self.values), len(self.channels)), np.float32)
        first = 0 if self.regions else 1
        table[0, :first] = 1
        for channel, members in enumerate(self.members, start=first):
            for value in members:
                table[1 + self.values.index(value), channel] = 1
        return table

    def card_labels(self) -> tuple[Label, ...]:
        """Describe what a model of these labels paints."""
        return tuple(
            Label(value=value, name=name, color=self.colors.get(value, _COLORS[k % len(_COLORS)]))
            for k, (value, name) in enumerate(zip(self.painted, self.names, strict=True))
        )

    @classmethod
    def of_values(cls, values: Iterable[int]) -> LabelDescription:
        """Name the values other than 0 by their number, for want of anything better."""
        return cls(labels={int(value): f"Label {value}" for value in sorted(set(values) - {0})})

    @classmethod
    def of_card(cls, card: ModelCard) -> LabelDescription:
        """Describe what a model was trained on where its card says so, else what it paints, as exclusive labels."""
        if "labels" in card.training:
            return cls.model_validate(card.training["labels"])
        return cls(
            labels={label.value: label.name for label in card.labels},
            colors={label.value: label.color for label in card.labels},
        )


LABEL_PRESETS: dict[str, LabelDescription] = {
    "brats": LabelDescription(
        labels={1: "necrotic and non-enhancing core", 2: "oedema", 4: "enhancing tumour"},
        regions={"whole tumour": (1, 2, 4), "tumour core": (1, 4), "enhancing tumour": (4,)},
    ),
    "brats-ped": LabelDescription(
        labels={1: "enhancing tumour", 2: "non-enhancing core", 3: "oedema"},
        regions={"whole tumour": (1, 2, 3), "tumour core": (1, 2), "enhancing tumour": (1,)},
    ),
}
"""Label descriptions by name: BraTS 2018 to 2021, and BraTS 2023-PED, whose values mean other things."""


def assign_classes(means: NDArray[np.floating]) -> list[int] | None:
    """Find which labels the classes of a network are parts of, by how probable they are in them.

    A class is the more likely part of a label, the more probable it is there than in the background: r(l, c) =
    mean of p(c) in l / mean of p(c) in the background. Every label takes one class, so that the product of r is
    largest; any other class belongs to the label where r is largest, or to the background where that is below 4.

    Parameters
    ----------
    means : ndarray of shape (1 + L, C)
        Mean probabilities of the classes in the background, then in each label.

    Returns
    -------
    list of int or None
        For each class its row; None where a label has no class that is clearly more probable there, or the
        background has none.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, and rarely needed

    if len(means) - 1 > means.shape[1]:
        return None
    ratio = np.maximum(means, _RARE) / np.maximum(means[0], _RARE)
    ratio[0] = _CLEARLY
    rows = ratio.argmax(0)
    labels, chosen = linear_sum_assignment(np.log(ratio[1:]), maximize=True)
    if (ratio[labels + 1, chosen] < _CLEARLY).any():
        return None
    rows[chosen] = labels + 1
    return [int(row) for row in rows] if (rows == 0).any() else None


def find_labels(data: Path) -> LabelDescription | None:
    """Read the ``dataset.json`` of a folder, or beside a file; None where there is none or it describes no labels.

    Raises
    ------
    FileError, StudyError
        It cannot be read, or contradicts itself.
    """
    path = (data if data.is_dir() else data.parent) / "dataset.json"
    if not path.is_file():
        return None
    return read_labels(path) if "labels" in _read(path) else None


def read_labels(source: str | Path | Mapping[str, Any]) -> LabelDescription:
    """Read a label description.

    Parameters
    ----------
    source : str, Path or mapping
        The name of a preset, a ``dataset.json`` or other JSON or YAML file, a folder that holds a ``dataset.json``,
        or the content of such a file. ``labels`` maps values to names, or names to a value or a list of values;
        names that stand for a list of several values are regions. ``regions``, ``background``, ``unlabelled`` and
        ``colors`` are optional; a label named "background", "unlabelled" or "ignore" says the same.

    Raises
    ------
    FileError
        The file cannot be read.
    StudyError
        It describes no labels, or contradicts itself.
    """
    if isinstance(source, str) and source in LABEL_PRESETS:
        return LABEL_PRESETS[source]
    if isinstance(source, Mapping):
        content, name = source, "The label description"
    else:
        path = Path(source).expanduser()
        path = path / "dataset.json" if path.is_dir() else path
        content, name = _read(path), str(path)
    try:
        return LabelDescription(**_fields(content))
    except (ValidationError, ValueError, TypeError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise StudyError(
            f"{name}: {why}. Give labels as {{value: name}}, and regions as {{name: [values]}}."
        ) from error


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        presets = ", ".join(LABEL_PRESETS)
        raise FileError(f"{path} is no readable label description ({error}): give a file, or {presets}.") from error
    if not isinstance(content, Mapping):
        raise StudyError(f"{path} is no label description: it needs labels as {{value: name}}.")
    return content


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[Any, Any]:
    found = content.get(key) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{key!r} is a {type(found).__name__}, which names nothing")
    return found


def _fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the ways in which datasets write labels into one."""
    fields: dict[str, Any] = {key: content[key] for key in ("background", "unlabelled", "colors") if key in content}
    labels: dict[int, str] = {}
    regions: dict[str, tuple[int, ...]] = {}
    for name, values in _mapping(content, "regions").items():
        if not isinstance(values, list | tuple):
            raise ValueError(f"the region {name!r} is {values!r}, which is no list of values")
        regions[str(name)] = tuple(values)
    described = _mapping(content, "labels")
    for key, meaning in described.items():
        if isinstance(meaning, list):
            regions[str(key)] = tuple(meaning)
            continue
        value, name = (meaning, str(key)) if isinstance(meaning, int) else (int(key), str(meaning))
        if name.lower() not in _NAMES_OF_NOTHING:
            labels[value] = name
        elif name.lower() == "background":
            fields.setdefault("background", value)
        else:
            fields.setdefault("unlabelled", value)
    if any(isinstance(meaning, list) for meaning in described.values()):
        regions = {**{name: (value,) for value, name in labels.items()}, **regions}
        regions = dict(sorted(regions.items(), key=lambda item: -len(item[1])))
    return {**fields, "labels": labels, "regions": regions}
