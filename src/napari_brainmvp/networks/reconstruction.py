"""A reconstruction network that is told its target and says how sure it is, with the segmentation network's body.

The published one (:class:`PretrainingNetwork`) rebuilds a crop from its deepest features alone and learns its target
only from the voxels left visible. This one keeps the decoder's skips, so that the whole decoder is pre-trained and
detail survives, and takes the wanted modality as a condition, so that nothing of it needs to be visible.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from napari_brainmvp.networks.layers import to_hwd
from napari_brainmvp.networks.segmentation import SegmentationNetwork
from napari_brainmvp.networks.templates import ModalityTemplates
from napari_brainmvp.networks.uniformer import EncoderSpec

__all__ = ["ReconstructionNetwork"]


class _Condition(nn.Module):
    """Scale and shift channels by a learned embedding of the modality (FiLM, Perez et al. 2018); nothing at first."""

    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, 2 * channels)
        nn.init.zeros_(self.embedding.weight)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        scale, shift = self.embedding(target)[..., None, None, None].chunk(2, 1)
        conditioned: Tensor = x * (1 + scale) + shift
        return conditioned


class ReconstructionNetwork(SegmentationNetwork):
    """Reconstruct one modality from a crop of it, of another, or of a mixture.

    Parameters
    ----------
    modalities : sequence of str
        Targets that can be asked for.
    spec : EncoderSpec
    full_resolution_channels : int, optional
        As in :class:`SegmentationNetwork`, to which all weights but the output's transfer by name.
    templates : ModalityTemplates, optional
        The distilled templates that come with the weights.

    Examples
    --------
    >>> network = ReconstructionNetwork(("t1", "flair"), EncoderSpec(channels=(8, 16, 32, 32), head_size=16))
    >>> network.reconstruct(torch.zeros(1, 1, 16, 32, 48), torch.tensor([1])).shape
    torch.Size([1, 2, 16, 32, 48])
    """

    def __init__(
        self,
        modalities: Sequence[str],
        spec: EncoderSpec,
        full_resolution_channels: int | None = None,
        templates: ModalityTemplates | None = None,
    ) -> None:
        super().__init__(1, 2, spec, full_resolution_channels, deep_supervision=False)
        self.modalities = tuple(modalities)
        half, quarter, eighth, _ = spec.channels
        self.conditions = nn.ModuleList(
            _Condition(len(self.modalities), width) for width in (eighth, quarter, half, self.full_resolution_channels)
        )
        self.templates = templates

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the encoder's five maps of a crop (B, 1, H, W, D); see :meth:`UniFormer.forward`."""
        features: list[Tensor] = self.encoder(x)
        return features

    def decode(self, features: list[Tensor], target: Tensor) -> Tensor:
        """Map the encoder's maps to the modality ``target`` (B,), int64: see :meth:`reconstruct`."""
        image, *stages = features
        half, quarter, eighth, x = (to_hwd(f) for f in stages)
        skips = (eighth, quarter, half, to_hwd(self.decoder.proj1(image)))
        names = ("decoder5", "decoder4", "decoder3", "decoder2")
        for name, skip, condition in zip(names, skips, self.conditions, strict=True):
            x = condition(getattr(self.decoder, name)(x, skip), target)
        out: Tensor = self.decoder.out(x)
        return out

    def reconstruct(self, x: Tensor, target: Tensor) -> Tensor:
        """Reconstruct a modality.

        Parameters
        ----------
        x : Tensor of shape (B, 1, H, W, D)
            Prepared intensities; H, W and D are multiples of 16.
        target : Tensor of shape (B,), int64
            Which of ``modalities`` is wanted.

        Returns
        -------
        Tensor of shape (B, 2, H, W, D)
            The reconstruction, and the logarithm of the variance of its error.
        """
        return self.decode(self.encode(x), target)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Reconstruct."""
        return self.reconstruct(x, target)
