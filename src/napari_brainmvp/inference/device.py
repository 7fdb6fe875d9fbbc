"""Where to compute, and how precisely."""

from __future__ import annotations

from typing import Literal

import torch

from napari_brainmvp.errors import BrainMVPError

__all__ = [
    "Precision",
    "TrainingPrecision",
    "choose_device",
    "choose_dtype",
    "choose_precision",
    "lacks_memory",
    "lightning_devices",
    "list_devices",
]

Precision = Literal["auto", "float32", "bfloat16"]
TrainingPrecision = Literal["bf16-mixed", "16-mixed", "32-true"]
"""As Lightning names them."""
_OURS = {"auto": "auto", "gpu": "auto", "cuda": "cuda", "mps": "mps", "cpu": "cpu"}
"""Devices by the names of Lightning's accelerators."""


def list_devices() -> list[str]:
    """List what this machine can compute on, best first: CUDA devices, MPS, the CPU."""
    devices = [f"cuda:{k}" for k in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        devices.append("mps")
    return [*devices, "cpu"]


def choose_device(name: str = "auto") -> torch.device:
    """Turn a user's choice into a device.

    Parameters
    ----------
    name : str
        ``"auto"`` (the best there is), ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"mps"``.

    Raises
    ------
    BrainMVPError
        There is no such device here.
    """
    available = list_devices()
    if name == "auto":
        return torch.device(available[0])
    if name == "cuda" and any(d.startswith("cuda") for d in available):
        return torch.device("cuda:0")
    if name not in available:
        raise BrainMVPError(f"There is no device {name!r} here: choose one of auto, {', '.join(available)}.")
    return torch.device(name)


def choose_dtype(device: torch.device, precision: Precision = "auto") -> torch.dtype:
    """Choose the precision of convolutions: bfloat16 where the hardware multiplies it, else float32."""
    if precision != "auto":
        return torch.float32 if precision == "float32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    multiplies_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # not in every release
    return torch.bfloat16 if device.type == "cpu" and multiplies_bfloat16() else torch.float32


def lacks_memory(error: RuntimeError) -> bool:
    """Tell whether a device has no memory left: CUDA's libraries do not all say so by torch.OutOfMemoryError.

    Examples
    --------
    >>> lacks_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    True
    >>> lacks_memory(RuntimeError("Expected all tensors to be on the same device"))
    False
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return "CUDA" in str(error) and any(word in str(error) for word in ("out of memory", "ALLOC_FAILED"))


def choose_precision(precision: Literal["auto"] | TrainingPrecision, accelerator: str = "auto") -> TrainingPrecision:
    """Choose the precision of training on a Lightning accelerator: bfloat16 where the hardware multiplies it.

    Elsewhere it is emulated, on processors tens of times slower than float32. Float16 is never chosen, as it loses
    small gradients.
    """
    if precision != "auto":
        return precision
    device = _OURS.get(accelerator, accelerator if accelerator.startswith("cuda:") else "")
    if not device:
        return "32-true"
    half = choose_dtype(choose_device(device)) == torch.bfloat16
    return "bf16-mixed" if half else "32-true"


def lightning_devices(accelerator: str, count: int) -> tuple[str, int | list[int]]:
    """Name devices as Lightning wants them, and take ``"cuda:N"`` for the GPUs from number N on.

    Raises
    ------
    BrainMVPError
        There are not so many GPUs.

    Examples
    --------
    >>> lightning_devices("cpu", 2)
    ('cpu', 2)
    """
    kind, _, first = accelerator.partition(":")
    if not first.isdecimal():
        return accelerator, count
    numbers = [int(first) + k for k in range(count)]
    choose_device(f"{kind}:{numbers[-1]}")
    return kind, numbers
