"""Import the authors' checkpoints, and model folders from elsewhere."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from napari_brainmvp.errors import ModelError
from napari_brainmvp.io import make_folder
from napari_brainmvp.models.card import Label, ModelCard, NetworkSpec, check_model_name
from napari_brainmvp.models.registry import CARD_FILE, ModelEntry, find_model, models_folder, read_card
from napari_brainmvp.models.weights import load_model, save_model
from napari_brainmvp.networks import EncoderSpec, ModalityTemplates, SegmentationNetwork
from napari_brainmvp.networks.pretraining import PretrainingNetwork
from napari_brainmvp.networks.unet3d import UNet3DPretrainingNetwork
from napari_brainmvp.preparation.spec import PreparationSpec
from napari_brainmvp.study import modality

__all__ = ["RELEASE_TEMPLATES", "import_model", "load_official_checkpoint"]

RELEASE_TEMPLATES = ("flair", "t1", "t1c", "t2", "mra", "pd", "dwi", "adc")
"""Order of the templates in the authors' pre-training checkpoints."""
_BRATS_ORDER = ("flair", "t1c", "t1", "t2")
_COLORS = ("#d1495b", "#f2c14e", "#2fbf9b", "#4a90d9", "#9b6dd6", "#e07a3f", "#6fb98f", "#c06c84")

# The release stores whole up-blocks, of which reconstruction uses the transposed convolutions only.
_UNUSED = re.compile(r"decoder\.(decoder[2-5]\.conv_block\.|proj1\.)")


def load_official_checkpoint(source: str | Path | Mapping[str, Any]) -> nn.Module:
    """Load a checkpoint of the authors as the network it belongs to.

    Parameters
    ----------
    source : path or mapping
        A ``.pt`` or ``.pth`` file, or what such a file holds: a state dict, bare or under ``"state_dict"``, with or
        without ``module.`` before its keys. Files are read with ``weights_only=True``: nothing in them is executed.

    Returns
    -------
    Module
        In eval mode. A :class:`SegmentationNetwork` maps (B, C, H, W, D) to logits (B, K, H, W, D); a
        :class:`PretrainingNetwork` or :class:`UNet3DPretrainingNetwork` has ``encode`` and ``reconstruct``, and the
        distilled ``templates`` where the checkpoint has them.

    Raises
    ------
    ModelError
        The file cannot be read safely, or its tensors are none of these networks.
    """
    state = _state_dict(source)
    if "encoder.uniformer.patch_embed1.proj.weight" in state:
        network, unused = _pretraining(state), _UNUSED
    elif "encoder.patch_embed1.proj.weight" in state:
        network, unused = _segmentation(state), None
    elif "conv1a.weight" in state:
        network, unused = _unet3d(state), None
    else:
        first = ", ".join(list(state)[:3]) or "nothing"
        raise ModelError(f"This is no BrainMVP checkpoint: it holds {first}… Give a pre-training or fine-tuned one.")
    templates = state.pop("rep_template", None)
    if templates is not None:
        state["templates.volumes"] = templates
    kept = {key: value for key, value in state.items() if unused is None or not unused.match(key)}
    _load(network, kept)
    return network.eval()


