"""``brainmvp finetune``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from napari_brainmvp.cli.console import say
from napari_brainmvp.cli.jobs_commands import submit
from napari_brainmvp.errors import BrainMVPError, FileError

if TYPE_CHECKING:
    from napari_brainmvp.training.finetuning.spec import FinetuneSpec

__all__ = ["finetune"]


class Task(StrEnum):
    """What a model is fine-tuned for."""

    segmentation = "segmentation"
    classification = "classification"


def finetune(
    out: Annotated[str, typer.Option("--out", "-o", help="Name of the new model.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Folder, BIDS tree, .json datalist or synthetic:N. Repeatable.")
    ] = None,
    task: Annotated[Task, typer.Option(help="What to learn.")] = Task.segmentation,
    init: Annotated[str, typer.Option(help="Model to start from, or scratch; default the one that ships.")] = "",
    preset: Annotated[str, typer.Option(help="minutes (the default), hour or paper.")] = "",
    labels: Annotated[
        str, typer.Option(help="Label description: file, brats or brats-ped; default dataset.json.")
    ] = "",
    participants: Annotated[str, typer.Option(help="Classes: a .tsv; default participants.tsv in the data.")] = "",
    column: Annotated[str, typer.Option(help="Column of the classes.")] = "",
    max_steps: Annotated[int, typer.Option(min=0, help="Updates in all; 0 for the preset's.")] = 0,
    folds: Annotated[int, typer.Option(min=0, help="Cross-validate first; 0 for not.")] = 0,
    run: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/NAME beside your models.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    background: Annotated[bool, typer.Option("--background", help="Train in a background job.")] = False,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting: NAME=VALUE. Repeatable.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for prepared studies.")] = None,
) -> None:
    """Fine-tune a model on a few annotated studies, or on studies with a class each."""
    from napari_brainmvp.cli.pretraining import FREE, progress_lines, resumed, settings, sources, stop_on_signals
    from napari_brainmvp.jobs import left_out
    from napari_brainmvp.models import find_model, list_models, models_folder
    from napari_brainmvp.models.card import check_model_name
    from napari_brainmvp.training.finetuning.spec import read_spec
    from napari_brainmvp.training.labels import read_labels
    from napari_brainmvp.training.sources import absolute_paths

    folder = run or models_folder().parent / "runs" / out
    spec: FinetuneSpec
    changes: dict[str, Any]
    if resume:
        if data or max_steps or preset:
            raise BrainMVPError(
                "A resumed run keeps its data, its preset and its length: leave out --data, --preset and --max-steps."
            )
        said: dict[str, Any] = {"init": init, "participants": participants, "column": column, "folds": folds}
        said["labels"] = read_labels(labels) if labels else None
        said["task"] = "" if task == Task.segmentation else task.value
        changes = {key: value for key, value in said.items() if value} | settings(change or ())
        spec = resumed(_started(folder), changes, FREE)
    else:
        if not data:
            raise BrainMVPError("No data: say --data FOLDER, with a folder of annotated studies.")
        changes = {"task": task.value, "data": sources(data, ""), **settings(change or ())}
        options = {"init": init, "participants": participants, "column": column, "max_steps": max_steps, "folds": folds}
        changes |= {key: value for key, value in options.items() if value}
        if labels:
            changes["labels"] = read_labels(labels)
        spec = absolute_paths(read_spec(preset or "minutes", changes))
    try:
        check_model_name(out)
    except ValueError as error:
        raise BrainMVPError(f"{error}.") from error
    if out in {entry.card.name for entry in list_models()}:
        raise BrainMVPError(f"There already is a model {out!r}: choose another --out, or remove it first.")
    if background:
        if run or resume:
            raise BrainMVPError("A job has its own folder: leave out --run and --resume (brainmvp jobs resume).")
        submit("finetune", spec, out, cache)
        return

    from napari_brainmvp.models import import_model
    from napari_brainmvp.training.finetuning.engine import finetune as train

    with progress_lines() as progress, stop_on_signals() as cancel:
        made = train(spec, folder, resume=resume, cache=cache, progress=progress, cancel=cancel)
    import_model(made, out)
    entry = find_model(out)
    for metric in entry.card.metrics:
        say(f"{metric.name}: {metric.value:.3f} ({metric.data}, n = {metric.n})")
    if note := left_out(folder):
        say(f"Note: {note}")
    say(f"Wrote model {out} ({entry.folder}).")


def _started(run: Path) -> FinetuneSpec:
    """Read the specification a run was started with."""
    from napari_brainmvp.training.finetuning.spec import FinetuneSpec

    path = run / "spec.json"
    if not path.is_file():
        raise FileError(f"{run} holds no run to resume: start one without --resume.")
    try:
        return FinetuneSpec(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise BrainMVPError(f"{path} is no fine-tuning run's specification ({error}).") from error
