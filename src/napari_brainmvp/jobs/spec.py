"""What a job is asked to do: written once, when it is submitted."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, field_validator

from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.training.pretraining.spec import PretrainingSpec

__all__ = ["KINDS", "JobKind", "JobSpec", "jobs_folder", "pretraining_job"]


@dataclass(frozen=True)
class JobKind:
    """A training function and its specification, by import path; imported in the job's own process only.

    Parameters
    ----------
    module : str
        Of the function.
    function : str
        ``f(spec, run, *, resume, cache, progress, cancel)``, which returns the folder of a model.
    spec : str
        ``module:Class`` of the function's specification, a pydantic model.
    """

    module: str
    function: str
    spec: str

    def load(self) -> tuple[Any, type[BaseModel]]:
        """Import the function and the class of its specification."""
        module, _, name = self.spec.partition(":")
        spec: type[BaseModel] = getattr(import_module(module), name)
        return getattr(import_module(self.module), self.function), spec


_TRAINING = "napari_brainmvp.training"

KINDS: dict[str, JobKind] = {
    "pretrain": JobKind(f"{_TRAINING}.pretraining.engine", "pretrain", f"{_TRAINING}.pretraining.spec:PretrainingSpec"),
}
"""What can run in the background."""


class JobSpec(BaseModel):
    """A job.

    Parameters
    ----------
    kind : str
        A key of :data:`KINDS`.
    name : str
        Of the job and of the model it makes: up to 64 of a-z, 0-9, '.', '_' and '-'.
    title : str
        As a person would call it.
    device : str
        In whose queue it waits: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"mps"``.
    devices : int
        How many GPUs of this machine it takes, from that one on.
    settings : dict
        The specification of the kind's training function, as JSON. Paths in it are absolute.
    cache : Path or None
        Where prepared studies are kept; None for the usual place.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    name: str
    title: str = ""
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    devices: int = Field(1, gt=0)
    settings: dict[str, Any]
    cache: Path | None = None

    @field_validator("kind")
    @classmethod
    def _kind_is_known(cls, kind: str) -> str:
        if kind not in KINDS:
            raise ValueError(f"there is no kind of job {kind!r}: choose one of {', '.join(KINDS)}")
        return kind

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
            raise ValueError(f"{name!r} is not a name for a model: use up to 64 of a-z, 0-9, '.', '_' and '-'")
        return name


def jobs_folder() -> Path:
    """Return where jobs live: ``$BRAINMVP_HOME/jobs``, else in the platform's data directory."""
    home = os.environ.get("BRAINMVP_HOME")
    return (Path(home) if home else Path(platformdirs.user_data_dir("brainmvp", appauthor=False))) / "jobs"


def pretraining_job(spec: PretrainingSpec, name: str, *, title: str = "", cache: Path | None = None) -> JobSpec:
    """Make a job of a pre-training run; paths become absolute, and the queue is that of the run's accelerator.

    Raises
    ------
    BrainMVPError
        ``name`` cannot be a model's name, or the run needs several machines.
    """
    if spec.nodes > 1:
        raise BrainMVPError("A background job runs on one machine: start a run on several nodes with their scheduler.")
    data = [
        {
            **source.model_dump(mode="json"),
            "path": _absolute(source.path),
            "base": source.base and _absolute(source.base),
        }
        for source in spec.data
    ]
    device = {"gpu": "cuda", "cpu": "cpu", "cuda": "cuda", "mps": "mps"}.get(spec.accelerator, "auto")
    try:
        return JobSpec(
            kind="pretrain",
            name=name,
            title=title or f"Pre-training {name}",
            device=device,
            devices=spec.devices,
            settings={**spec.model_dump(mode="json"), "data": data},
            cache=cache.expanduser().absolute() if cache else None,
        )
    except ValueError as error:
        raise BrainMVPError(
            f"{name!r} is not a name for a model: use up to 64 of a-z, 0-9, '.', '_' and '-'."
        ) from error


def _absolute(path: str) -> str:
    return path if path.startswith("synthetic:") else str(Path(path).expanduser().absolute())
