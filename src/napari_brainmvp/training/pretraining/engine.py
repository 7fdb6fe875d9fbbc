"""The run: data in, an encoder and templates out, resumable at any moment.

Lightning Fabric brings devices, nodes, strategies and precision; the loop is written out, so that a resumed run does
exactly what the uninterrupted one would have done. All randomness is drawn from the number of the batch: there is no
random state to restore.
"""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from napari_brainmvp.errors import BrainMVPError, Cancelled, FileError, ModelError
from napari_brainmvp.inference.device import choose_precision
from napari_brainmvp.models import ModelCard, NetworkSpec, find_model, load_model, save_model
from napari_brainmvp.networks import PretrainingNetwork
from napari_brainmvp.networks.layers import share_batch_norm
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback, no_progress
from napari_brainmvp.training.cache import CachedStudy, cache_folder
from napari_brainmvp.training.checkpoints import last_checkpoint, save_checkpoint
from napari_brainmvp.training.loop import describe_run, drop_rows, log_row, schedule, update_average
from napari_brainmvp.training.memory import keep_freed_memory
from napari_brainmvp.training.pretraining.data import CropStream, collect
from napari_brainmvp.training.pretraining.model import PretrainingModel
from napari_brainmvp.training.pretraining.spec import PretrainingSpec
from napari_brainmvp.training.pretraining.validation import validate

__all__ = ["pretrain"]

logger = logging.getLogger(__name__)

