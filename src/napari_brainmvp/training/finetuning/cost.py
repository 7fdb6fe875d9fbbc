"""A rough idea of how long a fine-tuning run takes on this machine's processor. No torch here."""

from __future__ import annotations

from math import prod

from napari_brainmvp.training.finetuning.spec import FinetuneSpec

__all__ = ["estimate_seconds", "fits_at_once"]

_VOXEL = 0.57
"""Of a view's voxel, validation included, in those of pre-training: ``minutes`` took 8 minutes on two AVX2 cores, whose
pace was 1.06e-5 seconds a voxel."""
_ENCODER = {"compact": 1.0, "small": 4.0}
"""Of a voxel, in those of the compact encoder."""
_PREPARING = 5.0
"""Seconds to read, prepare and describe a study."""


def fits_at_once(spec: FinetuneSpec, studies: int) -> bool:
    """Tell whether all that is trained is a linear layer on frozen features, which cross-validation costs nothing."""
    return spec.task == "classification" and (spec.encoder_rate == 0 or studies <= spec.probe_up_to)


def estimate_seconds(spec: FinetuneSpec, studies: int, pace: float) -> float:
    """Estimate how long a run takes, cross-validation included, early stopping left aside.

    Parameters
    ----------
    spec : FinetuneSpec
    studies : int
        How many there are.
    pace : float
        Of this machine, see :func:`~napari_brainmvp.training.pretraining.survey.measure_pace`.

    Returns
    -------
    float
        Seconds.
    """
    if fits_at_once(spec, studies):
        return studies * _PREPARING
    voxels = prod(spec.size) if spec.task == "classification" else spec.crop**3 * (2 if spec.consistency else 1)
    folds = min(spec.folds, studies)
    trained_on = [studies, *(studies - len(range(fold, studies, folds)) for fold in range(folds))]
    steps = sum(spec.steps(count) for count in trained_on)
    return steps * spec.batch * voxels * _ENCODER[spec.encoder] * _VOXEL * pace + studies * _PREPARING
