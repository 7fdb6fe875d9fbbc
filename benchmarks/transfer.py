"""Does pre-training pay? Few-shot fine-tuning from pre-trained models and from random weights, in pairs.

For 1, 2 and 3 labelled cases, every arm sees the same cases, in the same order of crops, for the same number of steps,
from the same seed; what differs is the start (``--init``, repeated, and always ``scratch``, the equal-schedule
control; with ``--steps 0`` an untrained encoder) and whether templates are mixed in. Every arm is measured on the same
held-out cases. Results are appended as JSON lines to ``--out``, and what is there already is not measured again, so
that the script may be stopped and started at will. ``--summary`` prints means, paired differences and their spread.

    python benchmarks/transfer.py --init brain-encoder --work DIR --out transfer.jsonl
    python benchmarks/transfer.py --init brain-encoder --work DIR --out transfer.jsonl --real-gliomas DIR
    python benchmarks/transfer.py --init brain-encoder --work DIR --out lesion.jsonl --task classification
    python benchmarks/transfer.py --out transfer.jsonl --summary
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from napari_brainmvp.cli.synthesising import write_study
from napari_brainmvp.inference import SegmentOptions
from napari_brainmvp.io import StudyFiles, find_studies
from napari_brainmvp.models import find_model, load_model, save_model
from napari_brainmvp.models.weights import build_network
from napari_brainmvp.synthesis import LABEL_NAMES, SynthesisSpec, make_study
from napari_brainmvp.training.evaluation import evaluate_segmentation
from napari_brainmvp.training.finetuning import FinetuneSpec, finetune
from napari_brainmvp.training.finetuning.spec import SCRATCH
from napari_brainmvp.training.labels import LABEL_PRESETS, LabelDescription
from napari_brainmvp.training.sources import DataSource

FIRST_SEED = 9_300_000
"""Synthetic cases of this benchmark; no pre-training and no other benchmark uses these seeds."""
POOL, TEST = 6, 3
LESIONS = ("glioma", "ms", "stroke")
REGIONS = LabelDescription(
    labels=LABEL_NAMES,
    regions={"whole tumour": (4, 5, 6), "tumour core": (5, 6), "enhancing tumour": (6,)},
)


@dataclass(frozen=True)
class Arm:
    """One training: everything that tells it from the others."""

    task: str
    data: str
    cases: int
    seed: int
    init: str
    mixing: bool
    steps: int


def synthetic(folder: Path, seeds: range, lesions: Sequence[str]) -> list[Path]:
    """Write synthetic studies, those of ``lesions`` in turn, as NIfTI; what is there stays."""
    made = []
    for k, seed in enumerate(seeds):
        lesion = lesions[k % len(lesions)]
        place = folder / f"synthetic-{lesion}-{seed}"
        if not place.is_dir():
            partial = place.with_name(f".{place.name}")
            shutil.rmtree(partial, ignore_errors=True)
            write_study(partial, make_study(seed, SynthesisSpec(lesion=lesion)))
            partial.rename(place)
        made.append(place)
    return made


def cases_for(arguments: argparse.Namespace, seed: int, count: int) -> tuple[list[Path], list[Path]]:
    """Choose cases to train on, and cases to measure on that no training of this seed sees."""
    rng = np.random.default_rng(seed)
    if arguments.real_gliomas:
        every = [files.scans["t1"].parent for files in find_studies(arguments.real_gliomas)]
        order = [every[k] for k in rng.permutation(len(every))]
        return order[:count], order[3:]
    folder = arguments.work / "studies"
    if arguments.task == "classification":
        pool = synthetic(folder, range(FIRST_SEED + 1000, FIRST_SEED + 1000 + 24), LESIONS)
        test = synthetic(folder, range(FIRST_SEED + 2001, FIRST_SEED + 2001 + 24), LESIONS)
        kinds = [[p for p in pool if f"-{lesion}-" in p.name] for lesion in LESIONS]
        return [kind[k] for kind in kinds for k in rng.permutation(len(kind))[:count]], test
    pool = synthetic(folder, range(FIRST_SEED, FIRST_SEED + POOL), ("glioma",))
    test = synthetic(folder, range(FIRST_SEED + 500, FIRST_SEED + 500 + TEST), ("glioma",))
    return [pool[k] for k in rng.permutation(POOL)[:count]], test


def arms(arguments: argparse.Namespace) -> Iterator[Arm]:
    """List all trainings, complete pairs first; mixing is tried with every start."""
    data = arguments.real_gliomas.name if arguments.real_gliomas else "synthetic"
    for seed in range(arguments.seeds):
        for count in arguments.cases:
            for mixing in (False, True) if arguments.mixing else (False,):
                for init in (*arguments.init, SCRATCH):
                    yield Arm(arguments.task, data, count, seed, init, mixing, arguments.steps)


def spec_for(arm: Arm, train: Sequence[Path], arguments: argparse.Namespace) -> FinetuneSpec:
    """Make the same recipe for every arm but for its start and its mixing."""
    return FinetuneSpec(
        task=arm.task,
        data=tuple(DataSource(path=str(path)) for path in train),
        init=arm.init,
        labels=(LABEL_PRESETS["brats"] if arguments.real_gliomas else REGIONS) if arm.task == "segmentation" else None,
        participants=str(arguments.work / "participants.tsv") if arm.task == "classification" else "",
        modalities=("t1", "t1c", "t2", "flair"),
        encoder_rate=arguments.encoder_rate,
        layer_decay=1.0,
        freeze_norm=arguments.freeze_norm,
        crop=arguments.crop,
        batch=arguments.batch,
        mixing=0.5 if arm.mixing else 0.0,
        consistency=0.1 if arm.mixing else 0.0,
        max_steps=max(1, arm.steps),
        probe_up_to=0 if arm.steps else 1000,
        learning_rate=arguments.learning_rate,
        held_out=0,
        average=0.98,
        start_share=0.0,
        seed=arm.seed,
        minutes=60.0,
    )


def untrained(folder: Path, seed: int) -> str:
    """Write the shipped encoder with random weights, for what a linear probe sees before any training."""
    source = load_model(find_model("brain-encoder"), "pretraining")
    torch.manual_seed(seed)
    card = source.card.model_copy(update={"name": "untrained", "title": "Untrained encoder"})
    shutil.rmtree(folder, ignore_errors=True)
    return str(save_model(folder, card, build_network(card), source.templates))


def run(arm: Arm, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one arm and measure it."""
    train, test = cases_for(arguments, arm.seed, arm.cases)
    folder = arguments.work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    spec = spec_for(arm, train, arguments)
    if arm.init == SCRATCH and not arm.steps:
        spec = spec.model_copy(update={"init": untrained(arguments.work / "untrained", arm.seed)})
    model = load_model(find_model(finetune(spec, folder, cache=arguments.work / "prepared")), arm.task)
    seconds = time.perf_counter() - started
    if arm.task == "segmentation":
        assert spec.labels is not None
        files = [find_studies(path)[0] for path in test]
        found, _ = evaluate_segmentation(model, files, spec.labels, options=SegmentOptions(overlap=0.25))
        scores: Any = {c.case: {name: round(s.dice, 4) for name, s in c.scores.items()} for c in found}
        mean = float(np.mean([list(s.values()) for s in scores.values()]))
    else:
        scores, mean = classified(model, [find_studies(path)[0] for path in test])
    settings = {k: getattr(arguments, k) for k in ("crop", "batch", "learning_rate", "encoder_rate", "freeze_norm")}
    return {**asdict(arm), **settings, "mean": round(mean, 4), "scores": scores, "seconds": round(seconds)}


