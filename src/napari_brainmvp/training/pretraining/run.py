"""The loop of pre-training: resumable at any moment, on any number of processes.

It is written out, so that a resumed run does exactly what the uninterrupted one would have done. All randomness is
drawn from the number of the batch: there is no random state to restore.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from napari_brainmvp.errors import Cancelled, FileError, ModelError
from napari_brainmvp.models import ModelCard, NetworkSpec, find_model, load_model, save_model
from napari_brainmvp.models.sharing import without_paths
from napari_brainmvp.networks import PretrainingNetwork
from napari_brainmvp.networks.layers import share_batch_norm
from napari_brainmvp.progress import CancelToken, Progress, ProgressCallback
from napari_brainmvp.training.cache import CachedStudy
from napari_brainmvp.training.checkpoints import last_checkpoint, save_checkpoint
from napari_brainmvp.training.loop import SkippedUpdates, drop_rows, log_row, may_fail, schedule, update_average
from napari_brainmvp.training.pretraining.model import PretrainingModel
from napari_brainmvp.training.pretraining.spec import PretrainingSpec
from napari_brainmvp.training.pretraining.validation import validate

__all__ = ["Run"]

logger = logging.getLogger(__name__)

_LEAST_WINDOW = 64
"""In use, where instance normalisation is better off with more of the brain than a small crop of training holds."""


def _start_from(model: PretrainingModel, name: str) -> None:
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


class Run:
    """A model in training with its optimiser, moving average and logs.

    Parameters
    ----------
    fabric : Fabric
    spec : PretrainingSpec
    run : Path
        The run's folder.
    held_out : list of CachedStudy
        For validation.
    """

    def __init__(self, fabric: Fabric, spec: PretrainingSpec, run: Path, held_out: list[CachedStudy]) -> None:
        self.fabric, self.spec, self.run, self.held_out = fabric, spec, run, held_out
        torch.manual_seed(spec.seed)
        model = PretrainingModel(spec)
        if spec.init:
            _start_from(model, spec.init)
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
        self.skips = SkippedUpdates()

    def restore(self) -> int:
        """Load the last checkpoint and return the step it was written after; 0 where there is none."""
        state = last_checkpoint(self.run)
        if state is None:
            return 0
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        if scale := state.get("precision"):
            self.fabric.strategy.precision.load_state_dict(scale)
        return int(state["step"])

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),  # the scale of float16's gradients
        }
        save_checkpoint(self.run, step, state)

    def train(self, loader: DataLoader[Any], step: int, progress: ProgressCallback, cancel: CancelToken | None) -> None:
        """Go on from a step to the last one; what is logged of later steps is forgotten first."""
        spec, main = self.spec, self.fabric.global_rank == 0
        board = self._open_log(step) if main else None
        batches, saved = iter(loader), time.monotonic()
        while step < spec.max_steps:
            if self._stop_wanted(cancel):
                self._stop(step)
            began = time.perf_counter()
            losses = self._step(batches, step)
            step += 1
            if not main:
                continue
            self._log(step, losses, time.perf_counter() - began, board)
            if time.monotonic() - saved >= 60 * spec.minutes or step == spec.max_steps:
                self._try_to_save(step)
                saved = time.monotonic()
            if self._due(step):
                self._validate(step, board, losses)
            progress(Progress("Pre-training", step, spec.max_steps))
        if board is not None:
            with may_fail("TensorBoard's log"):
                board.close()

    def _open_log(self, step: int) -> SummaryWriter:
        """Forget the rows after a step, and validate where the checkpoint may be all that was written of that step."""
        drop_rows(self.run / "metrics.csv", step)
        drop_rows(self.run / "validation.csv", step - 1)
        board = SummaryWriter(str(self.run / "tensorboard"), purge_step=step)
        if step and self._due(step):
            self._validate(step, board, {})
        return board

    def _log(self, step: int, losses: dict[str, float], seconds: float, board: SummaryWriter | None) -> None:
        spec = self.spec
        row = {
            **losses,
            "learning_rate": self.rates[0] * schedule(step - 1, spec.max_steps, spec.warm_up),
            "samples_per_second": spec.batch * spec.accumulate * self.fabric.world_size / seconds,
        }
        log_row(self.run / "metrics.csv", step, row, board)

    def _due(self, step: int) -> bool:
        return step % self.spec.validate_every == 0 or step == self.spec.max_steps

    def _stop(self, step: int) -> NoReturn:
        """Write a checkpoint and end."""
        try:
            if self.fabric.global_rank == 0:
                self.save(step)
        finally:
            self.fabric.barrier()  # Lightning kills the first process once another has ended, be it still writing
        raise Cancelled(f"Stopped after step {step} of {self.spec.max_steps}. Resume to go on.")

    def _stop_wanted(self, cancel: CancelToken | None) -> bool:
        """Tell whether any process was asked to stop, so that all of them stop after the same step."""
        asked = cancel is not None and cancel.cancelled
        if self.fabric.world_size == 1:
            return asked
        votes = self.fabric.all_reduce(torch.tensor(float(asked), device=self.fabric.device), reduce_op="sum")
        assert isinstance(votes, Tensor)
        return bool(votes > 0)

    def _step(self, batches: Any, step: int) -> dict[str, float]:
        """Update once, from ``accumulate`` batches; an update that is not finite is skipped."""
        spec, fabric = self.spec, self.fabric
        factor = schedule(step, spec.max_steps, spec.warm_up)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        sums = self._backward(batches, step / spec.max_steps)
        norm = fabric.clip_gradients(self.wrapped, self.optimiser, max_norm=spec.clip, error_if_nonfinite=False)
        assert norm is not None
        names = sorted(sums)
        values = fabric.all_reduce(torch.stack([*(sums[name] for name in names), norm]), reduce_op="mean")
        assert isinstance(values, Tensor)
        *means, size = values.tolist()  # the same in all processes, and not finite if it is so in any
        losses = dict(zip(names, means, strict=True))
        finite = math.isfinite(losses["loss"]) and math.isfinite(size)
        if finite or spec.precision == "16-mixed":  # its gradient scaler skips by itself, and must learn of it
            self.optimiser.step()
        self.optimiser.zero_grad()
        if finite:
            update_average(self.average, self.model, step, spec.average)
            self.skips.count = 0
        else:
            remedy = "resume with the setting precision=32-true, or start a new run with a learning_rate below"
            self.skips.skip(self.model, self.average, step + 1, f"{remedy} {spec.learning_rate:g}")
        return losses

    def _backward(self, batches: Any, done: float) -> dict[str, Tensor]:
        """Add up the gradients of ``accumulate`` batches, and return the means of their losses."""
        spec, fabric = self.spec, self.fabric
        self.wrapped.train()
        sums: dict[str, Tensor] = {}
        for part in range(spec.accumulate):
            batch = {key: value.to(fabric.device, non_blocking=True) for key, value in next(batches).items()}
            with fabric.no_backward_sync(self.wrapped, enabled=part + 1 < spec.accumulate):
                gather = self._gather if fabric.world_size > 1 else None
                losses = self.wrapped(batch, done, fabric.global_rank, fabric.world_size, gather)
                fabric.backward(losses["loss"] / spec.accumulate)
            for key, value in losses.items():
                sums[key] = sums.get(key, torch.zeros((), device=fabric.device)) + value.detach() / spec.accumulate
        return sums

    def _gather(self, features: Tensor) -> Tensor:
        """Join the features of all processes, (world B, F); gradients flow back to each."""
        gathered = self.fabric.all_gather(features, sync_grads=True)
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1)

    def _validate(self, step: int, board: SummaryWriter | None, losses: dict[str, float]) -> None:
        """Measure the moving average on held-out studies, write it down and say it."""
        picture = self.run / "pictures" / f"{step:08d}.png"
        self.best = validate(self.average, self.held_out, picture, self.fabric)
        if self.best:
            log_row(self.run / "validation.csv", step, self.best, board)
        said = [f"loss {losses['loss']:.4g}"] if losses else []
        for view, other in (("the template", False), ("another modality", True)):
            found = [v for k, v in self.best.items() if k.startswith("psnr_") and k.endswith("_from_other") is other]
            said += [f"PSNR {fmean(found):.1f} dB from {view}"] if found else []
        logger.info("Step %d of %d: %s.", step, self.spec.max_steps, ", ".join(said) or "no study is held out")

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
            training={
                "studies": studies,
                "recipe": without_paths(spec.model_dump(mode="json")),
                "validation": self.best,
            },
        )
        if folder.exists():
            return folder
        return save_model(folder, card, network)
