"""The run: data in, an encoder and templates out. Lightning Fabric brings devices, nodes, strategies and precision."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.progress import CancelToken, ProgressCallback, no_progress
from napari_brainmvp.training.cache_space import shrink_cache
from napari_brainmvp.training.checkpoints import has_checkpoint
from napari_brainmvp.training.loop import describe_run, hold_run, make_fabric, run_cache
from napari_brainmvp.training.memory import keep_freed_memory
from napari_brainmvp.training.pretraining.data import CropStream, collect
from napari_brainmvp.training.pretraining.run import Run
from napari_brainmvp.training.pretraining.spec import PretrainingSpec

__all__ = ["pretrain"]


def pretrain(
    spec: PretrainingSpec,
    run: Path,
    *,
    resume: bool = False,
    cache: Path | None = None,
    progress: ProgressCallback = no_progress,
    cancel: CancelToken | None = None,
) -> Path:
    """Pre-train an encoder.

    Parameters
    ----------
    spec : PretrainingSpec
    run : Path
        Folder for ``spec.json``, ``problems.txt``, ``metrics.csv``, ``validation.csv``, TensorBoard logs,
        ``pictures``, the last two checkpoints, ``cache.txt`` where a cache is named and, in the end, ``model``.
    resume : bool
        Go on from the last checkpoint, or start where there is none; without, the folder must not hold one.
    cache : Path, optional
        Where prepared studies are kept; see :func:`~napari_brainmvp.training.loop.run_cache`.
    progress, cancel
        Called, in the first process, and asked at every step. A cancelled run writes a checkpoint first.

    Returns
    -------
    Path
        The model's folder.

    Raises
    ------
    BrainMVPError
        The folder holds another run or is in use, there is nothing to train on, no checkpoint can be read, the last one
        cannot be written, or the loss is no longer finite.
    Cancelled
        After the checkpoint is written.
    """
    fabric = make_fabric(spec.accelerator, spec.precision, spec.devices, spec.nodes, spec.strategy)
    fabric.launch()
    if fabric.device.type == "cpu":
        keep_freed_memory()
        torch.set_flush_denormal(True)
    with hold_run(run) if fabric.global_rank == 0 else nullcontext():
        return _work(fabric, spec, run, resume, cache, progress, cancel)


def _work(
    fabric: Fabric,
    spec: PretrainingSpec,
    run: Path,
    resume: bool,
    cache: Path | None,
    progress: ProgressCallback,
    cancel: CancelToken | None,
) -> Path:
    """Prepare, train and write the model, as one of several processes."""
    if not resume and has_checkpoint(run):
        raise BrainMVPError(f"{run} already holds a run: resume it, or choose another folder.")
    first = fabric.global_rank == 0
    folder = run_cache(run, cache, keep=first)
    with fabric.rank_zero_first():  # the others find everything prepared
        report = progress if first else no_progress
        alone = spec if fabric.local_rank == 0 else spec.model_copy(update={"workers": 0})
        datasets, held_out, problems = collect(alone, folder, report, cancel)
    if first:
        describe_run(run, spec, problems)
        shrink_cache(folder)
    trainer = Run(fabric, spec, run, held_out)
    step = trainer.restore() if resume else 0
    stream = CropStream(datasets, spec, step * spec.accumulate, fabric.global_rank, fabric.world_size)
    loader = DataLoader(stream, batch_size=None, num_workers=spec.workers, pin_memory=fabric.device.type == "cuda")
    trainer.train(loader, step, progress, cancel)
    fabric.barrier()
    return trainer.finish(sum(len(d.studies) for d in datasets)) if first else run / "model"
