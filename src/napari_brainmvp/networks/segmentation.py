"""The segmentation network: UniFormer encoder, convolutional decoder with skips, deep supervision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from napari_brainmvp.networks.layers import InstanceNorm, TransposedConv, channels_last, to_hwd
from napari_brainmvp.networks.uniformer import STRIDE, UNIFORMER_SMALL, EncoderSpec, PatchEmbedding, UniFormer

__all__ = ["ResidualBlock", "SegmentationDecoder", "SegmentationNetwork", "Unions", "UpBlock"]


class _Convolution(nn.Module):
    """A convolution under the name ``conv``, as MONAI nests it."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class ResidualBlock(nn.Module):
    """Two 3^3 convolutions with instance normalisation and leaky ReLU, and a 1^3 shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _Convolution(in_channels, out_channels, 3)
        self.conv2 = _Convolution(out_channels, out_channels, 3)
        self.conv3 = _Convolution(in_channels, out_channels, 1)
        self.norm = InstanceNorm()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) to (B, C', X, Y, Z)."""
        out = F.leaky_relu(self.norm(self.conv1(x)), 0.01, inplace=True)
        out = self.norm(self.conv2(out)) + self.norm(self.conv3(x))
        return F.leaky_relu(out, 0.01, inplace=True)


class UpBlock(nn.Module):
    """Double the resolution, join the skip, refine (the up-block of UNETR, Hatamizadeh et al. 2022)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.transp_conv = TransposedConv(in_channels, out_channels)
        self.conv_block = ResidualBlock(2 * out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map x (B, C, h, w, d) and skip (B, C', 2h, 2w, 2d) to (B, C', 2h, 2w, 2d)."""
        out: Tensor = self.conv_block(torch.cat([self.transp_conv(x), skip], 1))
        return out


class OutputConv(nn.Module):
    """A 1^3 convolution under the name ``conv.conv``, as MONAI nests it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = _Convolution(in_channels, out_channels, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) to (B, K, X, Y, Z)."""
        out: Tensor = self.conv(x)
        return out


