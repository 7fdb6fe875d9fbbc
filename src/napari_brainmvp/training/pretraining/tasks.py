"""The three tasks of pre-training as functions: masking, reconstruction, distillation, contrast.

Source: Rui et al., CVPR 2025 (arXiv 2410.10604), section 3; where ours differs, the function says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Gather", "block_mask", "error_likelihood", "info_nce", "mean_square", "psnr", "reconstruction_loss"]


Gather = Callable[[Tensor], Tensor]
"""Joins a tensor of all processes along the first axis; gradients flow back to each."""


def block_mask(rates: Tensor, size: int, generator: torch.Generator, block: int = 8) -> Tensor:
    """Choose blocks at random, the same share of each sample to the nearest block, for all samples at once.

    Parameters
    ----------
    rates : Tensor of shape (B,), float32, 0..1
        Share of the blocks that is hidden, per sample.
    size : int
        Edge of the cubes, a multiple of ``block``.
    generator : torch.Generator
        On the CPU, so that every device hides the same blocks.
    block : int
        Edge of a block (8 in the paper).

    Returns
    -------
    Tensor of shape (B, 1, size, size, size), bool
        True where hidden; on the device of ``rates``.
    """
    count = size // block
    order = torch.rand(len(rates), count**3, generator=generator).argsort(1).argsort(1)
    hidden = order.to(rates.device) < (rates * count**3).round()[:, None]
    mask = hidden.view(-1, 1, count, 1, count, 1, count, 1)
    return mask.expand(-1, -1, -1, block, -1, block, -1, block).reshape(-1, 1, size, size, size)


def reconstruction_loss(
    reconstruction: Tensor, target: Tensor, mask: Tensor | None, gather: Gather | None = None
) -> Tensor:
    """Mean squared error, task 1 (cross-modal reconstruction).

    L = sum_v m_v (y_v - x_v)^2 / sum_v m_v over all voxels of the batch with the mask m; with None, m = 1 everywhere as
    in the paper. Every voxel counts the same: crops at the edge of the head hold few, and would only add noise.

    Of template and image inside the head it is the direct form of task 2 (not in the paper): its minimum is the
    modality's mean at each place. In the paper a template is reached only through task 1, which asks that it be useful
    and not that it be the mean.

    Parameters
    ----------
    reconstruction, target : Tensor of shape (B, C, X, Y, Z)
    mask : Tensor of shape (B, C, X, Y, Z), bool, or None
    gather : callable, optional
        Joins a tensor of all processes along the first axis. With it the mean over the processes of what each returns
        is the loss of the whole batch, however its hidden voxels are spread.

    Returns
    -------
    Tensor
        Scalar.
    """
    return _masked_mean((reconstruction.float() - target) ** 2, mask, gather)


def _masked_mean(values: Tensor, mask: Tensor | None, gather: Gather | None) -> Tensor:
    if mask is None:
        return values.mean()
    counts = mask.flatten(1).sum(1, dtype=values.dtype)
    every = gather(counts) if gather else counts
    return (values * mask).flatten(1).sum(1).mean() / every.mean().clamp(min=1)


def error_likelihood(
    log_variance: Tensor, reconstruction: Tensor, target: Tensor, mask: Tensor | None, gather: Gather | None = None
) -> Tensor:
    """Negative log-likelihood of the error under a normal distribution, up to a constant: (e^2 / s^2 + log s^2) / 2.

    The error is taken as given, so that learning how sure to be does not change what is reconstructed. Averaged as in
    :func:`reconstruction_loss`.
    """
    log_variance = log_variance.float().clamp(-10, 5)
    squared = (reconstruction.detach().float() - target) ** 2
    return _masked_mean(0.5 * (squared * torch.exp(-log_variance) + log_variance), mask, gather)


def info_nce(first: Tensor, second: Tensor, temperature: float, studies: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE, task 3 (modality-aware contrastive learning).

    With s_ij = cos(a_i, b_j) / t: L = -1/2 mean_i [log softmax_j(s_ij)_i + log softmax_j(s_ji)_i]. Two views of one
    study are the positive pair, the other studies of the batch the negatives.

    Parameters
    ----------
    first, second : Tensor of shape (B, F)
        Features of view A and of view B.
    temperature : float
        t; 1.0 in the release.
    studies : Tensor of shape (B,), optional
        Which study each row is of: another crop of the same one is no negative. Default: each of its own.

    Returns
    -------
    Tensor
        Scalar; 0 for a batch of one study.
    """
    similarity = F.normalize(first.float(), dim=1) @ F.normalize(second.float(), dim=1).T / temperature
    positives = torch.arange(len(first), device=first.device)
    if studies is not None:
        same = studies[:, None] == studies
        same.fill_diagonal_(False)
        similarity = similarity.masked_fill(same, float("-inf"))
    return 0.5 * (F.cross_entropy(similarity, positives) + F.cross_entropy(similarity.T, positives))


def mean_square(features: Sequence[Tensor]) -> Tensor:
    """Activation regularisation (Merity et al. 2017, arXiv 1708.01009): the mean over maps of their mean square.

    Nothing else holds the residual streams: every reader of them normalises first, so that their size costs no loss,
    and it grows without bound, in few directions, until what tells tissues apart is lost beside it. Not in the paper.

    Parameters
    ----------
    features : sequence of Tensor of shape (B, C, ...)

    Returns
    -------
    Tensor
        Scalar.
    """
    return torch.stack([maps.float().square().mean() for maps in features]).mean()


def psnr(reconstruction: Tensor, target: Tensor, mask: Tensor) -> float:
    """Peak signal-to-noise ratio in dB inside a mask; the peak is the target's largest value there."""
    inside = target[mask]
    if inside.numel() == 0:
        return float("nan")
    error = (reconstruction[mask].float() - inside).square().mean().clamp(min=1e-12)
    return float(10 * torch.log10(inside.max() ** 2 / error))
