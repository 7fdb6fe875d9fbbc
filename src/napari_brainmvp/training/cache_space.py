"""The room that prepared studies take: where they are kept, when they were used, and which ones go."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import platformdirs

__all__ = ["cache_folder", "mark_used", "shrink_cache"]

_DAY = 86400.0
"""Seconds."""
_UNUSED, _SHARE = 7 * _DAY, 0.25


def cache_folder() -> Path:
    """Return where prepared studies are kept: ``$BRAINMVP_HOME/prepared``, else the platform's cache directory."""
    home = os.environ.get("BRAINMVP_HOME")
    return Path(home) / "prepared" if home else Path(platformdirs.user_cache_dir("brainmvp", appauthor=False))


def mark_used(path: Path) -> None:
    """Note that a file is used, once a day: reading it thousands of times shall not be as many writes."""
    if _unused_for(path) > _DAY:
        with suppress(OSError):  # somebody else's, or on a disk that cannot be written
            os.utime(path)


def shrink_cache(folder: Path) -> None:
    """Remove prepared studies that no run has used for a week, the longest unused first, where they take much space.

    Together they may take a quarter of what the disk would have free without them. A folder other than
    :func:`cache_folder` is left as it is. Nothing is taken from runs beside this one, as they mark what they read.

    Parameters
    ----------
    folder : Path
        The cache of a run that has found or made all that it needs.
    """
    if folder != cache_folder() or not folder.is_dir():
        return
    files = sorted((*folder.glob("*.npy"), *folder.glob("*.json")), key=_unused_for, reverse=True)
    sizes = {}
    for path in files:
        with suppress(OSError):  # another run may shrink it, too
            sizes[path] = path.stat().st_size
    total = sum(sizes.values())
    limit = _SHARE * (shutil.disk_usage(folder).free + total)
    for path, size in sizes.items():
        if total <= limit or _unused_for(path) < _UNUSED:
            break
        with suppress(OSError):  # Windows keeps what is open
            path.unlink()
            total -= size


def _unused_for(path: Path) -> float:
    """Return for how many seconds a file was not used; 0 where it is gone."""
    with suppress(OSError):
        return time.time() - path.stat().st_mtime
    return 0.0
