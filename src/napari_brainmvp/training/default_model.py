"""Train the default model from nothing but synthetic studies: ``python -m napari_brainmvp.training.default_model``.

Three steps, each of which goes on where it was interrupted: make the pool of studies, train, write the model.
Held-out synthetic studies have seeds from :data:`HELD_OUT` on, which training never uses.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from napari_brainmvp.networks import UNIFORMER_COMPACT, ModalityTemplates, SegmentationNetwork
from napari_brainmvp.preparation.spec import PreparationSpec
from napari_brainmvp.progress import Progress
from napari_brainmvp.synthesis import LABEL_NAMES, SynthesisSpec
from napari_brainmvp.training.augmentation import template_volumes
from napari_brainmvp.training.pool import Pool, fill_pool
from napari_brainmvp.training.segmentation import SegmentationRecipe, train

__all__ = ["HELD_OUT", "MODALITIES", "TEMPLATE_SHAPE", "build", "main"]

MODALITIES = ("t1", "t1c", "t2", "flair")
TEMPLATE_SHAPE = (36, 44, 38)
"""Template voxels over the foreground box: about 4 mm each."""
FULL_RESOLUTION_CHANNELS = 16
HELD_OUT = 9_000_000

logger = logging.getLogger(__name__)


def build() -> SegmentationNetwork:
    """Make the untrained network: four modalities in, background and six tissues out."""
    return SegmentationNetwork(
        len(MODALITIES),
        1 + len(LABEL_NAMES),
        UNIFORMER_COMPACT,
        full_resolution_channels=FULL_RESOLUTION_CHANNELS,
        deep_supervision=False,
    )


def distil_templates(pool: Pool, count: int = 60) -> ModalityTemplates:
    """Make the templates that stand in for missing modalities: the median of the first studies of the pool."""
    templates = ModalityTemplates(MODALITIES, TEMPLATE_SHAPE).requires_grad_(False)
    templates.volumes.copy_(template_volumes(pool.studies[:count], TEMPLATE_SHAPE))
    return templates


def _report(progress: Progress) -> None:
    if progress.done % 50 == 0 or progress.done == progress.total:
        logger.info("%s: %d of %d", progress.step, progress.done, progress.total)


def main() -> None:
    """Run all steps from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, required=True, help="folder for the prepared synthetic studies")
    parser.add_argument("--run", type=Path, required=True, help="folder for checkpoints and the loss curve")
    parser.add_argument("--studies", type=int, default=600)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, field in SegmentationRecipe.model_fields.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = SegmentationRecipe(**{name: arguments[name] for name in SegmentationRecipe.model_fields})
    torch.manual_seed(recipe.seed)
    torch.set_flush_denormal(True)

    seeds = range(arguments["studies"])
    fill_pool(arguments["pool"], seeds, SynthesisSpec(MODALITIES, head=0.12), PreparationSpec(), _report)
    pool = Pool(arguments["pool"], seeds)
    network = train(
        build(),
        distil_templates(pool),
        pool,
        recipe,
        arguments["run"],
        device=arguments["device"],
        progress=_report,
    )
    torch.save(network.state_dict(), arguments["run"] / "average.pt")


if __name__ == "__main__":
    main()
