"""How good reconstructions are, what they are good for, and how long they take.

    python benchmarks/reconstruction.py --model NAME --cache DIR --real-gliomas DIR --real-ms DIR --out FILE.json
    python benchmarks/reconstruction.py --model NAME --speed

For every held-out study and each of its modalities, nothing of which is given:

1. PSNR and SSIM of the reconstruction from each other modality and from all of them, against the model's template
   alone, the others histogram-matched and averaged, and a voxel-wise ridge regression and random forest on the others.
   Matching and regressions learn from other synthetic studies.
2. Dice of the default segmentation model with that modality missing: left empty, the template, or imputed.
3. For FLAIR, the disagreement as a detector of lesions that was never taught any: average precision and the best Dice,
   against the residual of the template alone and the FLAIR intensity. How large it is in healthy tissue.

Real studies only measure: nothing is trained on them.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import Ridge
from sklearn.metrics import precision_recall_curve

from napari_brainmvp.inference import ReconstructionOptions, ReconstructionResult, SegmentOptions, reconstruct, segment
from napari_brainmvp.inference.reconstruction import TEMPLATE, template_of
from napari_brainmvp.inference.similarity import measure_similarity
from napari_brainmvp.io import find_studies, read_study
from napari_brainmvp.models import DEFAULT_ENCODER, find_model, load_model
from napari_brainmvp.models.weights import LoadedModel
from napari_brainmvp.preparation import prepare
from napari_brainmvp.study import Study
from napari_brainmvp.synthesis import SynthesisSpec, make_study

KEYS = ("t1", "t1c", "t2", "flair")
HELD_OUT, TEACHING = 9_000_000, 8_900_000
VOXELS = 15_000
"""Drawn from each teaching study."""
LEVELS = np.linspace(0, 1, 257)


@dataclass(frozen=True)
class Baselines:
    """What a user would try instead, taught on synthetic studies, for one target."""

    levels: np.ndarray
    ridge: Ridge
    forest: RandomForestRegressor

    @classmethod
    def teach(cls, teaching: Sequence[np.ndarray], target: int) -> Baselines:
        """Learn from voxels (N, C) of each teaching study."""
        voxels = np.concatenate(teaching)
        others = np.delete(voxels, target, 1)
        forest = RandomForestRegressor(40, min_samples_leaf=20, max_samples=0.5, n_jobs=2, random_state=0)
        levels = np.quantile(voxels[:, target], LEVELS)
        return cls(levels, Ridge().fit(others, voxels[:, target]), forest.fit(others, voxels[:, target]))

    def predict(self, others: np.ndarray) -> dict[str, np.ndarray]:
        """Predict the target of voxels (N, C - 1)."""
        matched = [np.interp(column, np.quantile(column, LEVELS), self.levels) for column in others.T]
        return {
            "mean of the others, histogram-matched": np.mean(matched, 0),
            "ridge": self.ridge.predict(others),
            "random forest": self.forest.predict(others),
        }


def teaching_voxels(model: LoadedModel, count: int, cache: Path) -> list[np.ndarray]:
    """Draw voxels of synthetic teaching studies, (N, C) each; kept in the cache."""
    drawn = []
    for seed in range(TEACHING, TEACHING + count):
        path = cache / f"voxels-{seed}-{model.card.preparation.intensity}.npy"
        if not path.exists():
            prepared = prepare(make_study(seed, SynthesisSpec(KEYS)), KEYS, model.card.preparation)
            inside = prepared.images[:, prepared.foreground].T.numpy()
            cache.mkdir(parents=True, exist_ok=True)
            np.save(path, np.random.default_rng(seed).choice(inside, VOXELS, replace=False))
        drawn.append(np.load(path))
    return drawn


def detection(score: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Average precision and the best Dice over all thresholds."""
    precision, recall, _ = precision_recall_curve(truth, score)
    dice = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    return {"average precision": float(-np.sum(np.diff(recall) * precision[:-1])), "best Dice": float(dice.max())}


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice overlap of two masks; 1 where both are empty."""
    total = a.sum() + b.sum()
    return 1.0 if total == 0 else float(2 * (a & b).sum() / total)


class Measure:
    """Collects numbers over studies.

    Parameters
    ----------
    model, segmenter : LoadedModel
    baselines : dict of str to Baselines
        By target.
    how : dict
        Device and overlap of the windows.
    """

    def __init__(
        self, model: LoadedModel, segmenter: LoadedModel, baselines: dict[str, Baselines], how: dict[str, Any]
    ) -> None:
        self.model, self.segmenter, self.baselines, self.how = model, segmenter, baselines, how
        self.numbers: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def study(self, study: Study, lesions: np.ndarray | None) -> None:
        """Measure a study; ``lesions`` is a mask on its grid."""
        options = ReconstructionOptions(**self.how)
        keys = [key for key in KEYS if key in study.scans]
        self._dice("all given", study, lesions)
        for key in keys:
            others = [k for k in keys if k != key]
            result = reconstruct(study, self.model, key, others, options)
            for row in result.similarity:
                self._similarity(key, f"network, from {row.name}" if row.name in KEYS else row.name, row)
            self._calibrate(study, key, result, lesions)
            self._compare(study, key, others)
            without = study.with_modalities(tuple(others)).with_reference(others[0])
            self._dice(f"without {key}: left empty", without, lesions, empty=True)
            self._dice(f"without {key}: template", without, lesions)
            self._dice(f"without {key}: imputed", without.with_scan(result.scan), lesions)
            if key == "flair" and lesions is not None and lesions.any():
                self._detect(study, lesions, {"all others, nothing of FLAIR given": result.disagreement})

    def _similarity(self, key: str, name: str, row: object) -> None:
        for what in ("psnr", "ssim", "mae"):
            self.numbers[f"{what.upper()}: {key}"][name].append(float(getattr(row, what)))

    def _calibrate(self, study: Study, key: str, result: ReconstructionResult, lesions: np.ndarray | None) -> None:
        """Collect how large disagreements are where nothing is wrong: 1 if the network knows its own errors."""
        if lesions is None or result.disagreement is None or lesions.shape != result.disagreement.shape:
            return
        healthy = result.disagreement[(study.scans[key].data > 0) & ~lesions]
        name = "Disagreement in healthy tissue: root mean square"
        self.numbers[name][key].append(float(np.sqrt(np.mean(healthy**2))))

    def _compare(self, study: Study, key: str, others: Sequence[str]) -> None:
        if list(others) != [k for k in KEYS if k != key]:
            return
        prepared = prepare(study, (key, *others), self.model.card.preparation)
        truth, inside = prepared.images[0], prepared.foreground
        for name, values in self.baselines[key].predict(prepared.images[1:, inside].T.numpy()).items():
            image = torch.zeros_like(truth)
            image[inside] = torch.from_numpy(values.astype(np.float32))
            self._similarity(key, name, measure_similarity(name, image, truth, inside & (truth != 0)))

    def _dice(self, name: str, study: Study, lesions: np.ndarray | None, empty: bool = False) -> None:
        if lesions is None or not lesions.any():
            return
        model = self.segmenter
        if empty:
            model = replace(model, card=model.card.model_copy(update={"fill_missing": "zero"}))
        found = segment(study, model, SegmentOptions(**self.how)).labels
        self.numbers["Dice of all abnormal tissue"][name].append(dice(found >= 4, lesions))

    def _detect(self, study: Study, lesions: np.ndarray, maps: dict[str, np.ndarray | None]) -> None:
        for rate in (0.5, 0.8):
            hidden = ReconstructionOptions(mask_rate=rate, **self.how)
            shown = reconstruct(study, self.model, "flair", (TEMPLATE,), hidden)
            maps[f"template around, {rate:.0%} of FLAIR hidden"] = shown.disagreement
        prepared = prepare(study, ("flair",), self.model.card.preparation)
        image = prepared.images[0]
        template = template_of(self.model, "flair", prepared)
        maps["residual of the template alone"] = prepared.restore_image((image - template).abs() * prepared.foreground)
        maps["FLAIR intensity"] = prepared.restore_image(image)
        inside = prepared.restore_labels(prepared.foreground)
        for name, score in maps.items():
            assert score is not None
            for what, value in detection(score[inside], lesions[inside]).items():
                self.numbers[f"Lesions found: {what}"][name].append(value)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return means over studies."""
        return {what: {name: float(np.mean(v)) for name, v in rows.items()} for what, rows in self.numbers.items()}


