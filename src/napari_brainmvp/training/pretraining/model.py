"""The network with everything that is trained beside it, and one forward pass through all three tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from napari_brainmvp.networks import (
    UNIFORMER_COMPACT,
    UNIFORMER_SMALL,
    ModalityTemplates,
    PretrainingNetwork,
    ReconstructionNetwork,
)
from napari_brainmvp.training.pretraining.data import Batch
from napari_brainmvp.training.pretraining.spec import PretrainingSpec
from napari_brainmvp.training.pretraining.tasks import (
    block_mask,
    distillation_loss,
    error_likelihood,
    info_nce,
    reconstruction_loss,
)

__all__ = ["FULL_RESOLUTION_CHANNELS", "PretrainingModel", "build_network"]

FULL_RESOLUTION_CHANNELS = 16
"""Of the decoder of ``uniformer-compact``, as in the default segmentation model."""
Gather = Callable[[Tensor], Tensor]


def build_network(spec: PretrainingSpec) -> PretrainingNetwork | ReconstructionNetwork:
    """Make the untrained network with its templates, all zero."""
    templates = ModalityTemplates(spec.modalities, spec.template_shape)
    encoder = UNIFORMER_COMPACT if spec.encoder == "compact" else UNIFORMER_SMALL
    if spec.decoder == "plain":
        return PretrainingNetwork(encoder, templates=templates)
    full = FULL_RESOLUTION_CHANNELS if spec.encoder == "compact" else None
    return ReconstructionNetwork(spec.modalities, encoder, full, templates)


class PretrainingModel(nn.Module):
    """Two masked views of each study through one network, and the losses of the three tasks.

    Parameters
    ----------
    spec : PretrainingSpec
    """

    def __init__(self, spec: PretrainingSpec) -> None:
        super().__init__()
        self.spec = spec
        self.network = build_network(spec)
        deepest = self.network.encoder.uniformer.spec if isinstance(self.network, PretrainingNetwork) else None
        width = (deepest or cast(ReconstructionNetwork, self.network).encoder.spec).channels[-1]
        self.projection: nn.Module | None = None
        if spec.contrast and spec.projection:
            self.projection = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, spec.projection))

    @property
    def templates(self) -> ModalityTemplates:
        """The templates being distilled."""
        assert self.network.templates is not None
        return self.network.templates

    def views(self, batch: Batch, progress: float, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Make view A, masked from the template, and view B, masked from another modality.

        View B takes the template too where the study has no other modality, and before ``other_from``.

        Parameters
        ----------
        batch : Batch
            As :class:`~napari_brainmvp.training.pretraining.data.CropStream` gives it.
        progress : float
            Share of the run that is done, 0..1.
        rank, world : int
            Which samples of the global batch these are.

        Returns
        -------
        views, masks : Tensor of shape (2 B, 1, n, n, n)
            First all views A, then all views B; what is hidden is True.
        template : Tensor of shape (B, 1, n, n, n)
        """
        spec, image = self.spec, batch["image"]
        total = len(image) * world
        generator = torch.Generator().manual_seed(hash((spec.seed, int(batch["number"]))) % 2**63)
        low, high = spec.mask_rate
        rates = low + (high - low) * torch.rand(2 * total, generator=generator)
        nothing = torch.rand(total, generator=generator) < spec.whole
        mine = torch.arange(rank, 2 * total, world)
        other = batch["has_other"] & (progress >= spec.other_from)
        rates, nothing = rates[mine].to(image.device), nothing[mine[: len(image)]].to(image.device)
        rates[len(image) :][nothing & other] = 1.0
        every = torch.ones(2 * total)
        every[mine] = rates.cpu()
        masks = block_mask(every, spec.crop, generator)[mine].to(image.device)

        template = self.templates.crop(batch["target"], batch["start"], batch["stop"], spec.crop)
        if spec.template_minmax:
            flat = self.templates.volumes[batch["target"]].flatten(1)
            least, most = (edge[:, None, None, None, None] for edge in (flat.amin(1), flat.amax(1)))
            template = (template - least) / (most - least).clamp(min=1e-9)
        instead = torch.where(other[:, None, None, None, None], batch["other"], template)
        shown = torch.cat([image, image])
        return torch.where(masks, torch.cat([template, instead]), shown), masks, template

    def reconstruct(self, views: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the reconstruction (B, 1, ...), the log variance of its error or None, and the deepest features."""
        features = self.network.encode(views)
        if isinstance(self.network, PretrainingNetwork):
            return self.network.decode(features), None, features[-1]
        out = self.network.decode(features, target)
        return out[:, :1], out[:, 1:], features[-1]

    def forward(
        self, batch: Batch, progress: float, rank: int = 0, world: int = 1, gather: Gather | None = None
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Returns
        -------
        dict of str to Tensor
            Scalars ``template`` and ``other`` (task 1 on views A and B), ``distillation`` (task 2), ``contrast``
            (task 3), ``likelihood``, and ``loss``, their weighted sum.
        """
        spec, image, count = self.spec, batch["image"], len(batch["image"])
        views, masks, template = self.views(batch, progress, rank, world)
        mean, log_variance, deepest = self.reconstruct(views, batch["target"].repeat(2))
        hidden = masks if spec.masked_loss else None
        first, second = (hidden[:count], hidden[count:]) if hidden is not None else (None, None)
        losses = {
            "template": reconstruction_loss(mean[:count], image, first),
            "other": reconstruction_loss(mean[count:], image, second),
        }
        total = spec.from_template * losses["template"] + spec.from_other * losses["other"]
        if spec.distillation:
            losses["distillation"] = distillation_loss(template, image)
            total = total + spec.distillation * losses["distillation"]
        if spec.contrast:
            pooled = deepest.flatten(1) if self.projection is None else self.projection(deepest.mean((2, 3, 4)))
            one, two = (gather(half) if gather else half for half in (pooled[:count], pooled[count:]))
            losses["contrast"] = info_nce(one, two, spec.temperature)
            total = total + spec.contrast * float(progress >= spec.contrast_from) * losses["contrast"]
        if log_variance is not None:
            losses["likelihood"] = error_likelihood(log_variance, mean, image.repeat(2, 1, 1, 1, 1), hidden)
            total = total + 0.1 * losses["likelihood"]
        return {**losses, "loss": total}
