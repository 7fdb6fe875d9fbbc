"""Start a network from another model's weights, whatever that was trained for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from napari_brainmvp.errors import ModelError
from napari_brainmvp.models import LoadedModel, ModelCard, NetworkSpec
from napari_brainmvp.models.weights import build_network
from napari_brainmvp.networks import (
    UNIFORMER_COMPACT,
    UNIFORMER_SMALL,
    EncoderSpec,
    SegmentationDecoder,
    SegmentationNetwork,
)
from napari_brainmvp.training.cache import CachedStudy
from napari_brainmvp.training.finetuning.data import choose_modalities
from napari_brainmvp.training.finetuning.spec import FinetuneSpec

__all__ = [
    "Transfer",
    "class_network",
    "copy_classes",
    "count_classes",
    "encoder_of",
    "has_exclusive_classes",
    "input_modalities",
    "network_spec",
    "same_output",
    "transfer",
]

_STEMS = ("encoder.patch_embed1.proj.weight", "decoder.proj1.proj.weight")
"""Convolutions of the raw input: their second axis is modalities."""
_HEAD = "decoder.out.conv.conv."
COMPACT_FULL_RESOLUTION = 16
"""Channels of the decoder at full resolution with the compact encoder, as in the shipped models."""


@dataclass(frozen=True)
class Transfer:
    """What became of a network's tensors.

    Parameters
    ----------
    taken, adapted, new : tuple of str
        Names of tensors that are the source's, that were made from the source's by averaging, choosing or dealing out
        channels, and that keep their random start.
    """

    taken: tuple[str, ...]
    adapted: tuple[str, ...]
    new: tuple[str, ...]

    @property
    def has_head(self) -> bool:
        """Whether every output channel was known to the source."""
        return f"{_HEAD}weight" in self.taken

    @property
    def all_from_source(self) -> bool:
        """Whether everything that inference needs is the source's, so that training goes on from what it does."""
        return not self.adapted and all(name.startswith("ms_out.") for name in self.new)

    @property
    def widened(self) -> bool:
        """Whether the encoder's first convolution sees other modalities than it was trained on."""
        return _STEMS[0] in self.adapted


def encoder_of(source: LoadedModel | None, size: str) -> EncoderSpec:
    """Return the sizes of a model's encoder, or those called ``"compact"`` or ``"small"``.

    Raises
    ------
    ModelError
        The model has another kind of encoder.
    """
    if source is None:
        return UNIFORMER_COMPACT if size == "compact" else UNIFORMER_SMALL
    spec = source.card.network
    if spec.architecture != "uniformer":
        raise ModelError(f"{source.card.name} has the architecture {spec.architecture}: choose a uniformer model.")
    return EncoderSpec(channels=spec.channels, depths=spec.depths, head_size=spec.head_size, mlp_ratio=spec.mlp_ratio)


def network_spec(source: LoadedModel | None, size: str, in_channels: int, out_channels: int, deep: bool) -> NetworkSpec:
    """Describe the segmentation network that a model's weights fit into."""
    full = source.card.network.full_resolution_channels if source is not None else None
    encoder = encoder_of(source, size)
    if source is None and encoder == UNIFORMER_COMPACT:
        full = COMPACT_FULL_RESOLUTION
    return NetworkSpec(
        in_channels=in_channels,
        out_channels=out_channels,
        full_resolution_channels=full,
        deep_supervision=deep,
        **encoder.model_dump(),
    )


@torch.no_grad()
def transfer(
    network: nn.Module,
    source: LoadedModel,
    modalities: Sequence[str],
    channels: Sequence[str] = (),
    *,
    encoder_only: bool = False,
) -> Transfer:
    """Copy weights by name, in place.

    Stems are made channel by channel: a modality the source has takes its own weights; any other takes the mean over
    the source's. Filters of a single-modality stem are dealt out, each looking at one modality: the same image in all
    channels gives what the source gave for it, and modalities stay apart, which they do not where every filter
    averages over all. Output channels are taken over where their names are the same and decided in the same way;
    everything else keeps its random start.

    Parameters
    ----------
    network : Module
        A segmentation or classification network with an encoder of the source's sizes.
    source : LoadedModel
    modalities : sequence of str
        Input channels of ``network``.
    channels : sequence of str
        Names of its output channels.
    encoder_only : bool
        Leave the decoder at its random start. With few labelled cases a pre-trained decoder helps; with many it is
        slower to change than a random one.
    """
    given = _names_of_segmentation(source.network.state_dict())
    if encoder_only:
        given = {key: value for key, value in given.items() if key.startswith("encoder.")}
    state = network.state_dict()
    taken: list[str] = []
    adapted: list[str] = []
    new: list[str] = []
    for key, tensor in state.items():
        value = given.get(key)
        if value is not None and key in _STEMS and tensor.shape[0] == value.shape[0]:
            stem = _stem(value, source.card, modalities)
            same = stem.shape == value.shape and bool((stem == value).all())
            (taken if same else adapted).append(key)
            state[key] = stem
        elif key.startswith(_HEAD):
            rows = _same_channels(source.card, channels)
            if isinstance(network, SegmentationNetwork) and network.unions is not None:
                rows = {row: row for row in range(len(tensor))}  # its classes are the source's
            if value is not None and rows and tensor.shape[1:] == value.shape[1:]:
                for row, old in rows.items():
                    tensor[row] = value[old]
            (taken if len(rows) == len(tensor) else adapted if rows else new).append(key)
        elif value is not None and value.shape == tensor.shape:
            state[key] = value
            taken.append(key)
        else:
            new.append(key)
    network.load_state_dict(state)
    return Transfer(tuple(taken), tuple(adapted), tuple(new))


