"""A reconstruction network that knows every modality and how sure it is, with the segmentation network's body.

The published one (:class:`PretrainingNetwork`) rebuilds a crop from its deepest features alone and learns its target
only from the voxels left visible. This one keeps the decoder's skips, so that the whole decoder is pre-trained and
detail survives. It is told what stands in for hidden voxels, and every wanted modality has an output of its own, so
that nothing of it needs to be visible and one pass gives them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from napari_brainmvp.networks.layers import InstanceNorm, to_hwd
from napari_brainmvp.networks.segmentation import ResidualBlock, SegmentationDecoder
from napari_brainmvp.networks.templates import ModalityTemplates
from napari_brainmvp.networks.uniformer import EncoderSpec, UniFormer

__all__ = ["ReconstructionNetwork"]

_BLOCKS = ("decoder5", "decoder4", "decoder3", "decoder2")


class _ConditionalNorm(nn.Module):
    """Instance normalisation, then a scale and shift chosen by an index (FiLM, Perez et al. 2018); none at first."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.norm = InstanceNorm()
        self.scale, self.shift = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.embedding = nn.Embedding(count, 2 * channels)
        nn.init.zeros_(self.embedding.weight)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        scale, shift = self.embedding(index).chunk(2, 1)
        scale, shift = (
            (common + own)[..., None, None, None] for common, own in ((self.scale, scale), (self.shift, shift))
        )
        conditioned: Tensor = self.norm(x) * scale + shift
        return conditioned


class _BlockNorms(nn.Module):
    """What stands for the plain normalisations of a decoder block.

    Instance normalisation takes a crop's intensities to mean 0 and variance 1: good, as studies differ in contrast, but
    then a shift is what can tell the network anything, and it has to come after the normalisation.
    """

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.norm1 = _ConditionalNorm(channels, count)
        self.norm2 = _ConditionalNorm(channels, count)

    def forward(self, block: ResidualBlock, x: Tensor, index: Tensor) -> Tensor:
        out = F.leaky_relu(self.norm1(block.conv1(x), index), 0.01)
        return F.leaky_relu(self.norm2(block.conv2(out), index) + block.norm(block.conv3(x)), 0.01)


class ReconstructionNetwork(nn.Module):
    """Reconstruct modalities from a crop of one, of another, or of a mixture.

    Parameters
    ----------
    modalities : sequence of str
        Those that can be asked for.
    spec : EncoderSpec
    full_resolution_channels : int, optional
        As in :class:`~napari_brainmvp.networks.SegmentationNetwork`, to which all weights but conditions and output
        transfer by name.
    templates : ModalityTemplates, optional
        The distilled templates that come with the weights.

    Examples
    --------
    >>> network = ReconstructionNetwork(("t1", "flair"), EncoderSpec(channels=(8, 16, 32, 32), head_size=16))
    >>> flair, from_t1 = torch.tensor([1]), torch.tensor([0])
    >>> network.reconstruct(torch.zeros(1, 1, 16, 32, 48), flair, from_t1).shape
    torch.Size([1, 2, 16, 32, 48])
    """

    def __init__(
        self,
        modalities: Sequence[str],
        spec: EncoderSpec,
        full_resolution_channels: int | None = None,
        templates: ModalityTemplates | None = None,
    ) -> None:
        count = len(modalities)
        super().__init__()
        self.full_resolution_channels = full_resolution_channels or spec.channels[0]
        self.encoder = UniFormer(1, spec)
        self.decoder = SegmentationDecoder(1, 2 * count, spec, self.full_resolution_channels)
        self.modalities = tuple(modalities)
        half, quarter, eighth, _ = spec.channels
        widths = (eighth, quarter, half, self.full_resolution_channels)
        self.conditions = nn.ModuleList(_BlockNorms(width, count + 1) for width in widths)
        self.templates = templates
        for stem in (self.encoder.get_submodule("patch_embed1.proj"), self.decoder.proj1.proj):
            # The layer normalisation that follows keeps the intensity only beside a bias of its size.
            nn.init.normal_(stem.get_parameter("bias"))
        start = self.decoder.out.get_parameter("conv.conv.bias")
        with torch.no_grad():  # median tissue, and unsure of it
            start[:count], start[count:] = 1.0, -3.0

    @property
    def template_source(self) -> int:
        """The index that says that the template stands in for what is hidden, after those of the modalities."""
        return len(self.modalities)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the encoder's five maps of a crop (B, 1, H, W, D); see :meth:`UniFormer.forward`."""
        features: list[Tensor] = self.encoder(x)
        return features

    def decode(self, features: list[Tensor], source: Tensor) -> tuple[Tensor, Tensor]:
        """Map the encoder's maps to all modalities: means and log variances, (B, M, H, W, D) each."""
        image, *stages = features
        half, quarter, eighth, x = (to_hwd(f) for f in stages)
        skips = (eighth, quarter, half, to_hwd(self.decoder.proj1(image)))
        for name, skip, norms in zip(_BLOCKS, skips, self.conditions, strict=True):
            up = getattr(self.decoder, name)
            x = norms(up.conv_block, torch.cat([up.transp_conv(x), skip], 1), source)
        means, log_variances = self.decoder.out(x).chunk(2, 1)
        return means, log_variances

    def reconstruct(self, x: Tensor, target: Tensor, source: Tensor) -> Tensor:
        """Reconstruct a modality.

        Parameters
        ----------
        x : Tensor of shape (B, 1, H, W, D)
            Prepared intensities; H, W and D are multiples of 16.
        target : Tensor of shape (B,), int64
            Which of ``modalities`` is wanted.
        source : Tensor of shape (B,), int64
            Which of ``modalities`` is shown where the target is not, or :attr:`template_source`.

        Returns
        -------
        Tensor of shape (B, 2, H, W, D)
            The reconstruction, and the logarithm of the variance of its error.
        """
        rows = torch.arange(len(x), device=x.device)
        return torch.stack([every[rows, target] for every in self.decode(self.encode(x), source)], 1)

    def forward(self, x: Tensor, target: Tensor, source: Tensor) -> Tensor:
        """Reconstruct."""
        return self.reconstruct(x, target, source)
