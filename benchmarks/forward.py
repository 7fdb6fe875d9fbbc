"""How fast the paper's full network is: eval forward at 1 x 4 x 96^3, plain formulation against ours.

    python benchmarks/forward.py

Plain: explicit softmax attention, contiguous float32, ``instance_norm``. Ours: the network as it is used, in float32
and with bfloat16 autocast. The same weights and input; results are compared.
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from napari_brainmvp.networks import SegmentationNetwork, channels_last, layers, segmentation, uniformer


class PlainAttention(nn.Module):
    """Softmax attention with the matrix of weights written out."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj, self.head_size = ours.qkv, ours.proj, ours.head_size

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, N, C) to the same shape."""
        b, n, c = tokens.shape
        q, k, v = self.qkv(tokens).reshape(b, n, 3, c // self.head_size, self.head_size).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.head_size**-0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class PlainChannelNorm(nn.Module):
    """Layer normalisation over channels through a contiguous copy."""

    def __init__(self, ours: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = ours

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, X, Y, Z)."""
        b, c, *size = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        tokens = F.layer_norm(tokens, (c,), self.norm.weight, self.norm.bias, self.norm.eps)
        return tokens.transpose(1, 2).reshape(b, c, *size).contiguous()


class PlainInstanceNorm(nn.Module):
    """What ``torch`` calls instance normalisation."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, X, Y, Z)."""
        return F.instance_norm(x)


def plain(network: nn.Module) -> nn.Module:
    """Copy a network with every layer in its plain formulation."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, uniformer._Attention):
                setattr(module, name, PlainAttention(child))
            elif isinstance(child, layers.ChannelNorm):
                setattr(module, name, PlainChannelNorm(child))
            elif isinstance(child, layers.InstanceNorm):
                setattr(module, name, PlainInstanceNorm())
    return network


class contiguous_memory:
    """While active, tensors are laid out as PyTorch does by default."""

    def __enter__(self) -> None:
        self.kept = (layers.channels_last, uniformer.to_dhw, segmentation.to_hwd, segmentation.channels_last)
        uniformer.to_dhw = lambda x: x.permute(0, 1, 4, 2, 3).contiguous()
        segmentation.to_hwd = lambda x: x.permute(0, 1, 3, 4, 2).contiguous()
        segmentation.channels_last = lambda x: x.contiguous()

    def __exit__(self, *_: object) -> None:
        _, uniformer.to_dhw, segmentation.to_hwd, segmentation.channels_last = self.kept


def best_time(run: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """Return the shortest of several runs in seconds, and the result."""
    result, times = run(), []
    for _ in range(repeats):
        started = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - started)
    return min(times), result


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    ours = SegmentationNetwork(4, 3).eval()
    reference = plain(ours)
    x = torch.rand(1, 4, 96, 96, 96)
    ours = ours.to(memory_format=torch.channels_last_3d)
    packed = channels_last(x)
    with torch.inference_mode():
        with contiguous_memory():
            slow, expected = best_time(lambda: reference(x), arguments.repeats)
        fast, result = best_time(lambda: ours(packed), arguments.repeats)
        with torch.autocast("cpu", torch.bfloat16):
            half, rounded = best_time(lambda: ours(packed), arguments.repeats)
    error = float((result - expected).abs().max() / expected.std())
    half_error = float((rounded.float() - expected).abs().mean() / expected.std())
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {arguments.threads} threads, torch {torch.__version__}, seed 0\n")
    print("| formulation | seconds | speed | difference to plain (of std) |\n|---|---|---|---|")
    print(f"| plain | {slow:.2f} | 1.0 | |")
    print(f"| ours, float32 | {fast:.2f} | {slow / fast:.1f} | {error:.1e} (largest) |")
    print(f"| ours, bfloat16 | {half:.2f} | {slow / half:.1f} | {half_error:.1e} (mean) |")


if __name__ == "__main__":
    main()