_LEAST_WINDOW = 64
"""In use, where instance normalisation is better off with more of the brain than a small crop of training holds."""


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
        ``pictures``, the last two checkpoints and, in the end, ``model``.
    resume : bool
        Go on from the last checkpoint; without, the folder must not hold one.
    cache : Path, optional
        Where prepared studies are kept; default :func:`~napari_brainmvp.training.cache.cache_folder`.
    progress, cancel
        Called and asked at every step. A cancelled run writes a checkpoint first.

    Returns
    -------
    Path
        The model's folder.

    Raises
    ------
    BrainMVPError
        The folder holds another run, there is nothing to train on, or the last checkpoint cannot be written.
    Cancelled
        After the checkpoint is written.
    """
    fabric = Fabric(
        accelerator=spec.accelerator,
        devices=spec.devices,
        num_nodes=spec.nodes,
        strategy=spec.strategy,
        precision=choose_precision(spec.precision, spec.accelerator),
    )
    fabric.launch()
    if fabric.device.type == "cpu":
        keep_freed_memory()
        torch.set_flush_denormal(True)
    if not resume and last_checkpoint(run) is not None:
        raise BrainMVPError(f"{run} already holds a run: resume it, or choose another folder.")
    with fabric.rank_zero_first():  # the others find everything prepared
        datasets, held_out, problems = collect(spec, cache or cache_folder(), progress, cancel)
    if fabric.global_rank == 0:
        describe_run(run, spec, problems)
    trainer = _Run(fabric, spec, run, held_out)
    step = trainer.restore() if resume else 0
    stream = CropStream(datasets, spec, step * spec.accumulate, fabric.global_rank, fabric.world_size)
    loader = DataLoader(stream, batch_size=None, num_workers=spec.workers, pin_memory=fabric.device.type == "cuda")
    trainer.train(loader, step, progress, cancel)
    fabric.barrier()
    return trainer.finish(sum(len(d.studies) for d in datasets)) if fabric.global_rank == 0 else run / "model"


def start_from(model: PretrainingModel, name: str) -> None:
    """Take over network and templates of a pre-trained model.

    Raises
    ------
    ModelError
        There is no such model, or its modalities, networks or templates are others.
    """
    source = load_model(find_model(name), "pretraining")
    if source.card.modalities != model.spec.modalities:
        raise ModelError(
            f"{source.card.name} knows {', '.join(source.card.modalities)}: go on with just these, or start afresh."
        )
    templates = source.templates or model.templates
    state = {**source.network.state_dict(), "templates.volumes": templates.volumes}
    try:
        model.network.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{source.card.name} has another encoder, decoder or template shape: {error}") from error


class _Run:
    """A model in training with its optimiser, moving average and logs."""

    def __init__(self, fabric: Fabric, spec: PretrainingSpec, run: Path, held_out: list[CachedStudy]) -> None:
        self.fabric, self.spec, self.run, self.held_out = fabric, spec, run, held_out
        torch.manual_seed(spec.seed)
        model = PretrainingModel(spec)
        if spec.init:
            start_from(model, spec.init)
        self.average = copy.deepcopy(model).requires_grad_(False).to(fabric.device)
        if fabric.world_size > 1:
            share_batch_norm(model)
        slow = [p for n, p in model.named_parameters() if not n.endswith("templates.volumes")]
        optimiser = torch.optim.AdamW(
            [
                {"params": slow, "lr": spec.learning_rate},
                {"params": [model.templates.volumes], "lr": spec.template_rate, "weight_decay": 0.0},
            ],
            weight_decay=spec.weight_decay,
        )
        self.rates = [group["lr"] for group in optimiser.param_groups]
        self.model = model
        compiled: Any = torch.compile(model) if spec.compile else model
        self.wrapped, self.optimiser = fabric.setup(compiled, optimiser)
        self.best: dict[str, float] = {}

    def restore(self) -> int:
        """Load the last checkpoint and return the step it was written after; 0 where there is none."""
        state = last_checkpoint(self.run, str(self.fabric.device))
        step = 0 if state is None else int(state["step"])
        drop_rows(self.run / "metrics.csv", step)
        drop_rows(self.run / "validation.csv", step)
        if state is None:
            return 0
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        return step

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        optimiser = self.optimiser.state_dict()
        state = {"model": self.model.state_dict(), "average": self.average.state_dict(), "optimiser": optimiser}
        save_checkpoint(self.run, step, state)

    def train(self, loader: DataLoader[Any], step: int, progress: ProgressCallback, cancel: CancelToken | None) -> None:
        """Go on to the last step."""
        spec, main = self.spec, self.fabric.global_rank == 0
        board = SummaryWriter(str(self.run / "tensorboard"), purge_step=step) if main else None
        batches = iter(loader)
        saved = time.monotonic()
        while step < spec.max_steps:
            if self._stop_wanted(cancel):
                if main:
                    self.save(step)
                raise Cancelled(f"Stopped after step {step} of {spec.max_steps}. Resume to go on.")
            began = time.perf_counter()
            losses = self._step(batches, step)
            step += 1
            if main:
                seconds = time.perf_counter() - began
                speed = spec.batch * spec.accumulate * self.fabric.world_size / seconds
                row = {
                    **losses,
                    "learning_rate": self.rates[0] * schedule(step - 1, spec.max_steps, spec.warm_up),
                    "samples_per_second": speed,
                }
                log_row(self.run / "metrics.csv", step, row, board)
                if step % spec.validate_every == 0 or step == spec.max_steps:
                    self._validate(step, board)
                if time.monotonic() - saved >= 60 * spec.minutes or step == spec.max_steps:
                    self._try_to_save(step)
                    saved = time.monotonic()
            progress(Progress("Pre-training", step, spec.max_steps))
        if board is not None:
            board.close()

    def _stop_wanted(self, cancel: CancelToken | None) -> bool:
        """Tell whether any process was asked to stop, so that all of them stop after the same step."""
        asked = cancel is not None and cancel.cancelled
        if self.fabric.world_size == 1:
            return asked
        votes = self.fabric.all_reduce(torch.tensor(float(asked), device=self.fabric.device), reduce_op="sum")
        assert isinstance(votes, Tensor)
        return bool(votes > 0)

    def _step(self, batches: Any, step: int) -> dict[str, float]:
        """Update once, from ``accumulate`` batches."""
        spec, fabric = self.spec, self.fabric
        factor = schedule(step, spec.max_steps, spec.warm_up)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.wrapped.train()
        sums: dict[str, Tensor] = {}
        for part in range(spec.accumulate):
            batch = {key: value.to(fabric.device, non_blocking=True) for key, value in next(batches).items()}
            with fabric.no_backward_sync(self.wrapped, enabled=part + 1 < spec.accumulate):
                gather = self._gather if fabric.world_size > 1 else None
                done = step / spec.max_steps
                losses = self.wrapped(batch, done, fabric.global_rank, fabric.world_size, gather)
                fabric.backward(losses["loss"] / spec.accumulate)
            for key, value in losses.items():
                sums[key] = sums.get(key, torch.zeros((), device=fabric.device)) + value.detach() / spec.accumulate
        fabric.clip_gradients(self.wrapped, self.optimiser, max_norm=spec.clip, error_if_nonfinite=False)
        self.optimiser.step()
        self.optimiser.zero_grad()
        update_average(self.average, self.model, step, spec.average)
        names = sorted(sums)
        values = fabric.all_reduce(torch.stack([sums[name] for name in names]), reduce_op="mean")
        assert isinstance(values, Tensor)
        return dict(zip(names, values.tolist(), strict=True))

    def _gather(self, features: Tensor) -> Tensor:
        """Join the features of all processes, (world B, F); gradients flow back to each."""
        gathered = self.fabric.all_gather(features, sync_grads=True)
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1)

    def _validate(self, step: int, board: SummaryWriter | None) -> None:
        picture = self.run / "pictures" / f"{step:08d}.png"
        self.best = validate(self.average, self.held_out, picture, self.fabric)
        if self.best:
            log_row(self.run / "validation.csv", step, self.best, board)

    def _try_to_save(self, step: int) -> None:
        """Write a checkpoint; a full disk stops the run only at its end, as it may be freed meanwhile."""
        try:
            self.save(step)
        except FileError as error:
            if step == self.spec.max_steps:
                raise
            logger.error("%s Training goes on; the last checkpoint is older.", error)

    def finish(self, studies: int) -> Path:
        """Write the model: the averaged network and the templates."""
        spec, folder = self.spec, self.run / "model"
        network: nn.Module = self.average.network
        plain = isinstance(network, PretrainingNetwork)
        card = ModelCard(
            name="pretrained",
            title="Pre-trained encoder",
            description=f"UniFormer encoder and modality templates, pre-trained on {studies} studies.",
            task="pretraining",
            network=NetworkSpec(
                in_channels=1,
                out_channels=1 if plain else 2 * len(spec.modalities),
                full_resolution_channels=None if plain else network.full_resolution_channels,
                deep_supervision=False,
                decoder=spec.decoder,
                **self.average.encoder_spec.model_dump(),
            ),
            modalities=spec.modalities,
            preparation=spec.preparation,
            patch_size=3 * (spec.crop if plain else max(spec.crop, _LEAST_WINDOW),),
            fill_missing="template",
            template_frame=spec.template_frame,
            template_minmax=spec.template_minmax,
            training={"studies": studies, "recipe": spec.model_dump(mode="json"), "validation": self.best},
        )
        if folder.exists():
            return folder
        return save_model(folder, card, network)
