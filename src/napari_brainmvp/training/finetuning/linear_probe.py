"""The linear probe of classification: a logistic regression, written as a linear layer."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

__all__ = ["fit_probe"]

_REGULARISATION = 0.01
"""Inverse strength C of the probe's ridge penalty on standardised features; fixed, so that nothing is tuned on."""


def fit_probe(features: NDArray[np.floating], targets: NDArray[np.integer]) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression, rare classes weighted up, and write it as a linear layer.

    Features are standardised by s = max(standard deviation, |mean| / 20): what hardly varies is not blown up, so that
    rounding in half precision stays harmless.

    Parameters
    ----------
    features : ndarray of shape (N, F)
    targets : ndarray of shape (N,), 0 to K - 1
        Every class occurs.

    Returns
    -------
    weight : Tensor of shape (K, F), float32
    bias : Tensor of shape (K,), float32
    """
    mean = features.mean(0)
    scale = np.maximum(features.std(0), np.maximum(np.abs(mean) / 20, 1e-3))
    regression = LogisticRegression(C=_REGULARISATION, class_weight="balanced", max_iter=2000)
    regression.fit((features - mean) / scale, targets)
    coefficients, intercept = regression.coef_, regression.intercept_
    if len(coefficients) == 1:  # two classes: the first one's logit is 0
        coefficients, intercept = np.vstack([0 * coefficients, coefficients]), np.array([0.0, intercept[0]])
    weight = coefficients / scale
    bias = intercept - weight @ mean
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()
