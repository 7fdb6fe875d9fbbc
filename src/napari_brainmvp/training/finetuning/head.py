"""Start the output layer where the model already leads, before anything else is trained."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn

from napari_brainmvp.training.finetuning.data import LabelledCrops
from napari_brainmvp.training.finetuning.model import SegmentationModel
from napari_brainmvp.training.finetuning.objective import truth
from napari_brainmvp.training.labels import assign_classes

__all__ = ["fit_head", "match_classes"]

_BATCHES, _VOXELS = 12, 6000
"""Batches of crops that are looked at, and voxels taken from each."""

logger = logging.getLogger(__name__)

Parts = tuple[tuple[int, ...], ...]
"""For each class of a network, the output channels it is part of; see :class:`~napari_brainmvp.networks.Unions`."""


@torch.no_grad()
def match_classes(model: SegmentationModel, crops: LabelledCrops, fabric: Fabric) -> Parts:
    """Find which labels the classes of a network are parts of, by where the network sees them.

    See :func:`~napari_brainmvp.training.labels.assign_classes`. So a model of tissues is at once a model of the regions
    of a dataset, whatever they are called.

    Parameters
    ----------
    model : SegmentationModel
        With exclusive classes inside, and the labels of the dataset.
    crops : LabelledCrops
        Of the training cases; the first batches of the run are looked at, with all their modalities.
    fabric : Fabric
        Device and precision.

    Returns
    -------
    tuple of tuple of int
        For each class, the output channels it is part of; empty where some label has no class.
    """
    table = model.table.cpu()
    spec = crops.spec.model_copy(update={"mixing": 0.0, "consistency": 0.0})
    everything = LabelledCrops(crops.cases, crops.modalities, crops.labels, spec)
    classes = model.network.out_channels
    sums, counts = torch.zeros(len(table), classes), torch.zeros(len(table), 1)
    model.to(fabric.device).eval()
    for number in range(_BATCHES):
        batch = everything.batch(number)
        with fabric.autocast():
            logits = model.predict_classes({key: value.to(fabric.device) for key, value in batch.items()})
        probabilities = logits.float().softmax(1).cpu().movedim(1, -1)
        for row in range(len(table)):
            there = batch["rows"] == row
            sums[row] += probabilities[there].sum(0)
            counts[row] += there.sum()
    if not counts.all():
        values = (crops.labels.background, *crops.labels.values)
        unseen = ", ".join(str(value) for value, count in zip(values, counts, strict=True) if not count)
        logger.info("No voxel with the label %s was seen: the output layer starts anew.", unseen)
        return ()
    rows = assign_classes((sums / counts).numpy())
    if rows is None:
        logger.info("The model's classes do not make up the labels: the output layer starts anew.")
        return ()
    return tuple(tuple(table[row].nonzero()[:, 0].tolist()) for row in rows)


@torch.no_grad()
def fit_head(model: SegmentationModel, crops: LabelledCrops, fabric: Fabric) -> None:
    """Fit the output convolution to the features as they are: a linear probe before fine-tuning (Kumar et al., 2022).

    From a random start, the first hundreds of steps would go into the output layer, and what it sends back into the
    network meanwhile spoils features that were good. The fit is a convex problem of few unknowns, and cheap.

    Parameters
    ----------
    model : SegmentationModel
        Its network's ``decoder.out`` is changed in place.
    crops : LabelledCrops
        Of the training cases; the first batches of the run are looked at.
    fabric : Fabric
        Device and precision.
    """
    out = model.network.decoder.out.conv.conv
    assert isinstance(out, nn.Conv3d)
    seen: list[Tensor] = []
    hook = out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].float().cpu()))
    model.to(fabric.device).eval()
    generator = torch.Generator().manual_seed(crops.spec.seed)
    features, targets = [], []
    for number in range(_BATCHES):
        batch = crops.batch(number)
        batch["shown"] = batch["shown"][:, :1]
        with fabric.autocast():
            model.predict({key: value.to(fabric.device) for key, value in batch.items()})
        target, labelled = truth(batch["rows"], model.table.cpu())
        index = labelled.flatten().nonzero()[:, 0]
        index = index[torch.randperm(len(index), generator=generator)[:_VOXELS]]
        features.append(seen.pop().movedim(1, -1).flatten(0, 3)[index])
        targets.append(target.movedim(1, -1).flatten(0, 3)[index])
    hook.remove()
    x, y = torch.cat(features), torch.cat(targets)
    if len(x):
        weight, bias = _fit(x, y, model.activation)
        out.weight.copy_(weight[..., None, None, None])
        assert out.bias is not None
        out.bias.copy_(bias)


def _fit(features: Tensor, target: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Minimise the cross entropy of a linear layer with a small ridge: weights (K, F) and biases (K,)."""
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-3)
    x = (features - mean) / scale
    with torch.enable_grad():
        weight = torch.zeros(target.shape[1], x.shape[1], requires_grad=True)
        bias = torch.zeros(target.shape[1], requires_grad=True)
        optimiser = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            logits = x @ weight.T + bias
            if activation == "softmax":
                loss = -(target * F.log_softmax(logits, 1)).sum(1).mean()
            else:
                loss = F.binary_cross_entropy_with_logits(logits, target)
            loss = loss + 1e-4 * weight.square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
    plain = weight.detach() / scale
    return plain, bias.detach() - plain @ mean
