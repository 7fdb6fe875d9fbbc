"""The classification network: UniFormer encoder, a description of what it sees, and a small head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from napari_brainmvp.networks.layers import channels_last
from napari_brainmvp.networks.segmentation import SegmentationDecoder
from napari_brainmvp.networks.uniformer import UNIFORMER_SMALL, EncoderSpec, UniFormer

__all__ = ["ClassificationNetwork", "describe_content"]

_EDGES = (1, 2, 4, 8, 16)
"""Of the cubes in which the most of a class is looked for: voxels of the network's input."""


def describe_content(probabilities: Tensor) -> Tensor:
    """Describe how much of each class a study shows, and how much of it in one place.

    The logarithm of each class's share of the volume, and of its largest share in cubes of several sizes. So a few
    large patches and many small ones of the same volume are told apart.

    Parameters
    ----------
    probabilities : Tensor of shape (B, K, H, W, D)
        Of exclusive classes, the background first, which is left out.

    Returns
    -------
    Tensor of shape (B, 6 (K - 1)), float32
    """
    seen = probabilities[:, 1:].float()
    parts = [(seen.mean((2, 3, 4)) + 1e-5).log()]
    for edge in (min(edge, *seen.shape[2:]) for edge in _EDGES):
        pooled = F.avg_pool3d(seen, edge, max(1, edge // 2))
        parts.append((pooled.amax((2, 3, 4)) + 1e-3).log())
    return torch.cat(parts, 1)


class ClassificationNetwork(nn.Module):
    """Classify a whole study, resized to a fixed shape.

    An encoder of one channel, as pre-training gives it, sees every modality by itself, and the pooled features of all
    are put side by side; one of as many channels as there are modalities sees them together. With the decoder of a
    segmentation model on top, a study is described by the tissues and lesions that this model sees instead.

    Parameters
    ----------
    modalities : int
        Channels of the input.
    classes : int
    spec : EncoderSpec
    in_channels : int
        Of the encoder: 1, or ``modalities``.
    hidden : int
        Width of the perceptron; 0 for a linear layer.
    tissues : int
        Exclusive classes of the decoder, with the background; 0 for a network without.
    full_channels : int, optional
        Of the decoder at full resolution; default those of the first stage.

    Attributes
    ----------
    typical : Tensor of shape (width,)
        With tissues: the mean description of the studies that the head was fitted to.

    Examples
    --------
    >>> network = ClassificationNetwork(4, 3, EncoderSpec(channels=(8, 16, 32, 32), head_size=16), in_channels=1)
    >>> network.eval()(torch.zeros(1, 4, 16, 32, 48)).shape
    torch.Size([1, 3])
    """

    def __init__(
        self,
        modalities: int,
        classes: int,
        spec: EncoderSpec = UNIFORMER_SMALL,
        in_channels: int = 1,
        hidden: int = 64,
        tissues: int = 0,
        full_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.typical: Tensor
        self.in_channels = in_channels
        self.encoder = UniFormer(in_channels, spec)
        self.decoder: SegmentationDecoder | None = None
        self.width = 2 * sum(spec.channels) * modalities // in_channels
        if tissues:
            self.decoder = SegmentationDecoder(in_channels, tissues, spec, full_channels or spec.channels[0])
            self.width = (1 + len(_EDGES)) * (tissues - 1)
            self.register_buffer("typical", torch.zeros(self.width))
        self.head: nn.Module = nn.Linear(self.width, classes)
        if hidden:
            self.head = nn.Sequential(
                nn.LayerNorm(self.width), nn.Linear(self.width, hidden), nn.GELU(), nn.Linear(hidden, classes)
            )

    def stages(self, x: Tensor) -> list[Tensor]:
        """Return the encoder's four maps, (B G, channels, D, H, W): G is 1, or the number of modalities.

        Parameters
        ----------
        x : Tensor of shape (B, C, H, W, D)
            Prepared intensities; sizes are multiples of 16.
        """
        seen = x if self.in_channels > 1 or x.shape[1] == 1 else x.flatten(0, 1)[:, None]
        features: list[Tensor] = self.encoder(channels_last(seen))
        return features[1:]

    def pool(self, stages: list[Tensor], batch: int) -> Tensor:
        """Describe maps by their mean and their largest value over space: (B, width), float32."""
        parts = [part for f in stages for part in (f.float().mean((2, 3, 4)), f.float().amax((2, 3, 4)))]
        return torch.cat(parts, 1).reshape(batch, -1)

    def describe(self, x: Tensor) -> Tensor:
        """Describe studies (B, C, H, W, D) by what the head sees: (B, width), float32."""
        if self.decoder is None:
            return self.pool(self.stages(x), len(x))
        return describe_content(self._tissues(x))

    def _tissues(self, x: Tensor) -> Tensor:
        """Return the probabilities of the decoder's classes, (B, K, H, W, D)."""
        assert self.decoder is not None
        logits: Tensor = self.decoder(self.encoder(channels_last(x)))[-1]
        return logits.float().softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W, D) to the logits of the classes, (B, K)."""
        logits: Tensor = self.head(self.describe(x))
        return logits

    def _lead(self, described: Tensor, index: int) -> Tensor:
        """Return by how much a class's logit exceeds the mean of the others', for one study."""
        logits: Tensor = self.head(described)[0]
        others = (logits.sum() - logits[index]) / max(1, len(logits) - 1)
        return logits[index] - others

    def saliency(self, x: Tensor, index: int) -> Tensor:
        """Show what speaks for a class rather than for the others: what makes its logit exceed the mean of theirs.

        Grad-CAM (Selvaraju et al., ICCV 2017) on the third stage's maps: s = relu(sum_c w_c A_c) with w_c the mean
        over space of the gradient at map A_c; summed over the modalities where each is seen by itself.

        With a decoder and a linear head, on the probabilities p_k of its classes: s = relu(sum_k e_k p_k) with
        e_k = sum_f v_f relu(z_f - m_f) over the descriptions z_f of class k, where v is the class's weights less the
        mean of the others', and m the typical study. So each tissue is as bright, wherever it is, as there being more
        of it than in a typical study speaks for the class; that there is less of something cannot be shown.

        Parameters
        ----------
        x : Tensor of shape (1, C, H, W, D)
        index : int
            Of the class.

        Returns
        -------
        Tensor of shape (H, W, D), float32, 0..1
            0 everywhere where nothing speaks for the class.
        """
        if self.decoder is not None:
            return self._tissue_saliency(x, index)
        with torch.enable_grad():
            stages = self.stages(x.detach().requires_grad_(True))
            (gradient,) = torch.autograd.grad(self._lead(self.pool(stages, 1), index), stages[2])
        weights = gradient.float().mean((2, 3, 4), keepdim=True)
        maps = F.relu((weights * stages[2].detach().float()).sum(1)).sum(0).permute(1, 2, 0)  # (D, H, W) to (H, W, D)
        full = F.interpolate(maps[None, None], x.shape[2:], mode="trilinear", align_corners=False)[0, 0]
        return full / full.amax().clamp(min=1e-12)

    @torch.no_grad()
    def _tissue_saliency(self, x: Tensor, index: int) -> Tensor:
        assert isinstance(self.head, nn.Linear)
        seen = self._tissues(x)
        weight = self.head.weight.float()
        others = (weight.sum(0) - weight[index]) / max(1, len(weight) - 1)
        excess = F.relu(describe_content(seen)[0] - self.typical)
        evidence = ((weight[index] - others) * excess).reshape(1 + len(_EDGES), -1).sum(0)
        shown = F.relu(torch.einsum("k,khwd->hwd", evidence, seen[0, 1:]))
        return shown / shown.amax().clamp(min=1e-12)
