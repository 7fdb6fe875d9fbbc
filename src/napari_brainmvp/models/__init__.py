"""Models: cards, the registry, weights, and the authors' checkpoints.

Cards and the registry need no torch; everything that does is imported with its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from napari_brainmvp.models.card import Label, Metric, ModelCard, NetworkSpec, name_digest
from napari_brainmvp.models.registry import (
    DEFAULT_ENCODER,
    DEFAULT_MODEL,
    ModelEntry,
    find_model,
    list_models,
    models_folder,
    remove_model,
)

if TYPE_CHECKING:
    from napari_brainmvp.models.official import import_model, load_official_checkpoint
    from napari_brainmvp.models.weights import LoadedModel, load_model, save_model

__all__ = [
    "DEFAULT_ENCODER",
    "DEFAULT_MODEL",
    "Label",
    "LoadedModel",
    "Metric",
    "ModelCard",
    "ModelEntry",
    "NetworkSpec",
    "find_model",
    "import_model",
    "list_models",
    "load_model",
    "load_official_checkpoint",
    "models_folder",
    "name_digest",
    "remove_model",
    "save_model",
]

_LAZY = {
    "LoadedModel": "weights",
    "load_model": "weights",
    "save_model": "weights",
    "import_model": "official",
    "load_official_checkpoint": "official",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"napari_brainmvp.models.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
