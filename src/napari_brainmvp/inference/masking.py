"""Which blocks of a volume are hidden: one lattice for the whole volume, so that no window sees a border."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from napari_brainmvp.errors import BrainMVPError

__all__ = ["BLOCK", "block_masks"]

BLOCK = 8
"""Edge of a block in voxels, as in pre-training (Rui et al., CVPR 2025)."""


def block_masks(shape: Sequence[int], rate: float, seed: int, *, complementary: bool) -> list[Tensor]:
    """Choose blocks at random.

    With the blocks in a random order on a circle, mask p of n hides the share ``rate`` that begins at p / n. With
    n = ceil(1 / rate) masks the whole circle is hidden at least once.

    Parameters
    ----------
    shape : sequence of three int
        Volume in voxels; blocks at its far faces may be cut.
    rate : float
        Share of the blocks that each mask hides, 0..1.
    seed : int
        The same seed gives the same masks on every machine.
    complementary : bool
        Give as many masks as it takes to hide every voxel at least once; else a single one.

    Returns
    -------
    list of Tensor of shape (X, Y, Z), bool
        True where hidden. With rate 0 a single mask that hides nothing.

    Raises
    ------
    BrainMVPError
        The rate is not between 0 and 1.

    Examples
    --------
    >>> first, second = block_masks((16, 16, 24), 0.5, 0, complementary=True)
    >>> bool((first ^ second).all())
    True
    """
    if not 0 <= rate <= 1:
        raise BrainMVPError(f"The mask rate is {rate:g}: give a share between 0 and 1.")
    blocks = [-(-n // BLOCK) for n in shape]
    count = math.prod(blocks)
    hidden = round(rate * count)
    passes = math.ceil(count / hidden) if complementary and hidden else 1
    place = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    masks = []
    for number in range(passes):
        start = number * count // passes
        chosen = ((place - start) % count < hidden).view(blocks)
        for axis, length in enumerate(shape):
            chosen = chosen.repeat_interleave(BLOCK, axis).narrow(axis, 0, length)
        masks.append(chosen)
    return masks
