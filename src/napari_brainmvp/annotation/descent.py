"""Descend from a perceptron's weights on a few thousand voxels, in hundredths of a second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Part", "Voxels", "descend"]


@dataclass(frozen=True, eq=False)
class Voxels:
    """What is learned from.

    Parameters
    ----------
    values : Tensor of shape (n, F), float32
        Features.
    prior : Tensor of shape (n, K), float32
        Logits that the perceptron's are added to.
    wanted : Tensor of shape (n, K), float32
        Probabilities.
    """

    values: Tensor
    prior: Tensor
    wanted: Tensor

    def part(self, rows: slice) -> Voxels:
        """Return some of them."""
        return Voxels(self.values[rows], self.prior[rows], self.wanted[rows])

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Choose at most ``size`` of them."""
        count = len(self.values)
        chosen = torch.randint(count, (size,), generator=generator) if count > size else torch.arange(count)
        values, prior, wanted = (t.index_select(0, chosen) for t in (self.values, self.prior, self.wanted))
        return values, prior, wanted


@dataclass(frozen=True, eq=False)
class Part:
    """Voxels of one kind: at most ``size`` of them are drawn a step, and weigh ``share`` in all."""

    voxels: Voxels
    size: int
    share: float


def descend(
    weights: Sequence[Tensor],
    parts: Sequence[Part],
    steps: int,
    noise: Tensor,
    generator: torch.Generator,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """Minimise the cross entropy by Adam, gradients by hand: torch's bookkeeping would take longer than the products.

    Parameters
    ----------
    weights : sequence of Tensor
        Of shapes (F, H), (H,), (H, K) and (K,), float32; changed in place.
    parts : sequence of Part
        None of them empty.
    steps : int
    noise : Tensor of shape (m, F), float32
        Rows of it, from a random one on, are added to the features: fresh draws would take longer than the products.
    generator : torch.Generator
    learning_rate, weight_decay : float
        Of Adam, with decoupled decay; the rate rises over five steps and falls by a cosine.
    """
    first, bias, last, offset = weights
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    for step in range(1, steps + 1):
        drawn = [part.voxels.draw(part.size, generator) for part in parts]
        x, prior, wanted = (torch.cat(column) for column in zip(*drawn, strict=True))
        sizes = [len(rows[0]) for rows in drawn]
        weight = torch.cat([torch.full((n, 1), part.share / n) for n, part in zip(sizes, parts, strict=True)])
        skip = int(torch.randint(len(noise) - len(x) + 1, (), generator=generator))
        x = x + noise[skip : skip + len(x)]
        hidden = torch.addmm(bias, x, first).clamp_(min=0)
        scores = (torch.addmm(offset, hidden, last).add_(prior).softmax(1) - wanted) * weight
        back = torch.ops.aten.threshold_backward(scores @ last.T, hidden, 0)  # 0 where no hidden unit is on
        gradients = (x.T @ back, back.sum(0), hidden.T @ scores, scores.sum(0))
        rate = learning_rate * min(1.0, step / 5) * (0.5 + 0.5 * np.cos(np.pi * step / (steps + 1)))
        for value, gradient, (mean, square) in zip(weights, gradients, moments, strict=True):
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient.square(), 0.01)
            scaled = (mean / (1 - 0.9**step)) / ((square / (1 - 0.99**step)).sqrt() + 1e-8)
            value.mul_(1 - rate * weight_decay).sub_(scaled, alpha=rate)
