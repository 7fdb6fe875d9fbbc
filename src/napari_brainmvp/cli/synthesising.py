"""``brainmvp synth``: a dataset of made-up studies."""

from __future__ import annotations

import json
from pathlib import Path

from napari_brainmvp.errors import BrainMVPError, FileError
from napari_brainmvp.io import write_image, write_label_map, write_text_atomic
from napari_brainmvp.progress import Progress, ProgressCallback
from napari_brainmvp.study import MODALITIES, Study
from napari_brainmvp.synthesis import LABEL_NAMES, SynthesisSpec, make_study

__all__ = ["write_dataset", "write_study"]


def write_study(folder: Path, study: Study) -> list[Path]:
    """Write a study as ``folder/NAME-MODALITY.nii.gz`` and its labels as ``NAME-seg.nii.gz``."""
    paths = [
        write_image(folder / f"{study.name}-{key}.nii.gz", scan.data, scan.grid, description="synthetic")
        for key, scan in study.scans.items()
    ]
    if study.labels is not None:
        paths.append(write_label_map(folder / f"{study.name}-seg.nii.gz", study.labels.data, study.labels.grid))
    return paths


def write_dataset(
    folder: Path, count: int, seed: int, spec: SynthesisSpec, device: str, progress: ProgressCallback
) -> None:
    """Write studies of seeds ``seed`` to ``seed + count - 1``, each in a folder of its own, and ``dataset.json``.

    Raises
    ------
    FileError
        The folder is not empty.
    BrainMVPError
        A modality has no signal equation.
    """
    unknown = [key for key in spec.modalities if key not in MODALITIES]
    if unknown or not spec.modalities:
        raise BrainMVPError(f"Cannot make {', '.join(unknown) or 'no modality'}: choose from {', '.join(MODALITIES)}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileError(f"{folder} is not an empty folder: choose a new one.")
    names = []
    for index in range(count):
        study = make_study(seed + index, spec, device=device)
        write_study(folder / study.name, study)
        names.append(study.name)
        progress(Progress("Making studies", index + 1, count))
    description = {
        "name": "synthetic brain MRI",
        "seed": seed,
        "modalities": list(spec.modalities),
        "labels": {str(value): name for value, name in LABEL_NAMES.items()},
        "studies": names,
    }
    write_text_atomic(folder / "dataset.json", json.dumps(description, indent=2) + "\n")
