"""Modality templates: what each modality looks like on average, as learnable volumes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ModalityTemplates"]


class ModalityTemplates(nn.Module):
    """One low-resolution volume per modality in a common frame.

    The volume spans a study's foreground box (RAS): its first and last voxels lie on the box's. So a position in the
    frame is a position in the box, and no registration is needed.

    Parameters
    ----------
    modalities : sequence of str
        Keys, in order.
    shape : tuple of three int
        Voxels of each volume.

    Examples
    --------
    >>> templates = ModalityTemplates(("t1", "flair"), (4, 5, 6))
    >>> templates.fill((8, 9, 10)).shape
    torch.Size([2, 8, 9, 10])
    """

    def __init__(self, modalities: Sequence[str], shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        self.volumes = nn.Parameter(torch.zeros(len(self.modalities), *shape))

    def sample(self, index: Tensor, coordinates: Tensor) -> Tensor:
        """Look templates up at positions; gradients reach the volumes.

        Parameters
        ----------
        index : Tensor of shape (B,), int64
            Which template for each sample.
        coordinates : Tensor of shape (B, X, Y, Z, 3), float32
            Positions in the box, -1 at its first and 1 at its last voxel along each axis.

        Returns
        -------
        Tensor of shape (B, 1, X, Y, Z), float32
            Trilinear; the border value beyond the box.
        """
        chosen = self.volumes[index][:, None]
        return F.grid_sample(chosen, coordinates.flip(-1), mode="bilinear", padding_mode="border", align_corners=True)

    def crop(self, index: Tensor | None, start: Tensor, stop: Tensor, size: int) -> Tensor:
        """Cut cubes out of templates; gradients reach the volumes.

        Trilinear interpolation on a grid along the axes is three small matrix products, which are faster than a
        gather and have a deterministic gradient on every device.

        Parameters
        ----------
        index : Tensor of shape (B, N), int64, or None
            Which templates for each sample; None for all, without a copy.
        start, stop : Tensor of shape (B, 3), float32
            Positions of the cube's first and last voxel in the box, -1..1 along each axis; mirrored where the start
            lies behind the stop, and the border value beyond the box.
        size : int
            Voxels along each edge of the cube.

        Returns
        -------
        Tensor of shape (B, N, size, size, size), float32
        """
        steps = torch.linspace(0, 1, size, device=start.device)
        cubes = self.volumes[None] if index is None else self.volumes[index]
        for axis, length in enumerate(self.volumes.shape[1:]):
            unit = start[:, axis, None] + (stop - start)[:, axis, None] * steps
            position = ((unit + 1) / 2 * (length - 1)).clamp(0, length - 1)
            nodes = torch.arange(length, device=start.device)
            weights = (1 - (position[..., None] - nodes).abs()).clamp(min=0)  # (B, size, length), hat functions
            cubes = torch.einsum("bnijk,bsi->bnjks", cubes, weights)  # the next axis comes first
        return cubes

    def fill(self, shape: Sequence[int]) -> Tensor:
        """Resize all templates to a whole foreground box: (M, X, Y, Z), float32."""
        return F.interpolate(self.volumes[None], tuple(shape), mode="trilinear", align_corners=True)[0]

    @torch.no_grad()
    def placed(self, modality: str, shape: Sequence[int], frame: str = "box", minmax: bool = False) -> Tensor:
        """Bring one template to a whole foreground box, placed as in its training.

        Parameters
        ----------
        modality : str
            One of ``modalities``.
        shape : sequence of three int
            The box in voxels.
        frame : {"box", "centred"}
            Whether the volume spans the box, or is a frame of voxels in whose centre the box lies (the release).
        minmax : bool
            Normalise the volume to 0..1 first (the release).

        Returns
        -------
        Tensor of shape (X, Y, Z), float32
            Trilinear; the border value beyond the frame.
        """
        volume = self.volumes[self.modalities.index(modality)]
        if minmax:
            volume = (volume - volume.amin()) / (volume.amax() - volume.amin()).clamp(min=1e-9)
        if frame == "box":
            return F.interpolate(volume[None, None], tuple(shape), mode="trilinear", align_corners=True)[0, 0]
        for axis, (length, frame_length) in enumerate(zip(shape, volume.shape, strict=True)):
            position = (torch.arange(length) - (length - 1) / 2 + (frame_length - 1) / 2).clamp(0, frame_length - 1)
            low = position.long().clamp(max=max(0, frame_length - 2))
            weight = (position - low).view([-1 if a == axis else 1 for a in range(3)]).to(volume)
            high = (low + 1).clamp(max=frame_length - 1)
            volume = torch.lerp(volume.index_select(axis, low), volume.index_select(axis, high), weight)
        return volume
