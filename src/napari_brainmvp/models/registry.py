"""Which models there are: those that ship and those in the user's folder. No torch here."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from pydantic import ValidationError

from napari_brainmvp.errors import FileError, ModelError
from napari_brainmvp.models.card import ModelCard
from napari_brainmvp.resources import resource_path

__all__ = [
    "CARD_FILE",
    "DEFAULT_ENCODER",
    "DEFAULT_MODEL",
    "WEIGHTS_FILE",
    "ModelEntry",
    "find_model",
    "list_models",
    "models_folder",
    "read_card",
    "remove_model",
]

CARD_FILE, WEIGHTS_FILE = "card.json", "model.safetensors"
DEFAULT_MODEL = "brain-tissue-lesion"
"""The segmentation model that ships and that is used when none is named."""
DEFAULT_ENCODER = "brain-encoder"
"""The pre-trained model that ships and that is used when none is named."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelEntry:
    """A model on disk.

    Parameters
    ----------
    card : ModelCard
    folder : Path
        Holds ``card.json`` and ``model.safetensors``.
    shipped : bool
        Part of the installation: cannot be removed.
    """

    card: ModelCard
    folder: Path
    shipped: bool

    @property
    def weights(self) -> Path:
        """The weights file."""
        return self.folder / WEIGHTS_FILE


def models_folder() -> Path:
    """Return the user's model folder: ``$BRAINMVP_HOME/models``, else in the platform's data directory."""
    home = os.environ.get("BRAINMVP_HOME")
    return (Path(home) if home else Path(platformdirs.user_data_dir("brainmvp", appauthor=False))) / "models"


def read_card(folder: Path) -> ModelCard:
    """Read and validate the card of a model folder.

    Raises
    ------
    ModelError
        There is no card, or it is not a valid one.
    """
    path = folder / CARD_FILE
    try:
        return ModelCard.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror}): a model is a folder with a {CARD_FILE}."
        ) from error
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is not valid JSON (line {error.lineno}): restore the card.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "card"
        raise ModelError(f"{path}: {where}: {first['msg']}. Correct the card.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not text in UTF-8 ({error}): restore the card.") from error


def list_models() -> list[ModelEntry]:
    """List all models with a valid card, shipped ones first; a broken one is logged and left out."""
    entries = []
    for root, shipped in ((_shipped_folder(), True), (models_folder(), False)):
        for folder in _folders(root):
            try:
                if (folder / CARD_FILE).is_file():
                    entries.append(ModelEntry(read_card(folder), folder, shipped))
            except (ModelError, OSError) as error:
                logger.warning("%s", error)
    return entries


def _folders(root: Path | None) -> list[Path]:
    try:
        return sorted(root.iterdir()) if root is not None and root.is_dir() else []
    except OSError as error:
        logger.warning("%s", error)
        return []


def _shipped_folder() -> Path | None:
    try:
        return resource_path("models")
    except FileError:
        return None


def find_model(name: str | Path | None = None) -> ModelEntry:
    """Find a model by name or by its folder.

    Parameters
    ----------
    name : str or Path, optional
        A registered name or a path to a model folder; default :data:`DEFAULT_MODEL`.

    Raises
    ------
    ModelError
        There is no such model; the message lists those there are.
    """
    wanted = str(name or DEFAULT_MODEL)
    named = [entry for entry in list_models() if entry.card.name == wanted]
    if named:
        return min(named, key=lambda entry: entry.folder.name != wanted)  # a copy of its folder comes after it
    folder = Path(wanted).expanduser()
    if (folder / CARD_FILE).is_file():
        return ModelEntry(read_card(folder), folder.resolve(), shipped=False)
    known = ", ".join(entry.card.name for entry in list_models()) or "none"
    raise ModelError(f"There is no model {wanted!r}. Installed: {known}. Name one of them or a model folder.")


def remove_model(name: str) -> Path:
    """Delete a model from the user's folder and return where it was.

    Raises
    ------
    ModelError
        There is no such model, or it is part of the installation.
    """
    entry = find_model(name)
    if entry.shipped or entry.folder.parent.resolve() != models_folder().resolve():
        raise ModelError(f"{name!r} is not in {models_folder()}: only models there can be removed.")
    shutil.rmtree(entry.folder)
    return entry.folder
