"""Where studies to train on come from. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from napari_brainmvp.errors import FileError, StudyError
from napari_brainmvp.io import StudyFiles, find_studies, is_image_path, is_label_name, read_datalist
from napari_brainmvp.models import list_models
from napari_brainmvp.study import modality

__all__ = [
    "DataSource",
    "absolute_paths",
    "find_all",
    "find_files",
    "find_projects",
    "modality_keys",
    "own_name",
    "unique_names",
]

Spec = TypeVar("Spec", bound=BaseModel)


class DataSource(BaseModel):
    """One dataset of a run; also made from text as ``--data`` takes it, ``"PATH"`` or ``"PATH@WEIGHT"``.

    Parameters
    ----------
    path : str
        A folder of studies or a BIDS tree; a JSON datalist; or ``"synthetic:N"`` for N made-up studies (from seed 0,
        or ``"synthetic:FIRST-LAST"`` for these seeds).
    weight : float
        How often it is drawn from, relative to the others.
    base : str or None
        Folder a datalist's relative paths start from; default the datalist's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    weight: float = Field(1.0, gt=0)
    base: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        weighted = re.fullmatch(r"(.+)@(\d+(?:\.\d+)?)", value)
        return {"path": weighted[1], "weight": weighted[2]} if weighted else {"path": value}

    def absolute(self) -> DataSource:
        """Return it with absolute paths, which mean the same from wherever they are read.

        Raises
        ------
        FileError
            There is no such file or folder.
        """
        if self.path.startswith("synthetic:"):
            return self
        return self.model_copy(update={"path": _absolute(self.path), "base": self.base and _absolute(self.base)})

    @property
    def seeds(self) -> range | None:
        """The seeds of made-up studies, or None for files.

        Raises
        ------
        StudyError
            It begins with ``synthetic:`` and does not go on with numbers.
        """
        kind, _, wanted = self.path.partition(":")
        if kind != "synthetic":
            return None
        numbers = re.fullmatch(r"(?:(\d+)-)?(\d+)", wanted)
        if numbers is None:
            raise StudyError(f"{self.path!r}: say how many synthetic studies, for example synthetic:50.")
        first, last = numbers.groups()
        return range(int(last)) if first is None else range(int(first), int(last) + 1)


def absolute_paths(spec: Spec) -> Spec:
    """Return a training run's specification with absolute paths: ``data``, ``init`` and ``participants``.

    Names of models stay as they are.

    Raises
    ------
    FileError
        Data are not there; better missed now than in the background, or by a run that is resumed.
    """
    settings: Any = spec
    changes: dict[str, Any] = {"data": tuple(source.absolute() for source in settings.data)}
    for name in ("init", "participants"):
        path = getattr(spec, name, "")
        if path and Path(path).expanduser().exists() and not (name == "init" and _is_model_name(path)):
            changes[name] = _absolute(path)
    return spec.model_copy(update=changes)


def _is_model_name(name: str) -> bool:
    """Tell whether it is what ``init`` means by it, whatever lies in the folder one happens to be in."""
    return name == "scratch" or name in {entry.card.name for entry in list_models()}


def _absolute(path: str) -> str:
    absolute = Path(path).expanduser().absolute()
    if not absolute.exists():
        raise FileError(f"{absolute} is neither a folder nor a .json datalist: check the path.")
    return str(absolute)


def modality_keys(names: Sequence[str]) -> tuple[str, ...]:
    """Return the keys of modalities by whatever name they go.

    Raises
    ------
    ValueError
        Two names mean one modality, or one is none.

    Examples
    --------
    >>> modality_keys(["T1", "T1ce", "FLAIR"])
    ('t1', 't1c', 'flair')
    """
    try:
        keys = tuple(modality(name).key for name in names)
    except StudyError as error:
        raise ValueError(str(error)) from error
    if len(set(keys)) < len(keys):
        raise ValueError(f"{', '.join(names)} name one modality twice")
    return keys