def synthetic_studies(count: int) -> Iterator[tuple[Study, np.ndarray]]:
    """Make held-out studies with gliomas and their lesion masks."""
    for seed in range(HELD_OUT, HELD_OUT + count):
        study = make_study(seed, SynthesisSpec(KEYS, "glioma"))
        assert study.labels is not None
        yield study, study.labels.data >= 4


def real_studies(folder: Path, count: int) -> Iterator[tuple[Study, np.ndarray]]:
    """Read labelled studies of a folder, or the folder as one study."""
    found = find_studies(folder)
    folders = [next(iter(files.scans.values())).parent for files in found]
    for path in dict.fromkeys(folders[:count]):
        study = read_study(path).with_reference("flair")
        assert study.labels is not None
        yield study, study.labels.data > 0


def speed(model: LoadedModel, device: str, threads: int) -> dict[str, object]:
    """Time reconstructions of FLAIR of one synthetic study of 145 x 180 x 145 voxels."""
    study = make_study(HELD_OUT, SynthesisSpec(KEYS, "glioma"))
    shape = (145, 180, 145)
    scans = {}
    for key, scan in study.scans.items():
        data = np.zeros(shape, np.float32)
        box = tuple(slice(0, min(a, b)) for a, b in zip(shape, scan.data.shape, strict=True))
        data[box] = scan.data[box]
        scans[key] = replace(scan, data=data, grid=type(scan.grid)(shape, scan.grid.affine))
    study = Study("speed", scans)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    rows: dict[str, object] = {"threads": threads, "GB before": before}
    for sources in (("t1",), ("t1", "t1c", "t2")):
        started = time.perf_counter()
        reconstruct(study, model, "flair", sources, ReconstructionOptions(device=device))
        rows[f"seconds from {'+'.join(sources)}"] = time.perf_counter() - started
    rows["GB at most"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return rows


def main() -> None:
    """Measure and print; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_ENCODER, help="pre-trained model: name or folder")
    parser.add_argument("--segmenter", default=None, help="segmentation model; default the one that ships")
    parser.add_argument("--synthetic", type=int, default=3, help="held-out synthetic studies")
    parser.add_argument("--teaching", type=int, default=8, help="synthetic studies that teach the baselines")
    parser.add_argument("--cache", type=Path, default=Path("reconstruction-cache"), help="keeps what teaches")
    parser.add_argument("--real-gliomas", type=Path)
    parser.add_argument("--real-ms", type=Path)
    parser.add_argument("--real", type=int, default=6, help="at most so many real gliomas")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--overlap", type=float, default=0.5, help="of neighbouring windows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--speed", action="store_true", help="only measure time and memory")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model(find_model(arguments.model), "pretraining")
    table: dict[str, object] = {
        "model": model.card.name,
        "sha256": model.card.sha256,
        "overlap": arguments.overlap,
        "machine": f"{platform.processor() or platform.machine()}, {arguments.threads} threads",
    }
    if arguments.speed:
        table["speed"] = speed(model, arguments.device, arguments.threads)
    else:
        segmenter = load_model(find_model(arguments.segmenter))
        teaching = teaching_voxels(model, arguments.teaching, arguments.cache)
        baselines = {key: Baselines.teach(teaching, k) for k, key in enumerate(KEYS)}
        groups = {f"synthetic, seeds from {HELD_OUT}": synthetic_studies(arguments.synthetic)}
        if arguments.real_gliomas:
            groups["real gliomas"] = real_studies(arguments.real_gliomas, arguments.real)
        if arguments.real_ms:
            groups["real MS"] = real_studies(arguments.real_ms, 1)
        for name, studies in groups.items():
            how = {"device": arguments.device, "overlap": arguments.overlap}
            measure = Measure(model, segmenter, baselines, how)
            for count, (study, lesions) in enumerate(studies, 1):
                measure.study(study, lesions)
                table[name] = {"studies": count, **measure.summary()}
                if arguments.out:
                    arguments.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(table, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
