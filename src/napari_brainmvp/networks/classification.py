"""The classification network: UniFormer encoder, pooled features of all stages, and a small head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from napari_brainmvp.networks.layers import channels_last
from napari_brainmvp.networks.uniformer import UNIFORMER_SMALL, EncoderSpec, UniFormer

__all__ = ["ClassificationNetwork"]


class ClassificationNetwork(nn.Module):
    """Classify a whole study, resized to a fixed shape.

    An encoder of one channel, as pre-training gives it, sees every modality by itself, and the pooled features of all
    are put side by side; one of as many channels as there are modalities sees them together.

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
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.encoder = UniFormer(in_channels, spec)
        self.width = 2 * sum(spec.channels) * modalities // in_channels
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

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W, D) to the logits of the classes, (B, K)."""
        logits: Tensor = self.head(self.pool(self.stages(x), len(x)))
        return logits

    def saliency(self, x: Tensor, index: int) -> Tensor:
        """Show what speaks for a class (Grad-CAM, Selvaraju et al., ICCV 2017), on the third stage's maps.

        s = relu(sum_c w_c A_c) with w_c the mean over space of the logit's gradient at map A_c; summed over the
        modalities where each is seen by itself.

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
        with torch.enable_grad():
            stages = self.stages(x.detach().requires_grad_(True))
            logit = self.head(self.pool(stages, 1))[0, index]
            (gradient,) = torch.autograd.grad(logit, stages[2])
        weights = gradient.float().mean((2, 3, 4), keepdim=True)
        maps = F.relu((weights * stages[2].detach().float()).sum(1)).sum(0).permute(1, 2, 0)  # (D, H, W) to (H, W, D)
        full = F.interpolate(maps[None, None], x.shape[2:], mode="trilinear", align_corners=False)[0, 0]
        return full / full.amax().clamp(min=1e-12)
