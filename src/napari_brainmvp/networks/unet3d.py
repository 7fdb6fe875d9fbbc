"""The second backbone of the authors' release: a residual 3D U-Net encoder with a plain reconstruction decoder.

Module names are those of the release, so that its weights load.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from napari_brainmvp.errors import StudyError
from napari_brainmvp.networks.templates import ModalityTemplates

__all__ = ["UNet3DPretrainingNetwork"]

_STRIDE = 8


class _Residual(nn.Module):
    """Pre-activation block: group norm, ReLU, 3^3 convolution, twice, with an identity shortcut."""

    def __init__(self, channels: int, groups: int = 8) -> None:
        super().__init__()
        self.gn1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.gn2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.gn1(x)))
        total: Tensor = x + self.conv2(F.relu(self.gn2(out)))
        return total


class UNet3DPretrainingNetwork(nn.Module):
    """Encode a single-modality crop and reconstruct it.

    Parameters
    ----------
    in_channels : int
        1 in the release.
    width : int
        Channels at full resolution; 2, 4 and 8 times as many at 1/2, 1/4 and 1/8.
    templates : ModalityTemplates, optional
        The distilled templates that come with the weights.
    """

    def __init__(self, in_channels: int = 1, width: int = 32, templates: ModalityTemplates | None = None) -> None:
        super().__init__()
        w1, w2, w3, w4 = (width * 2**k for k in range(4))
        self.conv1a = nn.Conv3d(in_channels, w1, 3, padding=1)
        self.conv1b = _Residual(w1)
        self.ds1 = nn.Conv3d(w1, w2, 3, stride=2, padding=1)
        self.conv2a, self.conv2b = _Residual(w2), _Residual(w2)
        self.ds2 = nn.Conv3d(w2, w3, 3, stride=2, padding=1)
        self.conv3a, self.conv3b = _Residual(w3), _Residual(w3)
        self.ds3 = nn.Conv3d(w3, w4, 3, stride=2, padding=1)
        self.conv4a, self.conv4b, self.conv4c, self.conv4d = (_Residual(w4) for _ in range(4))
        self.up4conva, self.up4convb = nn.Conv3d(w4, w3, 1), _Residual(w3)
        self.up3conva, self.up3convb = nn.Conv3d(w3, w2, 1), _Residual(w2)
        self.up2conva, self.up2convb = nn.Conv3d(w2, w1, 1), _Residual(w1)
        self.up1conv = nn.Conv3d(w1, in_channels, 1)
        self.templates = templates

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the features handed on: outputs of ``ds1``, ``ds2``, ``ds3`` and ``conv4d``.

        Parameters
        ----------
        x : Tensor of shape (B, C, H, W, D)
            Sizes are multiples of 8.

        Returns
        -------
        list of four Tensor
            (B, channels, H, W, D) at 1/2, 1/4, 1/8 and 1/8.

        Raises
        ------
        StudyError
            A size is not a multiple of 8.
        """
        if any(n < _STRIDE or n % _STRIDE for n in x.shape[2:]):
            raise StudyError(f"The crop is {tuple(x.shape[2:])} voxels: pad or cut it to multiples of {_STRIDE}.")
        half = self.ds1(self.conv1b(self.conv1a(x)))
        quarter = self.ds2(self.conv2b(self.conv2a(half)))
        eighth = self.ds3(self.conv3b(self.conv3a(quarter)))
        deepest = self.conv4d(self.conv4c(self.conv4b(self.conv4a(eighth))))
        return [half, quarter, eighth, deepest]

    def reconstruct(self, x: Tensor) -> Tensor:
        """Map a (masked) crop (B, C, H, W, D) to its reconstruction of the same shape."""
        out = self.encode(x)[-1]
        for narrow, refine in (
            (self.up4conva, self.up4convb),
            (self.up3conva, self.up3convb),
            (self.up2conva, self.up2convb),
        ):
            out = refine(F.interpolate(narrow(out), scale_factor=2.0, mode="nearest"))
        image: Tensor = self.up1conv(out)
        return image

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct."""
        return self.reconstruct(x)
