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
from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.io import write_text_atomic
from napari_brainmvp.jobs import left_out
from napari_brainmvp.models import find_model, list_models
from napari_brainmvp.models.card import check_model_name
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback
from napari_brainmvp.training.pretraining.spec import DataSource, PretrainingSpec, read_settings, read_spec
from napari_brainmvp.training.sources import absolute_paths

__all__ = [
    "FREE",
    "chosen_spec",
    "progress_lines",
    "resumed",
    "run_pretraining",
    "settings",
    "sources",
    "stop_on_signals",
]

FREE = ("accelerator", "precision", "workers", "minutes")
"""Settings that do not change what a run learns."""
_NAME = "name.txt"
"""Of a run's folder: what its model will be called."""
_SECONDS = 30.0
"""Between lines of progress where there is no terminal."""

Spec = TypeVar("Spec", bound=BaseModel)


def sources(paths: Sequence[str], base: str) -> tuple[DataSource, ...]:
    """Read ``--data`` options: a path, or a path and a weight as ``PATH@2``."""
    found = []
    for text in paths:
        try:
            source = DataSource.model_validate(text)
        except ValidationError as error:
            raise BrainMVPError(f"--data {text}: the weight must be more than 0.") from error
        is_list = source.path.endswith(".json")
        found.append(source.model_copy(update={"base": base}) if base and is_list else source)
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


def chosen_spec(
    out: Path | None, file: Path | None, recipe: str, changes: dict[str, Any], *, resume: bool
) -> PretrainingSpec:
    """Return the specification of a new run, or of the one in ``out`` that is resumed, with absolute paths.

    Parameters
    ----------
    out : Path or None
        The run's folder. Where it holds no run, one is started, so that the same command starts and resumes.
    file : Path or None
        YAML file of settings.
    recipe : str
        By name, or empty.
    changes : dict
        Settings that go before both. What a resumed run learns may be said again, and not be changed.

    Raises
    ------
    BrainMVPError
        A setting makes no sense or is not what the run was started with, or there are no data.
    """
    started = out / "spec.json" if out and resume else None
    if started is not None and started.is_file():
        said = read_settings(file, recipe or None) | changes
        return resumed(read_spec(started, None, {}), said, {*FREE, "devices", "nodes", "strategy", "compile"})
    spec = read_spec(file, recipe or None, changes)
    if not spec.data:
        nothing = f"{out} holds no run to resume, and there are no data to start one" if started else "No data"
        raise BrainMVPError(f"{nothing}: say --data FOLDER, or --data synthetic:50 to try it out.")
    return absolute_paths(spec)


def resumed(spec: Spec, changes: dict[str, Any], free: Collection[str]) -> Spec:
    """Change those settings of a run that may be given anew, and refuse to change others; paths become absolute.

    Raises
    ------
    BrainMVPError
        Something that is not in ``free`` is to be changed, or a value makes no sense.
    """
    try:  # first, because options and files say 2 for 2.0, and lists for tuples
        wanted = type(spec).model_validate(spec.model_dump() | changes)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BrainMVPError(f"{where}: {first['msg']}. Correct the value.") from error
    before, wanted = absolute_paths(spec), absolute_paths(wanted)
    differing = [name for name in sorted(set(changes) - set(free)) if getattr(before, name) != getattr(wanted, name)]
    if differing:
        kept = {name: getattr(before, name) for name in differing}
        told = [f"{name} of {value}" if isinstance(value, (int, float, str)) else name for name, value in kept.items()]
        raise BrainMVPError(f"A resumed run keeps its {', '.join(told)}: leave that out, or start a new run.")
    return wanted


def run_pretraining(spec: PretrainingSpec, run: Path, *, resume: bool, name: str, cache: Path | None) -> None:
    """Pre-train, stop well on an interrupt, and enter the model into the registry."""
    from torch import distributed

    from napari_brainmvp.models import import_model
    from napari_brainmvp.training.pretraining.engine import pretrain

    known = run / _NAME
    if not name and resume and known.is_file():
        name = known.read_text(encoding="utf-8").strip()
    name = name or re.sub(r"[^a-z0-9._-]+", "-", run.resolve().name.lower()).strip("-._") or "pretrained"
    try:
        check_model_name(name)
    except ValueError as error:
        raise BrainMVPError(f"{error}: choose another --name.") from error
    if name in {entry.card.name for entry in list_models()}:
        raise BrainMVPError(f"There already is a model {name!r}: choose another --name, or remove it first.")
    if resume or not (run / "spec.json").is_file():  # else it may be refused, as the folder of another run
        write_text_atomic(known, f"{name}\n")
    with progress_lines() as progress, stop_on_signals() as cancel:
        folder = pretrain(spec, run, resume=resume, cache=cache, progress=progress, cancel=cancel)
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        import_model(folder, name)
        if note := left_out(run):
            say(f"Note: {note}")
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
