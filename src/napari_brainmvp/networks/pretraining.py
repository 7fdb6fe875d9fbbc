"""The pre-training network: UniFormer encoder and a reconstruction decoder without skips (Rui et al., CVPR 2025)."""

from __future__ import annotations

from torch import Tensor, nn

from napari_brainmvp.networks.layers import TransposedConv, to_hwd
from napari_brainmvp.networks.segmentation import OutputConv
from napari_brainmvp.networks.templates import ModalityTemplates
from napari_brainmvp.networks.uniformer import UNIFORMER_SMALL, EncoderSpec, UniFormer

__all__ = ["PretrainingNetwork"]


class _Up(nn.Module):
    """The part of an up-block that reconstruction uses."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.transp_conv = TransposedConv(in_channels, out_channels)


class _ReconstructionDecoder(nn.Module):
    """Four transposed convolutions in sequence and a 1^3 output convolution."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        half, quarter, eighth, deepest = spec.channels
        self.decoder5 = _Up(deepest, eighth)
        self.decoder4 = _Up(eighth, quarter)
        self.decoder3 = _Up(quarter, half)
        self.decoder2 = _Up(half, half)
        self.out_1 = OutputConv(half, 1)

    def forward(self, x: Tensor) -> Tensor:
        for up in (self.decoder5, self.decoder4, self.decoder3, self.decoder2):
            x = up.transp_conv(x)
        out: Tensor = self.out_1(x)
        return out


class _Encoder(nn.Module):
    """Holds the UniFormer under the name the release gives it."""

    def __init__(self, in_channels: int, spec: EncoderSpec) -> None:
        super().__init__()
        self.uniformer = UniFormer(in_channels, spec)


class PretrainingNetwork(nn.Module):
    """Encode a single-modality crop and reconstruct it from its deepest features.

    Parameters
    ----------
    spec : EncoderSpec
    in_channels : int
        1: the network is not told which modality it sees.
    templates : ModalityTemplates, optional
        The distilled templates that come with the weights.
    """

    def __init__(
        self, spec: EncoderSpec = UNIFORMER_SMALL, in_channels: int = 1, templates: ModalityTemplates | None = None
    ) -> None:
        super().__init__()
        self.encoder = _Encoder(in_channels, spec)
        self.decoder = _ReconstructionDecoder(spec)
        self.templates = templates

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the encoder's five maps of a crop (B, C, H, W, D); see :meth:`UniFormer.forward`."""
        features: list[Tensor] = self.encoder.uniformer(x)
        return features

    def decode(self, features: list[Tensor]) -> Tensor:
        """Map the encoder's maps to the reconstruction (B, 1, H, W, D); only the deepest is used."""
        image: Tensor = self.decoder(to_hwd(features[-1]))
        return image

    def reconstruct(self, x: Tensor) -> Tensor:
        """Map a (masked) crop (B, C, H, W, D) to its reconstruction (B, 1, H, W, D)."""
        return self.decode(self.encode(x))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct."""
        return self.reconstruct(x)
