"""What a fine-tuning run is: one specification for the command line, the window and the job. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.models import DEFAULT_MODEL
from napari_brainmvp.models.sharing import without_paths
from napari_brainmvp.training.labels import LabelDescription
from napari_brainmvp.training.sources import DataSource, modality_keys

__all__ = ["PRESETS", "SCRATCH", "FinetuneSpec", "read_spec"]

SCRATCH = "scratch"
"""In place of a model's name: random weights."""


class FinetuneSpec(BaseModel):
    """A fine-tuning run; the defaults are the ``minutes`` preset.

    Parameters
    ----------
    task : {"segmentation", "classification"}
    data : tuple of DataSource
        Studies with labels; for classification, studies whose class a ``participants.tsv`` names.
    init : str
        Model to start from, by name or folder, of any task; or ``"scratch"``.
    modalities : tuple of str
        Input channels; empty for those of a model that has as many channels, else those most studies have.
    labels : LabelDescription or None
        What label values mean; None to look for a ``dataset.json`` beside the data, then to number them.
    participants, column : str
        Table of classes and its column; empty for ``participants.tsv`` in the data's folder and its only other
        column, or one named diagnosis, group, class or label.
    encoder : {"compact", "small"}
        Size where training starts from scratch.
    encoder_rate : float
        Learning rate of the encoder relative to the decoder's; 0 freezes it. From scratch it is always 1.
    layer_decay : float
        Factor on that rate from each encoder stage to the one before it.
    freeze_norm : float
        Share of the run after which batch normalisation keeps its statistics; 0 keeps the pre-trained ones, which is
        better with few cases. From scratch at least 0.6.
    deep_supervision : bool
    crop, batch : int
        Edge of the crops (multiple of 16), and studies per step.
    foreground : float
        Share of crops around a labelled voxel, all classes alike.
    flip : tuple of three float
        Probability of a mirror image along each axis, independently.
    intensity : float
        Largest scale and shift of intensities: 0.1 means factors 0.9 to 1.1 and shifts -0.1 to 0.1.
    mixing : float
        Probability that, in a view, up to all but one channel are replaced by their modality's template.
    consistency : float
        Weight of the squared difference between the features of two such views; 0 makes one view only.
    max_steps, epochs : int
        Optimiser steps; where 0, as many as it takes to see every study ``epochs`` times.
    learning_rate, weight_decay : float
        Of Adam (decoupled decay); linear warm-up, then a cosine to zero.
    warm_up : int
    clip : float
        Largest norm of the gradient.
    average : float
        Decay of the moving average of the weights, which is what is kept; 0 keeps the last weights.
    start_share : float
        Largest share of the weights that training started from in those that are kept, where all of them, the output
        layer included, came from ``init``. It is less where held-out data speak against it. What is mixed so forgets
        less of what it knew, and is better on studies unlike those it was trained on (Wortsman et al., CVPR 2022).
    dice : float
        Weight of the Dice loss; the rest is cross entropy.
    held_out : int or None
        Subjects, with all their sessions, kept back for early stopping and measuring; None for a fifth of four or
        more, and otherwise, in segmentation, for slices of every study. 0 for none.
    folds : int
        Cross-validation before the final training on everything: at least 2, or 0 for none.
    validate_every, patience : int
        Steps between validations, and validations without a better score before stopping (0: never).
    size : tuple of three int
        Classification: voxels to which the foreground box is resized (multiples of 16).
    hidden : int
        Classification: width of the perceptron; 0 for a linear layer.
    probe_up_to : int
        Classification: with at most this many studies, a linear layer on frozen features is fitted in closed form.
    precision : {"auto", "bf16-mixed", "32-true", "16-mixed"}
        Bfloat16 where the processor or CUDA device multiplies it, else float32: emulated, it is far slower.
    accelerator : str
        As Lightning names it; or ``"cuda:N"``, the GPU of that number.
    workers : int
        Processes that prepare studies, from 2 on, and that read crops.
    minutes : float
        Between checkpoints.
    seed : int
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["segmentation", "classification"] = "segmentation"
    data: tuple[DataSource, ...] = ()
    init: str = DEFAULT_MODEL
    modalities: tuple[str, ...] = ()
    labels: LabelDescription | None = None
    participants: str = ""
    column: str = ""
    encoder: Literal["compact", "small"] = "compact"
    encoder_rate: float = Field(0.0, ge=0)
    layer_decay: float = Field(0.8, gt=0, le=1)
    freeze_norm: float = Field(0.0, ge=0, le=1)
    deep_supervision: bool = False
    crop: int = Field(64, ge=16, le=256, multiple_of=16)
    batch: int = Field(2, gt=0)
    foreground: float = Field(0.33, ge=0, le=1)
    flip: tuple[float, float, float] = (0.5, 0.0, 0.0)
    intensity: float = Field(0.1, ge=0, lt=1)
    mixing: float = Field(0.2, ge=0, le=1)
    consistency: float = Field(0.0, ge=0)
    max_steps: int = Field(150, ge=0)
    epochs: int = Field(0, ge=0)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    warm_up: int = Field(10, ge=0)
    clip: float = Field(1.0, gt=0)
    average: float = Field(0.98, ge=0, lt=1)
    start_share: float = Field(0.5, ge=0, lt=1)
    dice: float = Field(0.7, ge=0, le=1)
    held_out: int | None = Field(None, ge=0)
    folds: int = Field(0, ge=0)
    validate_every: int = Field(25, gt=0)
    patience: int = Field(4, ge=0)
    size: tuple[int, int, int] = (80, 96, 80)
    hidden: int = Field(64, ge=0)
    probe_up_to: int = Field(10, ge=0)
    precision: Literal["auto", "bf16-mixed", "32-true", "16-mixed"] = "auto"
    accelerator: str = "auto"
    workers: int = Field(0, ge=0)
    minutes: float = Field(2.0, ge=0)
    seed: int = Field(0, ge=0)

    @field_validator("modalities")
    @classmethod
    def _keys(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return modality_keys(names)

    @model_validator(mode="after")
    def _makes_sense(self) -> FinetuneSpec:
        if not self.max_steps and not self.epochs:
            raise ValueError("max_steps and epochs are both 0: nothing would be trained")
        if self.folds == 1:
            raise ValueError("folds must be at least 2, or 0 for no cross-validation")
        if any(n < 16 or n % 16 for n in self.size):
            raise ValueError(f"size {self.size} must be multiples of 16")
        if self.crop == 16 and self.batch == 1 and (self.init == SCRATCH or self.freeze_norm > 0):
            raise ValueError("crop 16 with batch 1 leaves batch normalisation one value: take a larger one of either")
        return self

    def steps(self, studies: int) -> int:
        """Optimiser steps with so many studies to train on."""
        return self.max_steps or self.epochs * -(-studies // self.batch)

    def recipe(self) -> dict[str, Any]:
        """Return what a model's card says of the run: all but the labels, with digests in the place of paths."""
        return without_paths(self.model_dump(mode="json", exclude={"labels"}))


