"""Pre-train the encoder that ships, on synthetic studies only: ``python -m napari_brainmvp.training.default_encoder``.

It goes on where it was interrupted. The studies have seeds from 0 on, none of them among the held-out ones.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from napari_brainmvp.models import DEFAULT_ENCODER, find_model, load_model, save_model
from napari_brainmvp.progress import Progress
from napari_brainmvp.training.pretraining.spec import DataSource, PretrainingSpec

__all__ = ["FIRST", "SECOND", "main", "publish"]

FIRST = PretrainingSpec(data=(DataSource(path="synthetic:240"),), max_steps=2400, validate_every=400, minutes=3.0)
"""The ``compact`` recipe: many small crops, which teach most for the time."""
SECOND = FIRST.model_copy(
    update={"crop": 64, "batch": 2, "max_steps": 400, "learning_rate": 1e-3, "warm_up": 20, "validate_every": 100}
)
"""Then crops of the size in which it is used, so that brightness is judged beside more of the brain."""

logger = logging.getLogger(__name__)


def publish(trained: Path, out: Path) -> Path:
    """Write a run's model as the one that ships, with its description, in ``out``."""
    model = load_model(find_model(trained), "pretraining")
    count, recipe = model.card.training["studies"], {**model.card.training["recipe"], "init": "the first run's model"}
    card = model.card.model_copy(
        update={
            "name": DEFAULT_ENCODER,
            "title": "Brain encoder",
            "description": "Reconstructs T1, T1c, T2, FLAIR, DWI, ADC, MRA and PD from one another; the start of "
            "fine-tuning. Pre-trained by the three tasks of BrainMVP on synthetic studies only.",
            "licence": "BSD-3-Clause",
            "training": {
                "data": f"{count} synthetic studies (this package's synthesis room) made from the MNI152 tissue maps",
                "script": "python -m napari_brainmvp.training.default_encoder",
                **model.card.training,
                "recipe": recipe,
            },
        }
    )
    return save_model(out / DEFAULT_ENCODER, card, model.network, model.templates)


def _report(progress: Progress) -> None:
    if progress.done % 50 == 0 or progress.done == progress.total:
        logger.info("%s: %d of %d", progress.step, progress.done, progress.total)


def main() -> None:
    """Pre-train and publish from the command line."""
    from napari_brainmvp.training.pretraining.engine import pretrain

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder for logs and checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder in which the model's folder is made")
    parser.add_argument("--cache", type=Path, help="folder for the prepared studies")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    first, second = arguments.run / "first", arguments.run / "second"
    trained = pretrain(FIRST, first, resume=first.exists(), cache=arguments.cache, progress=_report)
    spec = SECOND.model_copy(update={"init": str(trained)})
    trained = pretrain(spec, second, resume=second.exists(), cache=arguments.cache, progress=_report)
    logger.info("Wrote %s", publish(trained, arguments.out))


if __name__ == "__main__":
    main()
