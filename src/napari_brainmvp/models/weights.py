"""A model's weights: safetensors, checked against the card before anything runs."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from napari_brainmvp.errors import FileError, ModelError
from napari_brainmvp.models.card import ModelCard, Task
from napari_brainmvp.models.registry import CARD_FILE, WEIGHTS_FILE, ModelEntry
from napari_brainmvp.networks import (
    ClassificationNetwork,
    EncoderSpec,
    ModalityTemplates,
    PretrainingNetwork,
    ReconstructionNetwork,
    SegmentationNetwork,
    UNet3DPretrainingNetwork,
    Unions,
)

__all__ = ["LoadedModel", "build_network", "load_model", "save_model"]

_TEMPLATES = "templates.volumes"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Parameters
    ----------
    card : ModelCard
    network : Module
        In eval mode, float32, on the CPU.
    templates : ModalityTemplates or None
        One volume per modality of the card.
    """

    card: ModelCard
    network: nn.Module
    templates: ModalityTemplates | None


def build_network(card: ModelCard) -> nn.Module:
    """Make the untrained network a card describes.

    Raises
    ------
    ModelError
        The sizes contradict each other, or the architecture has no network for the card's task.
    """
    spec = card.network
    if spec.architecture == "unet3d" and card.task == "pretraining":
        return UNet3DPretrainingNetwork(spec.in_channels, spec.channels[0])
    if spec.architecture != "uniformer":
        raise ModelError(f"There is no {card.task} network of architecture {spec.architecture!r}.")
    try:
        encoder = EncoderSpec(
            channels=spec.channels, depths=spec.depths, head_size=spec.head_size, mlp_ratio=spec.mlp_ratio
        )
    except ValueError as error:
        raise ModelError(f"The card's network sizes do not fit together: {error}.") from error
    if card.task == "classification":
        return ClassificationNetwork(
            len(card.modalities), spec.out_channels, encoder, spec.in_channels, spec.hidden, spec.tissues,
            spec.full_resolution_channels,
        )  # fmt: skip
    if card.task == "pretraining" and spec.decoder == "skips":
        return ReconstructionNetwork(card.modalities, encoder, spec.full_resolution_channels)
    if card.task == "pretraining":
        return PretrainingNetwork(encoder, spec.in_channels)
    unions = Unions(spec.parts, card.activation == "sigmoid") if spec.parts else None
    return SegmentationNetwork(
        spec.in_channels, spec.out_channels, encoder, spec.full_resolution_channels, spec.deep_supervision, unions
    )


def save_model(folder: Path, card: ModelCard, network: nn.Module, templates: ModalityTemplates | None = None) -> Path:
    """Write a model folder: weights and the card with their hash.

    Weights are stored in half precision, but for batch normalisation's statistics, which may be larger than it can
    hold. The folder appears complete or not at all.

    Parameters
    ----------
    folder : Path
        Must not exist.
    card : ModelCard
        Its ``sha256`` and ``versions`` are filled in.
    network, templates
        What to store.

    Raises
    ------
    ModelError
        A tensor holds values that are not finite.
    FileError
        The folder exists, or cannot be written.
    """
    if folder.exists():
        raise FileError(f"{folder} already exists: choose another name or remove that model first.")
    tensors = {key: _compact(key, value) for key, value in network.state_dict().items()}
    if templates is not None:
        tensors[_TEMPLATES] = _compact(_TEMPLATES, templates.volumes)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        partial.mkdir(parents=True)
        save_file(tensors, partial / WEIGHTS_FILE)
        versions = {"python": platform.python_version(), "torch": version("torch")}
        signed = card.model_copy(update={"sha256": _sha256(partial / WEIGHTS_FILE), "versions": versions})
        (partial / CARD_FILE).write_text(signed.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors writes for its owner only
            with path.open("rb") as file:
                os.fsync(file.fileno())
        partial.rename(folder)
    except OSError as error:
        raise FileError(
            f"{folder} cannot be written ({error.strerror}): free space or choose another place."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _compact(key: str, value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    if not value.is_floating_point():
        return value
    stored = value.float() if key.endswith(("running_mean", "running_var")) else value.half()
    if not stored.isfinite().all():
        raise ModelError(
            f"The tensor {key} has values that are not finite in {stored.dtype}: the model is not written."
        )
    return stored


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model(entry: ModelEntry, task: Task = "segmentation") -> LoadedModel:
    """Load a model, after checking hash, names and shapes against its card.

    Parameters
    ----------
    entry : ModelEntry
    task : {"segmentation", "classification", "pretraining"}
        What it is wanted for.

    Raises
    ------
    ModelError
        It is a model for another task, the card and the weights disagree, or the weights cannot be read.
    """
    card = entry.card
    if card.task != task:
        raise ModelError(f"{card.name} is a {card.task} model: choose a {task} model.")
    network = build_network(card)
    tensors = _read(entry)
    volumes = tensors.pop(_TEMPLATES, None)
    expected = network.state_dict()
    wrong = sorted(set(expected) ^ set(tensors))
    wrong += sorted(k for k in set(expected) & set(tensors) if expected[k].shape != tensors[k].shape)
    if wrong:
        raise ModelError(
            f"{entry.weights} is not the network its card describes: {len(wrong)} tensors differ, first {wrong[0]!r}."
        )
    network.load_state_dict(tensors)
    return LoadedModel(card, network.eval().requires_grad_(False), _templates(entry, volumes))


def _read(entry: ModelEntry) -> dict[str, Tensor]:
    try:
        if _sha256(entry.weights) != entry.card.sha256:
            raise ModelError(
                f"{entry.weights} is not the file its card was written for (SHA-256 differs): import it again."
            )
        with safe_open(entry.weights, framework="pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ModelError(f"{entry.weights} is not a safetensors file ({error}): import the model again.") from error
    except OSError as error:
        raise ModelError(f"{entry.weights} cannot be read ({error.strerror}): import the model again.") from error
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def _templates(entry: ModelEntry, volumes: Tensor | None) -> ModalityTemplates | None:
    if volumes is None:
        if entry.card.fill_missing == "template":
            raise ModelError(f"{entry.weights} has no templates, but its card wants them for missing modalities.")
        return None
    if volumes.ndim != 4 or len(volumes) != len(entry.card.modalities):
        raise ModelError(f"{entry.weights} has templates of shape {tuple(volumes.shape)} for {entry.card.modalities}.")
    a, b, c = volumes.shape[1:]
    templates = ModalityTemplates(entry.card.modalities, (a, b, c)).requires_grad_(False)
    with torch.no_grad():
        templates.volumes.copy_(volumes)
    return templates
