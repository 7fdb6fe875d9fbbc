"""The instant probe against a random forest: Dice and times.

    python benchmarks/annotation.py --real-gliomas DIR --out annotation.json

Protocol ``slices``: 5 % of the brain's voxels of three axial slices are labelled (at 25, 50 and 75 % of the tumour's
height). Protocol ``strokes``: on the same slices one thin stroke per visible class, then up to ten rounds of one
corrective stroke on the largest error. Protocol ``across``: a probe of the ``--teachers``, labelled as in ``slices``,
predicts every other study, of which nothing is labelled. Protocol ``second``: every study gets strokes one by one (one
per visible class on the slice at 50 %, then corrections), alone and after ``--before`` others (those ahead of it in the
order of their names) have had theirs. Protocol ``corrections``: every stroke is a correction of what the model
``--model`` predicts, a fine-tuned one; ``--only`` names the studies, which it was not trained on. The forest sees
Gaussian means (sigma 0, 1, 2, 4, 8 voxels) and the gradient magnitude of each modality, as is customary. Without a
path, held-out synthetic gliomas serve. Real studies only measure: nothing is trained that stays.

``--parts times`` gives the seconds of the features, of a stroke to the visible slice, and to the volume; on a CUDA
machine those of the features a second time, too, as the first time includes the start of CUDA.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from sklearn.ensemble import RandomForestClassifier

from napari_brainmvp.annotation.content import LabelClass
from napari_brainmvp.annotation.features import StudyFeatures, compute_features
from napari_brainmvp.annotation.model_classes import known_classes
from napari_brainmvp.annotation.prediction import LabelledVoxels, StudyPredictor, labelled_voxels
from napari_brainmvp.annotation.probe import ProbeSpec
from napari_brainmvp.io import find_studies, read_study
from napari_brainmvp.models import find_model, load_model
from napari_brainmvp.study import Study
from napari_brainmvp.synthesis import SynthesisSpec, make_study
from napari_brainmvp.training.default_model import HELD_OUT
from napari_brainmvp.training.labels import LABEL_PRESETS

SHARE, ROUNDS, STROKES = 0.05, 10, 20
REGIONS = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
BACKGROUND = 9
CLASSES = (
    LabelClass(value=BACKGROUND, name="Background", color="#4a90d9", background=True),
    *(LabelClass(value=v, name=n, color="#d1495b") for v, n in LABEL_PRESETS["brats"].labels.items()),
)
Predict = Callable[[np.ndarray], np.ndarray]


def dice(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Dice of whole tumour, tumour core and enhancing tumour; 1 where both are empty."""
    scores = {}
    for name, values in REGIONS.items():
        a, b = np.isin(found, values), np.isin(truth, values)
        total = a.sum() + b.sum()
        scores[name] = 1.0 if total == 0 else float(2 * (a & b).sum() / total)
    return scores


def load_studies(folder: Path | None, count: int) -> list[Study]:
    """Read real gliomas, or make synthetic ones with BraTS labels."""
    if folder is not None:
        return [read_study(files.scans["t1"].parent) for files in find_studies(folder)]
    return [make_study(HELD_OUT + k, SynthesisSpec(lesion="glioma")) for k in range(count)]


def truth_of(study: Study) -> np.ndarray:
    """Return BraTS labels inside the brain, BACKGROUND for the rest of it and 0 outside."""
    assert study.labels is not None
    labels = study.labels.data.astype(np.int64)
    if study.name.startswith("synthetic"):
        labels = np.select([labels == 4, labels == 5, labels == 6], [2, 1, 4], 0)
    brain = np.any([scan.data > 0 for scan in study.scans.values()], axis=0)
    return np.where(labels > 0, labels, np.where(brain, BACKGROUND, 0))


def annotated_slices(truth: np.ndarray) -> list[int]:
    """Return the axial slices at 25, 50 and 75 % of the tumour's height."""
    heights = np.flatnonzero(np.isin(truth, REGIONS["WT"]).any((0, 1)))
    return [int(heights[0] + (heights[-1] - heights[0]) * share) for share in (0.25, 0.5, 0.75)]


