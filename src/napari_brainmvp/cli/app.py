"""The ``brainmvp`` command: thin, typed, and quick to answer because the engine is imported inside the commands."""

from __future__ import annotations

import json
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from napari_brainmvp.cli.console import named_scans, progress_bar, say, table
from napari_brainmvp.cli.evaluating import classify, evaluate
from napari_brainmvp.cli.export_commands import export, pull, push
from napari_brainmvp.cli.finetuning import finetune
from napari_brainmvp.cli.jobs_commands import jobs_app, submit
from napari_brainmvp.cli.reconstruct_commands import impute, reconstruct
from napari_brainmvp.errors import BrainMVPError, Cancelled

app = typer.Typer(
    name="brainmvp",
    help="Multi-modal brain MRI: segment, pre-train, make synthetic studies, manage models. Research use only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="List, show, import, export, share and remove models.", no_args_is_help=True)
app.add_typer(models_app, name="models")

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Model name or folder; default the one that ships.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]


class Lesion(StrEnum):
    """Kinds of synthetic lesions."""

    any = "any"
    none = "none"
    glioma = "glioma"
    ms = "ms"
    stroke = "stroke"


@app.callback()
def _root(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the engine's log.")] = False) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(levelname)s %(name)s: %(message)s")


@app.command()
def segment(
    study: Annotated[list[Path], typer.Argument(help="A study's folder, or its files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Label map to write (.nii or .nii.gz).")],
    model: ModelOption = "",
    scan: Annotated[list[str] | None, typer.Option(help="Say which file is which: t1c=FILE. Repeatable.")] = None,
    reference: Annotated[str, typer.Option(help="Modality on whose grid the result is given.")] = "",
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Also write class probabilities.")] = False,
    uncertainty: Annotated[bool, typer.Option("--uncertainty", help="Also write the uncertainty, 0 to 1.")] = False,
    volumes: Annotated[Path | None, typer.Option(help="Also write volumes in ml as CSV.")] = None,
    device: DeviceOption = "auto",
    mirror: Annotated[bool, typer.Option("--mirror", help="Average with the mirror image: slower, better.")] = False,
    overlap: Annotated[float, typer.Option(min=0.0, max=0.9, help="Overlap of neighbouring windows.")] = 0.5,
    impute: Annotated[bool, typer.Option("--impute", help="Impute missing modalities from the others first.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace output files that exist.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Segment a study and write the label map on the scan's own grid."""
    from napari_brainmvp.cli.segmenting import OutputPaths, as_report, write_outputs
    from napari_brainmvp.inference import SegmentOptions
    from napari_brainmvp.inference import segment as run
    from napari_brainmvp.io import read_study
    from napari_brainmvp.models import DEFAULT_ENCODER

    paths = OutputPaths.beside(out, probabilities=probabilities, uncertainty=uncertainty, volumes=volumes)
    named = named_scans(scan or ())
    source: Path | list[Path] = study[0] if len(study) == 1 else study
    loaded = read_study(source, modalities=named, reference=reference or None)
    paths.check(overwrite, loaded)
    options = SegmentOptions(
        device=device,
        overlap=overlap,
        mirror=mirror,
        probabilities=probabilities,
        uncertainty=uncertainty,
        impute=DEFAULT_ENCODER if impute else "",
    )
    with progress_bar(quiet=as_json) as progress:
        result = run(loaded, model or None, options, progress)
    write_outputs(result, paths, like=loaded.scans[loaded.reference].path)
    if as_json:
        say(json.dumps(as_report(result, paths.labels)))
        return
    rows = [(str(s.value), s.name, f"{s.volume_ml:.1f}") for s in result.structures]
    table(f"{loaded.name}: {result.model} on {result.device}, {result.seconds:.0f} s", ("", "Structure", "ml"), rows)
    for warning in result.warnings:
        say(f"Note: {warning}")
    say(f"Wrote {', '.join(str(path) for path in paths.all())}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the study, the result and the picture.")] = Path(
        "demo"
    ),
    model: ModelOption = "",
    device: DeviceOption = "auto",
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open napari when there is a display.")] = True,
) -> None:
    """Make a synthetic glioma study, segment it, and show or draw the result."""
    from napari_brainmvp.cli.demo import run_demo

    with progress_bar() as progress:
        made = run_demo(out, model or None, device, progress)
    for line in made.lines:
        say(line)
    if show and made.can_open_napari():
        say("Opening napari. Close its window to return.")
        made.open_napari()


@app.command()
def synth(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the dataset; must be empty or new.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Number of studies.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same studies.")] = 0,
    lesion: Annotated[Lesion, typer.Option(help="Kind of lesion.")] = Lesion.any,
    modalities: Annotated[str, typer.Option(help="Comma-separated modality keys.")] = "t1,t1c,t2,flair",
    device: DeviceOption = "cpu",
) -> None:
    """Write a dataset of synthetic studies, named like BraTS, with their true labels."""
    from napari_brainmvp.cli.synthesising import write_dataset
    from napari_brainmvp.synthesis import SynthesisSpec

    keys = tuple(key.strip() for key in modalities.split(",") if key.strip())
    with progress_bar() as progress:
        write_dataset(out, n, seed, SynthesisSpec(keys, lesion.value), device, progress)
    say(f"Wrote {n} studies to {out}; dataset.json says what the labels mean.")


@models_app.command("list")
def list_command() -> None:
    """List the installed models."""
    from napari_brainmvp.models import list_models

    rows = [
        (e.card.name, e.card.task, ", ".join(e.card.modalities), "shipped" if e.shipped else str(e.folder))
        for e in list_models()
    ]
    table("Models", ("Name", "Task", "Modalities", "Where"), rows)


@models_app.command("show")
def show_command(name: Annotated[str, typer.Argument(help="Model name or folder.")]) -> None:
    """Print a model's card as JSON."""
    from napari_brainmvp.models import find_model

    say(find_model(name).card.model_dump_json(indent=2))


@models_app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(help="A checkpoint of the authors (.pt, .pth), or a model folder.")],
    name: Annotated[str, typer.Option(help="Name in the registry; default from the file's name.")] = "",
    modalities: Annotated[str, typer.Option(help="Input channels in order, for example flair,t1c,t1,t2.")] = "",
) -> None:
    """Copy a model into the registry; checkpoints are converted and get a card."""
    from napari_brainmvp.models import import_model

    keys = tuple(key.strip() for key in modalities.split(",") if key.strip())
    say(f"Imported as {import_model(file, name or None, keys or None).card.name!r}.")