class SegmentationDecoder(nn.Module):
    """From the encoder's features to full resolution, and to logits."""

    def __init__(self, in_channels: int, out_channels: int, spec: EncoderSpec, full_channels: int) -> None:
        super().__init__()
        half, quarter, eighth, deepest = spec.channels
        self.proj1 = PatchEmbedding(in_channels, full_channels, kernel_size=3, stride=1)
        self.decoder5 = UpBlock(deepest, eighth)
        self.decoder4 = UpBlock(eighth, quarter)
        self.decoder3 = UpBlock(quarter, half)
        self.decoder2 = UpBlock(half, full_channels)
        self.out = OutputConv(full_channels, out_channels)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the 1/4-scale features, the 1/2-scale features and the logits, all (B, C, H, W, D)."""
        image, *stages = features
        half, quarter, eighth, deepest = (to_hwd(f) for f in stages)
        at_eighth = self.decoder5(deepest, eighth)
        at_quarter = self.decoder4(at_eighth, quarter)
        at_half = self.decoder3(at_quarter, half)
        full = self.decoder2(at_half, to_hwd(self.proj1(image)))
        return at_quarter, at_half, self.out(full)


class Unions(nn.Module):
    """Logits of unions of exclusive classes, so that a network of fine classes answers a coarser question.

    With class logits z and p = softmax(z), a union G has the probability sum of p over G. Where unions overlap, its
    logit is log(p(G) / (1 - p(G))) = LSE(z in G) - LSE(z not in G), whose sigmoid that is; where they are exclusive,
    LSE(z in G), whose softmax over the unions that is. LSE is the logarithm of the sum of exponentials.

    Parameters
    ----------
    parts : sequence of sequences of int
        For each class, the unions it is part of, from 0. Every union has a class, and none has all.
    overlapping : bool
        Whether a class may be part of several unions, or of none; otherwise each is part of exactly one.

    Examples
    --------
    >>> z = torch.tensor([[0.0, 1.0, 2.0]]).reshape(1, 3, 1, 1, 1)
    >>> odds = Unions([(), (0,), (0, 1)], overlapping=True)(z).flatten()
    >>> torch.allclose(torch.sigmoid(odds)[0], z.softmax(1)[0, 1:].sum())
    True
    """

    def __init__(self, parts: Sequence[Sequence[int]], overlapping: bool) -> None:
        super().__init__()
        self.parts, self.overlapping = tuple(map(tuple, parts)), overlapping
        self.out_channels = 1 + max(union for unions in self.parts for union in unions)

    def forward(self, logits: Tensor) -> Tensor:
        """Map class logits (B, K, H, W, D) to logits of the unions (B, U, H, W, D), float32."""
        columns = logits.float().unbind(1)
        return torch.stack([self._union(columns, k) for k in range(self.out_channels)], 1)

    @property
    def kinds(self) -> tuple[tuple[int, ...], ...]:
        """The different sets of unions that a voxel can be in: that of none first, then those of the classes."""
        return tuple(dict.fromkeys(((), *(tuple(sorted(unions)) for unions in self.parts))))

    def split(self, probabilities: Tensor) -> Tensor | None:
        """Tell how probable each of :attr:`kinds` is, from how probable the unions are.

        A union's probability is the sum over the kinds it is in. That is solved for the kinds, where it determines
        them, as it does for regions that lie within each other or apart.

        Parameters
        ----------
        probabilities : Tensor of shape (U, ...), float32, 0..1

        Returns
        -------
        Tensor of shape (kinds, ...), float32, 0..1, or None
            None where the unions do not tell.
        """
        kinds = self.kinds[1:]
        member = torch.tensor([[union in kind for kind in kinds] for union in range(self.out_channels)]).double()
        if int(torch.linalg.matrix_rank(member)) < len(kinds):
            return None
        inside = torch.tensordot(torch.linalg.pinv(member).to(probabilities), probabilities, 1)
        return torch.cat([1 - inside.sum(0, keepdim=True), inside]).clamp_(0, 1)

    def decide(self, probabilities: Tensor) -> Tensor:
        """Tell which unions (U, ...), bool, a voxel is in: those of the most probable of :attr:`kinds`.

        So it is decided as between the exclusive classes inside, and a small region within a larger one is found where
        it is likelier than the rest of that and than nothing, not only where it is likelier than both together. Where
        the unions do not tell the kinds, each is decided by itself, at one half.

        Examples
        --------
        >>> within = Unions([(), (0,), (0, 1)], overlapping=True)
        >>> within.decide(torch.tensor([0.8, 0.45])).tolist()  # nothing 0.2, the outer part 0.35, the inner one 0.45
        [True, True]
        """
        shares = self.split(probabilities)
        if shares is None:
            return probabilities > 0.5
        member = torch.tensor([[union in kind for kind in self.kinds] for union in range(self.out_channels)])
        return member.to(shares.device)[:, shares.argmax(0)]

    def _union(self, columns: Sequence[Tensor], union: int) -> Tensor:
        pairs = list(zip(columns, self.parts, strict=True))
        inside = torch.stack([z for z, unions in pairs if union in unions]).logsumexp(0)
        if not self.overlapping:
            return inside
        return inside - torch.stack([z for z, unions in pairs if union not in unions]).logsumexp(0)


class SegmentationNetwork(nn.Module):
    """Segment a crop of stacked modalities.

    Parameters
    ----------
    in_channels : int
        Modalities.
    out_channels : int
        Classes, or overlapping regions.
    spec : EncoderSpec
        Sizes of the encoder.
    full_resolution_channels : int, optional
        Channels of the decoder at full resolution, where most of the time goes; default those of the first stage.
    deep_supervision : bool
        Add 1^3 heads on the 1/4- and 1/2-scale decoder features, used in training mode only.
    unions : Unions, optional
        The network then tells apart ``len(unions.parts)`` exclusive classes, and its outputs are unions of them.

    Examples
    --------
    >>> network = SegmentationNetwork(4, 3, EncoderSpec(channels=(8, 16, 32, 32), head_size=16)).eval()
    >>> network(torch.zeros(1, 4, 16, 32, 48)).shape
    torch.Size([1, 3, 16, 32, 48])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        spec: EncoderSpec = UNIFORMER_SMALL,
        full_resolution_channels: int | None = None,
        deep_supervision: bool = True,
        unions: Unions | None = None,
    ) -> None:
        super().__init__()
        self.out_channels, self.unions = out_channels, unions
        classes = out_channels if unions is None else len(unions.parts)
        self.full_resolution_channels = full_resolution_channels or spec.channels[0]
        self.encoder = UniFormer(in_channels, spec)
        self.decoder = SegmentationDecoder(in_channels, classes, spec, self.full_resolution_channels)
        heads = [nn.Conv3d(spec.channels[1], classes, 1), nn.Conv3d(spec.channels[0], classes, 1)]
        self.ms_out = nn.ModuleList(heads if deep_supervision else [])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Segment.

        Parameters
        ----------
        x : Tensor of shape (B, C, H, W, D)
            Prepared intensities of any size; it is padded with zeros to multiples of the stride and the result cut
            back.

        Returns
        -------
        Tensor of shape (B, K, H, W, D), or in training mode with deep supervision a list of three
            Logits; the list is ordered from 1/4 to full resolution, all interpolated to the full size.
        """
        height, width, depth = x.shape[2:]
        rest = [-n % STRIDE for n in (depth, width, height)]
        x = channels_last(F.pad(x, (0, rest[0], 0, rest[1], 0, rest[2])) if any(rest) else x)
        outputs = [o[..., :height, :width, :depth] for o in self.decode_stages(self.encoder(x))]
        return outputs if len(outputs) > 1 else outputs[0]

    def decode_stages(self, features: list[Tensor]) -> list[Tensor]:
        """Map the encoder's maps to logits (B, K, H, W, D), in training with deep supervision coarser ones first."""
        outputs = self.class_logits(features)
        return outputs if self.unions is None else [self.unions(z) for z in outputs]

    def class_logits(self, features: list[Tensor]) -> list[Tensor]:
        """Do as :meth:`decode_stages`, but for the classes inside, before unions are made."""
        at_quarter, at_half, logits = self.decoder(features)
        if not (self.training and len(self.ms_out)):
            return [logits]
        deep = zip(self.ms_out, (at_quarter, at_half), (4.0, 2.0), strict=True)
        coarse = [F.interpolate(head(f), scale_factor=s, mode="trilinear", align_corners=True) for head, f, s in deep]
        return [*coarse, logits]
