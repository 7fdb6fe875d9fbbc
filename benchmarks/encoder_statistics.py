"""How large an encoder's features are: whether something holds them.

    python benchmarks/encoder_statistics.py --model brain-encoder --cache DIR

Prints, per stage, the largest and the median standard deviation of a channel, over six crops of 64^3 of a synthetic
FLAIR.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from napari_brainmvp.models import find_model, load_model
from napari_brainmvp.preparation import PreparationSpec
from napari_brainmvp.training.cache import cache_synthetic
from napari_brainmvp.training.finetuning.data import Case, LabelledCrops
from napari_brainmvp.training.finetuning.spec import FinetuneSpec
from napari_brainmvp.training.labels import LabelDescription

FIRST_SEED = 9_350_000
"""The synthetic study that features are measured on; no pre-training uses this seed."""


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


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="brain-encoder")
    parser.add_argument("--cache", type=Path, required=True, help="folder for prepared studies")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    print_sizes(arguments.model, arguments.cache)


if __name__ == "__main__":
    main()
