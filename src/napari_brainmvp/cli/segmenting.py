"""Outputs of ``brainmvp segment``: which files, and writing them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from napari_brainmvp.errors import FileError
from napari_brainmvp.inference import SegmentationResult
from napari_brainmvp.inference.result import volumes_csv
from napari_brainmvp.io import (
    guess_modality,
    is_label_name,
    stem,
    write_image,
    write_label_map,
    write_text_atomic,
)
from napari_brainmvp.study import Study

__all__ = ["OutputPaths", "as_report", "write_outputs"]


@dataclass(frozen=True)
class OutputPaths:
    """Files one segmentation writes; None for those not asked for."""

    labels: Path
    probabilities: Path | None
    uncertainty: Path | None
    volumes: Path | None

    @classmethod
    def beside(cls, labels: Path, *, probabilities: bool, uncertainty: bool, volumes: Path | None) -> OutputPaths:
        """Name the maps after the label map, in the same folder."""
        if not labels.name.lower().endswith((".nii", ".nii.gz")):
            raise FileError(f"{labels} does not end in .nii or .nii.gz: choose such a name for --out.")
        return cls(
            labels,
            labels.with_name(f"{stem(labels)}_probabilities.nii.gz") if probabilities else None,
            labels.with_name(f"{stem(labels)}_uncertainty.nii.gz") if uncertainty else None,
            volumes,
        )

    def all(self) -> list[Path]:
        """Return the files that will be written."""
        return [p for p in (self.labels, self.probabilities, self.uncertainty, self.volumes) if p is not None]

    def check(self, overwrite: bool, study: Study) -> None:
        """Refuse, before any work, to write over a scan, or over anything unless asked.

        Parameters
        ----------
        overwrite : bool
        study : Study
            Its scans, and files beside them that are called like scans, are never written over.

        Raises
        ------
        FileError
            A file is in the way.
        """
        scans = {scan.path.resolve() for scan in study.scans.values() if scan.path is not None}
        for path in self.all():
            if not path.exists():
                continue
            if not overwrite:
                raise FileError(f"{path} exists: choose another name, or add --overwrite.")
            place = path.resolve()
            beside = place.parent in {scan.parent for scan in scans}
            if place in scans or (beside and guess_modality(path) is not None and not is_label_name(path)):
                raise FileError(f"{path} is one of the scans: choose another name.")


def write_outputs(result: SegmentationResult, paths: OutputPaths, like: Path | None) -> None:
    """Write what was asked for; every file complete or not at all."""
    write_label_map(paths.labels, result.labels, result.grid, like=like)
    if paths.probabilities is not None and result.probabilities is not None:
        maps = np.moveaxis(result.probabilities, 0, -1)
        write_image(paths.probabilities, maps, result.grid, description=", ".join(result.channel_names))
    if paths.uncertainty is not None and result.uncertainty is not None:
        write_image(paths.uncertainty, result.uncertainty, result.grid, like=like, description="normalised entropy")
    if paths.volumes is not None:
        write_text_atomic(paths.volumes, volumes_csv(result.structures))


def as_report(result: SegmentationResult, output: Path) -> dict[str, Any]:
    """Return the object that ``--json`` prints."""
    return {
        "output": str(output),
        "model": result.model,
        "device": result.device,
        "seconds": round(result.seconds, 2),
        "labels": [{"value": s.value, "name": s.name, "volume_ml": round(s.volume_ml, 4)} for s in result.structures],
        "warnings": list(result.warnings),
    }
