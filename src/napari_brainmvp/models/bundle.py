"""A segmentation model as a MONAI bundle: configuration, weights and metadata in the places MONAI expects."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from napari_brainmvp import __version__
from napari_brainmvp.io.atomic import make_folder
from napari_brainmvp.models.card import ModelCard
from napari_brainmvp.models.registry import ModelEntry
from napari_brainmvp.models.sharing import copy_model

__all__ = ["export_bundle"]

_SCHEMA_URL = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
_PARTS = "napari_brainmvp.inference.bundle"


def export_bundle(entry: ModelEntry, out: Path) -> Path:
    """Write a segmentation model as a MONAI bundle.

    Parameters
    ----------
    entry : ModelEntry
    out : Path
        Folder to make; must not exist. It appears complete or not at all.

    Returns
    -------
    Path
        ``out``, with ``configs/metadata.json``, ``configs/inference.json``, ``configs/schema.json`` to verify the
        metadata offline, ``models/model.pt`` (a state dict), the model itself beside it, and ``docs/README.md``.

    Raises
    ------
    ModelError
        It is no segmentation model, or it cannot be loaded.
    FileError
        The folder exists or cannot be written.
    """
    import torch

    from napari_brainmvp.models.weights import load_model

    loaded = load_model(entry)

    def fill(folder: Path) -> None:
        for name in ("configs", "models", "docs"):
            (folder / name).mkdir(parents=True)
        for path, content in (
            ("metadata.json", _metadata(entry.card)),
            ("inference.json", _inference(entry.card)),
            ("schema.json", _schema()),
        ):
            (folder / "configs" / path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        copy_model(entry, folder / "models", readme=False)
        torch.save(loaded.network.state_dict(), folder / "models" / "model.pt")
        (folder / "docs" / "README.md").write_text(_bundle_readme(entry.card), encoding="utf-8")
        (folder / "LICENSE").write_text(f"{entry.card.licence or 'See the source of the model.'}\n", encoding="utf-8")

    return make_folder(out, fill)


def _bundle_readme(card: ModelCard) -> str:
    return f"""# {card.title or card.name}

{card.description}

**{card.notice}**

A MONAI bundle made by napari-brainmvp {__version__}. Reading, preparation, windows and the way back to the scan's own
grid are classes of that package, so that the labels are those of `brainmvp segment`:

    pip install napari-brainmvp fire jsonschema

(`python -m monai.bundle` needs `fire`, and verifying needs `jsonschema`.)

`dataset_dir` is a study's folder with one file per modality ({", ".join(card.modalities)}; any may be missing but not
all), or a folder of such folders. Labels are written to `output_dir`.

    python -m monai.bundle run --config_file configs/inference.json --meta_file configs/metadata.json \\
        --bundle_root . --dataset_dir STUDIES --output_dir labels

`configs/schema.json` restates the fields that MONAI's specification of bundles asks for, so that the metadata can be
verified without a network. Name another file to fetch MONAI's own schema instead:

    python -m monai.bundle verify_metadata --meta_file configs/metadata.json --filepath configs/schema.json
