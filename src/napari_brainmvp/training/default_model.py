"""Train the default model from nothing but synthetic studies: ``python -m napari_brainmvp.training.default_model``.

Three steps, each of which goes on where it was interrupted: make the pool of studies, train, write the model.
Held-out synthetic studies have seeds from :data:`HELD_OUT` on, which training never uses.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from napari_brainmvp.models import DEFAULT_MODEL, Label, ModelCard, NetworkSpec, find_model, load_model, save_model
from napari_brainmvp.networks import UNIFORMER_COMPACT, ModalityTemplates, SegmentationNetwork
from napari_brainmvp.preparation.spec import PreparationSpec
from napari_brainmvp.progress import Progress
from napari_brainmvp.synthesis import SynthesisSpec
from napari_brainmvp.training.augmentation import template_volumes
from napari_brainmvp.training.finetuning.transfer import transfer
from napari_brainmvp.training.pool import Pool, fill_pool
from napari_brainmvp.training.segmentation import SegmentationRecipe, train

__all__ = ["HELD_OUT", "MODALITIES", "TEMPLATE_SHAPE", "build", "main"]

MODALITIES = ("t1", "t1c", "t2", "flair")
TEMPLATE_SHAPE = (36, 44, 38)
"""Template voxels over the foreground box: about 4 mm each."""
FULL_RESOLUTION_CHANNELS = 16
HELD_OUT = 9_000_000

LABELS = (
    Label(value=1, name="CSF", color="#4a90d9", meaning="cerebrospinal fluid: ventricles and around the brain"),
    Label(value=2, name="Grey matter", color="#8f979e", meaning="cortex and deep nuclei"),
    Label(value=3, name="White matter", color="#e9e4d8", meaning="normal-appearing white matter"),
    Label(value=4, name="Oedema", color="#f2c14e", meaning="bright on T2 and FLAIR: oedema, infiltration, plaques"),
    Label(value=5, name="Non-enhancing core", color="#d1495b", meaning="necrosis, or tumour that takes up no contrast"),
    Label(value=6, name="Enhancing", color="#2fbf9b", meaning="takes up contrast agent"),
)

logger = logging.getLogger(__name__)


def build() -> SegmentationNetwork:
    """Make the untrained network: four modalities in, background and six tissues out."""
    return SegmentationNetwork(
        len(MODALITIES),
        1 + len(LABELS),
        UNIFORMER_COMPACT,
        full_resolution_channels=FULL_RESOLUTION_CHANNELS,
        deep_supervision=False,
    )


def distil_templates(pool: Pool, count: int = 60) -> ModalityTemplates:
    """Make the templates that stand in for missing modalities: the median of the first studies of the pool."""
    templates = ModalityTemplates(MODALITIES, TEMPLATE_SHAPE).requires_grad_(False)
    templates.volumes.copy_(template_volumes(pool.studies[:count], TEMPLATE_SHAPE))
    return templates


def make_card(training: dict[str, Any]) -> ModelCard:
    """Describe the default model, its metrics still to be measured."""
    return ModelCard(
        name=DEFAULT_MODEL,
        title="Brain tissue and lesions",
        description="CSF, grey and white matter, and abnormal tissue as oedema, non-enhancing or necrotic core, and "
        "enhancing tissue, from any of T1, T1c, T2 and FLAIR. Trained on synthetic studies only.",
        task="segmentation",
        network=NetworkSpec(
            in_channels=len(MODALITIES),
            out_channels=1 + len(LABELS),
            channels=UNIFORMER_COMPACT.channels,
            depths=UNIFORMER_COMPACT.depths,
            head_size=UNIFORMER_COMPACT.head_size,
            mlp_ratio=UNIFORMER_COMPACT.mlp_ratio,
            full_resolution_channels=FULL_RESOLUTION_CHANNELS,
            deep_supervision=False,
        ),
        modalities=MODALITIES,
        labels=LABELS,
        channels=(0, *(label.value for label in LABELS)),
        preparation=PreparationSpec(),
        fill_missing="template",
        training=training,
        licence="BSD-3-Clause",
    )


def _report(progress: Progress) -> None:
    if progress.done % 50 == 0 or progress.done == progress.total:
        logger.info("%s: %d of %d", progress.step, progress.done, progress.total)


def main() -> None:
    """Run all steps from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, required=True, help="folder for the prepared synthetic studies")
    parser.add_argument("--run", type=Path, required=True, help="folder for checkpoints and the loss curve")
    parser.add_argument("--out", type=Path, required=True, help="folder in which the model's folder is made")
    parser.add_argument("--studies", type=int, default=600)
    parser.add_argument("--init", help="pre-trained model to start from; default random weights")
    parser.add_argument("--encoder-only", action="store_true", help="start only the encoder from the pre-trained model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, field in SegmentationRecipe.model_fields.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    if arguments["encoder_only"] and not arguments["init"]:
        parser.error("--encoder-only needs --init")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = SegmentationRecipe(**{name: arguments[name] for name in SegmentationRecipe.model_fields})
    torch.manual_seed(recipe.seed)
    torch.set_flush_denormal(True)

    seeds = range(arguments["studies"])
    fill_pool(arguments["pool"], seeds, SynthesisSpec(MODALITIES, head=0.12), PreparationSpec(), _report)
    pool = Pool(arguments["pool"], seeds)
    untrained = build()
    if arguments["init"]:
        source = load_model(find_model(arguments["init"]), "pretraining")
        transfer(untrained, source, MODALITIES, encoder_only=arguments["encoder_only"])
    network = train(
        untrained,
        distil_templates(pool),
        pool,
        recipe,
        arguments["run"],
        device=arguments["device"],
        progress=_report,
    )
    training = {
        "data": f"{len(pool)} synthetic studies (this package's synthesis room) made from the MNI152 tissue maps",
        "init": (arguments["init"] or "random weights") + ", encoder only" * arguments["encoder_only"],
        "recipe": recipe.model_dump(),
        "script": "python -m napari_brainmvp.training.default_model",
        "device": arguments["device"],
    }
    folder = save_model(arguments["out"] / DEFAULT_MODEL, make_card(training), network, distil_templates(pool))
    logger.info("Wrote %s", folder)


if __name__ == "__main__":
    main()
