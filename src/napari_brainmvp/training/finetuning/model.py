"""A segmentation network with its templates, and one forward pass to the losses of fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from napari_brainmvp.models import LoadedModel
from napari_brainmvp.networks import ModalityTemplates, SegmentationNetwork, channels_last
from napari_brainmvp.training.cache import CachedStudy
from napari_brainmvp.training.finetuning.data import Batch
from napari_brainmvp.training.finetuning.objective import Activation, consistency, deep_loss, truth
from napari_brainmvp.training.finetuning.run import Trainable
from napari_brainmvp.training.finetuning.spec import SCRATCH, FinetuneSpec
from napari_brainmvp.training.labels import LabelDescription

__all__ = ["SegmentationModel", "freeze_batch_norm", "make_templates", "parameter_groups"]

_SHAPE = (36, 44, 38)
"""Template voxels over the foreground box where the model to start from has none: about 4 mm each."""
_BOX = (144, 176, 152)
"""A usual foreground box in voxels: the part of a template in another frame that is used."""
_FREEZE_NORM_FROM_SCRATCH = 0.6


def make_templates(
    modalities: Sequence[str], source: LoadedModel | None, studies: Sequence[CachedStudy]
) -> ModalityTemplates:
    """Make the templates that stand in for missing modalities: the source's, else the mean over the studies.

    A modality that neither knows has an empty template.
    """
    known = source.templates if source is not None else None
    in_box = source is not None and source.card.template_frame == "box" and not source.card.template_minmax
    a, b, c = known.volumes.shape[1:] if known is not None and in_box else _SHAPE
    templates = ModalityTemplates(modalities, (a, b, c)).requires_grad_(False)
    for index, modality in enumerate(modalities):
        if source is not None and known is not None and modality in known.modalities:
            if in_box:
                templates.volumes[index] = known.volumes[known.modalities.index(modality)]
            else:
                placed = known.placed(modality, _BOX, source.card.template_frame, source.card.template_minmax)
                templates.volumes[index] = F.interpolate(placed[None, None], (a, b, c), mode="area")[0, 0]
            continue
        resized = [
            F.interpolate(
                torch.from_numpy(np.array(s.volumes[s.modalities.index(modality)]))[None, None].float(),
                (a, b, c),
                mode="trilinear",
                align_corners=True,
            )[0, 0]
            for s in studies[:20]
            if modality in s.modalities
        ]
        if resized:
            templates.volumes[index] = torch.stack(resized).mean(0)
    return templates


class SegmentationModel(Trainable):
    """A segmentation network in training.

    Parameters
    ----------
    network : SegmentationNetwork
    templates : ModalityTemplates
        One volume for each input channel; not trained.
    labels : LabelDescription
    spec : FinetuneSpec
    """

    table: Tensor

    def __init__(
        self, network: SegmentationNetwork, templates: ModalityTemplates, labels: LabelDescription, spec: FinetuneSpec
    ) -> None:
        super().__init__()
        self.network, self.templates, self.spec = network, templates, spec
        self.activation: Activation = "sigmoid" if labels.regions else "softmax"
        self.register_buffer("table", torch.from_numpy(labels.table), persistent=False)

    def set_mode(self, done: float) -> None:
        """Switch to training mode, with batch normalisation as it shall be after this share of the run."""
        self.train()
        later = _FREEZE_NORM_FROM_SCRATCH if self.spec.init == SCRATCH else 0.0
        if done >= max(self.spec.freeze_norm, later):
            freeze_batch_norm(self.network)

    def views(self, batch: Batch) -> Tensor:
        """Make the views (V B, C, n, n, n), all first views first: hidden and missing channels show their template."""
        image, shown = batch["image"], batch["shown"].movedim(1, 0).flatten(0, 1)
        count, size = len(image), image.shape[-1]
        repeated = image.repeat(len(shown) // count, 1, 1, 1, 1)
        if shown.all():
            return repeated
        templates = self.templates.crop(None, batch["start"], batch["stop"], size)
        templates = templates * (image > 0).any(1, keepdim=True)
        instead = templates.repeat(len(shown) // count, 1, 1, 1, 1)
        return torch.where(shown[:, :, None, None, None], repeated, instead)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the losses of a batch: ``segmentation``, ``consistency`` where there are two views, and ``loss``."""
        views = channels_last(self.views(batch))
        features = self.network.encoder(views)
        outputs = self.network.decode_stages(features)
        target, labelled = truth(batch["rows"], self.table)
        count = len(views) // len(target)
        target, labelled = target.repeat(count, 1, 1, 1, 1), labelled.repeat(count, 1, 1, 1, 1)
        losses = {"segmentation": deep_loss(outputs, target, labelled, self.activation, self.spec.dice)}
        total = losses["segmentation"]
        if count == 2:
            losses["consistency"] = consistency(*features[-1].chunk(2))
            total = total + self.spec.consistency * losses["consistency"]
        return {**losses, "loss": total}

    def predict(self, batch: Batch) -> Tensor:
        """Map a batch of single views to logits (B, K, n, n, n), in eval mode."""
        logits: Tensor = self.network(self.views(batch))
        return logits

    def predict_classes(self, batch: Batch) -> Tensor:
        """Do as :meth:`predict`, but for the classes inside the network, before unions are made."""
        return self.network.class_logits(self.network.encoder(channels_last(self.views(batch))))[0]


def freeze_batch_norm(module: nn.Module) -> None:
    """Let every batch normalisation inside a module use its running statistics and leave them as they are."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm3d):
            part.eval()


def parameter_groups(network: nn.Module, spec: FinetuneSpec, *, train_stem: bool) -> list[dict[str, object]]:
    """Give every part of a network its learning rate, and freeze what has none.

    The decoder and the heads have ``spec.learning_rate``; the encoder's last stage ``spec.encoder_rate`` times that,
    and every stage before it ``spec.layer_decay`` times the one after it.

    Parameters
    ----------
    network : Module
        With an ``encoder``.
    spec : FinetuneSpec
    train_stem : bool
        Train the encoder's first convolution at the full rate although the rest is frozen: it is new to its channels.
    """
    relative = 1.0 if spec.init == SCRATCH else spec.encoder_rate
    decay = 1.0 if spec.init == SCRATCH else spec.layer_decay
    rates: dict[float, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        rate = 1.0
        if name.startswith("encoder."):
            digits = [c for c in name.split(".")[1] if c.isdigit()]
            stage = int(digits[0]) if digits else 4
            rate = relative * decay ** (4 - stage)
            if train_stem and name.startswith("encoder.patch_embed1.proj"):
                rate = max(rate, 1.0)
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            rates.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate * spec.learning_rate} for rate, parameters in rates.items()]
