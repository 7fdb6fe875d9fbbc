"""The instant probe: a small perceptron on a study's features, fitted while the hand is still on the brush.

A linear layer on these features loses to a forest, and a forest takes seconds a volume. One hidden layer has the
forest's accuracy (more, with the network's maps among the features), and costs two matrix products a voxel. Its
first fit starts from random hidden units and an output layer solved in closed form, and descends from there; a new
stroke goes on from the weights of the last one. So a dozen steps suffice before the visible slice is shown, and some
more before the volume is. Noise on the standardised inputs keeps a fit to a few hundred voxels smooth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.inference.device import choose_dtype

__all__ = ["Probe", "ProbeSpec"]

_CHUNK = 1 << 15


@dataclass(frozen=True)
class ProbeSpec:
    """The probe and its fit.

    Parameters
    ----------
    hidden : int
        Units of the hidden layer.
    first_steps : int
        Steps before the visible slice is predicted.
    steps : int
        Steps in all before the volume is.
    batch : int
        Labelled voxels a step.
    noise : float
        Standard deviation of the noise added to the features, whose own is 1.
    learning_rate, weight_decay : float
        Of Adam (decoupled decay).
    balance : float
        Share of the classes' weights that is equal; the rest follows how much of each is labelled.
    ridge : float
        Of the closed-form start.
    seed : int
        Same strokes, same seed, same machine: same prediction.
    """

    hidden: int = 96
    first_steps: int = 12
    steps: int = 100
    batch: int = 1024
    noise: float = 0.3
    learning_rate: float = 0.01
    weight_decay: float = 0.3
    balance: float = 0.0
    ridge: float = 0.1
    seed: int = 0


class Probe:
    """A classifier of voxels by their features.

    Parameters
    ----------
    features : int
        Columns of the feature matrix.
    spec : ProbeSpec
    """

    def __init__(self, features: int, spec: ProbeSpec | None = None) -> None:
        self.spec = spec or ProbeSpec()
        self.classes: tuple[int, ...] = ()
        self._features = features
        self._generator = torch.Generator().manual_seed(self.spec.seed)
        self._noise = self.spec.noise * torch.randn(4 * self.spec.batch, features, generator=self._generator)
        self._weights: list[Tensor] = []

    def fit(self, values: Tensor, labels: NDArray[np.int64], steps: int | None = None) -> None:
        """Fit to labelled voxels, going on from the last fit where the classes are the same.

        Parameters
        ----------
        values : Tensor of shape (n, F)
        labels : ndarray of shape (n,), integers
            Any values; each is a class.
        steps : int, optional
            Default those of the specification.

        Raises
        ------
        BrainMVPError
            Fewer than two classes are labelled.
        """
        classes, numbers = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise BrainMVPError(
                "The probe needs voxels of at least two classes: paint some background as well as some of what you "
                "are looking for."
            )
        target = torch.from_numpy(numbers.astype(np.int64))
        if tuple(classes) != self.classes:
            self._start(tuple(int(c) for c in classes), values.float(), target)
        counts = torch.bincount(target, minlength=len(classes)).float()
        shares = (1 - self.spec.balance) * counts / counts.sum() + self.spec.balance / len(classes)
        chance = (shares / counts)[target]
        with torch.inference_mode():
            self._descend(values.float(), target, chance, self.spec.steps if steps is None else steps)

    def _start(self, classes: tuple[int, ...], values: Tensor, target: Tensor) -> None:
        """Draw a hidden layer, and solve for the output layer on top of it: a good place to descend from."""
        self.classes = classes
        self._generator.manual_seed(self.spec.seed)
        first = torch.randn(self._features, self.spec.hidden, generator=self._generator) * (2 / self._features) ** 0.5
        hidden = torch.cat([(values @ first).clamp(min=0), torch.ones(len(values), 1)], 1)
        wanted = 4 * F.one_hot(target, len(classes)).float() - 2
        weight = 1 / torch.bincount(target).float()[target][:, None]
        gram = hidden.T @ (weight * hidden) + self.spec.ridge * torch.eye(hidden.shape[1])
        solved = torch.linalg.solve(gram, hidden.T @ (weight * wanted))
        self._weights = [first, torch.zeros(self.spec.hidden), solved[:-1].contiguous(), solved[-1].contiguous()]

    def _descend(self, values: Tensor, target: Tensor, chance: Tensor, steps: int) -> None:
        """Adam on the cross entropy, gradients by hand: torch's bookkeeping would take longer than the products."""
        spec, count = self.spec, len(values)
        first, bias, last, offset = self._weights
        moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in self._weights]
        size = min(spec.batch, count)
        uneven = spec.balance > 0
        for step in range(1, steps + 1):
            if uneven:
                chosen = torch.multinomial(chance, size, replacement=True, generator=self._generator)
            else:
                chosen = (
                    torch.randint(count, (size,), generator=self._generator) if count > size else torch.arange(count)
                )
            skip = int(torch.randint(len(self._noise) - size + 1, (), generator=self._generator))
            x = values[chosen] + self._noise[skip : skip + size]  # fresh draws would take longer than the products
            before = torch.addmm(bias, x, first)
            hidden = before.clamp(min=0)
            scores = torch.addmm(offset, hidden, last).softmax(1)
            scores[torch.arange(size), target[chosen]] -= 1
            scores /= size
            back = (scores @ last.T).masked_fill_(before <= 0, 0)
            gradients = (x.T @ back, back.sum(0), hidden.T @ scores, scores.sum(0))
            rate = spec.learning_rate * min(1.0, step / 5) * (0.5 + 0.5 * np.cos(np.pi * step / (steps + 1)))
            for weight, gradient, (mean, square) in zip(self._weights, gradients, moments, strict=True):
                mean.lerp_(gradient, 0.1)
                square.lerp_(gradient.square(), 0.01)
                scaled = (mean / (1 - 0.9**step)) / ((square / (1 - 0.99**step)).sqrt() + 1e-8)
                weight.mul_(1 - rate * spec.weight_decay).sub_(scaled, alpha=rate)

    @torch.inference_mode()
    def predict(self, values: Tensor) -> Tensor:
        """Return the probabilities of :attr:`classes`, (n, K) float32, of feature rows (n, F)."""
        dtype = choose_dtype(torch.device("cpu"))
        first, bias, last, offset = (w.to(dtype) for w in self._weights)
        out = torch.empty(len(values), len(self.classes))
        for start in range(0, len(values), _CHUNK):
            hidden = torch.addmm(bias, values[start : start + _CHUNK].to(dtype), first).clamp_(min=0)
            torch.softmax(torch.addmm(offset, hidden, last).float(), 1, out=out[start : start + _CHUNK])
        return out
