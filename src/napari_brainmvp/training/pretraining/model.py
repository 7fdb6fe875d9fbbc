"""The network with everything that is trained beside it, and one forward pass through all three tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from napari_brainmvp.networks import (
    UNIFORMER_COMPACT,
    UNIFORMER_SMALL,
    EncoderSpec,
    ModalityTemplates,
    PretrainingNetwork,
    ReconstructionNetwork,
)
from napari_brainmvp.training.pretraining.data import Batch
from napari_brainmvp.training.pretraining.spec import PretrainingSpec
from napari_brainmvp.training.pretraining.tasks import (
    Gather,
    block_mask,
    error_likelihood,
    info_nce,
    mean_square,
    reconstruction_loss,
)

__all__ = ["FULL_RESOLUTION_CHANNELS", "Prediction", "PretrainingModel", "Views", "build_network", "unseen"]

FULL_RESOLUTION_CHANNELS = 16
"""Of the decoder of ``uniformer-compact``, as in the default segmentation model."""


class Views(NamedTuple):
    """Two masked views of each crop.

    ``scans`` (B, M, n, n, n), float16: of all modalities. ``image``, ``template`` (B, 1, n, n, n): what is to be
    learned, and the distilled idea of it. ``templates`` (B, M, n, n, n): those of all modalities where they are
    distilled directly. ``head`` (B, 1, n, n, n), bool: where any modality is not 0. ``shown``, ``masks`` (2 B, 1, n, n,
    n): first all views A, then all views B, and True where they hide the image. ``source`` (2 B,): the modality shown
    there; their number for the template.
    """

    scans: Tensor
    image: Tensor
    head: Tensor
    template: Tensor
    templates: Tensor
    shown: Tensor
    masks: Tensor
    source: Tensor


class Prediction(NamedTuple):
    """What the network makes of views.

    ``means`` and ``log_variances`` (2 B, M, n, n, n) of all modalities, or (2 B, 1, n, n, n) and None from the
    published decoder; the ``features`` of the four stages of the encoder.
    """

    means: Tensor
    log_variances: Tensor | None
    features: Sequence[Tensor]

    def of(self, target: Tensor) -> Prediction:
        """Return the maps (2 B, 1, n, n, n) of one modality of each view."""
        if self.log_variances is None:
            return self
        rows = torch.arange(len(target), device=target.device)
        means, log_variances = (maps[rows, target][:, None] for maps in (self.means, self.log_variances))
        return Prediction(means, log_variances, self.features)


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
        width = self.encoder_spec.channels[-1]
        self.projection: nn.Module | None = None
        if spec.contrast and spec.projection:
            self.projection = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, spec.projection))

    @property
    def encoder_spec(self) -> EncoderSpec:
        """Sizes of the encoder."""
        network = self.network
        return network.encoder.uniformer.spec if isinstance(network, PretrainingNetwork) else network.encoder.spec

    @property
    def templates(self) -> ModalityTemplates:
        """The templates being distilled."""
        assert self.network.templates is not None
        return self.network.templates

    def views(self, batch: Batch, progress: float, rank: int = 0, world: int = 1) -> Views:
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
        """
        spec, scans, target = self.spec, batch["scans"], batch["target"]
        count, device = len(scans), scans.device
        rows = torch.arange(count, device=device)
        image, second = (scans[rows, batch[key]][:, None].float() for key in ("target", "other"))
        total = count * world
        generator = torch.Generator().manual_seed(hash((spec.seed, int(batch["number"]))) % 2**63)
        low, high = spec.mask_rate
        rates = low + (high - low) * torch.rand(2 * total, generator=generator)
        nothing = torch.rand(total, generator=generator) < spec.whole
        mine = torch.arange(rank, 2 * total, world)
        other = (batch["other"] != target) & (progress >= spec.other_from)
        rates, nothing = rates[mine].to(device), nothing[mine[:count]].to(device)
        rates[count:][nothing & other] = 1.0
        every = torch.ones(2 * total)
        every[mine] = rates.cpu()
        masks = block_mask(every, spec.crop, generator)[mine].to(device)

        wanted = None if spec.distillation else target[:, None]
        templates = self.templates.crop(wanted, batch["start"], batch["stop"], spec.crop)
        template = templates[rows, target][:, None] if spec.distillation else templates
        if spec.template_minmax:
            edges = torch.stack([torch.stack(torch.aminmax(volume)) for volume in self.templates.volumes])
            least, most = edges[target].T[..., None, None, None, None]
            template = (template - least) / (most - least).clamp(min=1e-9)
        instead = torch.cat([template, torch.where(other[:, None, None, None, None], second, template)])
        from_template = torch.full_like(target, len(spec.modalities))
        return Views(
            scans=scans,
            image=image,
            head=scans.abs().amax(1, keepdim=True) > 0,  # far faster on a CPU than any() of a comparison
            template=template,
            templates=templates,
            shown=torch.where(masks, instead, torch.cat([image, image])),
            masks=masks,
            source=torch.cat([from_template, torch.where(other, batch["other"], from_template)]),
        )

    def predict(self, shown: Tensor, source: Tensor) -> Prediction:
        """Reconstruct from views (2 B, 1, n, n, n) whose hidden blocks show ``source`` (2 B,)."""
        features = self.network.encode(shown)
        if isinstance(self.network, PretrainingNetwork):
            return Prediction(self.network.decode(features), None, features[1:])
        means, log_variances = self.network.decode(features, source)
        return Prediction(means, log_variances, features[1:])

    def forward(
        self, batch: Batch, progress: float, rank: int = 0, world: int = 1, gather: Gather | None = None
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Returns
        -------
        dict of str to Tensor
            Scalars ``template`` and ``other`` (task 1 on views A and B), ``distillation`` (task 2), ``contrast``
            (task 3), ``likelihood``, ``activation``, and ``loss``, their weighted sum.
        """
        spec, views = self.spec, self.views(batch, progress, rank, world)
        scans = views.scans
        found = self.predict(views.shown, views.source)
        if found.log_variances is not None and spec.all_targets:
            truth, counted = scans.repeat(2, 1, 1, 1, 1), unseen(views, batch)
        else:
            found = found.of(batch["target"].repeat(2))
            truth, counted = views.image.repeat(2, 1, 1, 1, 1), views.masks & views.head.repeat(2, 1, 1, 1, 1)
        pairs = [part.chunk(2) for part in (found.means, truth, counted)]
        losses = {
            name: reconstruction_loss(mean, true, where if spec.masked_loss else None, gather)
            for name, mean, true, where in zip(("template", "other"), *pairs, strict=True)
        }
        total = spec.from_template * losses["template"] + spec.from_other * losses["other"]
        if found.log_variances is not None:
            losses["likelihood"] = error_likelihood(found.log_variances, found.means, truth, counted, gather)
            total = total + 0.1 * losses["likelihood"]
        if spec.distillation:
            inside = views.head & batch["present"][:, :, None, None, None]
            losses["distillation"] = reconstruction_loss(views.templates, scans, inside, gather)
            total = total + spec.distillation * losses["distillation"]
        if spec.contrast:
            deepest = found.features[-1]
            pooled = deepest.flatten(1) if self.projection is None else self.projection(deepest.mean((2, 3, 4)))
            own = batch["study"].float()
            one, two, studies = (gather(part) if gather else part for part in (*pooled.chunk(2), own))
            losses["contrast"] = info_nce(one, two, spec.temperature, studies)
            total = total + spec.contrast * float(progress >= spec.contrast_from) * losses["contrast"]
        if spec.activation:
            losses["activation"] = mean_square(found.features[:-1])
            total = total + spec.activation * losses["activation"]
        return {**losses, "loss": total}


def unseen(views: Views, batch: Batch) -> Tensor:
    """Return where each modality is to be predicted and not to be seen: (2 B, M, n, n, n), bool, inside the head."""
    counted = (batch["present"][:, :, None, None, None] & views.head).repeat(2, 1, 1, 1, 1)
    rows = torch.arange(len(counted), device=counted.device)
    counted[rows, batch["target"].repeat(2)] &= views.masks[:, 0]
    real = (views.source < counted.shape[1]).nonzero()[:, 0]
    counted[real, views.source[real]] &= ~views.masks[real, 0]
    return counted
