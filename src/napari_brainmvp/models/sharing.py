"""Models for others: folders and the Hugging Face Hub. The network is used only where a Hub repository is named."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from napari_brainmvp.errors import BrainMVPError, FileError, ModelError
from napari_brainmvp.models.card import ModelCard
from napari_brainmvp.models.registry import CARD_FILE, WEIGHTS_FILE, ModelEntry, read_card

__all__ = ["copy_model", "export_folder", "make_folder", "pull_model", "push_model"]

_HUB = "hf:"


def export_folder(entry: ModelEntry, out: Path) -> Path:
    """Copy a model with a README for people: safetensors and card.

    Parameters
    ----------
    entry : ModelEntry
    out : Path
        Folder to make; must not exist. It appears complete or not at all.

    Raises
    ------
    FileError
        It exists or cannot be written.
    """
    return make_folder(out, lambda folder: copy_model(entry, folder))


def push_model(entry: ModelEntry, destination: str, *, private: bool = True) -> str:
    """Give a model to a folder, or to a repository of the Hugging Face Hub.

    Parameters
    ----------
    entry : ModelEntry
    destination : str
        A folder, in which the model gets a folder of its name; or ``hf:USER/REPOSITORY``.
    private : bool
        Whether a repository that is made for it can be seen by its owner only.

    Returns
    -------
    str
        Where it went.

    Raises
    ------
    BrainMVPError
        The Hub cannot be used from here, or refuses.
    FileError
        The folder holds a model of that name, or cannot be written.
    """
    if not destination.startswith(_HUB):
        return str(export_folder(entry, Path(destination).expanduser() / entry.card.name))
    hub, repository = _hub(), _repository(destination)
    with tempfile.TemporaryDirectory() as temporary:
        folder = export_folder(entry, Path(temporary) / "model")
        try:
            hub.create_repo(repository, private=private, exist_ok=True)
            return str(hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add the model"))
        except (OSError, ValueError) as error:  # the Hub's own errors are OSErrors
            raise BrainMVPError(
                f"{destination} did not take the model ({_first_line(error)}): log in or retry."
            ) from error


def pull_model(source: str, name: str | None = None) -> ModelEntry:
    """Fetch a model from a folder or from the Hugging Face Hub into the registry, checked against its card.

    Parameters
    ----------
    source : str
        A model folder, or ``hf:USER/REPOSITORY``.
    name : str, optional
        In the registry; default the card's.

    Raises
    ------
    BrainMVPError
        The Hub cannot be used from here, or refuses.
    ModelError
        There is no model, it cannot be used, or the name is taken.
    """
    from napari_brainmvp.models.official import import_model

    if not source.startswith(_HUB):
        folder = Path(source).expanduser()
        return import_model(folder, name or read_card(folder).name)
    hub, repository = _hub(), _repository(source)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            hub.snapshot_download(repository, local_dir=temporary, allow_patterns=[CARD_FILE, WEIGHTS_FILE])
        except (OSError, ValueError) as error:
            raise BrainMVPError(
                f"{source} cannot be fetched ({_first_line(error)}): check name and network."
            ) from error
        return import_model(temporary, name or read_card(Path(temporary)).name)


def _hub() -> Any:
    if find_spec("huggingface_hub") is None:
        raise BrainMVPError("The package huggingface_hub is not installed: pip install huggingface_hub, then retry.")
    return import_module("huggingface_hub")


def _repository(address: str) -> str:
    repository = address.removeprefix(_HUB)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ModelError(f"{address!r} is not a repository: write hf:USER/REPOSITORY.")
    return repository


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def make_folder(out: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a folder beside ``out`` and rename it, so that it appears complete or not at all.

    Raises
    ------
    FileError
        It exists or cannot be written.
    """
    if out.exists():
        raise FileError(f"{out} already exists: choose another place or remove it first.")
    partial = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        partial.mkdir(parents=True)
        fill(partial)
        partial.rename(out)
    except OSError as error:
        raise FileError(f"{out} cannot be written ({error.strerror}): free space or choose another place.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def copy_model(entry: ModelEntry, folder: Path, readme: bool = True) -> None:
    """Copy weights and card into a folder, and a README for people."""
    folder.mkdir(exist_ok=True)
    shutil.copy2(entry.weights, folder / WEIGHTS_FILE)
    shutil.copy2(entry.folder / CARD_FILE, folder / CARD_FILE)
    if readme:
        (folder / "README.md").write_text(_readme(entry.card), encoding="utf-8")


def _readme(card: ModelCard) -> str:
    return (
        "---\nlibrary_name: napari-brainmvp\ntags: [medical, brain, mri]\n---\n\n"
        f"# {card.title or card.name}\n\n{card.description}\n\n**{card.notice}**\n\n"
        f"Task: {card.task}. Modalities: {', '.join(card.modalities)}. Licence: {card.licence or 'not stated'}.\n\n"
        f"`brainmvp models pull` takes this folder or repository. `{CARD_FILE}` describes the model in full.\n"
    )
