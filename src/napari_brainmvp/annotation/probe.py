"""The instant probe: a small perceptron on a study's features, fitted while the hand is still on the brush.

A linear layer on these features loses to a forest, and a forest takes seconds a volume. One hidden layer has the
forest's accuracy (more, with the network's maps among the features), and costs two matrix products a voxel. Its
first fit starts from random hidden units and an output layer solved in closed form, and descends from there; a new
stroke goes on from the weights of the last one. So a dozen steps suffice before the visible slice is shown, and some
more before the volume is. Noise on the standardised inputs keeps a fit to a few hundred voxels smooth.

Where the network's own classes make up what is being painted, the perceptron only learns what to change: its logits
are added to those of the network, and a few voxels nobody labelled ask it to change nothing. They weigh the less, the
more places are labelled, and the more often the network is wrong there. So the first strokes start from what the
network knows, and the last ones from what the hand does. What was painted on other studies is learned, too, but all
of it weighs no more than one place of the study itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from napari_brainmvp.annotation.descent import Part, Voxels, descend
from napari_brainmvp.annotation.features import CLASS
from napari_brainmvp.annotation.labelled import Lesson
from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.inference.device import choose_dtype
from napari_brainmvp.progress import CancelToken
from napari_brainmvp.threads import use_threads
from napari_brainmvp.training.labels import assign_classes

__all__ = ["Probe", "ProbeSpec"]

_CHUNK = {"cpu": 1 << 13, "cuda": 1 << 18}
"""Voxels predicted at a time, whose hidden units then stay in the processor's cache, or keep a GPU busy."""
_BELIEVED, _ELSEWHERE = 256, 512
"""Unlabelled voxels, and labelled ones of other studies, a step."""
_OWN = 8.0
"""How much more than the model that ships one is trusted whose classes are known: it was trained to tell them."""
_SOLVED = 1000
"""Unlabelled voxels that the closed-form start is held to."""
_DOUBT = 0.01
"""Added to the network's probabilities, so that no label is ever ruled out."""


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
    ridge : float
        Of the closed-form start.
    trust : float
        How many labelled places (cubes of 8 mm) weigh as much as what the network says of all that is not labelled; 0
        to go by the labels alone.
    elsewhere : float
        What all labelled places of other studies weigh together, at most, where one of the study that is predicted
        weighs 1: people and scanners differ, however many there are.
    smoothing : float
        Standard deviation, in mm, of the Gaussian that predicted probabilities are smoothed by while few places are
        labelled.
    say : float
        How many predicted voxels a labelled one weighs as much as then.
    seed : int
        Same strokes, same seed, same machine: same prediction.
    """

    hidden: int = 96
    first_steps: int = 12
    steps: int = 100
    batch: int = 1024
    noise: float = 0.45
    learning_rate: float = 0.01
    weight_decay: float = 0.3
    ridge: float = 0.1
    trust: float = 1.5
    elsewhere: float = 1.0
    smoothing: float = 2.0
    say: float = 0.5
    seed: int = 0


class Probe:
    """A classifier of voxels by their features.

    Parameters
    ----------
    names : sequence of str
        Columns of the feature matrix, as in :class:`~napari_brainmvp.annotation.features.StudyFeatures`; those of the
        network's classes come last.
    background : int
        Label value of what is nothing of interest.
    spec : ProbeSpec
    known : sequence of int
        The label value of each of the network's classes, where that is known; else it is found out from the labels.
    """

    def __init__(
        self, names: Sequence[str], background: int = 0, spec: ProbeSpec | None = None, known: Sequence[int] = ()
    ) -> None:
        self.spec, self.background, self.known = spec or ProbeSpec(), background, tuple(known)
        self._trust = self.spec.trust * (_OWN if self.known else 1)
        self.classes: tuple[int, ...] = ()
        self._features = sum(not name.startswith(CLASS) for name in names)
        if any(name.startswith(CLASS) for name in names[: self._features]):
            raise ValueError(f"The columns {CLASS!r}… must come last, not as in {', '.join(names)}.")
        self._generator = torch.Generator().manual_seed(self.spec.seed)
        self._noise = self.spec.noise * torch.randn(
            4 * self.spec.batch + _BELIEVED, self._features, generator=self._generator
        )
        self._weights: list[Tensor] = []
        self._unions: Tensor | None = None
        self._seen: frozenset[int] = frozenset()

    def fit(
        self,
        here: Lesson,
        steps: int | None = None,
        *,
        elsewhere: Lesson | None = None,
        unlabelled: Tensor | None = None,
    ) -> None:
        """Fit to labelled voxels, going on from the last fit where the classes are the same.

        Parameters
        ----------
        here : Lesson
            Of the study that is predicted; may be empty where others teach.
        steps : int, optional
            Default those of the specification.
        elsewhere : Lesson, optional
            Of other studies, which weigh less, see :attr:`ProbeSpec.elsewhere`.
        unlabelled : Tensor of shape (m, F), optional
            Voxels of the study that is predicted, on which the network is believed.

        Raises
        ------
        BrainMVPError
            Fewer than two classes are labelled.
        """
        if elsewhere is None:
            elsewhere = Lesson(here.values[:0], here.labels[:0])
        count, total = len(here.labels), len(here.labels) + len(elsewhere.labels)
        painted = np.concatenate([here.labels, elsewhere.labels, np.array(self.known, np.int64)])
        classes, numbers = np.unique(painted, return_inverse=True)
        if len(classes) < 2:
            raise BrainMVPError(
                "The probe needs voxels of at least two classes: paint some background as well as some of what you "
                "are looking for."
            )
        values = torch.cat([here.values, elsewhere.values])
        target = torch.from_numpy(numbers[:total].astype(np.int64))
        unlabelled = unlabelled if unlabelled is not None and len(unlabelled) else None
        found = tuple(int(c) for c in classes)
        unions = self._match(found, values, target, unlabelled)
        prior = self._prior(values, unions, len(found))
        values = values[:, : self._features].float()
        worth = here.weight, min(self.spec.elsewhere, elsewhere.weight)
        seen = frozenset(target.unique().tolist())
        if found != self.classes or seen != self._seen or not _same(unions, self._unions):
            self._unions, self._seen = unions, seen
            counts = (count, len(target) - count)
            each = torch.cat([torch.full((n,), w / max(1, n)) for w, n in zip(worth, counts, strict=True)])
            self._start(found, values, target, prior, each, unlabelled if self.known else None)
        if not total:  # what the network says stands
            return
        with torch.inference_mode(), use_threads(1):  # so few voxels are done before a second core has woken up
            labelled = Voxels(values, prior, F.one_hot(target, len(classes)).float())
            parts = [
                Part(labelled.part(slice(count)), self.spec.batch, worth[0] / sum(worth)),
                Part(labelled.part(slice(count, None)), _ELSEWHERE, worth[1] / sum(worth)),
            ]
            if unions is not None and unlabelled is not None:
                share = self._trust / sum(worth) * self._agreement(prior, target)
                parts.append(Part(self._believed(unlabelled), _BELIEVED, share))
            descend(
                self._weights,
                [part for part in parts if len(part.voxels.values)],
                self.spec.steps if steps is None else steps,
                self._noise,
                self._generator,
                self.spec.learning_rate,
                self.spec.weight_decay,
            )

    def _agreement(self, prior: Tensor, target: Tensor) -> float:
        """Say how well the network tells what is painted from background: 0 by chance or worse, 1 without an error.

        Of a network whose classes are known one paints the errors, and nothing where it is right: that says no ill.
        """
        if self.known:
            return 1.0
        if self.background not in self.classes:
            return 0.0
        background = self.classes.index(self.background)
        right = (prior.argmax(1) == background) == (target == background)
        rates = [float(right[part].float().mean()) for part in (target == background, target != background)]
        return max(0.0, sum(rates) - 1)

    def _believed(self, values: Tensor) -> Voxels:
        """Take what the network says of voxels for the truth."""
        prior = self._prior(values, self._unions, len(self.classes))
        return Voxels(values[:, : self._features].float(), prior, prior.softmax(1))

    def _match(
        self, classes: tuple[int, ...], values: Tensor, target: Tensor, unlabelled: Tensor | None
    ) -> Tensor | None:
        """Find which of the network's classes make up each label: (C, K) of 0 and 1, or None where they do not.

        Background strokes are often put where the network is wrong, so what is common outside the labels is read off
        the unlabelled voxels. Labels that fill much of the brain have no such contrast, and go by the strokes alone.
        """
        if not (self.spec.trust and values.shape[1] > self._features and self.background in classes):
            return None
        if self.known:
            return F.one_hot(torch.tensor([classes.index(value) for value in self.known]), len(classes)).float()
        order = [classes.index(self.background), *(k for k, c in enumerate(classes) if c != self.background)]
        probabilities = values[:, self._features :].float().exp()
        means = torch.stack([probabilities[target == k].mean(0) for k in order])
        if unlabelled is not None:
            means[0] = unlabelled[:, self._features :].float().exp().mean(0)
        assigned = assign_classes(means.numpy())
        if assigned is None:
            return None
        return F.one_hot(torch.tensor([order[row] for row in assigned]), len(classes)).float()

    def _prior(self, values: Tensor, unions: Tensor | None, count: int) -> Tensor:
        """Return what the network already says, as logits of the labels, (n, K); 0 where its classes are others."""
        if unions is None:
            return torch.zeros(len(values), count)
        made = values[:, self._features :].float().exp() @ unions
        return (made / made.sum(1, keepdim=True) + _DOUBT).log()

    def _start(
        self,
        classes: tuple[int, ...],
        values: Tensor,
        target: Tensor,
        prior: Tensor,
        weight: Tensor,
        unlabelled: Tensor | None,
    ) -> None:
        """Draw a hidden layer, and solve for the output layer on top of it: a good place to descend from.

        Each voxel has a weight, and all classes the same in all. Nothing is to change at voxels that are not labelled:
        what is painted may be errors of one class only, by which alone all others would be solved away.
        """
        self.classes = classes
        self._generator.manual_seed(self.spec.seed)
        first = torch.randn(self._features, self.spec.hidden, generator=self._generator) * (2 / self._features) ** 0.5
        wanted = 4 * F.one_hot(target, len(classes)).float() - 2 - (prior - prior.mean(1, keepdim=True))
        share = weight.sum()
        weight = weight / torch.bincount(target, weight)[target]
        if unlabelled is not None:
            more = unlabelled[:: max(1, len(unlabelled) // _SOLVED), : self._features].float()
            believed = len(classes) * self._trust / max(1.0, float(share)) / len(more)
            values, weight = torch.cat([values, more]), torch.cat([weight, torch.full((len(more),), believed)])
            wanted = torch.cat([wanted, torch.zeros(len(more), len(classes))])
        hidden = torch.cat([(values @ first).clamp(min=0), torch.ones(len(values), 1)], 1)
        gram = hidden.T @ (weight[:, None] * hidden) + self.spec.ridge * torch.eye(hidden.shape[1])
        solved = torch.linalg.solve(gram, hidden.T @ (weight[:, None] * wanted))
        self._weights = [first, torch.zeros(self.spec.hidden), solved[:-1].contiguous(), solved[-1].contiguous()]

    def predict(self, values: Tensor, cancel: CancelToken | None = None) -> Tensor:
        """Return the probabilities of :attr:`classes`, (n, K) float32, of feature rows (n, F), where these are.

        Raises
        ------
        Cancelled
            ``cancel`` was.
        """
        device = values.device
        dtype, size = choose_dtype(device), _CHUNK[device.type]
        first, bias, last, offset = (w.to(device, dtype) for w in self._weights)
        unions = None if self._unions is None else self._unions.to(device)
        out = torch.empty(len(values), len(self.classes), device=device)

        @torch.inference_mode()
        def decide(start: int) -> None:
            if cancel is not None:
                cancel.raise_if_cancelled()
            chunk = values[start : start + size]
            hidden = torch.addmm(bias, chunk[:, : self._features].to(dtype), first).clamp_(min=0)
            logits = torch.addmm(offset, hidden, last).float()
            if unions is not None:
                logits += self._prior(chunk, unions, len(self.classes))
            torch.softmax(logits, 1, out=out[start : start + size])

        starts = range(0, len(values), size)
        count = min(len(starts), torch.get_num_threads() if device.type == "cpu" else 1)
        if count < 2:
            for start in starts:
                decide(start)
        else:  # a chunk a thread: within each product, cores would wait for the slowest, which draws or trains as well
            with use_threads(1), ThreadPoolExecutor(count) as pool:
                for _ in pool.map(decide, starts):
                    pass
        return out


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