def _names_of_segmentation(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a pre-training network's tensors to the segmentation network's."""
    return {re.sub(r"^encoder\.uniformer\.", "encoder.", key): value for key, value in state.items()}


def _stem(weight: Tensor, card: ModelCard, modalities: Sequence[str]) -> Tensor:
    """Make the stem (O, C', ...) for other modalities from a stem (O, C, ...)."""
    if weight.shape[1] == 1:
        filters, channels = torch.arange(len(weight)), torch.arange(len(modalities))
        looks = filters[:, None] % len(modalities) == channels
        return weight * looks[:, :, None, None, None].to(weight.dtype)
    order = list(card.modalities)
    mean = weight.mean(1, keepdim=True)
    columns = [weight[:, order.index(m)][:, None] if m in order else mean for m in modalities]
    return torch.cat(columns, 1)


def _same_channels(card: ModelCard, channels: Sequence[str]) -> dict[int, int]:
    """Pair output channels of the same name, new to old; regions and exclusive labels do not mix."""
    if card.network.parts or card.task != "segmentation" or _exclusive(card) != ("background" in channels):
        return {}
    old = _channel_names(card)
    return {row: old.index(name.lower()) for row, name in enumerate(channels) if name.lower() in old}


def same_output(card: ModelCard, channels: Sequence[str]) -> bool:
    """Tell whether a segmentation model's output channels have these names in this order, decided in the same way."""
    return _exclusive(card) == ("background" in channels) and _channel_names(card) == [c.lower() for c in channels]


def has_exclusive_classes(card: ModelCard) -> bool:
    """Tell whether a model tells apart exclusive classes, whatever its output channels make of them."""
    return card.task == "segmentation" and (_exclusive(card) or bool(card.network.parts))


def count_classes(card: ModelCard) -> int:
    """Count a segmentation model's exclusive classes, the background being the first; 0 where it has none."""
    if card.network.parts:
        return len(card.network.parts)
    return card.network.out_channels if has_exclusive_classes(card) and card.channels[0] == 0 else 0


def class_network(source: LoadedModel, modalities: Sequence[str]) -> SegmentationNetwork:
    """Make a segmentation model's network for these modalities, with its exclusive classes as output channels."""
    spec = source.card.network
    count = len(spec.parts) or spec.out_channels
    update = {"in_channels": len(modalities), "out_channels": count, "parts": (), "deep_supervision": False}
    card = source.card.model_copy(update={"network": spec.model_copy(update=update)})
    network = build_network(card)
    assert isinstance(network, SegmentationNetwork)
    transfer(network, source, modalities)
    copy_classes(network.decoder, source)
    return network


def copy_classes(decoder: SegmentationDecoder, source: LoadedModel) -> None:
    """Give a decoder the output layer of a segmentation model's, with all its classes."""
    head, given = decoder.out.state_dict(), source.network.state_dict()
    decoder.out.load_state_dict({key: given[f"decoder.out.{key}"] for key in head})


def _exclusive(card: ModelCard) -> bool:
    return card.activation == "softmax"


def _channel_names(card: ModelCard) -> list[str]:
    names = {0: "background", **{label.value: label.name.lower() for label in card.labels}}
    return [names[value] for value in card.channels]


def input_modalities(spec: FinetuneSpec, source: LoadedModel | None, studies: Sequence[CachedStudy]) -> tuple[str, ...]:
    """Return the input channels: those asked for, those of the model, or those most studies have."""
    if spec.modalities:
        return spec.modalities
    if source is not None and source.card.task == "segmentation":
        return source.card.modalities
    return choose_modalities(studies)
