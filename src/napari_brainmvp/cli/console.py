"""What the command line shows: lines, tables and a progress bar on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from napari_brainmvp.progress import Progress, ProgressCallback, no_progress

__all__ = ["progress_bar", "say", "table"]


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
