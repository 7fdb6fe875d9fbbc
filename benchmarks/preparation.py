"""How well a preparation keeps lesions apart from healthy tissue, modality by modality.

    python benchmarks/preparation.py [--synthetic 8] [--real-gliomas DIR]

For the published preparation (5th to 95th percentile, clipped) and for the robust one: the share of abnormal voxels
that lie at the top of the range, where they can no longer be told from each other, and the area under the ROC curve of
the prepared intensity (0.5 knows nothing; below 0.5 they are darker) as a detector of abnormal voxels inside the head,
and of enhancing voxels among the abnormal ones.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata

from napari_brainmvp.io import find_studies, read_study
from napari_brainmvp.preparation import PreparationSpec
from napari_brainmvp.preparation.intensity import foreground_mask, normalise
from napari_brainmvp.study import Study
from napari_brainmvp.synthesis import make_study
from napari_brainmvp.training.default_model import HELD_OUT

PREPARATIONS = {
    "percentile, clipped": PreparationSpec(intensity="percentile", clip=True),
    "robust": PreparationSpec(),
}


def roc_auc(values: np.ndarray, truth: np.ndarray) -> float:
    """Area under the ROC curve from mean ranks, ties counted half (Mann and Whitney 1947)."""
    ranks, positives = rankdata(values), int(truth.sum())
    wins = ranks[truth].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * (len(truth) - positives)))


def rows(study: Study, abnormal: np.ndarray, enhancing: np.ndarray) -> Iterator[tuple[str, str, list[float]]]:
    """Yield preparation, modality, and saturated share and the two areas under the curve."""
    for name, spec in PREPARATIONS.items():
        for key, scan in study.scans.items():
            volume = torch.from_numpy(np.array(scan.data))
            mask = foreground_mask(volume)
            prepared = normalise(volume, mask, spec).numpy()
            inside, truth = prepared[mask.numpy()], abnormal[mask.numpy()]
            among = enhancing[mask.numpy()][truth]
            part = roc_auc(inside[truth], among) if among.any() and not among.all() else float("nan")
            yield name, key, [float((inside[truth] >= inside.max()).mean()), roc_auc(inside, truth), part]


def main() -> None:
    """Measure all studies and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthetic", type=int, default=8)
    parser.add_argument("--real-gliomas", type=Path)
    arguments = parser.parse_args()
    sets: dict[str, list[tuple[Study, int, int]]] = {"synthetic": [], "real gliomas": []}
    for seed in range(HELD_OUT, HELD_OUT + arguments.synthetic):
        sets["synthetic"].append((make_study(seed), 4, 6))
    for files in find_studies(arguments.real_gliomas) if arguments.real_gliomas else []:
        sets["real gliomas"].append((read_study(files.scans["t1"].parent), 1, 4))
    print("| studies | preparation | modality | at the top, % | abnormal | enhancing |\n|---|---|---|---|---|---|")
    for title, studies in sets.items():
        found: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
        for study, first, enhancing in studies:
            assert study.labels is not None
            abnormal = study.labels.data >= first
            if abnormal.any():
                for name, key, numbers in rows(study, abnormal, study.labels.data == enhancing):
                    found[name, key].append(numbers)
        for (name, key), values in found.items():
            saturated, area, part = np.nanmedian(values, axis=0)
            print(f"| {title}, n = {len(values)} | {name} | {key} | {100 * saturated:.0f} | {area:.3f} | {part:.3f} |")


if __name__ == "__main__":
    main()
