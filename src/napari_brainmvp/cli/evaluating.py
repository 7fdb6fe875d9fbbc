"""``brainmvp evaluate`` and ``brainmvp classify``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from napari_brainmvp.cli.console import named_scans, progress_bar, say, table
from napari_brainmvp.errors import BrainMVPError, FileError, StudyError

if TYPE_CHECKING:
    from napari_brainmvp.io import StudyFiles
    from napari_brainmvp.models import ModelCard
    from napari_brainmvp.training.cache import Problem

__all__ = ["classify", "evaluate", "read_mappings"]


def classify(
    study: Annotated[list[Path], typer.Argument(help="A study's folder, or its files.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Classification model, by name or folder.")],
    saliency: Annotated[Path | None, typer.Option(help="Also write what speaks for the class (.nii.gz).")] = None,
    scan: Annotated[list[str] | None, typer.Option(help="Say which file is which: t1c=FILE. Repeatable.")] = None,
    target: Annotated[str, typer.Option("--class", help="That class; default the most probable one.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Classify a study with a model of one's own."""
    from napari_brainmvp.inference.classify import classify as run
    from napari_brainmvp.io import read_study, write_image

    if saliency is not None and saliency.exists():
        raise FileError(f"{saliency} exists: choose another name for --saliency.")
    loaded = read_study(study[0] if len(study) == 1 else study, modalities=named_scans(scan or ()))
    with progress_bar(quiet=as_json) as progress:
        result = run(loaded, model, saliency=saliency is not None, target=target, device=device, progress=progress)
    if saliency is not None and result.saliency is not None:
        like = loaded.scans[loaded.reference].path
        write_image(saliency, result.saliency, result.grid, like=like, description=f"for {result.saliency_class}")
    if as_json:
        report: dict[str, Any] = {
            "study": loaded.name,
            "model": result.model,
            "class": result.best,
            "probabilities": {name: round(p, 4) for name, p in result.probabilities.items()},
            "device": result.device,
            "seconds": round(result.seconds, 2),
            "warnings": list(result.warnings),
        }
        say(json.dumps(report))
        return
    rows = [(name, f"{p:.0%}") for name, p in sorted(result.probabilities.items(), key=lambda item: -item[1])]
    table(f"{loaded.name}: {result.model} on {result.device}, {result.seconds:.0f} s", ("Class", "Probability"), rows)
    for warning in result.warnings:
        say(f"Note: {warning}")