"""


def _network_definition(card: ModelCard) -> dict[str, Any]:
    spec = card.network
    sizes = {"channels": spec.channels, "depths": spec.depths, "head_size": spec.head_size, "mlp_ratio": spec.mlp_ratio}
    return {
        "_target_": "napari_brainmvp.networks.SegmentationNetwork",
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "spec": {"_target_": "napari_brainmvp.networks.EncoderSpec", **sizes},
        "full_resolution_channels": spec.full_resolution_channels,
        "deep_supervision": spec.deep_supervision,
        **({"unions": _unions(card)} if spec.parts else {}),
    }


def _unions(card: ModelCard) -> dict[str, Any]:
    parts, overlapping = card.network.parts, card.activation == "sigmoid"
    return {"_target_": "napari_brainmvp.networks.Unions", "parts": parts, "overlapping": overlapping}


def _inference(card: ModelCard) -> dict[str, Any]:
    """Return the configuration that ``python -m monai.bundle run`` carries out."""
    return {
        "imports": ["$import torch", f"$from {_PARTS} import find_cases"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        "model": "$@bundle_root + '/models'",
        "ckpt_path": "$@bundle_root + '/models/model.pt'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "datalist": "$find_cases(@dataset_dir)",
        "network_def": _network_definition(card),
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [{"_target_": f"{_PARTS}.PrepareStudyd", "keys": "image", "model": "@model"}],
        },
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "inferer": {"_target_": f"{_PARTS}.WindowInferer", "model": "@model", "device": "@device", "overlap": 0.5},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": f"{_PARTS}.RestoreLabelsd", "keys": "pred", "model": "@model"},
                {"_target_": f"{_PARTS}.SaveLabelsd", "keys": "pred", "output_dir": "@output_dir"},
            ],
        },
        "evaluator": {
            "_target_": f"{_PARTS}.StudyEvaluator",
            "dataset": "@dataset",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        "initialize": ["$@network.load_state_dict(torch.load(@ckpt_path, map_location=@device, weights_only=True))"],
        "run": ["$@evaluator.run()"],
    }


def _metadata(card: ModelCard) -> dict[str, Any]:
    names = {0: "background", **{label.value: label.name for label in card.labels}}
    common = {"type": "image", "spatial_shape": ["*", "*", "*"], "dtype": "float32", "is_patch_data": True}
    return {
        "schema": _SCHEMA_URL,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by napari-brainmvp {__version__}"},
        "name": card.name,
        "monai_version": version("monai"),
        "pytorch_version": version("torch"),
        "numpy_version": version("numpy"),
        "required_packages_version": {"napari-brainmvp": __version__, "nibabel": version("nibabel")},
        "task": card.title or card.name,
        "description": card.description or card.title or card.name,
        "authors": "see the model's card",
        "copyright": card.licence or "see the model's card",
        "data_type": "nibabel",
        "intended_use": card.notice,
        "eval_metrics": {f"{m.name} ({m.data})": m.value for m in card.metrics},
        "network_data_format": {
            "inputs": {
                "image": {
                    **common,
                    "format": "magnitude",
                    "modality": "MR",
                    "num_channels": len(card.modalities),
                    "value_range": [],
                    "channel_def": {str(k): key for k, key in enumerate(card.modalities)},
                }
            },
            "outputs": {
                "pred": {
                    **common,
                    "format": "labels" if card.activation == "softmax" else "classes",
                    "num_channels": len(card.channels),
                    "value_range": [0, 1],
                    "channel_def": {str(k): names[value] for k, value in enumerate(card.channels)},
                }
            },
        },
    }


def _schema() -> dict[str, Any]:
    """Return a JSON schema of the metadata fields that MONAI's bundle specification asks for, in our words."""
    text, versions = {"type": "string", "minLength": 1}, {"type": "object", "additionalProperties": {"type": "string"}}
    tensor = {
        "type": "object",
        "properties": {
            "type": text,
            "format": text,
            "modality": text,
            "num_channels": {"type": "integer", "minimum": 1},
            "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}, "minItems": 1, "maxItems": 3},
            "dtype": text,
            "value_range": {"type": "array", "items": {"type": "number"}, "maxItems": 2},
            "is_patch_data": {"type": "boolean"},
            "channel_def": {"type": "object", "additionalProperties": text},
        },
        "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "is_patch_data", "channel_def"],
    }
    tensors = {"type": "object", "minProperties": 1, "additionalProperties": tensor}
    words = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description")
    fields = {name: text for name in (*words, "authors", "copyright")}
    data = {"type": "object", "properties": {"inputs": tensors, "outputs": tensors}, "required": ["inputs", "outputs"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Metadata of a MONAI bundle",
        "type": "object",
        "properties": {
            **fields,
            "changelog": versions,
            "required_packages_version": versions,
            "network_data_format": data,
        },
        "required": [*fields, "required_packages_version", "network_data_format"],
    }
