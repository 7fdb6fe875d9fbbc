"""Features on disk: computed once a study and model, bounded in size, the longest unused ones go first."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch

from napari_brainmvp.annotation.features import StudyFeatures, compute_features
from napari_brainmvp.errors import FileError
from napari_brainmvp.io import atomic_path, write_text_atomic
from napari_brainmvp.models import LoadedModel
from napari_brainmvp.progress import CancelToken, ProgressCallback, no_progress
from napari_brainmvp.study import Grid, Study

__all__ = ["FeatureStore", "features_folder", "study_key"]

_VERSION = "2"


def features_folder() -> Path:
    """Return where features are kept: ``$BRAINMVP_HOME/features``, else in the platform's cache directory."""
    home = os.environ.get("BRAINMVP_HOME")
    root = Path(home) if home else Path(platformdirs.user_cache_dir("brainmvp", appauthor=False))
    return root / "features"


def study_key(study: Study, model: LoadedModel) -> str:
    """Name a study's features by the content of its scans, their grids, and the model."""
    digest = hashlib.sha256(f"{_VERSION} {model.card.sha256} {study.reference}".encode())
    for key, scan in sorted(study.scans.items()):
        digest.update(f"{key} {scan.data.shape} {scan.data.dtype}".encode())
        digest.update(scan.grid.affine.tobytes())
        digest.update(np.ascontiguousarray(scan.data.T if scan.data.flags.f_contiguous else scan.data).data)
    return digest.hexdigest()[:32]


class FeatureStore:
    """A folder of features.

    Parameters
    ----------
    folder : Path, optional
        Default :func:`features_folder`.
    limit_gb : float
        Most space it may take, gigabytes; a study takes about 0.3.
    """

    def __init__(self, folder: Path | None = None, limit_gb: float = 6.0) -> None:
        self.folder = folder or features_folder()
        self._limit = limit_gb * 1e9

    def get(
        self,
        study: Study,
        model: LoadedModel,
        progress: ProgressCallback = no_progress,
        cancel: CancelToken | None = None,
        device: str = "auto",
    ) -> StudyFeatures:
        """Return a study's features, computed where they are not there yet; see :func:`compute_features`.

        A damaged entry is computed again. Where the folder cannot be written, nothing is kept.
        """
        key = study_key(study, model)
        found = self._read(key)
        if found is None:
            found = compute_features(study, model, progress, cancel, device)
            with suppress(FileError):
                self._write(key, found)
                self._shrink(key)
        return found

    def _read(self, key: str) -> StudyFeatures | None:
        said = self.folder / f"{key}.json"
        try:
            about = json.loads(said.read_text(encoding="utf-8"))
            with np.load(self.folder / f"{key}.npz", allow_pickle=False) as arrays:
                rows, words = arrays["rows"], arrays["values"]
            os.utime(said, (time.time(), time.time()))
            values = torch.from_numpy(words).view(torch.bfloat16)
            if values.shape != (int(rows.max()) + 1, len(about["names"])):
                return None
            return StudyFeatures(_grid(about["grid"]), _grid(about["source"]), rows, values, tuple(about["names"]))
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return None

    def _write(self, key: str, features: StudyFeatures) -> None:
        with atomic_path(self.folder / f"{key}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, rows=features.rows, values=features.values.view(torch.int16).numpy())
        about = {
            "names": features.names,
            "grid": [features.grid.shape, features.grid.affine.tolist()],
            "source": [features.source.shape, features.source.affine.tolist()],
        }
        write_text_atomic(self.folder / f"{key}.json", json.dumps(about))

    def _shrink(self, keep: str) -> None:
        """Remove the longest unused entries until the rest fits."""
        entries = sorted(self.folder.glob("*.npz"), key=lambda p: _used(p.with_suffix(".json")))
        total = sum(path.stat().st_size for path in entries)
        for path in entries:
            if total <= self._limit:
                break
            if path.stem != keep:
                total -= path.stat().st_size
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink(missing_ok=True)


def _used(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _grid(said: Any) -> Grid:
    shape, affine = said
    return Grid(tuple(shape), affine)