def evaluate(
    model: Annotated[list[str], typer.Option("--model", "-m", help="Model; repeat it to compare with the first.")],
    data: Annotated[list[Path], typer.Option(help="Folder, BIDS tree or .json datalist with answers. Repeatable.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="CSV to write: a line for each model, case and name.")],
    labels: Annotated[
        str, typer.Option(help="Label description: file, brats or brats-ped; default dataset.json.")
    ] = "",
    values: Annotated[
        list[str] | None,
        typer.Option("--map", help="The data's value for each of a model's: 4=2,5=1 or MODEL:4=2,5=1. Repeatable."),
    ] = None,
    participants: Annotated[str, typer.Option(help="Classes: a .tsv; default participants.tsv in the data.")] = "",
    column: Annotated[str, typer.Option(help="Column of the classes.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the CSV if it exists.")] = False,
) -> None:
    """Measure models on studies whose answer is known: Dice, HD95 and volumes, or accuracy, AUC and F1."""
    from napari_brainmvp.models import find_model, load_model

    if out.exists() and not overwrite:
        raise FileError(f"{out} exists: choose another name, or add --overwrite.")
    entries = {name: find_model(name) for name in dict.fromkeys(model)}
    first = next(iter(entries.values())).card
    if first.task not in ("segmentation", "classification"):
        raise BrainMVPError(f"{first.name} is a {first.task} model: choose a segmentation or classification model.")
    mappings = read_mappings(values or (), {name: entry.card for name, entry in entries.items()})
    models = {name: load_model(entry, first.task) for name, entry in entries.items()}
    data = list({path.expanduser().resolve(): path for path in data}.values())  # once, also if it is named twice
    sources, problems = _sources(data)
    studies = [files for listed in sources for _, files in listed]
    if not studies:
        why = f" The first problem: {problems[0].name}: {problems[0].reason}" if problems else ""
        raise StudyError(f"There is no study in {', '.join(map(str, data))}.{why}")
    if first.task == "segmentation":
        problems += _segmentations(models, studies, data, labels, mappings, device, out)
    else:
        classes = _classes(data, sources, participants, column)
        problems += _classifications(models, studies, classes, device, out)
    for problem in dict.fromkeys(problems):  # every model meets the same bad study
        say(f"Note: left out {problem.name}: {problem.reason}")
    say(f"Wrote {out}")


def _sources(data: Sequence[Path]) -> tuple[list[list[tuple[str, StudyFiles]]], list[Problem]]:
    """List the studies of every source: the name that each has there, and its files under a name that no other has."""
    from napari_brainmvp.training.cache import Problem
    from napari_brainmvp.training.sources import DataSource, find_files, unique_names

    found = [find_files(DataSource(path=str(path))) for path in data]
    names = unique_names([[*(f.name for f in listed), *(name for name, _ in bad)] for listed, bad in found], data)
    sources, problems = [], []
    for (listed, bad), given in zip(found, names, strict=True):
        sources.append([(f.name, replace(f, name=name)) for f, name in zip(listed, given, strict=False)])
        problems += [Problem(name, reason) for name, (_, reason) in zip(given[len(listed) :], bad, strict=True)]
    return sources, problems


def _classes(
    data: Sequence[Path], sources: Sequence[Sequence[tuple[str, StudyFiles]]], participants: str, column: str
) -> dict[str, str]:
    """Find the studies' classes, each in the table of its own source, or in the one that is named for all."""
    from napari_brainmvp.io import class_of, read_participants

    classes: dict[str, str] = {}
    for path, listed in zip(data, sources, strict=True):
        table = Path(participants) if participants else (path if path.is_dir() else path.parent) / "participants.tsv"
        said = read_participants(table, column)
        classes |= {files.name: found for name, files in listed if (found := class_of(name, said)) is not None}
    return classes


def read_mappings(texts: Sequence[str], cards: Mapping[str, ModelCard]) -> dict[str, dict[int, int]]:
    """Read what ``--map`` says: by model, the data's value for each of the model's.

    Parameters
    ----------
    texts : sequence of str
        ``4=2,5=1``, for all models; or ``MODEL:4=2,5=1``, for one.
    cards : mapping of str to ModelCard
        By the names that the models were asked for with.

    Raises
    ------
    BrainMVPError
        It is no such text, there is no such model, it does not paint such a value, or the models paint different
        values and it is not said which one is meant.
    """
    painted = {name: {label.value for label in card.labels} for name, card in cards.items()}
    mappings: dict[str, dict[int, int]] = {}
    for text in texts:
        name, _, pairs = text.rpartition(":")
        if name and name not in cards:
            raise BrainMVPError(f"--map {text}: {name} is none of the models {', '.join(cards)}: name one of them.")
        if not name and len({frozenset(values) for values in painted.values()}) > 1:
            example = f"--map {next(iter(cards))}:{pairs}"
            raise BrainMVPError(
                f"--map {text}: the models paint different values: say which one is meant, as {example}."
            )
        mapping = _mapping(text, pairs)
        for model in [name] if name else cards:
            if strange := sorted(set(mapping) - painted[model]):
                known = ", ".join(map(str, sorted(painted[model])))
                raise BrainMVPError(f"--map {text}: {model} does not paint {strange[0]}: it paints {known}.")
            if model in mappings:
                raise BrainMVPError(f"--map {text}: {model} has a --map already: put all pairs into one.")
            mappings[model] = mapping
    return mappings


def _segmentations(
    models: dict[str, Any],
    studies: list[StudyFiles],
    data: list[Path],
    labels: str,
    mappings: Mapping[str, dict[int, int]],
    device: str,
    out: Path,
) -> list[Problem]:
    from napari_brainmvp.inference import SegmentOptions
    from napari_brainmvp.io import write_text_atomic
    from napari_brainmvp.training.evaluation import compare_segmentations, evaluate_segmentation, scores_csv
    from napari_brainmvp.training.labels import LabelDescription, read_labels
    from napari_brainmvp.training.meaning import describe_labels
    from napari_brainmvp.training.sources import DataSource

    description = read_labels(labels) if labels else describe_labels([DataSource(path=str(path)) for path in data])
    description = description or LabelDescription.of_card(next(iter(models.values())).card)
    results: dict[str, Any] = {}
    left_out: list[Problem] = []
    with progress_bar() as progress:
        for name, loaded in models.items():
            options = SegmentOptions(device=device)
            results[name], problems = evaluate_segmentation(
                loaded, studies, description, values=mappings.get(name), options=options, progress=progress
            )
            left_out += problems
    write_text_atomic(out, scores_csv(results))
    rows = [
        (
            c.model,
            c.name,
            f"{c.dice:.3f}",
            f"{c.hd95:.1f}",
            f"{c.volume_error:.2f}",
            "" if c.p != c.p else f"{c.difference:+.3f} (p = {c.p:.3f})",
            str(c.n),
        )
        for c in compare_segmentations(results)
    ]
    table("Means over cases", ("Model", "Name", "Dice", "HD95, mm", "Error, ml", "Dice to the first", "n"), rows)
    return left_out


def _mapping(text: str, pairs: str) -> dict[int, int]:
    try:
        found = [(int(own), int(theirs)) for own, theirs in (pair.split("=") for pair in pairs.split(","))]
    except ValueError as error:
        raise BrainMVPError(
            f"--map {text}: write pairs of values, for example 4=2,5=1,6=4, or a model's name and a colon before them."
        ) from error
    if len(dict(found)) < len(found):
        raise BrainMVPError(f"--map {text}: names a value twice: keep one.")
    return dict(found)


def _classifications(
    models: dict[str, Any],
    studies: list[StudyFiles],
    classes: Mapping[str, str],
    device: str,
    out: Path,
) -> list[Problem]:
    import numpy as np

    from napari_brainmvp.io import write_text_atomic
    from napari_brainmvp.training.evaluation import classes_csv, evaluate_classification, mcnemar
    from napari_brainmvp.training.metrics import class_scores

    results, rows = {}, []
    left_out: list[Problem] = []
    with progress_bar() as progress:
        for name, loaded in models.items():
            results[name], problems = evaluate_classification(
                loaded, studies, classes, device=device, progress=progress
            )
            left_out += problems
    write_text_atomic(out, classes_csv(results))
    first = next(iter(results.values()))
    for number, (name, cases) in enumerate(results.items()):
        order = list(models[name].card.classes)
        probabilities = np.array([[case.probabilities[c] for c in order] for case in cases])
        scores = class_scores(probabilities, np.array([order.index(case.truth) for case in cases]))
        cells = [
            f"{value:.3f} ({low:.2f} to {high:.2f})"
            for value, (low, high) in (
                (scores.accuracy, scores.accuracy_ci),
                (scores.auc, scores.auc_ci),
                (scores.f1, scores.f1_ci),
            )
        ]
        rows.append((name, *cells, f"{mcnemar(first, cases):.3f}" if number else "", str(scores.n)))
    table("With 95 % bootstrap intervals", ("Model", "Accuracy", "AUC", "F1", "p to the first", "n"), rows)
    return left_out
