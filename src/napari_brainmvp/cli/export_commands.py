"""``brainmvp models export``, ``push`` and ``pull``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from napari_brainmvp.cli.console import say

__all__ = ["export", "pull", "push"]

NameArgument = Annotated[str, typer.Argument(help="Model name or folder.")]


class Format(StrEnum):
    """What a model can be exported as."""

    monai_bundle = "monai-bundle"
    safetensors = "safetensors"


def export(
    name: NameArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make; must not exist.")],
    kind: Annotated[
        Format, typer.Option("--format", help="monai-bundle (segmentation models) or safetensors with its card.")
    ] = Format.monai_bundle,
) -> None:
    """Write a model for use elsewhere."""
    from napari_brainmvp.models import find_model
    from napari_brainmvp.models.bundle import export_bundle
    from napari_brainmvp.models.sharing import export_folder

    write = export_bundle if kind is Format.monai_bundle else export_folder
    say(f"Wrote {write(find_model(name), out)}")


def push(
    name: NameArgument,
    destination: Annotated[str, typer.Argument(help="A folder, or hf:USER/REPOSITORY (needs the network).")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
) -> None:
    """Give a model to a shared folder or to the Hugging Face Hub."""
    from napari_brainmvp.models import find_model
    from napari_brainmvp.models.sharing import push_model

    say(f"Pushed to {push_model(find_model(name), destination, private=not public)}")


def pull(
    source: Annotated[str, typer.Argument(help="A model folder, or hf:USER/REPOSITORY (needs the network).")],
    name: Annotated[str, typer.Option(help="Name in the registry; default the model's own.")] = "",
) -> None:
    """Fetch a model from a shared folder or from the Hugging Face Hub into your models."""
    from napari_brainmvp.models.sharing import pull_model

    say(f"Pulled as {pull_model(source, name or None).card.name!r}.")
