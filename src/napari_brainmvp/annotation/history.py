"""One study's labels, every stroke of them on the disk, and the way back.

A folder holds a snapshot and the strokes since: ``snapshot-N.npz`` is the labels after stroke N, ``stroke-N.npz`` what
stroke N changed, ``state.json`` which snapshot counts and which stroke is the last that is not undone. Every file
appears complete or not at all, and ``state.json`` last, so that at any moment the folder holds the labels as they were
after some stroke.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_brainmvp.errors import FileError, StudyError
from napari_brainmvp.io import atomic_path, write_text_atomic

__all__ = ["LabelHistory", "label_dtype"]

_EVERY, _KEPT = 25, 250


class LabelHistory:
    """The labels of one study: sparse, 0 is unlabelled, any other integer a class.

    Parameters
    ----------
    folder : Path
        Of this study alone; created with the first stroke.
    shape : tuple of three int
        Of the study's own grid.
    allowed : callable, optional
        Called before anything is written; raises where somebody else writes here now.

    Raises
    ------
    FileError
        The folder is damaged.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], allowed: Callable[[], None] | None = None) -> None:
        self._folder, self._shape, self._allowed = folder, shape, allowed or _always
        self.labels: NDArray[np.int64] = np.zeros(shape, np.int64)
        self.written: frozenset[int] = frozenset()
        """The label values that the last call of :meth:`record`, :meth:`undo` or :meth:`redo` wrote, 0 left out."""
        self._snapshot = self._head = self._newest = 0
        self._load()

    @property
    def stroke(self) -> int:
        """Number of the last stroke that is not undone."""
        return self._head

    @property
    def can_undo(self) -> bool:
        """Whether there is a stroke to undo."""
        return self._head > 0 and self._path("stroke", self._head).exists()

    @property
    def can_redo(self) -> bool:
        """Whether a stroke was undone and nothing painted since."""
        return self._head < self._newest and self._path("stroke", self._head + 1).exists()

    def record(self, labels: NDArray[Any]) -> int:
        """Save what changed since the last stroke; return the number of voxels that did.

        Parameters
        ----------
        labels : ndarray of the study's shape, integers
            All labels as they are now.

        Raises
        ------
        StudyError
            The labels have another shape, or are not integers.
        FileError
            The disk is full or the folder cannot be written; nothing is lost of what was saved before.
        """
        if labels.shape != self._shape:
            raise StudyError(
                f"These labels have shape {labels.shape} and the study {self._shape}: they are not labels of this "
                "study. Nothing was changed."
            )
        if not np.issubdtype(labels.dtype, np.integer):
            raise StudyError(f"Labels are integers, got {labels.dtype}: convert the layer to labels first.")
        if labels.dtype == np.uint64 and labels.max(initial=0) > np.iinfo(np.int64).max:
            raise StudyError("Label values above 9223372036854775807 cannot be kept: give the class a smaller number.")
        where = np.flatnonzero(labels != self.labels)
        if not len(where):
            return 0
        self._allowed()
        index = np.unravel_index(where, self._shape)
        before, after = self.labels[index], labels[index].astype(np.int64)
        for number in range(self._head + 1, self._newest + 1):  # undone before, and now painted over
            self._path("stroke", number).unlink(missing_ok=True)
        self._save(self._path("stroke", self._head + 1), where=where, before=before, after=after)
        self._head = self._newest = self._head + 1
        self._put(where, after)
        self._write_state()
        if self._head - self._snapshot >= _EVERY:
            self.compact()
        return len(where)

    def undo(self) -> bool:
        """Take back the last stroke, also one of an earlier session; tell whether there was one."""
        if not self.can_undo:
            return False
        self._allowed()
        where, before, _ = self._stroke(self._head)
        self._put(where, before)
        self._head -= 1
        if self._head < self._snapshot:
            self.compact()
        self._write_state()
        return True

    def redo(self) -> bool:
        """Do again what was undone; tell whether there was something."""
        if not self.can_redo:
            return False
        self._allowed()
        where, _, after = self._stroke(self._head + 1)
        self._put(where, after)
        self._head += 1
        self._write_state()
        return True

    def compact(self) -> None:
        """Write a snapshot, and forget strokes that lie further back than anybody undoes."""
        where = np.flatnonzero(self.labels)
        values = self.labels[np.unravel_index(where, self._shape)]
        old = self._snapshot
        self._save(self._path("snapshot", self._head), where=where, values=values)
        self._snapshot = self._head
        self._write_state()
        if old != self._snapshot:
            self._path("snapshot", old).unlink(missing_ok=True)
        for path in self._folder.glob("stroke-*.npz"):
            if int(path.stem.split("-")[1]) <= self._head - _KEPT:
                path.unlink(missing_ok=True)

    def _put(self, where: NDArray[np.int64], values: NDArray[np.int64]) -> None:
        self.labels[np.unravel_index(where, self._shape)] = values
        self.written = frozenset(int(v) for v in np.unique(values) if v)

    def _load(self) -> None:
        path = self._folder / "state.json"
        parts = (p.name for p in self._folder.glob("*-*.npz"))
        written = sorted(name for name in parts if not name.startswith("."))  # what a killed window was writing
        if not path.exists() and not written:
            return
        try:
            if not path.exists() and written == [self._path("stroke", 1).name]:  # killed within the first stroke
                state: dict[str, Any] = {"snapshot": 0, "head": 1, "newest": 1, "shape": self._shape}
            else:
                state = json.loads(path.read_text(encoding="utf-8"))
            self._snapshot, head, self._newest = (int(state[key]) for key in ("snapshot", "head", "newest"))
            if tuple(state["shape"]) != self._shape:
                raise StudyError(
                    f"The labels in {self._folder} have shape {tuple(state['shape'])} and the study {self._shape}: the "
                    "scans were replaced. Put the original ones back, or add the study again under another name."
                )
            if self._snapshot or self._path("snapshot", 0).exists():
                kept = self._read(self._path("snapshot", self._snapshot))
                self.labels[np.unravel_index(kept["where"], self._shape)] = kept["values"]
            for number in range(self._snapshot + 1, head + 1):
                where, _, after = self._stroke(number)
                self.labels[np.unravel_index(where, self._shape)] = after
            self._head = head
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise FileError(f"The labels in {self._folder} are damaged ({error}): restore the folder.") from error

    def _stroke(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        arrays = self._read(self._path("stroke", number))
        return arrays["where"], arrays["before"], arrays["after"]

    def _path(self, kind: str, number: int) -> Path:
        return self._folder / f"{kind}-{number:06d}.npz"

    def _write_state(self) -> None:
        state = {"snapshot": self._snapshot, "head": self._head, "newest": self._newest, "shape": self._shape}
        write_text_atomic(self._folder / "state.json", json.dumps(state))

    @staticmethod
    def _save(path: Path, **arrays: NDArray[np.int64]) -> None:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @staticmethod
    def _read(path: Path) -> dict[str, NDArray[np.int64]]:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)


def _always() -> None:
    """Let everything be written."""


def label_dtype(values: Iterable[int]) -> type[np.int32] | type[np.int64]:
    """Return the smaller of the two types that holds all values."""
    limits = np.iinfo(np.int32)
    return np.int32 if all(limits.min <= v <= limits.max for v in values) else np.int64
