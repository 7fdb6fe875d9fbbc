"""Calibrate probabilities: one temperature for all logits (Guo et al., ICML 2017)."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from napari_brainmvp.networks import Unions
from napari_brainmvp.training.finetuning.objective import Activation

__all__ = ["fit_temperature"]


def fit_temperature(logits: Tensor, target: Tensor, activation: Activation, unions: Unions | None = None) -> float:
    """Minimise the cross entropy of logits / T (Guo et al., ICML 2017) over a fine grid of T from 0.25 to 4.

    Parameters
    ----------
    logits : Tensor of shape (N, C)
        Of classes.
    target : Tensor of shape (N, K), 0 or 1
    activation : {"softmax", "sigmoid"}
    unions : Unions, optional
        Makes K unions of the C classes.
    """
    best, chosen = float("inf"), 1.0
    for t in np.exp(np.linspace(np.log(0.25), np.log(4), 65)):
        scaled = logits / float(t)
        if unions is not None:
            scaled = unions(scaled)
        if activation == "softmax":
            loss = float(-(target * F.log_softmax(scaled, 1)).sum(1).mean())
        else:
            loss = float(F.binary_cross_entropy_with_logits(scaled, target))
        if loss < best:
            best, chosen = loss, float(t)
    return chosen
