"""What each part of the pre-training recipe is worth, by leaving it out: equal steps, equal seeds, equal data.

    python benchmarks/pretraining_recipe.py --cache DIR --out recipe.jsonl [--steps 250] [--seeds 2]

Every variant is the ``compact`` recipe with one change, trained on synthetic studies and measured on others, always in
the same way: PSNR of hidden voxels inside the head with 80 % of the blocks hidden behind the template (view A) or
behind another modality (view B), with everything hidden behind another modality, and of the bare template; and how
often a study's two views find each other among all held-out ones by their pooled deepest features. Rows are appended,
and rows that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from napari_brainmvp.inference.device import choose_precision
from napari_brainmvp.training.cache import CachedStudy, cache_synthetic
from napari_brainmvp.training.memory import keep_freed_memory
from napari_brainmvp.training.pretraining.data import CropStream, Dataset
from napari_brainmvp.training.pretraining.model import PretrainingModel
from napari_brainmvp.training.pretraining.run import Run
from napari_brainmvp.training.pretraining.spec import PretrainingSpec
from napari_brainmvp.training.pretraining.tasks import psnr
from napari_brainmvp.training.pretraining.validation import central_batch

VARIANTS: dict[str, dict[str, Any]] = {
    "compact": {},
    "one modality a crop": {"all_targets": False},
    "plain decoder, one output": {"decoder": "plain"},
    "something always shown": {"whole": 0.0},
    "loss on all voxels": {"masked_loss": False},
    "no direct distillation": {"distillation": 0.0},
    "templates min-max normalised": {"template_minmax": True, "distillation": 0.0},
    "no contrast": {"contrast": 0.0},
    "features not held": {"activation": 0.0},
    "contrast on raw features": {"projection": 0, "temperature": 1.0},
    "view A as much as view B": {"from_template": 1.0},
    "no view A": {"from_template": 0.0},
    "no view B": {"from_other": 0.0},
    "templates at the network's rate": {"template_rate": 3e-3},
    "mask rate fixed at 0.875": {"mask_rate": (0.875, 0.875)},
    "templates 240x240x155, centred": {"template_frame": "centred", "template_shape": (240, 240, 155)},
}
COLUMNS = ("view A", "view B", "all hidden", "template", "retrieval")


def train(spec: PretrainingSpec, studies: Sequence[CachedStudy], run: Path) -> PretrainingModel:
    """Train a variant from its seed and return the averaged model."""
    fabric = Fabric(accelerator="cpu", devices=1, precision=choose_precision(spec.precision, "cpu"))
    trainer = Run(fabric, spec, run, [])
    stream = CropStream([Dataset(tuple(studies), 1.0)], spec)
    trainer.train(DataLoader(stream, batch_size=None), 0, lambda progress: None, None)
    return trainer.average.eval()


@torch.no_grad()
def measure(model: PretrainingModel, held_out: Sequence[CachedStudy]) -> dict[str, float]:
    """Measure a model on the central crops of all modalities of held-out studies."""
    found: dict[str, list[float]] = {column: [] for column in COLUMNS}
    features: list[tuple[torch.Tensor, torch.Tensor]] = []
    whole = model.spec.model_copy(update={"mask_rate": (1.0, 1.0)})
    masked = model.spec.model_copy(update={"mask_rate": (0.8, 0.8), "whole": 0.0})
    for number, study in enumerate(held_out):
        for channel in range(len(study.modalities)):
            model.spec = masked
            batch = central_batch(model, study, channel, number, torch.device("cpu"))
            target = batch["target"].repeat(2)
            views = model.views(batch, 1.0)
            found_here = model.predict(views.shown, views.source)
            mean, image, head = found_here.of(target).means, views.image, views.head
            found["view A"].append(psnr(mean[:1], image, views.masks[:1] & head))
            found["template"].append(psnr(views.template, image, head))
            if batch["other"] != batch["target"]:
                found["view B"].append(psnr(mean[1:], image, views.masks[1:] & head))
                model.spec = whole
                hidden = model.views(batch, 1.0)
                mean = model.predict(hidden.shown, hidden.source).of(target).means
                found["all hidden"].append(psnr(mean[1:], image, head))
            if channel == 0:
                pooled = F.normalize(found_here.features[-1].mean((2, 3, 4)), dim=1)
                features.append((pooled[0], pooled[1]))
    first, second = (torch.stack(side) for side in zip(*features, strict=True))
    hits = (first @ second.T).argmax(1) == torch.arange(len(first))
    found["retrieval"] = hits.float().tolist()
    return {column: float(np.nanmean(values)) for column, values in found.items()}


def main() -> None:
    """Train and measure what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a run")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--crop", type=int, default=32)
    parser.add_argument("--studies", type=int, default=48, help="to train on; twelve more are held out")
    parser.add_argument("--variant", action="append", choices=tuple(VARIANTS), help="only this one; repeatable")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    keep_freed_memory()
    studies = cache_synthetic(range(arguments.studies + 12), arguments.cache, PretrainingSpec().preparation)
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    for seed in range(arguments.seeds):
        for name, changes in VARIANTS.items():
            if name not in (arguments.variant or VARIANTS):
                continue
            if any(row["variant"] == name and row["seed"] == seed for row in rows):
                continue
            fixed = {"crop": arguments.crop, "max_steps": arguments.steps, "seed": seed, "minutes": 1e6}
            spec = PretrainingSpec(**{**fixed, "validate_every": 10**6, "warm_up": 25, "average": 0.98, **changes})
            run = arguments.out.with_suffix("") / f"{name}-{seed}"
            model = train(spec, studies[: arguments.studies], run)
            rows.append({"variant": name, "seed": seed, **measure(model, studies[arguments.studies :])})
            with arguments.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print("| variant | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (1 + len(COLUMNS)))
    for name in VARIANTS:
        mine = [row for row in rows if row["variant"] == name]
        if mine:
            cells = (f"{statistics.mean(row[column] for row in mine):.2f}" for column in COLUMNS)
            print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
