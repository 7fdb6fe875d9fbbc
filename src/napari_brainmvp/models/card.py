"""What a model says of itself: the card beside its weights. No torch here."""

from __future__ import annotations

import hashlib
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from napari_brainmvp.preparation.spec import PreparationSpec

__all__ = ["NOTICE", "Label", "Metric", "ModelCard", "NetworkSpec", "check_model_name", "name_digest"]

NOTICE = "For research use. Not a medical device; not for diagnosis or treatment."

Task = Literal["segmentation", "classification", "pretraining"]
_SIZE = Field(gt=0, le=4096)


class Label(BaseModel):
    """One structure a segmentation model paints.

    Parameters
    ----------
    value : int
        In label maps; 1 or more.
    name : str
    color : str
        ``"#rrggbb"``.
    meaning : str
        One line for tooltips.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: int = Field(gt=0, le=65535)
    name: str = Field(min_length=1)
    color: str = Field(pattern=r"^#[0-9a-fA-F]{6}$")
    meaning: str = ""


class NetworkSpec(BaseModel):
    """Which network, and how large.

    Parameters
    ----------
    architecture : {"uniformer", "unet3d"}
    in_channels, out_channels : int
        Modalities in; classes or regions out; of a pre-training model 1, or with ``skips`` a mean and
        a log variance for each modality.
    channels, depths, head_size, mlp_ratio
        Of the UniFormer encoder; see :class:`napari_brainmvp.networks.EncoderSpec`.
    full_resolution_channels : int or None
        Of the decoder at full resolution; None for those of the first stage.
    deep_supervision : bool
        Whether the weights hold the heads used in training only.
    decoder : {"plain", "skips"}
        Of a pre-training model: the published one, or the one that knows every modality.
    hidden : int
        Of a classification model: width of the head's perceptron; 0 for a linear head.
    tissues : int
        Of a classification model that looks at a segmentation: classes of that, with the background; otherwise 0.
    parts : tuple of tuple of int
        Of a segmentation model whose output channels are unions of exclusive classes: for each class, the channels it
        is part of; otherwise empty. See :class:`napari_brainmvp.networks.Unions`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Literal["uniformer", "unet3d"] = "uniformer"
    in_channels: int = _SIZE
    out_channels: int = _SIZE
    channels: tuple[int, int, int, int] = (64, 128, 320, 512)
    depths: tuple[int, int, int, int] = (3, 4, 8, 3)
    head_size: int = Field(64, gt=0)
    mlp_ratio: float = Field(4.0, gt=0, le=16)
    full_resolution_channels: int | None = Field(None, gt=0, le=4096)
    deep_supervision: bool = True
    decoder: Literal["plain", "skips"] = "plain"
    hidden: int = Field(0, ge=0, le=65536)
    tissues: int = Field(0, ge=0, le=4096)
    parts: tuple[tuple[int, ...], ...] = Field((), max_length=4096)