@models_app.command("remove")
def remove_command(name: Annotated[str, typer.Argument(help="Model name.")]) -> None:
    """Delete a model from your models folder."""
    from napari_brainmvp.models import remove_model

    say(f"Removed {remove_model(name)}")


@app.command()
def info() -> None:
    """Show versions, devices and paths."""
    from napari_brainmvp.cli.information import information

    table("napari-brainmvp", ("", ""), information())


@app.command()
def pretrain(
    spec: Annotated[Path | None, typer.Argument(help="YAML file of settings; options go before it.")] = None,
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run: logs, checkpoints, model.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Folder, .json datalist or synthetic:N; @2 doubles it.")
    ] = None,
    base: Annotated[str, typer.Option(help="Folder a datalist's paths start from; default its own.")] = "",
    recipe: Annotated[str, typer.Option(help="compact, default, paper or release.")] = "",
    max_steps: Annotated[int, typer.Option(help="Updates in all; 0 for the recipe's.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint; start if none.")] = False,
    devices: Annotated[int, typer.Option(help="Devices on each node; 0 for the recipe's.")] = 0,
    nodes: Annotated[int, typer.Option(help="Nodes; 0 for the recipe's.")] = 0,
    strategy: Annotated[str, typer.Option(help="As Lightning names it, for example ddp.")] = "",
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting: NAME=VALUE. Repeatable.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the model; default the folder's.")] = "",
    cache: Annotated[Path | None, typer.Option(help="Folder for prepared studies.")] = None,
    background: Annotated[bool, typer.Option("--background", help="Submit a job and return: brainmvp jobs.")] = False,
) -> None:
    """Pre-train an encoder on unlabelled studies by the three tasks of BrainMVP."""
    from napari_brainmvp.cli.pretraining import chosen_spec, run_pretraining, settings, sources
    from napari_brainmvp.jobs import free_name

    changes = settings(change or ())
    options = {"max_steps": max_steps, "devices": devices, "nodes": nodes, "strategy": strategy}
    changes |= {key: value for key, value in options.items() if value}
    if data:
        changes["data"] = sources(data, base)
    if background == (out is not None) or (background and resume):
        raise BrainMVPError("Say --out FOLDER; or --background alone: a job has its folder, and brainmvp jobs resume.")
    run = chosen_spec(out, spec, recipe, changes, resume=resume)
    if out is None:
        submit("pretrain", run, name or free_name("encoder"), cache)
    else:
        run_pretraining(run, out, resume=resume, name=name, cache=cache)


app.add_typer(jobs_app, name="jobs")


app.command("reconstruct")(reconstruct)
app.command("impute")(impute)
models_app.command("export")(export)
models_app.command("push")(push)
models_app.command("pull")(pull)


app.command("finetune")(finetune)
app.command("evaluate")(evaluate)
app.command("classify")(classify)


def main() -> None:
    """Run the command line: exit status 0, 2 for a user's error (one line), 1 for a bug, 130 for Ctrl-C."""
    try:
        app(standalone_mode=True)
    except BrainMVPError as error:
        sys.stderr.write(f"brainmvp: {error}\n")
        sys.exit(130 if isinstance(error, Cancelled) else 2)
    except OSError as error:
        if error.filename is None:
            raise
        sys.stderr.write(f"brainmvp: {error.filename}: {error.strerror}; check the path and its permissions.\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("brainmvp: interrupted; nothing half-written was left.\n")
        sys.exit(130)