def scattered(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Label a share of the brain's voxels of the slices, at random."""
    labels = np.zeros_like(truth)
    for k in annotated_slices(truth):
        i, j = np.nonzero(truth[..., k])
        chosen = rng.permutation(len(i))[: round(SHARE * len(i))]
        labels[i[chosen], j[chosen], k] = truth[i[chosen], j[chosen], k]
    return labels


def stroke(region: np.ndarray, length: float = 40.0) -> np.ndarray:
    """Draw a stroke three pixels wide through a region's innermost pixel along its longest direction."""
    depth = ndimage.distance_transform_edt(region)
    centre = np.array(np.unravel_index(depth.argmax(), region.shape))
    parts, _ = ndimage.label(region)
    points = np.argwhere(parts == parts[tuple(centre)]) - centre
    direction = np.linalg.svd(points - points.mean(0), full_matrices=False)[2][0] if len(points) > 2 else np.ones(2)
    along = points @ direction
    across = np.abs(points @ np.array([-direction[1], direction[0]]))
    drawn = np.zeros_like(region)
    near = points[(across <= 1.5) & (np.abs(along) <= length / 2)] + centre
    drawn[tuple(near.T)] = True
    return drawn


def first_strokes(truth: np.ndarray, slices: list[int] | None = None) -> np.ndarray:
    """Draw one stroke per visible class on each of some slices; default those of :func:`annotated_slices`."""
    labels = np.zeros_like(truth)
    for k in annotated_slices(truth) if slices is None else slices:
        for value in np.unique(truth[..., k][truth[..., k] > 0]):
            if (truth[..., k] == value).sum() >= 5:
                labels[..., k][stroke(truth[..., k] == value)] = value
    return labels


def correct(labels: np.ndarray, truth: np.ndarray, found: np.ndarray) -> None:
    """Add a stroke of the true class on the largest connected error of any axial slice."""
    in_plane = np.zeros((3, 3, 3), bool)
    in_plane[:, 1, 1] = in_plane[1, :, 1] = True
    best = (0, 0, np.zeros((1, 1, 1), bool))
    for value in np.unique(truth[truth > 0]):
        parts, count = ndimage.label((truth == value) & (found != value), in_plane)
        if count:
            sizes = np.bincount(parts.ravel())
            sizes[0] = 0
            if sizes.max() > best[0]:
                best = (int(sizes.max()), int(value), parts == sizes.argmax())
    if best[0]:
        k = int(np.flatnonzero(best[2].any((0, 1)))[0])
        labels[..., k][stroke(best[2][..., k])] = best[1]


class Forest:
    """The customary baseline."""

    def __init__(self, study: Study, truth: np.ndarray) -> None:
        started = time.perf_counter()
        columns = []
        self.inside = truth > 0
        for scan in study.scans.values():
            data = scan.data.astype(np.float32)
            for sigma in (0, 1, 2, 4, 8):
                columns.append(ndimage.gaussian_filter(data, sigma)[self.inside] if sigma else data[self.inside])
            columns.append(ndimage.gaussian_gradient_magnitude(data, 1)[self.inside])
        self.values = np.stack(columns, 1)
        self.seconds = {"features": time.perf_counter() - started}

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        """Fit and predict."""
        chosen = labels[self.inside] > 0
        forest = RandomForestClassifier(50, n_jobs=2, random_state=0)
        started = time.perf_counter()
        forest.fit(self.values[chosen], labels[self.inside][chosen])
        self.seconds["fit"] = time.perf_counter() - started
        out = np.zeros_like(labels)
        out[self.inside] = forest.predict(self.values)
        self.seconds["predict"] = time.perf_counter() - started - self.seconds["fit"]
        return out


class InstantProbe:
    """Ours."""

    def __init__(
        self,
        features: StudyFeatures,
        spec: ProbeSpec,
        others: tuple[LabelledVoxels, ...] = (),
        known: tuple[int, ...] = (),
    ) -> None:
        self.predictor, self.others = StudyPredictor(features, BACKGROUND, spec, known=known), others

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        """Fit and predict."""
        self.predictor.fit(labels, self.others)
        return self.predictor.predict_volume().labels


def protocol_slices(truth: np.ndarray, predict: Predict, seed: int) -> dict[str, float]:
    """Dice with a share of three slices labelled."""
    return dice(predict(scattered(truth, np.random.default_rng(seed))), truth)


def protocol_strokes(truth: np.ndarray, predict: Predict) -> list[dict[str, float]]:
    """Dice after the first strokes and after each correction."""
    labels = first_strokes(truth)
    scores = []
    for _ in range(ROUNDS + 1):
        found = predict(labels)
        scores.append(dice(found, truth))
        correct(labels, truth, found)
    return scores


def device_name() -> str:
    """Name the GPU, if there is one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def clock() -> float:
    """Return the time in seconds at which all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timings(features: StudyFeatures, truth: np.ndarray, repeats: int = 10) -> dict[str, float]:
    """Best seconds from a stroke to the visible slice and to the volume; and of the volume once the fit is done."""
    labels = scattered(truth, np.random.default_rng(0))
    best: dict[str, float] = {}
    for _ in range(repeats):
        predictor = StudyPredictor(features, BACKGROUND)
        spec = predictor.probe.spec
        for case in ("first stroke", "further stroke"):
            started = clock()
            predictor.fit(labels, steps=spec.first_steps)
            predictor.predict_slice(2, annotated_slices(truth)[1])
            seen = clock()
            predictor.refine(spec.steps - spec.first_steps)
            fitted = clock()
            predictor.predict_volume()
            ended = clock()
            for name, seconds in (
                (f"{case}, slice", seen - started),
                (f"{case}, volume", ended - started),
                (f"{case}, predicting the volume alone", ended - fitted),
            ):
                best[name] = min(best.get(name, np.inf), seconds)
    return best


def across(cases: dict[str, tuple[StudyFeatures, np.ndarray]], teachers: list[str], seed: int) -> dict[str, object]:
    """Dice of a probe of some studies on all others."""
    rng = np.random.default_rng(seed)
    taught = [labelled_voxels(cases[name][0], scattered(cases[name][1], rng)) for name in teachers]
    scores = {}
    for name, (features, truth) in cases.items():
        if name not in teachers:
            predictor = StudyPredictor(features, BACKGROUND)
            predictor.fit(np.zeros(features.source.shape, np.int64), tuple(taught))
            scores[name] = dice(predictor.predict_volume().labels, truth)
    return {"studies": scores, "mean": means(list(scores.values()))}


def one_by_one(truth: np.ndarray, predict: Predict, first: int) -> tuple[list[dict[str, float]], np.ndarray]:
    """Dice after ``first``, ``first`` + 1, … ``STROKES`` strokes, and what was painted in the end.

    The first strokes are one per class that is visible on the slice at half of the tumour's height: the largest part of
    the tumour, what is no tumour, the other parts. From then on each is a correction.
    """
    labels = np.zeros_like(truth)
    begun = first_strokes(truth, [annotated_slices(truth)[1]])
    tumour = sorted(set(np.unique(begun)) - {0, BACKGROUND}, key=lambda value: -(begun == value).sum())
    planned = [tumour[0], BACKGROUND, *tumour[1:]]
    scores = []
    for drawn in range(STROKES + 1):
        if drawn >= first:
            found = predict(labels)
            scores.append(dice(found, truth))
        if planned:
            value = planned.pop(0)
            labels[begun == value] = value
        elif drawn < STROKES:
            correct(labels, truth, found)
    return scores, labels


def second(
    cases: dict[str, tuple[StudyFeatures, np.ndarray]], spec: ProbeSpec, before: list[int]
) -> dict[str, dict[str, object]]:
    """Dice by the number of strokes of every study as the first of a project, and after so many others."""
    alone: dict[str, list[dict[str, float]]] = {}
    taught: dict[str, LabelledVoxels] = {}
    for name, (features, truth) in cases.items():
        alone[name], labels = one_by_one(truth, InstantProbe(features, spec), 2)
        taught[name] = labelled_voxels(features, labels)
    tables = {"alone": alone}
    names = list(cases)
    for count in before:
        tables[f"after {count}"] = table = {}
        for k, name in enumerate(names):
            others = tuple(taught[names[k - j]] for j in range(1, count + 1))
            features, truth = cases[name]
            table[name] = one_by_one(truth, InstantProbe(features, spec, others), 0)[0]
    return {kind: {"studies": table, "mean by strokes": by_strokes(table)} for kind, table in tables.items()}


def corrections(truth: np.ndarray, predict: Predict) -> list[dict[str, float]]:
    """Dice of what a model predicts, and after each stroke on its largest error."""
    labels, scores = np.zeros_like(truth), []
    for _ in range(STROKES + 1):
        found = predict(labels)
        scores.append(dice(found, truth))
        correct(labels, truth, found)
    return scores


def by_strokes(table: dict[str, list[dict[str, float]]]) -> dict[int, Any]:
    """Average over studies that have had the same number of strokes."""
    first = max(STROKES + 1 - len(scores) for scores in table.values())
    return {k: means([s[k - STROKES - 1] for s in table.values()]) for k in range(first, STROKES + 1)}


def main() -> None:
    """Measure and print; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real-gliomas", type=Path)
    parser.add_argument("--synthetic", type=int, default=4, help="number of studies without --real-gliomas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default="slices,strokes,times")
    parser.add_argument("--teachers", nargs="+", default=[], help="names of studies, for --parts across")
    parser.add_argument("--before", type=int, nargs="+", default=[1, 3], help="studies, for --parts second")
    parser.add_argument("--model", help="start from this model, by name or folder; default the one that ships")
    parser.add_argument("--only", nargs="+", default=[], help="names of studies")
    parser.add_argument("--trust", type=float, default=ProbeSpec.trust, help="in the model, see ProbeSpec; 0 for none")
    parser.add_argument("--without-forest", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    parts, spec = arguments.parts.split(","), ProbeSpec(trust=arguments.trust)
    model = load_model(find_model(arguments.model))
    known = known_classes(model.card, CLASSES) if "corrections" in parts else ()
    table: dict[str, object] = {
        "model": model.card.name,
        "sha256": model.card.sha256,
        "seed": arguments.seed,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device_name()}",
    }
    rows: dict[str, dict[str, object]] = {}
    cases: dict[str, tuple[StudyFeatures, np.ndarray]] = {}
    for study in load_studies(arguments.real_gliomas, arguments.synthetic):
        if arguments.only and study.name not in arguments.only:
            continue
        truth = truth_of(study)
        started = clock()
        features = compute_features(study, model)
        row: dict[str, object] = {"feature seconds": clock() - started}
        if "times" in parts and torch.cuda.is_available():
            started = clock()
            features = compute_features(study, model)
            row["feature seconds, again"] = clock() - started
        if "slices" in parts:
            row["slices, probe"] = protocol_slices(truth, InstantProbe(features, spec), arguments.seed)
        if "strokes" in parts:
            row["strokes, probe"] = protocol_strokes(truth, InstantProbe(features, spec))
        if "corrections" in parts:
            row["corrections"] = corrections(truth, InstantProbe(features, spec, known=known))
        if "times" in parts:
            row["times"] = timings(features, truth)
        if not arguments.without_forest and {"slices", "strokes"} & set(parts):
            forest = Forest(study, truth)
            if "slices" in parts:
                row["slices, forest"] = protocol_slices(truth, forest, arguments.seed)
                row["forest seconds"] = dict(forest.seconds)
            if "strokes" in parts:
                row["strokes, forest"] = protocol_strokes(truth, forest)
        rows[study.name] = row
        if {"across", "second"} & set(parts):
            cases[study.name] = (features, truth)
        print(study.name, json.dumps(row), flush=True)
    table["studies"], table["means"] = rows, means(list(rows.values()))
    if "across" in parts:
        table["across"] = across(cases, arguments.teachers, arguments.seed)
    if "second" in parts:
        table["second"] = second(dict(sorted(cases.items())), spec, arguments.before)
    text = json.dumps(table, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


def means(values: list[Any]) -> Any:
    """Average nested numbers."""
    first = values[0]
    if isinstance(first, dict):
        return {key: means([v[key] for v in values]) for key in first}
    if isinstance(first, list):
        return [means([v[k] for v in values]) for k in range(len(first))]
    return round(float(np.mean(values)), 4)


if __name__ == "__main__":
    main()
