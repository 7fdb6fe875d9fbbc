"""What a reconstruction gives back, and how it is compared with the truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napari_brainmvp.errors import ModelError
from napari_brainmvp.inference.similarity import Similarity, measure_similarity
from napari_brainmvp.models import LoadedModel
from napari_brainmvp.networks import ReconstructionNetwork
from napari_brainmvp.preparation import PreparedStudy
from napari_brainmvp.preparation.intensity import IntensityScale
from napari_brainmvp.study import Scan, Study, modality

__all__ = ["TEMPLATE", "Comparison", "ReconstructionResult", "prepared_scan", "template_of"]

TEMPLATE = "template"
"""A source: the model's own average of the target."""
_LEAST_DEVIATION = 0.05
"""In prepared units: a disagreement is not called large because the network is surer than any scan is exact."""


@dataclass(frozen=True, eq=False)
class ReconstructionResult:
    """A reconstruction on the target scan's own grid, or on the reference's where the target is missing.

    Parameters
    ----------
    scan : Scan
        The reconstruction, marked as imputed; in the target scan's units where there is one, else in nominal ones
        (:meth:`~napari_brainmvp.preparation.intensity.IntensityScale.nominal`).
    sources : tuple of str
        Modality keys it was made from, or ``"template"``.
    mask_rate : float
        Share of the target that was hidden at a time; 1 where nothing of it was given.
    masked : ndarray of shape (i, j, k), float32
        What the network was shown, for the first source and mask, in the units of ``scan``.
    error : ndarray of shape (i, j, k), float32, or None
        Reconstruction minus truth, same units; 0 outside the head. None where the target is missing.
    disagreement : ndarray of shape (i, j, k), float32, or None
        Absolute error in predicted standard deviations: 1 is normal. Without predicted variances, in robust standard
        deviations of all errors. None where the target is missing.
    deviation : ndarray of shape (i, j, k), float32, or None
        Predicted standard deviation of the error, prepared units; None where the network does not predict it.
    similarity : tuple of Similarity
        ``"combined"``, each source where there are several, and ``"template alone"``; empty without truth.
    model, device : str
    seconds : float
    warnings : tuple of str
    """

    scan: Scan
    sources: tuple[str, ...]
    mask_rate: float
    masked: NDArray[np.float32]
    error: NDArray[np.float32] | None
    disagreement: NDArray[np.float32] | None
    deviation: NDArray[np.float32] | None
    similarity: tuple[Similarity, ...]
    model: str
    device: str
    seconds: float
    warnings: tuple[str, ...]

    @property
    def description(self) -> str:
        """One line for a file's header; at most 79 characters."""
        return f"{self.scan.title} by {self.model} from {','.join(self.sources)}"[:79]


def template_of(model: LoadedModel, key: str, prepared: PreparedStudy) -> Tensor:
    """Return the model's template of a modality, (X, Y, Z), placed over a prepared study.

    Raises
    ------
    ModelError
        The model has none.
    """
    if model.templates is None:
        raise ModelError(f"{model.card.name} has no templates: choose another modality as the source.")
    card = model.card
    return model.templates.placed(key, prepared.grid.shape, card.template_frame, card.template_minmax)


def prepared_scan(study: Study, model: LoadedModel, key: str, prepared: PreparedStudy, values: Tensor) -> Scan:
    """Make a scan of prepared intensities (X, Y, Z) of the first prepared modality, ``key``.

    On the grid and in the units of the study's scan of that modality, with its background outside the foreground; on
    the reference grid and in nominal units where there is none.
    """
    scan = study.scans.get(key)
    grid = study.grid if scan is None else scan.grid
    scale = prepared.scales[0] or IntensityScale.nominal(model.card.preparation)
    inside = prepared.restore_labels(prepared.foreground, grid)
    restored = scale.invert(torch.from_numpy(prepared.restore_image(values, grid))).numpy()
    return Scan(modality(key), np.where(inside, restored, np.float32(scale.background)), grid, imputed=True)


@dataclass(frozen=True)
class Comparison:
    """From what the network predicted to a result.

    Parameters
    ----------
    study, model, key, prepared
        What was reconstructed; the target is the first of the prepared images.
    sums : Tensor of shape (S, 3, X, Y, Z)
        Per source: weight times prediction, weight, and weight times predicted variance.
    judged : Tensor of shape (X, Y, Z), bool
        Where the prediction is compared with the truth.
    sources : tuple of str
    mask_rate : float
    """

    study: Study
    model: LoadedModel
    key: str
    prepared: PreparedStudy
    sums: Tensor
    judged: Tensor
    sources: tuple[str, ...]
    mask_rate: float

    def result(self, shown: Tensor) -> ReconstructionResult:
        """Put everything on the scan's own grid; ``shown`` (X, Y, Z) is what the network saw."""
        truth, prepared = self.study.scans.get(self.key), self.prepared
        total = self.sums.sum(0)
        mean = _ratio(total[0], total[1]) * prepared.foreground
        told = isinstance(self.model.network, ReconstructionNetwork)
        deviation = _ratio(total[2], total[1]).sqrt() * prepared.foreground if told else None
        scan = prepared_scan(self.study, self.model, self.key, prepared, mean)
        similarity: tuple[Similarity, ...] = ()
        error = disagreement = None
        if truth is not None:
            similarity = self._similarities(mean)
            inside = prepared.restore_labels(prepared.foreground, scan.grid)
            error = np.where(inside, scan.data - truth.data, np.float32(0))
            disagreement = prepared.restore_image(self._disagreement(mean, deviation), scan.grid)
        return ReconstructionResult(
            scan=scan,
            sources=self.sources,
            mask_rate=self.mask_rate,
            masked=prepared_scan(self.study, self.model, self.key, prepared, shown).data,
            error=error,
            disagreement=disagreement,
            deviation=None if deviation is None else prepared.restore_image(deviation, scan.grid),
            similarity=similarity,
            model=self.model.card.name,
            device="",
            seconds=0.0,
            warnings=(),
        )

    def _disagreement(self, mean: Tensor, deviation: Tensor | None) -> Tensor:
        inside = self.prepared.foreground & self.judged
        error = (mean - self.prepared.images[0]).abs() * inside
        normal = 1.4826 * error[inside].median() if deviation is None else deviation
        return error / normal.clamp(min=_LEAST_DEVIATION)

    def _similarities(self, mean: Tensor) -> tuple[Similarity, ...]:
        truth, prepared = self.prepared.images[0], self.prepared
        mask = prepared.foreground & self.judged & (truth != 0)
        images = {"combined": mean}
        if len(self.sums) > 1:
            for source, (weighted, weight, _) in zip(self.sources, self.sums, strict=True):
                images[source] = _ratio(weighted, weight) * prepared.foreground
        if self.model.templates is not None:
            images["template alone"] = template_of(self.model, self.key, prepared) * prepared.foreground
        return tuple(measure_similarity(name, image, truth, mask) for name, image in images.items())


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return numerator / denominator.clamp(min=1e-12)
