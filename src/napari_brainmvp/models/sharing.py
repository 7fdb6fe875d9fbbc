"""Models for others: folders and the Hugging Face Hub. The network is used only where a Hub repository is named."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from napari_brainmvp.errors import BrainMVPError, ModelError
from napari_brainmvp.io.atomic import make_folder
from napari_brainmvp.models.card import ModelCard, name_digest
from napari_brainmvp.models.registry import CARD_FILE, WEIGHTS_FILE, ModelEntry, read_card

__all__ = [
    "copy_model",
    "export_folder",
    "path_digest",
    "plain_name",
    "pull_model",
    "push_model",
    "without_paths",
]

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


def copy_model(entry: ModelEntry, folder: Path, readme: bool = True) -> None:
    """Copy weights and card into a folder, without the paths in a card, and a README for people."""
    folder.mkdir(exist_ok=True)
    shutil.copy2(entry.weights, folder / WEIGHTS_FILE)
    training = dict(entry.card.training)
    if isinstance(training.get("recipe"), dict):  # an older card, or one of pre-training, names folders
        training["recipe"] = without_paths(training["recipe"])
    if isinstance(training.get("init"), str):
        training["init"] = plain_name(training["init"])
    card = entry.card.model_copy(update={"training": training})
    (folder / CARD_FILE).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if readme:
        (folder / "README.md").write_text(_readme(entry.card), encoding="utf-8")


def path_digest(path: str | Path) -> str:
    """Return 12 hexadecimal digits for a place on this machine, whose path may name people."""
    return name_digest(str(Path(path).expanduser().resolve()))


def plain_name(model: str) -> str:
    """Return a model's name, of a folder the last part."""
    return model if re.fullmatch(r"[\w.-]*", model) else re.split(r"[\\/]", model.rstrip("\\/"))[-1]


def without_paths(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a training run's specification for a card: files and folders by their digests, which name nobody.

    Parameters
    ----------
    recipe : mapping
        As JSON. ``data`` lists sources with a ``path`` (made-up studies, ``synthetic:N``, stay) and a ``base``;
        ``participants`` is a file; ``init`` a model's name or folder.
    """
    kept = dict(recipe)
    if isinstance(recipe.get("data"), list | tuple):
        kept["data"] = [_without_path(source) for source in recipe["data"]]
    if recipe.get("participants"):
        kept["participants"] = path_digest(recipe["participants"])
    if isinstance(recipe.get("init"), str):
        kept["init"] = plain_name(recipe["init"])
    return kept


def _without_path(source: Any) -> Any:
    if not isinstance(source, dict) or str(source.get("path", "synthetic:")).startswith("synthetic:"):
        return source
    rest = {key: value for key, value in source.items() if key not in ("path", "base")}
    return {"digest": path_digest(source["path"]), **rest}


def _readme(card: ModelCard) -> str:
    return (
        "---\nlibrary_name: napari-brainmvp\ntags: [medical, brain, mri]\n---\n\n"
        f"# {card.title or card.name}\n\n{card.description}\n\n**{card.notice}**\n\n"
        f"Task: {card.task}. Modalities: {', '.join(card.modalities)}. Licence: {card.licence or 'not stated'}.\n\n"
        f"`brainmvp models pull` takes this folder or repository. `{CARD_FILE}` describes the model in full.\n"
    )
