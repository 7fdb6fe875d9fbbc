"""Keep memory that training frees and takes again at every step."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of glibc's ``mallopt``."""


def keep_freed_memory() -> bool:
    """Tell the C library not to hand large blocks back to the system, for the rest of this process.

    By default every large tensor is mapped anew and its pages are cleared at first touch, which takes a good part of a
    training step on a CPU. Only for processes that do little else: their memory does not shrink.

    Returns
    -------
    bool
        Whether the C library took it; False where it is not glibc.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_TOP_PAD, 2**28))
