"""How good a segmentation model is: Dice on held-out synthetic studies, on MNI152, and on real studies given by path.

    python benchmarks/accuracy.py --real-gliomas DIR --real-ms DIR --out accuracy.json

Real studies only measure: nothing is trained on them. Gliomas are folders with BraTS 2018 labels (1 necrosis and
non-enhancing core, 2 oedema, 4 enhancing); the MS study has one label, lesion.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch
from nilearn import datasets

from napari_brainmvp.inference import SegmentOptions, segment
from napari_brainmvp.io import find_studies, read_study
from napari_brainmvp.models import find_model, load_model
from napari_brainmvp.models.weights import LoadedModel
from napari_brainmvp.study import Grid, Scan, Study, modality
from napari_brainmvp.synthesis import LABEL_NAMES, SynthesisSpec, make_study
from napari_brainmvp.training.default_model import HELD_OUT
from napari_brainmvp.training.memory import keep_freed_memory

SUBSETS = (("t1", "t1c", "t2", "flair"), ("t1",), ("flair",), ("t1", "flair"))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice overlap of two masks; 1 where both are empty."""
    total = a.sum() + b.sum()
    return 1.0 if total == 0 else float(2 * (a & b).sum() / total)


def precision_recall(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Share of what was found that is true, and share of the truth that was found."""
    hits = (found & truth).sum()
    return {"precision": float(hits / max(1, found.sum())), "recall": float(hits / max(1, truth.sum()))}


def synthetic(model: LoadedModel, count: int, options: SegmentOptions) -> dict[str, dict[str, float]]:
    """Mean Dice per tissue over held-out studies (those whose truth has it), for subsets of modalities."""
    rows: dict[str, dict[str, list[float]]] = {}
    for seed in range(HELD_OUT, HELD_OUT + count):
        study = make_study(seed, SynthesisSpec())
        assert study.labels is not None
        truth = study.labels.data
        for keys in SUBSETS:
            found = segment(study.with_modalities(keys), model, options).labels
            row = rows.setdefault("+".join(keys), {})
            for value, name in LABEL_NAMES.items():
                if (truth == value).sum() >= 50:
                    row.setdefault(name, []).append(dice(found == value, truth == value))
            row.setdefault("any abnormal tissue", []).append(dice(found >= 4, truth >= 4))
    return {keys: {name: float(np.mean(v)) for name, v in row.items()} for keys, row in rows.items()}


def mni152(model: LoadedModel, options: SegmentOptions) -> dict[str, float]:
    """Dice per tissue on the MNI152 T1 alone, against its own tissue maps (the largest of the three)."""
    t1 = datasets.load_mni152_template(resolution=1)
    grey, white, brain = (
        np.asarray(load(resolution=1).dataobj, np.float32)
        for load in (
            datasets.load_mni152_gm_template,
            datasets.load_mni152_wm_template,
            datasets.load_mni152_brain_mask,
        )
    )
    grid = Grid(t1.shape, t1.affine)
    study = Study("MNI152", {"t1": Scan(modality("t1"), np.asarray(t1.dataobj, np.float32), grid)})
    truth = (np.argmax([1 - grey - white, grey, white], axis=0) + 1) * (brain > 0)
    found = segment(study, model, options).labels
    return {LABEL_NAMES[value]: dice(found == value, truth == value) for value in (1, 2, 3)}


def gliomas(
    model: LoadedModel, folder: Path, options: SegmentOptions
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Dice of whole tumour, core and enhancing tumour for each study of a folder; precision and recall of the whole."""
    rows, extents = {}, {}
    for files in find_studies(folder):
        study = read_study(files.scans["t1"].parent)
        assert study.labels is not None
        truth, found = study.labels.data, segment(study, model, options).labels
        rows[files.name] = {
            "whole tumour": dice(found >= 4, truth > 0),
            "tumour core": dice(found >= 5, (truth == 1) | (truth == 4)),
            "enhancing": dice(found == 6, truth == 4),
        }
        extents[files.name] = precision_recall(found >= 4, truth > 0)
    rows["mean"] = {name: float(np.mean([row[name] for row in rows.values()])) for name in next(iter(rows.values()))}
    return rows, extents


def multiple_sclerosis(
    model: LoadedModel, folder: Path, options: SegmentOptions
) -> tuple[dict[str, float], dict[str, float]]:
    """Dice of all abnormal tissue against the lesion label; precision, recall and volumes in ml."""
    study = read_study(folder)
    assert study.labels is not None
    found = segment(study, model, options).labels
    truth = study.labels.data > 0
    millilitres = {
        "found ml": float((found >= 4).sum() * study.grid.voxel_volume_ml),
        "true ml": float(truth.sum() * study.grid.voxel_volume_ml),
    }
    return {"lesions": dice(found >= 4, truth)}, precision_recall(found >= 4, truth) | millilitres


def main() -> None:
    """Measure and print; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="name or folder; default the one that ships")
    parser.add_argument("--synthetic", type=int, default=12, help="number of held-out synthetic studies")
    parser.add_argument("--real-gliomas", type=Path)
    parser.add_argument("--real-ms", type=Path)
    parser.add_argument("--mirror", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    model, options = load_model(find_model(arguments.model)), SegmentOptions(mirror=arguments.mirror)
    table: dict[str, object] = {
        "model": model.card.name,
        "sha256": model.card.sha256,
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "seeds": [HELD_OUT, HELD_OUT + arguments.synthetic],
        "mirror": arguments.mirror,
    }
    if arguments.real_gliomas:
        table["real gliomas"], table["real gliomas, whole tumour"] = gliomas(model, arguments.real_gliomas, options)
    if arguments.real_ms:
        table["real MS"], table["real MS, lesions"] = multiple_sclerosis(model, arguments.real_ms, options)
    table["MNI152 T1"] = mni152(model, options)
    if arguments.synthetic:
        table["synthetic"] = synthetic(model, arguments.synthetic, options)
    text = json.dumps(table, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
