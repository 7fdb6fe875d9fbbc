"""Compare a model fine-tuned on three gliomas with the default model on three others, and the other way round.

    python benchmarks/finetuning.py --real-gliomas DIR --work DIR --max-steps 400 --out finetuning.json
    python benchmarks/finetuning.py --real-gliomas DIR --work DIR --preset minutes --slices --out finetuning.json
    python benchmarks/finetuning.py --real-gliomas DIR --work DIR --preset minutes --folds 3 --out finetuning.json

The studies, in the order of their names, are parted as ``--train`` says (positions from 0); each part is trained on
once, from the default model, and measured by the other, also with each region decided by itself, at one half. With
``--slices``, as an annotation project would have it, only three axial slices of each are labelled (at 25, 50 and 75 %
of the tumour's height). Real studies only measure: what is trained here does not ship.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from annotation import BACKGROUND, annotated_slices, truth_of
from napari_brainmvp.cli.synthesising import write_study
from napari_brainmvp.inference import SegmentOptions, segment
from napari_brainmvp.io import StudyFiles, find_studies, read_study
from napari_brainmvp.models import find_model, load_model
from napari_brainmvp.models.weights import LoadedModel
from napari_brainmvp.study import Study
from napari_brainmvp.training.evaluation import evaluate_segmentation
from napari_brainmvp.training.finetuning import finetune
from napari_brainmvp.training.finetuning.spec import read_spec
from napari_brainmvp.training.labels import LABEL_PRESETS
from napari_brainmvp.training.metrics import region_scores

BRATS = LABEL_PRESETS["brats"]
OF_DEFAULT = {4: 2, 5: 1, 6: 4}
"""BraTS values of the default model's oedema, non-enhancing core and enhancing tissue."""

SPARSE = BRATS.model_copy(update={"background": BACKGROUND, "unlabelled": 0})

Scores = dict[str, dict[str, float]]


def measure(model: LoadedModel, studies: list[StudyFiles], values: dict[int, int] | None) -> Scores:
    """Dice of every region of every study."""
    found, _ = evaluate_segmentation(model, studies, BRATS, values=values)
    return {case.case: {name: s.dice for name, s in case.scores.items()} for case in found}


def measure_at_one_half(model: LoadedModel, studies: list[StudyFiles]) -> Scores:
    """Dice of every region of every study, each region by itself where it is more probable than not."""
    scores: Scores = {}
    for files in studies:
        study = read_study(files.scans["t1"].parent)
        truth, found = truth_of(study), segment(study, model, SegmentOptions(probabilities=True)).probabilities
        assert found is not None, "asked for"
        pairs = zip(BRATS.names, found, BRATS.members, strict=True)
        scores[files.name] = {
            name: region_scores(p > 0.5, np.isin(truth, members), study.grid.spacing, surface=False).dice
            for name, p, members in pairs
        }
    return scores


def three_slices(study: Study, folder: Path) -> Path:
    """Write a study with labels on three slices, and nothing else labelled."""
    truth = truth_of(study)
    kept = annotated_slices(truth)
    sparse = np.zeros_like(truth)
    sparse[..., kept] = truth[..., kept]
    assert study.labels is not None
    write_study(folder, replace(study, labels=replace(study.labels, data=sparse.astype(np.uint8))))
    return folder


def main() -> None:
    """Train what is not trained yet, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real-gliomas", type=Path, required=True)
    parser.add_argument("--train", type=int, nargs="+", default=[0, 3, 4])
    parser.add_argument("--preset", default="hour")
    parser.add_argument("--max-steps", type=int, default=0, help="0 for the preset's")
    parser.add_argument("--start-share", type=float, help="of the default model's weights; default the preset's")
    parser.add_argument("--folds", type=int, help="cross-validate first, which chooses that share, too")
    parser.add_argument("--slices", action="store_true", help="label three slices of each study only")
    parser.add_argument("--work", type=Path, required=True, help="folder for prepared studies and runs")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    studies = sorted(find_studies(arguments.real_gliomas), key=lambda files: files.name)
    parts = [[f for k, f in enumerate(studies) if (k in arguments.train) == first] for first in (True, False)]
    table: dict[str, Scores] = {"default": {}, "fine-tuned": {}, "fine-tuned, each region at one half": {}}
    for number, (train, test) in enumerate((parts, parts[::-1])):
        folders = [files.scans["t1"].parent for files in train]
        if arguments.slices:
            folders = [three_slices(read_study(f), arguments.work / "sparse" / f.name) for f in folders]
        data = [{"path": str(folder)} for folder in folders]
        changes = {"max_steps": arguments.max_steps} if arguments.max_steps else {}
        changes |= {"start_share": arguments.start_share} if arguments.start_share is not None else {}
        changes |= {"folds": arguments.folds} if arguments.folds else {}
        spec = read_spec(arguments.preset, {"data": data, "labels": SPARSE if arguments.slices else BRATS, **changes})
        run = arguments.work / f"run-{number}"
        made = finetune(spec, run, resume=run.exists(), cache=arguments.work / "prepared")
        model = load_model(find_model(made))
        table["fine-tuned"] |= measure(model, test, None)
        table["fine-tuned, each region at one half"] |= measure_at_one_half(model, test)
        table["default"] |= measure(load_model(find_model()), test, OF_DEFAULT)
        arguments.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    for name, scores in table.items():
        means = {region: np.mean([case[region] for case in scores.values()]) for region in BRATS.names}
        print(name, {region: round(float(mean), 3) for region, mean in means.items()}, flush=True)


if __name__ == "__main__":
    main()
