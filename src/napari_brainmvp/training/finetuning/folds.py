"""What cross-validation teaches: how the model that is trained on everything shall be trained."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

__all__ = ["Folds", "Settings"]


@dataclass(frozen=True)
class Settings:
    """What a run is told that cannot find it out, as nothing is held out.

    Parameters
    ----------
    steps : int
        Its length.
    start_share : float
        The largest share of the weights it started from in those that are kept.
    temperature : float
    """

    steps: int
    start_share: float
    temperature: float = 1.0


@dataclass
class Folds:
    """Collects the facts of every fold.

    Parameters
    ----------
    best_steps : list of int
        After how many steps each fold was best.
    temperatures : list of float
    scores : dict of str to list of float
        What the folds that tried it reached with a share of the start.
    """

    best_steps: list[int] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, facts: Mapping[str, Any]) -> None:
        """Take in what the training of a fold found."""
        self.best_steps.append(facts["step"])
        self.temperatures.append(facts["temperature"])
        for share, score in facts["score by start share"].items():
            self.scores[share].append(score)

    @property
    def mean_scores(self) -> dict[str, float]:
        """The mean score of each share."""
        return {share: round(mean(found), 4) for share, found in self.scores.items()}

    def settings(self, start_share: float) -> Settings:
        """Return the middle length, the share that is best in the mean, and the geometric mean of the temperatures.

        ``start_share`` where no fold tried any.
        """
        means = self.mean_scores
        return Settings(
            steps=sorted(self.best_steps)[(len(self.best_steps) - 1) // 2],
            start_share=float(max(means, key=lambda share: means[share])) if means else start_share,
            temperature=math.exp(mean(map(math.log, self.temperatures))),
        )
