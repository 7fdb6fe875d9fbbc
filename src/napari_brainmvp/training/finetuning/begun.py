"""What a run works with: studies its network sees something of; resumed, those it began with, which mean the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from napari_brainmvp.errors import BrainMVPError, StudyError
from napari_brainmvp.io import write_text_atomic
from napari_brainmvp.training.cache import CachedStudy, Problem
from napari_brainmvp.training.checkpoints import has_checkpoint

__all__ = ["holds_run", "keep_studies", "lacks_all", "part_usable"]

_STUDIES = "studies.json"


def holds_run(run: Path) -> bool:
    """Tell whether a run was begun in a folder, with folds or without."""
    return (run / "model").exists() or any(has_checkpoint(folder) for folder in (run, *run.glob("fold-*")))


def keep_studies(run: Path, studies: Mapping[str, Sequence[str]], meaning: object) -> None:
    """Write down what a run begins with, or make sure that one which goes on has the same.

    Otherwise studies that were trained on could be measured as held out, and an output could change its meaning.

    Parameters
    ----------
    run : Path
    studies : mapping of str to sequence of str
        What tells the content of each study apart, by its name.
    meaning : object
        What labels or classes mean, and which modalities are the channels; of what JSON holds.

    Raises
    ------
    BrainMVPError
        Something changed.
    """
    path = run / _STUDIES
    now = json.loads(json.dumps({"studies": studies, "meaning": meaning}))
    if not (holds_run(run) and path.is_file()):
        write_text_atomic(path, json.dumps(now, indent=1) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    had, has = before["studies"], now["studies"]
    changes = [f"{name} is new" for name in has if name not in had]
    changes += [f"{name} is gone" for name in had if name not in has]
    changes += [f"{name} has changed" for name in has if name in had and had[name] != has[name]]
    if before["meaning"] != now["meaning"]:
        changes.append("labels, classes or modalities mean something else")
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise BrainMVPError(
            f"{run} cannot go on with other data than it began with ({', '.join(changes[:3])}{more}): put them back, "
            "or start a new run."
        )


def part_usable(studies: Sequence[CachedStudy], modalities: Sequence[str]) -> tuple[list[CachedStudy], list[Problem]]:
    """Leave out studies that have none of the modalities that a network sees.

    Raises
    ------
    StudyError
        That is all of them.
    """
    reasons = [lacks_all(study, modalities) for study in studies]
    kept = [study for study, reason in zip(studies, reasons, strict=True) if not reason]
    if not kept:
        raise StudyError(f"No study has any of {', '.join(modalities)}: choose another --init, or --set modalities.")
    return kept, [Problem(study.name, reason) for study, reason in zip(studies, reasons, strict=True) if reason]


def lacks_all(study: CachedStudy, modalities: Sequence[str]) -> str:
    """Say that a study has none of these modalities; empty where it has one."""
    return "" if set(modalities) & set(study.modalities) else f"has none of {', '.join(modalities)}"
