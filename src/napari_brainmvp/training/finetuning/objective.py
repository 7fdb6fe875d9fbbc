"""The losses of fine-tuning (Rui et al., CVPR 2025, section on downstream tasks), blind to unlabelled voxels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["consistency", "deep_loss", "segmentation_loss", "truth"]

Activation = Literal["softmax", "sigmoid"]


def truth(rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Look up what every voxel is.

    Parameters
    ----------
    rows : Tensor of shape (B, X, Y, Z), int64
        Row numbers of ``table``; negative where a voxel carries no label.
    table : Tensor of shape (R, K), float32, 0 or 1

    Returns
    -------
    target : Tensor of shape (B, K, X, Y, Z), float32, 0 or 1
    labelled : Tensor of shape (B, 1, X, Y, Z), float32, 0 or 1
    """
    labelled = (rows >= 0)[:, None].to(table.dtype)
    return table[rows.clamp(min=0)].movedim(-1, 1) * labelled, labelled


def segmentation_loss(
    logits: Tensor, target: Tensor, labelled: Tensor, activation: Activation, dice: float = 0.7
) -> Tensor:
    """Soft Dice and cross entropy over the labelled voxels.

    L = d (1 - mean_k D_k) + (1 - d) E, with D_k = (2 sum p t + 1) / (sum p + sum t + 1) over the batch for every
    channel that occurs, and E the mean cross entropy, binary and over all channels for regions. Sums and means are
    over labelled voxels; with none, the loss is 0.

    Parameters
    ----------
    logits : Tensor of shape (B, K, X, Y, Z)
    target, labelled : Tensor
        As :func:`truth` gives them.
    activation : {"softmax", "sigmoid"}
        Exclusive labels, or regions that overlap.
    dice : float
        d, 0..1; 0.7 in the paper.

    Returns
    -------
    Tensor
        Scalar.
    """
    logits = logits.float()
    if activation == "softmax":
        log_probabilities = F.log_softmax(logits, 1)
        probabilities = log_probabilities.exp()
        entropy = -(target * log_probabilities).sum(1, keepdim=True)
    else:
        probabilities = torch.sigmoid(logits)
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1, keepdim=True)
    mean = (entropy * labelled).sum() / labelled.sum().clamp(min=1)
    found, true = ((part * labelled).movedim(1, 0).flatten(1) for part in (probabilities, target))
    volume = true.sum(1)
    scores = (2 * (found * true).sum(1) + 1) / (found.sum(1) + volume + 1)
    occurs = volume > 0
    missed = 1 - (scores * occurs).sum() / occurs.sum().clamp(min=1)
    return dice * missed * occurs.any() + (1 - dice) * mean


def deep_loss(
    outputs: Sequence[Tensor], target: Tensor, labelled: Tensor, activation: Activation, dice: float = 0.7
) -> Tensor:
    """Average :func:`segmentation_loss` over outputs from coarse to fine, each counting twice the one before."""
    weights = [2.0**k for k in range(len(outputs))]
    losses = [
        w * segmentation_loss(o, target, labelled, activation, dice) for w, o in zip(weights, outputs, strict=True)
    ]
    return torch.stack(losses).sum() / sum(weights)


def consistency(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared difference of the features of two views of the same crop (template mixing)."""
    return (first.float() - second.float()).square().mean()
