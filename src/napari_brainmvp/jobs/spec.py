"""What a job is asked to do: written once, when it is submitted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.models.card import check_model_name
from napari_brainmvp.training.sources import absolute_paths

__all__ = ["KINDS", "JobKind", "JobSpec", "jobs_folder", "training_job"]


@dataclass(frozen=True)
class JobKind:
    """A training function and its specification, by import path; imported in the job's own process only.

    Parameters
    ----------
    title : str
        What the job does.
    function : str
        ``module:function``: ``f(spec, run, *, resume, cache, progress, cancel)`` returns the folder of a model.
    spec : str
        ``module:Class`` of the function's specification, a pydantic model.
    """

    title: str
    function: str
    spec: str

    def load(self) -> tuple[Any, type[BaseModel]]:
        """Import the function and the class of its specification."""
        return _named(self.function), _named(self.spec)


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(f"napari_brainmvp.training.{module}"), name)


KINDS: dict[str, JobKind] = {
    "pretrain": JobKind("Pre-training", "pretraining.engine:pretrain", "pretraining.spec:PretrainingSpec"),
    "finetune": JobKind("Fine-tuning", "finetuning.engine:finetune", "finetuning.spec:FinetuneSpec"),
}
"""What can run in the background; modules of :mod:`napari_brainmvp.training`."""


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
        In whose queue it waits: ``"cpu"``, ``"cuda:N"`` or ``"mps"``; ``"cuda"`` for the GPU with the fewest jobs;
        ``"auto"`` for that, or what else there is.
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
        return check_model_name(name)  # which its model will have


def jobs_folder() -> Path:
    """Return where jobs live: ``$BRAINMVP_HOME/jobs``, else in the platform's data directory."""
    home = os.environ.get("BRAINMVP_HOME")
    return (Path(home) if home else Path(platformdirs.user_data_dir("brainmvp", appauthor=False))) / "jobs"


def training_job(kind: str, settings: BaseModel, name: str, *, cache: Path | None = None) -> JobSpec:
    """Make a job of a training run; paths become absolute, and the queue is that of the run's accelerator.

    Parameters
    ----------
    kind : str
        A key of :data:`KINDS`.
    settings : pydantic model
        The specification of that kind: its ``data``, ``accelerator`` and ``devices`` are looked at.
    name : str
        Of the job and its model.
    cache : Path, optional

    Raises
    ------
    BrainMVPError
        ``name`` cannot be a model's name, the run needs several machines, data are not there, or a GPU has no number.
    """
    content = absolute_paths(settings).model_dump(mode="json")
    if content.get("nodes", 1) > 1:
        raise BrainMVPError("A background job runs on one machine: start a run on several nodes with their scheduler.")
    accelerator = content["accelerator"]
    device = {"gpu": "cuda", "cpu": "cpu", "cuda": "cuda", "mps": "mps"}.get(accelerator, "auto")
    if accelerator.startswith("cuda:"):  # the job's process sees no other, and numbers it 0
        if not accelerator[5:].isdecimal():
            raise BrainMVPError(f"accelerator {accelerator}: name one GPU by its number, for example cuda:1.")
        device, content["accelerator"] = accelerator, "cuda"
    try:
        return JobSpec(
            kind=kind,
            name=name,
            title=f"{KINDS[kind].title} {name}",
            device=device,
            devices=content.get("devices", 1),
            settings=content,
            cache=cache.expanduser().absolute() if cache else None,
        )
    except ValidationError as error:
        raise BrainMVPError(
            f"{name!r} is not a name for a model: use up to 64 of a-z, 0-9, '.', '_' and '-'."
        ) from error
