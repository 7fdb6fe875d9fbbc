"""What the command line shows: lines, tables and a progress bar on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from napari_brainmvp.errors import BrainMVPError
from napari_brainmvp.progress import Progress, ProgressCallback, no_progress

__all__ = ["named_scans", "progress_bar", "say", "table"]


def named_scans(pairs: Sequence[str]) -> dict[str, str | Path]:
    """Read ``--scan MODALITY=FILE`` options.

    Raises
    ------
    BrainMVPError
        An option is not of that form.
    """
    named: dict[str, str | Path] = {}
    for pair in pairs:
        key, separator, path = pair.partition("=")
        if not separator or not key or not path:
            raise BrainMVPError(f"--scan {pair!r} is not MODALITY=FILE: write for example --scan t1c=scan3.nii.gz.")
        named[key] = Path(path)
    return named


def say(text: str) -> None:
    """Write a line to standard output."""
    sys.stdout.write(text + "\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, show_header=any(columns), title_justify="left")
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="right" if column == "ml" else "left", no_wrap=index == 0)
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 110).print(drawn)


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[ProgressCallback]:
    """Show a progress bar on standard error while the block runs; nothing where that is not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def report(progress: Progress) -> None:
            bar.update(task, description=progress.step, completed=progress.done, total=progress.total or None)

        yield report
