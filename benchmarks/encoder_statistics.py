"""How large an encoder's features are, and its batch normalisation's statistics estimated anew.

    python benchmarks/encoder_statistics.py --model brain-encoder --cache DIR
    python benchmarks/encoder_statistics.py --model brain-encoder --cache DIR --out FOLDER

Prints, per stage, the largest and the median standard deviation of a channel, over six crops of 64^3 of a synthetic
FLAIR. With ``--out`` the statistics are estimated on 60 batches of the shipped encoder's second run, the mean PSNR on
its held-out studies is printed before and after, and the model is written: so was the one that ships, after a run
whose variances half precision could not hold.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import nn

from napari_brainmvp.models import find_model, load_model, save_model
from napari_brainmvp.preparation import PreparationSpec
from napari_brainmvp.training.cache import CachedStudy, cache_synthetic
from napari_brainmvp.training.default_encoder import SECOND
from napari_brainmvp.training.finetuning.data import Case, LabelledCrops
from napari_brainmvp.training.finetuning.spec import FinetuneSpec
from napari_brainmvp.training.labels import LabelDescription
from napari_brainmvp.training.pretraining.data import CropStream, collect
from napari_brainmvp.training.pretraining.engine import start_from
from napari_brainmvp.training.pretraining.model import PretrainingModel
from napari_brainmvp.training.pretraining.validation import validate

FIRST_SEED = 9_350_000
"""The synthetic study that features are measured on; no pre-training uses this seed."""
BATCHES = 60


@torch.no_grad()
def print_sizes(name: str, cache: Path) -> None:
    """Print the standard deviations of channels."""
    study = cache_synthetic(range(FIRST_SEED, FIRST_SEED + 1), cache, PreparationSpec(), labels=True)[0]
    spec = FinetuneSpec(crop=64, batch=1, mixing=0.0, intensity=0.0, flip=(0.0, 0.0, 0.0), foreground=0.6)
    labels = LabelDescription.of_values(range(1, 7))
    crops = LabelledCrops([Case(study)], ("flair",), labels, spec)
    images = torch.stack([crops.sample(k)["image"] for k in range(6)])
    network = load_model(find_model(name), "pretraining").network
    for stage, maps in enumerate(network.get_submodule("encoder")(images)[1:], 1):
        spread = maps.std((0, 2, 3, 4))
        print(f"stage {stage}: largest {spread.max():.2f}, median {spread.median():.2f}")


def print_psnr(model: PretrainingModel, held_out: list[CachedStudy], fabric: Fabric) -> None:
    """Print the mean over modalities, of view A and view B."""
    found = {key: value for key, value in validate(model, held_out, None, fabric).items() if key.startswith("psnr")}
    views = [[v for k, v in found.items() if k.endswith("_from_other") == other] for other in (False, True)]
    print(f"PSNR: view A {np.mean(views[0]):.3f}, view B {np.mean(views[1]):.3f}", flush=True)


@torch.no_grad()
def estimate(name: str, cache: Path, out: Path) -> None:
    """Estimate the statistics and write the model."""
    spec = SECOND
    fabric = Fabric(accelerator="cpu", devices=1, precision=spec.precision)
    datasets, held_out, _ = collect(spec, cache)
    model = PretrainingModel(spec)
    start_from(model, name)
    print_psnr(model, held_out, fabric)
    for norm in (part for part in model.modules() if isinstance(part, nn.BatchNorm3d)):
        norm.reset_running_stats()
        norm.momentum = None
    batches = iter(CropStream(datasets, spec))
    model.train()
    for _ in range(BATCHES):
        views = model.views(next(batches), 1.0)
        with fabric.autocast():
            model.predict(views.shown, views.source)
    print_psnr(model, held_out, fabric)
    source = load_model(find_model(name), "pretraining")
    estimated = model.network.state_dict()
    source.network.load_state_dict({key: estimated[key] for key in source.network.state_dict()})
    said = f"batch normalisation re-estimated on {BATCHES} training batches after the run"
    card = source.card.model_copy(update={"training": {**source.card.training, "statistics": said}})
    save_model(out, card, source.network, source.templates)


def main() -> None:
    """Measure, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="brain-encoder")
    parser.add_argument("--cache", type=Path, required=True, help="folder for prepared studies")
    parser.add_argument("--out", type=Path, help="folder for the model with new statistics")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    print_sizes(arguments.model, arguments.cache)
    if arguments.out:
        estimate(arguments.model, arguments.cache, arguments.out)


if __name__ == "__main__":
    main()
