"""The UniFormer encoder of BrainMVP (Rui et al., CVPR 2025; Li et al., TPAMI 2023).

Four stages halve the resolution each. The first two mix neighbours by depth-wise convolution, the last two mix all
voxels by self-attention. Module names are those of the authors' checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from napari_brainmvp.errors import StudyError
from napari_brainmvp.networks.layers import ChannelNorm, DepthwiseConv3d, to_dhw

__all__ = ["STRIDE", "UNIFORMER_COMPACT", "UNIFORMER_SMALL", "EncoderSpec", "PatchEmbedding", "UniFormer"]

STRIDE = 16
"""Input voxels per voxel of the deepest feature map; input sizes are multiples of it."""


class EncoderSpec(BaseModel):
    """Sizes of a UniFormer encoder.

    Parameters
    ----------
    channels, depths : tuple of four int
        Channels and number of blocks of each stage.
    head_size : int
        Channels of one attention head; divides the channels of stages 3 and 4.
    mlp_ratio : float
        Hidden channels of a block's perceptron relative to its channels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: tuple[int, int, int, int] = (64, 128, 320, 512)
    depths: tuple[int, int, int, int] = (3, 4, 8, 3)
    head_size: int = Field(64, gt=0)
    mlp_ratio: float = Field(4.0, gt=0)

    @model_validator(mode="after")
    def _heads_fit(self) -> EncoderSpec:
        if min(self.channels) < 1 or min(self.depths) < 1:
            raise ValueError("every stage needs at least one channel and one block")
        if any(c % self.head_size for c in self.channels[2:]):
            raise ValueError(f"channels {self.channels[2:]} are not multiples of the head size {self.head_size}")
        return self


UNIFORMER_SMALL = EncoderSpec()
"""The paper's encoder, 22 M parameters."""
UNIFORMER_COMPACT = EncoderSpec(channels=(32, 64, 96, 192), depths=(2, 3, 4, 2), head_size=32)
"""The same blocks, narrower and fewer, for CPUs and for shipping."""


class PatchEmbedding(nn.Module):
    """A strided convolution, then layer normalisation over the channels.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size, stride : int
        Padding keeps the size divided by the stride.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 2, stride: int = 2) -> None:
        super().__init__()
        padding = (kernel_size - stride + 1) // 2
        self.proj = nn.Conv3d(in_channels, out_channels, kernel_size, stride=stride, padding=padding)
        self.norm = ChannelNorm(out_channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) to (B, C', X/stride, Y/stride, Z/stride)."""
        embedded: Tensor = self.norm(self.proj(x))
        return embedded


class _ConvMlp(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv3d(channels, hidden, 1)
        self.fc2 = nn.Conv3d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class ConvBlock(nn.Module):
    """Local relation: position by a 3^3, neighbourhood by a 5^3 depth-wise convolution, then a perceptron."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.pos_embed = DepthwiseConv3d(channels, 3)
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = nn.Conv3d(channels, channels, 1)
        self.attn = DepthwiseConv3d(channels, 5)
        self.conv2 = nn.Conv3d(channels, channels, 1)
        self.norm2 = nn.BatchNorm3d(channels)
        self.mlp = _ConvMlp(channels, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, D, H, W) to the same shape by three residual steps."""
        x = x + self.pos_embed(x)
        x = x + self.conv2(self.attn(self.conv1(self.norm1(x))))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class _Attention(nn.Module):
    def __init__(self, channels: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, channels = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, count, 3, channels // self.head_size, self.head_size)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, count, channels))
        return out


class _TokenMlp(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return out


class AttentionBlock(nn.Module):
    """Global relation: position by a 3^3 depth-wise convolution, self-attention over all voxels, a perceptron."""

    def __init__(self, channels: int, hidden: int, head_size: int) -> None:
        super().__init__()
        self.pos_embed = DepthwiseConv3d(channels, 3)
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = _Attention(channels, head_size)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = _TokenMlp(channels, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, D, H, W) to the same shape by three residual steps."""
        x = x + self.pos_embed(x)
        batch, channels, *size = x.shape
        tokens: Tensor = x.permute(0, 2, 3, 4, 1).reshape(batch, -1, channels)
        tokens = tokens + self.attn(self.norm1(tokens))
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.reshape(batch, *size, channels).permute(0, 4, 1, 2, 3)


class UniFormer(nn.Module):
    """The encoder.

    Parameters
    ----------
    in_channels : int
        Modalities stacked as channels; 1 in pre-training.
    spec : EncoderSpec
        Sizes.
    """

    def __init__(self, in_channels: int, spec: EncoderSpec = UNIFORMER_SMALL) -> None:
        super().__init__()
        self.spec, self.in_channels = spec, in_channels
        width_in = in_channels
        for stage, (width, depth) in enumerate(zip(spec.channels, spec.depths, strict=True), start=1):
            hidden = round(width * spec.mlp_ratio)
            blocks = [
                ConvBlock(width, hidden) if stage <= 2 else AttentionBlock(width, hidden, spec.head_size)
                for _ in range(depth)
            ]
            setattr(self, f"patch_embed{stage}", PatchEmbedding(width_in, width))
            setattr(self, f"blocks{stage}", nn.ModuleList(blocks))
            width_in = width
        self.norm = nn.BatchNorm3d(spec.channels[-1])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Encode a crop.

        Parameters
        ----------
        x : Tensor of shape (B, C, H, W, D)
            Prepared intensities; H, W and D are multiples of :data:`STRIDE`.

        Returns
        -------
        list of five Tensor
            The permuted input (B, C, D, H, W), then the features of the four stages at 1/2, 1/4, 1/8 and 1/16, all
            in (B, channels, D, H, W).

        Raises
        ------
        StudyError
            A size is not a multiple of the stride.
        """
        check_size(x.shape[2:])
        x = to_dhw(x)
        features = [x]
        for stage in range(1, 5):
            x = getattr(self, f"patch_embed{stage}")(x)
            for block in getattr(self, f"blocks{stage}"):
                x = block(x)
            features.append(x)
        features[-1] = self.norm(x)
        return features


def check_size(size: Sequence[int]) -> None:
    """Raise :class:`StudyError` unless every size is a positive multiple of :data:`STRIDE`."""
    if any(n < STRIDE or n % STRIDE for n in size):
        raise StudyError(f"The crop is {tuple(size)} voxels: pad or cut it to multiples of {STRIDE}.")