def classified(model: Any, files: Sequence[StudyFiles]) -> tuple[dict[str, dict[str, float]], float]:
    """Return the class probabilities of every test case, and the accuracy."""
    from napari_brainmvp.inference.classify import classify
    from napari_brainmvp.io import read_study

    scores = {f.name: classify(read_study(f.scans["t1"].parent), model).probabilities for f in files}
    right = [max(p, key=lambda name: p[name]) == name.split("-")[1] for name, p in scores.items()]
    return scores, float(np.mean(right))


def summary(path: Path) -> None:
    """Print mean scores of every arm, and the differences to scratch over the seeds both have."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    table: dict[tuple[Any, ...], dict[int, float]] = defaultdict(dict)
    keys = ("task", "data", "steps", "cases", "mixing", "init")
    for line in lines:
        table[tuple(line[key] for key in keys)][line["seed"]] = line["mean"]
    print("| task | data | steps | cases | mixing | start | mean | paired difference to scratch | seeds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for key, means in sorted(table.items(), key=lambda item: tuple(map(str, item[0]))):
        control = table.get((*key[:5], SCRATCH), {})
        both = [means[s] - control[s] for s in means if s in control]
        error = np.std(both, ddof=1) / np.sqrt(len(both)) if len(both) > 1 else float("nan")
        difference = f"{np.mean(both):+.3f} ± {error:.3f}" if both and key[5] != SCRATCH else ""
        print(f"| {' | '.join(map(str, key))} | {np.mean(list(means.values())):.3f} | {difference} | {len(means)} |")


def write_participants(path: Path) -> None:
    """Write the class of every study that classification could ask for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(("participant_id", "lesion"))
        for k in range(24):
            lesion = LESIONS[k % 3]
            writer.writerow((f"synthetic-{lesion}-{FIRST_SEED + 1000 + k}", lesion))


def main() -> None:
    """Run what is not yet in the results, or print a summary of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; appended to")
    parser.add_argument("--work", type=Path, help="folder for studies, prepared studies and the run")
    parser.add_argument("--init", action="append", default=[], help="model name or folder; repeatable")
    parser.add_argument("--task", choices=("segmentation", "classification"), default="segmentation")
    parser.add_argument("--real-gliomas", type=Path, help="folder of real studies instead of synthetic ones")
    parser.add_argument("--cases", type=int, nargs="+", default=[1, 2, 3], help="labelled cases (a class, if classes)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150, help="0: linear probes, for classification")
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--encoder-rate", type=float, default=0.5, help="of pre-trained encoders; scratch has 1")
    parser.add_argument("--freeze-norm", type=float, default=0.6)
    parser.add_argument("--mixing", action="store_true", help="also with template mixing")
    parser.add_argument("--summary", action="store_true")
    arguments = parser.parse_args()
    if arguments.summary:
        summary(arguments.out)
        return
    if arguments.work is None:
        parser.error("--work is needed")
    logging.basicConfig(level=logging.ERROR)
    torch.set_flush_denormal(True)
    write_participants(arguments.work / "participants.tsv")
    known = set()
    if arguments.out.exists():
        lines = [json.loads(line) for line in arguments.out.read_text(encoding="utf-8").splitlines()]
        known = {tuple(line[key] for key in Arm.__dataclass_fields__) for line in lines}
    for arm in arms(arguments):
        if tuple(asdict(arm).values()) in known:
            continue
        result = run(arm, arguments)
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{asdict(arm)}: {result['mean']:.3f} in {result['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
