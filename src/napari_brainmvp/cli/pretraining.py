"""``brainmvp pretrain``: from folders of studies to an encoder."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from napari_brainmvp.cli.console import progress_bar, say
from napari_brainmvp.errors import BrainMVPError, FileError
from napari_brainmvp.models import find_model, list_models
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback
from napari_brainmvp.training.pretraining.spec import DataSource, PretrainingSpec, read_spec

__all__ = [
    "FREE",
    "progress_lines",
    "resumed",
    "resumed_spec",
    "run_pretraining",
    "settings",
    "sources",
    "stop_on_signals",
]

FREE = ("accelerator", "precision", "workers", "minutes")
"""Settings that do not change what a run learns."""
_SECONDS = 30.0
"""Between lines of progress where there is no terminal."""

Spec = TypeVar("Spec", bound=BaseModel)


def sources(paths: Sequence[str], base: str) -> tuple[DataSource, ...]:
    """Read ``--data`` options: a path, or a path and a weight as ``PATH@2``."""
    found = []
    for text in paths:
        weighted = re.fullmatch(r"(.+)@(\d+(?:\.\d+)?)", text)
        path, weight = (weighted[1], float(weighted[2])) if weighted else (text, 1.0)
        if weight <= 0:
            raise BrainMVPError(f"--data {text}: the weight must be more than 0.")
        is_list = path.endswith(".json")
        found.append(DataSource(path=path, weight=weight, base=base or None if is_list else None))
    return tuple(found)


def settings(options: Sequence[str]) -> dict[str, Any]:
    """Read ``--set NAME=VALUE`` options, values in YAML."""
    changes: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise BrainMVPError(f"--set {option}: write NAME=VALUE, for example --set crop=48.")
        try:
            changes[name.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise BrainMVPError(f"--set {option}: {value!r} is not a value ({error}).") from error
    return changes


def resumed_spec(run: Path, changes: dict[str, Any]) -> PretrainingSpec:
    """Read the specification a run was started with; only what does not change its course may be given anew.

    Raises
    ------
    BrainMVPError
        There is no run, or something else is to be changed.
    """
    path = run / "spec.json"
    if not path.is_file():
        raise FileError(f"{run} holds no run to resume: start one without --resume.")
    return resumed(read_spec(path, None, {}), changes, {*FREE, "devices", "nodes", "strategy", "compile"})


def resumed(spec: Spec, changes: dict[str, Any], free: Collection[str]) -> Spec:
    """Change those settings of a run that may be given anew, and refuse to change others.

    Raises
    ------
    BrainMVPError
        Something that is not in ``free`` is to be changed, or a value makes no sense.
    """
    fields = type(spec).model_fields
    fixed = sorted(set(changes) - set(free))
    differing = [name for name in fixed if name not in fields or getattr(spec, name) != changes[name]]
    if differing:
        raise BrainMVPError(f"A resumed run keeps its {', '.join(differing)}: leave that out, or start a new run.")
    try:
        return type(spec).model_validate(spec.model_dump() | {name: changes[name] for name in changes if name in free})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BrainMVPError(f"{where}: {first['msg']}. Correct the value.") from error


def run_pretraining(spec: PretrainingSpec, run: Path, *, resume: bool, name: str, cache: Path | None) -> None:
    """Pre-train, stop well on an interrupt, and enter the model into the registry."""
    from torch import distributed

    from napari_brainmvp.models import import_model
    from napari_brainmvp.training.pretraining.engine import pretrain

    name = name or re.sub(r"[^a-z0-9._-]+", "-", run.resolve().name.lower()).strip("-._") or "pretrained"
    if name in {entry.card.name for entry in list_models()}:
        raise BrainMVPError(f"There already is a model {name!r}: choose another --name, or remove it first.")
    with progress_lines() as progress, stop_on_signals() as cancel:
        folder = pretrain(spec, run, resume=resume, cache=cache, progress=progress, cancel=cancel)
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        import_model(folder, name)
        say(f"Wrote model {name} ({find_model(name).folder}).")


@contextmanager
def progress_lines() -> Iterator[ProgressCallback]:
    """Show a bar on a terminal, else a line now and then on standard error."""
    if sys.stderr.isatty():
        with progress_bar() as bar:
            yield bar
        return
    spoken = [0.0]

    def report(progress: Progress) -> None:
        if time.monotonic() - spoken[0] >= _SECONDS or progress.done == progress.total:
            spoken[0] = time.monotonic()
            sys.stderr.write(f"{progress.step}: {progress.done} of {progress.total}\n")
            sys.stderr.flush()

    yield report


@contextmanager
def stop_on_signals() -> Iterator[CancelToken]:
    """Turn an interrupt or a termination into a graceful stop; a second interrupt ends at once."""
    token = CancelToken()
    before = {}

    def stop(number: int, frame: object) -> None:
        if token.cancelled:
            raise KeyboardInterrupt
        token.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, stop)
    try:
        yield token
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
