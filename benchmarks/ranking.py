"""Which study to annotate next: our order against random ones, in a simulated loop.

    python benchmarks/ranking.py --out ranking.json
    python benchmarks/ranking.py --real-gliomas DIR --out ranking.json

The studies of a project are annotated one by one, 5 % of three slices each; after each a probe is fitted to all that
are, and measured on the project's studies, annotated ones too, as what a user wants is that all of them are right; and
on others that are never annotated, for what was learned. Every study is the first one once; the next ones are chosen
as *Which next?* does, or at random (several orders). What is compared are curves with the same beginning. Without a
path, synthetic studies with gliomas, plaques and strokes serve, half of them as the project. Six real ones all are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from annotation import BACKGROUND, REGIONS, scattered, truth_of
from napari_brainmvp.annotation.features import compute_features
from napari_brainmvp.annotation.prediction import LabelledVoxels, labelled_voxels
from napari_brainmvp.annotation.probe import Probe
from napari_brainmvp.annotation.ranking import fit_probe, rank_studies, sample_voxels, summarise
from napari_brainmvp.io import find_studies, read_study
from napari_brainmvp.models import LoadedModel, find_model, load_model
from napari_brainmvp.study import Study
from napari_brainmvp.synthesis import SynthesisSpec, make_study
from napari_brainmvp.training.memory import keep_freed_memory

FIRST_SEED = 9_400_200
"""Synthetic studies of this benchmark alone; those of 9400000 chose the score."""
LESIONS = ("glioma", "ms", "stroke")
MEASURED = 0.03
"""Share of a study's brain voxels that it is measured on."""
Choose = Callable[[list[int]], int]


@dataclass(frozen=True)
class Case:
    """What is kept of a study: the voxels that would be labelled, those it is measured on, and an even sample."""

    marked: LabelledVoxels
    measured: LabelledVoxels
    sample: LabelledVoxels


def make_case(study: Study, model: LoadedModel, seed: int) -> Case:
    """Describe a study; only samples of its voxels are kept."""
    rng = np.random.default_rng(seed)
    truth = truth_of(study)
    features = compute_features(study, model)
    measured = np.where(rng.random(truth.shape) < MEASURED, truth, 0)
    marked = labelled_voxels(features, scattered(truth, rng))
    return Case(marked, labelled_voxels(features, measured), sample_voxels(features))


class Loop:
    """The loop; probes of the same studies are fitted once."""

    def __init__(self, cases: list[Case], pool: list[int], test: list[int]) -> None:
        self.cases, self.pool, self.test = cases, pool, test
        self._probes: dict[tuple[int, ...], Probe] = {}
        self._scores: dict[tuple[int, ...], list[float]] = {}

    def probe(self, done: list[int]) -> Probe:
        """Fit to what is annotated."""
        key = tuple(sorted(done))
        if key not in self._probes:
            others = [self.cases[k].sample for k in self.pool if k not in key]
            self._probes[key], _ = fit_probe([self.cases[k].marked for k in key], others, BACKGROUND)
        return self._probes[key]

    def score(self, done: list[int]) -> list[float]:
        """Mean Dice of all abnormal tissue over the project's studies, and over the others."""
        key, probe = tuple(sorted(done)), self.probe(done)
        if key not in self._scores:
            dice = {}
            for k in (*self.pool, *self.test):
                case = self.cases[k].measured
                found = np.isin(np.array(probe.classes)[probe.predict(case.values).argmax(1).numpy()], REGIONS["WT"])
                true = np.isin(case.labels, REGIONS["WT"])
                dice[k] = 2 * (found & true).sum() / max(1, found.sum() + true.sum())
            self._scores[key] = [float(np.mean([dice[k] for k in part])) for part in (self.pool, self.test) if part]
        return self._scores[key]

    def ranked(self, done: list[int]) -> int:
        """Choose as the project does."""
        probe = self.probe(done)
        summaries = {k: summarise(str(k), self.cases[k].sample.values, probe) for k in self.pool}
        left = [summaries[k] for k in self.pool if k not in done]
        return int(rank_studies(left, [summaries[k] for k in done])[0].name)

    def curve(self, first: int, choose: Choose, rounds: int) -> list[list[float]]:
        """Annotate a study a round; the scores after each."""
        done, found = [first], []
        for _ in range(rounds):
            done.append(choose(done))
            found.append(self.score(done))
        return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real-gliomas", type=Path)
    parser.add_argument("--synthetic", type=int, default=24, help="studies without --real-gliomas")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--orders", type=int, default=5, help="random orders for each first study")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    model = load_model(find_model())
    if arguments.real_gliomas:
        studies = (read_study(files.scans["t1"].parent) for files in find_studies(arguments.real_gliomas))
    else:
        seeds = range(arguments.first_seed, arguments.first_seed + arguments.synthetic)
        studies = (make_study(s, SynthesisSpec(lesion=LESIONS[k % 3])) for k, s in enumerate(seeds))
    cases = [make_case(study, model, number) for number, study in enumerate(studies)]
    print(f"{len(cases)} studies described", flush=True)
    half = len(cases) // 2
    pool = list(range(len(cases) if arguments.real_gliomas else half))
    pool = [k for k in pool if len(np.unique(cases[k].marked.labels)) > 1]  # of the others nothing can be painted
    if arguments.rounds > len(pool) - 2:
        parser.error(f"--rounds: {len(pool)} studies to choose from allow {len(pool) - 2} at most")
    loop = Loop(cases, pool, [] if arguments.real_gliomas else list(range(half, len(cases))))
    table: dict[str, list[list[list[float]]]] = {"ranked": [], "random": []}
    for first in pool:
        table["ranked"].append(loop.curve(first, loop.ranked, arguments.rounds))
        curves = []
        for order in range(arguments.orders):
            rng = np.random.default_rng([first, order])

            def at_random(done: list[int], rng: np.random.Generator = rng) -> int:
                return int(rng.choice([k for k in pool if k not in done]))

            curves.append(loop.curve(first, at_random, arguments.rounds))
        table["random"].append(np.mean(curves, 0).tolist())
        arguments.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    ranked, random = np.array(table["ranked"]), np.array(table["random"])
    error = (ranked - random).std(0, ddof=1) / np.sqrt(len(pool))
    for number, part in enumerate(("the project's studies", "others")[: ranked.shape[2]]):
        print(f"\nMeasured on {part}:\n")
        print("| studies annotated | ranked | random | paired difference |\n|---|---|---|---|")
        for k, (ours, theirs) in enumerate(zip(ranked.mean(0)[:, number], random.mean(0)[:, number], strict=True)):
            print(f"| {k + 2} | {ours:.3f} | {theirs:.3f} | {ours - theirs:+.3f} ± {error[k, number]:.3f} |")


if __name__ == "__main__":
    main()
