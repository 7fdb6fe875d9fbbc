"""What a pre-training run is: one specification for the command line, the window and the job. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.models import ModelCard
from napari_brainmvp.preparation.spec import PreparationSpec
from napari_brainmvp.study import MODALITIES
from napari_brainmvp.training.sources import DataSource, modality_keys

__all__ = ["RECIPES", "DataSource", "PretrainingSpec", "fits", "read_settings", "read_spec"]


class PretrainingSpec(BaseModel):
    """A pre-training run; the defaults are the ``compact`` recipe.

    Parameters
    ----------
    data : tuple of DataSource
    modalities : tuple of str
        Modalities that are learned; scans of others are left aside.
    held_out : int
        Studies kept back for validation: at most a fifth of all, or one of three or four; none of fewer.
    init : str
        Pre-trained model to go on from, by name or folder, with the same modalities and networks; empty for random
        weights.
    encoder : {"compact", "small"}
        ``uniformer-compact`` (1.6 M parameters) or ``uniformer-small`` (22 M, the paper's).
    decoder : {"skips", "plain"}
        With skips, told its target and sure or unsure of it; or the published one.
    crop, batch, accumulate : int
        Edge of the crops (multiple of 16); studies per step and process; steps summed before an update.
    max_steps : int
        Optimiser updates.
    mask_rate : (float, float)
        Share of the 8^3 blocks that is hidden, drawn per study between the two.
    whole : float
        Probability that view B shows nothing of its target, only the other modality.
    masked_loss : bool
        Reconstruct only what was hidden, rather than the whole crop.
    from_template, from_other, contrast, distillation : float
        Weights of task 1 on view A and on view B, of task 3, and of the direct form of task 2; 0 switches one off.
    activation : float
        Weight of the mean square of the encoder's features, which keeps them from growing without bound.
    all_targets : bool
        Reconstruct every modality the study has, wherever a view does not show it, rather than only the chosen one.
        One pass answers for all (``skips`` only), so that a crop teaches several times as much.
    other_from, contrast_from : float
        Shares of the run after which view B uses another modality, and after which task 3 counts.
    temperature : float
        Of the contrast.
    projection : int
        Width of the contrast's projection head on pooled features; 0 for the raw features.
    template_shape : tuple of three int
    template_frame : {"box", "centred"}
        Templates span the foreground box, or are a frame of 1 mm voxels in whose centre the box lies.
    template_minmax : bool
        Normalise a template to 0..1 before use, as the release does.
    template_rate : float
        Learning rate of the templates.
    learning_rate, weight_decay : float
        AdamW; linear warm-up, then a cosine to zero.
    warm_up : int
    clip : float
        Largest norm of the gradient.
    average : float
        Decay of the moving average of the weights, which is what is kept; 0 keeps the last weights.
    preparation : PreparationSpec
    precision : {"auto", "bf16-mixed", "32-true", "16-mixed"}
        Bfloat16 where the processor or CUDA device multiplies it, else float32: emulated, it is far slower.
    compile : bool
        Use ``torch.compile``.
    accelerator, devices, nodes, strategy
        As Lightning names them; or ``"cuda:N"``, the GPUs from that number on.
    workers : int
        Processes that prepare studies, from 2 on, and that read crops.
    minutes : float
        Between checkpoints.
    validate_every : int
        Updates between validations.
    seed : int
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: tuple[DataSource, ...] = ()
    modalities: tuple[str, ...] = tuple(MODALITIES)
    held_out: int = Field(4, ge=0)
    init: str = ""
    encoder: Literal["compact", "small"] = "compact"
    decoder: Literal["skips", "plain"] = "skips"
    crop: int = Field(32, ge=16, le=256, multiple_of=16)
    batch: int = Field(8, gt=0)
    accumulate: int = Field(1, gt=0)
    max_steps: int = Field(2000, gt=0)
    mask_rate: tuple[float, float] = (0.5, 0.9)
    whole: float = Field(0.8, ge=0, le=1)
    masked_loss: bool = True
    from_template: float = Field(0.5, ge=0)
    from_other: float = Field(1.0, ge=0)
    contrast: float = Field(0.1, ge=0)
    activation: float = Field(1e-3, ge=0)
    distillation: float = Field(1.0, ge=0)
    all_targets: bool = True
    other_from: float = Field(0.0, ge=0, le=1)
    contrast_from: float = Field(0.0, ge=0, le=1)
    temperature: float = Field(0.2, gt=0)
    projection: int = Field(64, ge=0)
    template_shape: tuple[int, int, int] = (36, 44, 38)
    template_frame: Literal["box", "centred"] = "box"
    template_minmax: bool = False
    template_rate: float = Field(5e-2, gt=0)
    learning_rate: float = Field(3e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    warm_up: int = Field(100, ge=0)
    clip: float = Field(1.0, gt=0)
    average: float = Field(0.998, ge=0, lt=1)
    preparation: PreparationSpec = PreparationSpec()
    precision: Literal["auto", "bf16-mixed", "32-true", "16-mixed"] = "auto"
    compile: bool = False
    accelerator: str = "auto"
    devices: int = Field(1, gt=0)
    nodes: int = Field(1, gt=0)
    strategy: str = "auto"
    workers: int = Field(0, ge=0)
    minutes: float = Field(5.0, ge=0)
    validate_every: int = Field(200, gt=0)
    seed: int = Field(0, ge=0)

    @property
    def learns_every_modality(self) -> bool:
        """Whether a crop teaches about every modality of its study, not only about the chosen one."""
        return (self.decoder == "skips" and self.all_targets) or self.distillation > 0

    @field_validator("mask_rate")
    @classmethod
    def _rates_in_order(cls, rates: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= rates[0] <= rates[1] <= 1:
            raise ValueError(f"mask_rate {rates} must be two shares between 0 and 1, the smaller first")
        return rates

    @field_validator("modalities")
    @classmethod
    def _keys(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return modality_keys(names)

    @model_validator(mode="after")
    def _something_to_learn(self) -> PretrainingSpec:
        if not (self.from_template or self.from_other):
            raise ValueError("from_template and from_other are both 0: nothing would be reconstructed")
        if self.contrast and self.batch * self.devices * self.nodes < 2:
            raise ValueError("the contrast needs two studies a step: set batch to 2 or more, or contrast to 0")
        return self


_PUBLISHED: dict[str, Any] = {
    "from_template": 1.0,
    "encoder": "small",
    "decoder": "plain",
    "crop": 96,
    "batch": 3,
    "accumulate": 2,
    "whole": 0.0,
    "masked_loss": False,
    "contrast": 1.0,
    "activation": 0.0,
    "distillation": 0.0,
    "contrast_from": 2 / 3,
    "temperature": 1.0,
    "projection": 0,
    "template_shape": (240, 240, 155),
    "template_frame": "centred",
    "template_minmax": True,
    "template_rate": 3e-4,
    "learning_rate": 3e-4,
    "weight_decay": 1e-5,
    "average": 0.0,
    "preparation": PreparationSpec(intensity="percentile", clip=True, symmetric=True, margin=0),
}

RECIPES: dict[str, dict[str, Any]] = {
    "compact": {},
    "default": {"encoder": "small", "crop": 96, "batch": 3, "accumulate": 2, "learning_rate": 1e-3},
    "paper": {**_PUBLISHED, "mask_rate": (0.875, 0.875)},
    "release": {**_PUBLISHED, "mask_rate": (0.8, 0.8), "from_template": 10.0, "other_from": 0.2},
}
"""Changes to the defaults of :class:`PretrainingSpec`, by name. ``paper`` and ``release`` are the published method."""


def fits(card: ModelCard, spec: PretrainingSpec) -> bool:
    """Tell whether a run could go on from a model: pre-trained here, with the same networks, modalities and templates.

    Whether it can is known when its weights are read.
    """
    if card.task != "pretraining":
        return False
    before, now = card.training.get("recipe", {}), spec.model_dump(mode="json")
    same = ("encoder", "decoder", "template_shape", "template_frame", "template_minmax")
    return card.modalities == spec.modalities and all(before.get(key) == now[key] for key in same)


def read_settings(path: Path | None, recipe: str | None) -> dict[str, Any]:
    """Read what a recipe and a YAML file say, the file before the recipe: fields of :class:`PretrainingSpec`, by name.

    A recipe that is named, be it in the file, says everything in which recipes differ; without one, nothing is said.

    Raises
    ------
    BrainMVPError
        An unknown recipe, or a file that is no YAML mapping.
    """
    content: Any = {}
    if path is not None:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise BrainMVPError(f"{path} is not a readable YAML file ({error}): correct it.") from error
        if not isinstance(content, dict):
            raise BrainMVPError(f"{path} must hold 'name: value' lines, not a {type(content).__name__}.")
    named = content.pop("recipe", None)
    if (chosen := recipe or named) is None:
        return dict(content)
    if chosen not in RECIPES:
        raise BrainMVPError(f"There is no recipe {chosen!r}: choose one of {', '.join(RECIPES)}.")
    usual = {name: PretrainingSpec.model_fields[name].default for changes in RECIPES.values() for name in changes}
    return {**usual, **RECIPES[chosen], **content}


def read_spec(path: Path | None, recipe: str | None, changes: dict[str, Any]) -> PretrainingSpec:
    """Put a specification together: a recipe, then a YAML file's fields, then ``changes``.

    Raises
    ------
    BrainMVPError
        An unknown recipe, a file that is no YAML mapping, a field or value that makes no sense.
    """
    try:
        return PretrainingSpec(**{**read_settings(path, recipe), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BrainMVPError(f"{where or 'The specification'}: {first['msg']}. Correct the value.") from error