def find_files(source: DataSource) -> tuple[list[StudyFiles], list[tuple[str, str]]]:
    """List the studies of a folder, BIDS tree or datalist, with their labels; nothing is opened.

    Returns
    -------
    list of StudyFiles
        In BIDS trees, labels are also looked for in ``derivatives``.
    list of (str, str)
        What is no study, and why.

    Raises
    ------
    FileError
        There is no such folder or datalist.
    """
    path = Path(source.path).expanduser()
    if path.suffix == ".json":
        return read_datalist(path, Path(source.base).expanduser() if source.base else None)
    if not path.is_dir():
        raise FileError(f"{path} is neither a folder nor a .json datalist: check the path.")
    problems: list[tuple[str, str]] = []
    files = find_studies(path, problems)
    derivatives = path / "derivatives"
    if not derivatives.is_dir():
        return files, problems
    labels = [p for p in sorted(derivatives.rglob("sub-*")) if p.is_file() and is_image_path(p) and is_label_name(p)]
    return [_with_derivative(study, labels) for study in files], problems


def find_all(sources: Sequence[DataSource]) -> list[tuple[DataSource, list[StudyFiles], list[tuple[str, str]]]]:
    """List the studies of several datasets, see :func:`find_files`, with a name each, see :func:`unique_names`.

    There are none of made-up studies.
    """
    found = [find_files(source) if source.seeds is None else ([], []) for source in sources]
    names = unique_names([[study.name for study in studies] for studies, _ in found], [Path(s.path) for s in sources])
    return [
        (source, [replace(study, name=name) for study, name in zip(studies, told, strict=True)], bad)
        for source, (studies, bad), told in zip(sources, found, names, strict=True)
    ]


def find_projects(sources: Sequence[DataSource]) -> list[str]:
    """List the identities of the annotation projects that datasets were exported from, as ``dataset.json`` says them.

    One that cannot be read says none here; who needs its labels says why.
    """
    found = set()
    for source in sources:
        if source.seeds is not None:
            continue
        path = Path(source.path).expanduser()
        try:
            content = json.loads(((path if path.is_dir() else path.parent) / "dataset.json").read_text("utf-8"))
        except (OSError, ValueError):
            continue
        said = content.get("project") if isinstance(content, dict) else None
        if isinstance(said, str) and re.fullmatch(r"[0-9a-f]{8,64}", said):
            found.add(said)
    return sorted(found)


def unique_names(names: Sequence[Sequence[str]], sources: Sequence[Path]) -> list[list[str]]:
    """Name the studies of several sources so that no two have one name.

    A name that another source has too begins with the folder (or datalist) it is from, and one that is there still gets
    a number: every BIDS dataset has a ``sub-01``.

    Parameters
    ----------
    names : sequence of sequence of str
        Of the studies of every source.
    sources : sequence of Path

    Examples
    --------
    >>> unique_names([["sub-01", "sub-02"], ["sub-01"]], [Path("one/bids"), Path("two/bids")])
    [['bids/sub-01', 'sub-02'], ['bids-2/sub-01']]
    """
    places: set[str] = set()
    taken: set[str] = {name for listed in names for name in listed}
    given: set[str] = set()
    found: list[list[str]] = []
    for number, (listed, source) in enumerate(zip(names, sources, strict=True)):
        place = source.expanduser().resolve()
        folder = _free(place.stem if place.suffix == ".json" else place.name, places)
        places.add(folder)
        others = {name for k, other in enumerate(names) if k != number for name in other}
        found.append([])
        for name in listed:
            unique = _free(f"{folder}/{name}" if name in others else name, given, taken - {name})
            given.add(unique)
            found[-1].append(unique)
    return found


def own_name(name: str) -> str:
    """Return a study's name within its dataset, without what :func:`unique_names` has put before it."""
    return name.rpartition("/")[2]


def _free(name: str, *taken: Collection[str]) -> str:
    """Give a name that is taken a number."""
    numbered = (f"{name}-{k}" for k in count(2))
    return next(n for n in chain((name,), numbered) if not any(n in names for names in taken))


def _with_derivative(files: StudyFiles, labels: Sequence[Path]) -> StudyFiles:
    """Give a BIDS session without labels those of the derivatives, where there is exactly one such file."""
    if files.labels is not None:
        return files
    entities = files.name.split("_")
    mine = [p for p in labels if set(entities) <= set(p.name.split("_"))]
    parcels = [p for p in mine if "_dseg" in p.name] or mine
    if len(parcels) == 1:
        return replace(files, labels=parcels[0])
    if parcels:
        names = ", ".join(p.name for p in parcels)
        return replace(files, warnings=(*files.warnings, f"Labels were left out, because there are several: {names}."))
    return files