class Metric(BaseModel):
    """One measured number.

    Parameters
    ----------
    data : str
        What it was measured on.
    name : str
        For example ``"Dice, whole tumour"``.
    value : float
    n : int
        Cases.
    script : str
        What measured it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str
    name: str
    value: float
    n: int = Field(gt=0)
    script: str = ""


class ModelCard(BaseModel):
    """The card of a model; everything needed to run it, and to judge it.

    Parameters
    ----------
    name : str
        Folder name in the registry: lower-case letters, digits, dots, dashes, underscores.
    title, description : str
        For people.
    task : {"segmentation", "classification", "pretraining"}
    network : NetworkSpec
    modalities : tuple of str
        Input channels in order, by modality key.
    labels : tuple of Label
        What a segmentation paints, without the background.
    channels : tuple of int
        Label value of each output channel, in order. With ``"softmax"`` the background 0 is among them; with
        ``"sigmoid"`` each channel is a region, painted in this order, later ones over earlier ones.
    activation : {"softmax", "sigmoid"}
    classes : tuple of str
        What a classification model tells apart, in the order of its output channels.
    preparation : PreparationSpec
    patch_size : tuple of three int
        Window of the sliding window inference, voxels; in classification the shape the foreground box is resized to.
    fill_missing : {"template", "zero"}
        What stands in for a missing modality.
    template_frame : {"box", "centred"}
        Templates span the foreground box, or are a frame of voxels in whose centre the box lies (the release).
    template_minmax : bool
        Whether a template is normalised to 0..1 before use (the release).
    training : dict
        Data, recipe, script.
    metrics : tuple of Metric
    licence, notice : str
    sha256 : str
        Of ``model.safetensors``.
    versions : dict
        Libraries the model was made with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str = ""
    description: str = ""
    task: Task
    network: NetworkSpec
    modalities: tuple[str, ...] = Field(min_length=1)
    labels: tuple[Label, ...] = ()
    channels: tuple[int, ...] = ()
    activation: Literal["softmax", "sigmoid"] = "softmax"
    classes: tuple[str, ...] = ()
    preparation: PreparationSpec = PreparationSpec()
    patch_size: tuple[int, int, int] = (96, 96, 96)
    fill_missing: Literal["template", "zero"] = "zero"
    template_frame: Literal["box", "centred"] = "box"
    template_minmax: bool = False
    training: dict[str, Any] = Field(default_factory=dict)
    metrics: tuple[Metric, ...] = ()
    licence: str = ""
    notice: str = NOTICE
    sha256: str = ""
    versions: dict[str, str] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, name: str) -> str:
        return check_model_name(name)

    @field_validator("patch_size")
    @classmethod
    def _patch_fits_the_stride(cls, size: tuple[int, int, int]) -> tuple[int, int, int]:
        if any(n < 16 or n % 16 or n > 512 for n in size):
            raise ValueError(f"patch_size {size} must be multiples of 16 between 16 and 512")
        return size

    @model_validator(mode="after")
    def _parts_agree(self) -> ModelCard:
        if self.task == "classification":
            if len(self.classes) != self.network.out_channels or len(set(self.classes)) < 2:
                raise ValueError(
                    f"classes {self.classes} must be {self.network.out_channels} different names, at least 2"
                )
            if self.network.in_channels not in (1, len(self.modalities)):
                raise ValueError(f"{len(self.modalities)} modalities but {self.network.in_channels} input channels")
        tissues = self.network.tissues
        if tissues and (
            self.task != "classification" or tissues < 2 or self.network.in_channels != len(self.modalities)
        ):
            raise ValueError(f"tissues {tissues} are two or more, of a classification network that sees all modalities")
        if self.task != "segmentation":
            return self
        if len(self.modalities) != self.network.in_channels:
            raise ValueError(f"{len(self.modalities)} modalities but {self.network.in_channels} input channels")
        if len(self.channels) != self.network.out_channels:
            raise ValueError(f"{len(self.channels)} channel labels but {self.network.out_channels} output channels")
        self._check_parts()
        values = [label.value for label in self.labels]
        if len(set(values)) != len(values):
            raise ValueError(f"label values {values} are not unique")
        unknown = set(self.channels) - {0} - set(values)
        if unknown:
            raise ValueError(f"channels name label values {sorted(unknown)} that labels do not describe")
        return self

    def _check_parts(self) -> None:
        parts, count = self.network.parts, self.network.out_channels
        if not parts:
            return
        members = [sum(union in unions for unions in parts) for union in range(count)]
        strange = {union for unions in parts for union in unions} - set(range(count))
        alone = all(len(unions) == 1 for unions in parts)
        if strange or not all(0 < n < len(parts) for n in members) or not (alone or self.activation == "sigmoid"):
            raise ValueError(f"parts {parts} do not make up {count} output channels of {self.activation}")


def check_model_name(name: str) -> str:
    """Return a model's name, which is that of its folder, too.

    Raises
    ------
    ValueError
        It is none.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
        raise ValueError(f"{name!r} is not a model name: use up to 64 of a-z, 0-9, '.', '_' and '-'")
    return name


def name_digest(name: str) -> str:
    """Return 12 hexadecimal digits for a study's name: a card tells what it was trained on without naming anybody."""
    return hashlib.sha256(name.encode()).hexdigest()[:12]
