"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from napari_brainmvp.errors import FileError

__all__ = ["atomic_path", "make_folder", "remove_partial", "write_text_atomic"]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that takes its place once the block ends well.

    The temporary file keeps all suffixes, which writers look at. It is flushed to the disk before it is renamed, and
    removed when anything fails.

    Parameters
    ----------
    path : Path
        Where the file is wanted; its folder is created.

    Raises
    ------
    FileError
        The file cannot be written: no permission, no space, no such place.

    Examples
    --------
    >>> with atomic_path(Path("out.txt")) as temporary:  # doctest: +SKIP
    ...     temporary.write_text("all or nothing")
    """
    temporary = path.with_name(f".{os.getpid()}.part.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("r+b") as file:  # Windows flushes no file that is open to be read only
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError(f"{path} cannot be written ({reason}): free some space or choose another place.") from error
    finally:
        with suppress(OSError):  # of a folder that is gone or closed, which was said already
            temporary.unlink()


def write_text_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 text file, complete or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(out: Path, fill: Callable[[Path], None], *, may_be_empty: bool = False) -> Path:
    """Fill a folder beside ``out`` and rename it, so that it appears complete or not at all.

    Parameters
    ----------
    out : Path
    fill : callable
        Writes into the folder it is given.
    may_be_empty : bool
        Whether ``out`` may be an empty folder already, as a dialog makes it.

    Raises
    ------
    FileError
        It exists or cannot be written.
    """
    partial = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        if out.exists() and not (may_be_empty and out.is_dir() and not any(out.iterdir())):
            raise FileError(f"{out} already exists: choose another place or remove it first.")
        partial.mkdir(parents=True)
        fill(partial)
        if out.exists():  # empty: Windows would not put another folder in its place
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise FileError(
            f"{out} cannot be written ({error.strerror or error}): free space or choose another place."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def remove_partial(folder: Path, older: float = 0.0) -> None:
    """Remove what killed writers have left in a folder and those inside it.

    Parameters
    ----------
    folder : Path
    older : float
        Seconds since the last change; more than any writing takes, where others may be writing there now.
    """
    for path in [*folder.rglob(".*.part.*"), *folder.rglob(".*.part")]:
        with suppress(OSError):
            if time.time() - path.stat().st_mtime < older:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