def _state_dict(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    content: Any = source
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise ModelError(f"{path} does not exist: check the path.") from error
        except pickle.UnpicklingError as error:
            raise ModelError(f"{path} holds more than weights: it is not opened, as that could run code.") from error
        except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise ModelError(f"{path} is not a PyTorch checkpoint, or is damaged ({error}).") from error
    if not isinstance(content, Mapping):
        raise ModelError(f"The checkpoint holds a {type(content).__name__}, not a state dict.")
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping):
        raise ModelError("The checkpoint's 'state_dict' is not a mapping of names to tensors.")
    tensors = {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def _encoder_spec(state: Mapping[str, Tensor], prefix: str) -> EncoderSpec:
    """Read the sizes of a UniFormer from the shapes of its tensors."""
    try:
        channels = tuple(len(state[f"{prefix}patch_embed{k}.proj.weight"]) for k in range(1, 5))
        hidden = len(state[f"{prefix}blocks1.0.mlp.fc1.weight"])
    except KeyError as error:
        raise ModelError(f"The checkpoint lacks {error.args[0]!r}: it is incomplete.") from error
    depths = tuple(
        len({k.split(".")[len(prefix.split("."))] for k in state if k.startswith(f"{prefix}blocks{stage}.")})
        for stage in range(1, 5)
    )
    head = 64 if all(c % 64 == 0 for c in channels[2:]) else 32
    try:
        return EncoderSpec(channels=channels, depths=depths, head_size=head, mlp_ratio=hidden / channels[0])
    except ValueError as error:
        raise ModelError(f"The checkpoint's encoder has sizes that do not fit together: {error}.") from error


def _templates(state: Mapping[str, Tensor]) -> ModalityTemplates | None:
    volumes = state.get("rep_template")
    if volumes is None:
        return None
    if volumes.ndim != 4:
        raise ModelError(f"The checkpoint's 'rep_template' has shape {tuple(volumes.shape)}, not (modality, x, y, z).")
    names = RELEASE_TEMPLATES if len(volumes) == 8 else tuple(f"modality{k}" for k in range(len(volumes)))
    a, b, c = volumes.shape[1:]
    return ModalityTemplates(names, (a, b, c))


def _pretraining(state: Mapping[str, Tensor]) -> nn.Module:
    channels = state["encoder.uniformer.patch_embed1.proj.weight"].shape[1]
    return PretrainingNetwork(_encoder_spec(state, "encoder.uniformer."), channels, _templates(state))


def _unet3d(state: Mapping[str, Tensor]) -> nn.Module:
    width, channels = state["conv1a.weight"].shape[:2]
    return UNet3DPretrainingNetwork(channels, width, _templates(state))


def _segmentation(state: Mapping[str, Tensor]) -> nn.Module:
    try:
        out, proj = state["decoder.out.conv.conv.weight"], state["decoder.proj1.proj.weight"]
    except KeyError as error:
        raise ModelError(f"The checkpoint lacks {error.args[0]!r}: it is not a segmentation network.") from error
    deep = "ms_out.0.weight" in state
    return SegmentationNetwork(proj.shape[1], len(out), _encoder_spec(state, "encoder."), len(proj), deep)


def _load(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    expected = network.state_dict()
    missing, unexpected = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    shapes = sorted(k for k in set(expected) & set(state) if expected[k].shape != state[k].shape)
    for what, keys in (("lacks", missing), ("has unexpected", unexpected), ("has wrong shapes for", shapes)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ModelError(f"The checkpoint {what} {', '.join(keys[:3])}{more}: it is another network or incomplete.")
    network.load_state_dict(dict(state))


def import_model(source: str | Path, name: str | None = None, modalities: Sequence[str] | None = None) -> ModelEntry:
    """Copy a model into the registry.

    Parameters
    ----------
    source : path
        A model folder, which is copied once it is checked; or a fine-tuned or pre-training checkpoint of the authors,
        which gets a card.
    name : str, optional
        Default the folder's or file's name.
    modalities : sequence of str, optional
        Input channels in order, for a fine-tuned checkpoint; default FLAIR, T1c, T1, T2.

    Raises
    ------
    ModelError
        The model cannot be used, or the name is taken or none.
    FileError
        It cannot be written.
    """
    path = Path(source).expanduser().absolute()  # a link to a file of another name goes by its own
    try:
        wanted = check_model_name(name or re.sub(r"[^a-z0-9._-]+", "-", _own_name(path).lower()).strip("-._"))
    except ValueError as error:
        raise ModelError(f"{error}: give it another --name.") from error
    target = models_folder() / wanted
    if target.exists():
        raise ModelError(f"A model {wanted!r} exists already: remove it, or choose another --name.")
    if path.is_dir():
        return _import_folder(path, wanted, target)
    network = load_official_checkpoint(path)
    try:
        card = _card(network, wanted, path.name, modalities)
    except ValueError as error:
        raise ModelError(f"{path.name} cannot be described: {error}") from error
    save_model(target, card, network)
    return find_model(wanted)


def _own_name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.stem


def _import_folder(path: Path, name: str, target: Path) -> ModelEntry:
    entry = ModelEntry(read_card(path), path, shipped=False)
    load_model(entry, entry.card.task)
    card = entry.card.model_copy(update={"name": name})

    def fill(folder: Path) -> None:
        shutil.copy2(entry.weights, folder)
        (folder / CARD_FILE).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")

    make_folder(target, fill)
    return find_model(name)


def _card(network: nn.Module, name: str, file: str, modalities: Sequence[str] | None) -> ModelCard:
    """Describe an imported checkpoint as far as its shapes tell."""
    common: dict[str, Any] = {
        "name": name,
        "description": f"Imported from {file}. Trained by the authors of the checkpoint, under their licence.",
        "preparation": PreparationSpec(intensity="percentile", symmetric=True, spacing=1.0, margin=0),
        "licence": "see the checkpoint's source",
    }
    if isinstance(network, UNet3DPretrainingNetwork | PretrainingNetwork):
        common |= {
            "preparation": PreparationSpec(intensity="percentile", symmetric=True, clip=True, margin=0),
            "template_frame": "centred",
            "template_minmax": True,
        }
    if isinstance(network, UNet3DPretrainingNetwork):
        width = network.conv1a.out_channels
        spec = NetworkSpec(
            architecture="unet3d",
            in_channels=network.conv1a.in_channels,
            out_channels=1,
            channels=(width, 2 * width, 4 * width, 8 * width),
        )
        return ModelCard(task="pretraining", network=spec, modalities=RELEASE_TEMPLATES, **common)
    if isinstance(network, PretrainingNetwork):
        encoder = network.encoder.uniformer
        spec = NetworkSpec(in_channels=encoder.in_channels, out_channels=1, **encoder.spec.model_dump())
        return ModelCard(task="pretraining", network=spec, modalities=RELEASE_TEMPLATES, **common)
    assert isinstance(network, SegmentationNetwork)
    encoder = network.encoder
    spec = NetworkSpec(
        in_channels=encoder.in_channels,
        out_channels=network.out_channels,
        full_resolution_channels=network.full_resolution_channels,
        deep_supervision=len(network.ms_out) > 0,
        **encoder.spec.model_dump(),
    )
    keys = [modality(key).key for key in modalities or _BRATS_ORDER[: encoder.in_channels]]
    labels = tuple(
        Label(
            value=k + 1, name=f"Region {k + 1}", color=_COLORS[k % len(_COLORS)], meaning="see the checkpoint's source"
        )
        for k in range(network.out_channels)
    )
    return ModelCard(
        task="segmentation",
        network=spec,
        modalities=tuple(keys),
        labels=labels,
        channels=tuple(label.value for label in labels),
        activation="sigmoid",
        **common,
    )