PRESETS: dict[str, dict[str, Any]] = {
    "minutes": {},
    "hour": {
        "encoder_rate": 0.3,
        "deep_supervision": True,
        "crop": 64,
        "mixing": 0.5,
        "consistency": 0.1,
        "max_steps": 1000,
        "learning_rate": 1e-3,
        "warm_up": 50,
        "average": 0.99,
        "validate_every": 50,
        "patience": 6,
        "minutes": 5.0,
    },
    "paper": {
        "encoder_rate": 1.0,
        "layer_decay": 1.0,
        "freeze_norm": 1.0,
        "deep_supervision": True,
        "crop": 96,
        "flip": (0.5, 0.5, 0.5),
        "mixing": 1.0,
        "consistency": 0.1,
        "max_steps": 0,
        "epochs": 300,
        "learning_rate": 3e-4,
        "weight_decay": 0.0,
        "warm_up": 0,
        "average": 0.0,
        "start_share": 0.0,
        "validate_every": 100,
        "patience": 0,
        "size": (96, 96, 64),
        "probe_up_to": 0,
        "minutes": 10.0,
    },
}
"""Changes to the defaults of :class:`FinetuneSpec`, by name. ``paper`` is the published recipe."""


def read_spec(preset: str, changes: dict[str, Any]) -> FinetuneSpec:
    """Put a specification together: a preset, then ``changes``.

    Raises
    ------
    BrainMVPError
        An unknown preset, or a field or value that makes no sense.
    """
    if preset not in PRESETS:
        raise BrainMVPError(f"There is no preset {preset!r}: choose one of {', '.join(PRESETS)}.")
    try:
        return FinetuneSpec(**{**PRESETS[preset], **changes})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BrainMVPError(f"{where or 'The specification'}: {first['msg']}. Correct the value.") from error
