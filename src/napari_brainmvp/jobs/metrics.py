"""What a run writes down: its growing tables, read a little at a time, and the studies it left out."""

from __future__ import annotations

import csv
import io
from pathlib import Path

__all__ = ["MetricsTable", "left_out"]

_NAMED = 5


class MetricsTable:
    """A ``metrics.csv`` or ``validation.csv`` that is still being written.

    Parameters
    ----------
    path : Path
        Need not exist yet.

    Examples
    --------
    >>> table = MetricsTable(Path("run/metrics.csv"))  # doctest: +SKIP
    >>> table.update()  # doctest: +SKIP
    True
    >>> table.columns["loss"][-1]  # doctest: +SKIP
    0.31
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        """Start with no rows."""
        self.steps: list[int] = []
        self.columns: dict[str, list[float]] = {}
        """Values by column, one for each of :attr:`steps`; nan where a cell is no number."""
        self._names: list[str] = []
        self._position = 0
        self._file = 0

    def update(self) -> bool:
        """Read the rows that were added, or all of them if a resumed run has rewritten the file; tell whether any."""
        try:
            about = self.path.stat()
            if about.st_size < self._position or about.st_ino != self._file:
                self._forget()
                self._file = about.st_ino
            if about.st_size == self._position:
                return False
            with self.path.open("rb") as file:
                file.seek(self._position)
                content = file.read()
        except OSError:
            return False
        content = content[: content.rfind(b"\n") + 1]  # the last row may be half written
        self._position += len(content)
        rows = list(csv.reader(io.StringIO(content.decode("utf-8", errors="replace"))))
        if rows and not self._names:
            self._names = rows.pop(0)
            self.columns = {name: [] for name in self._names[1:]}
        for row in rows:
            self._append(row)
        return bool(rows)

    def _append(self, row: list[str]) -> None:
        if len(row) != len(self._names) or not row[0].isdigit():
            return  # damaged: the curve has a gap there
        self.steps.append(int(row[0]))
        for name, cell in zip(self._names[1:], row[1:], strict=True):
            self.columns[name].append(_number(cell))


def left_out(run: Path) -> str:
    """Say how many studies a run has left out, and name the first; empty where there are none.

    Parameters
    ----------
    run : Path
        The run's folder, with its ``problems.txt``.
    """
    try:
        lines = (run / "problems.txt").read_text(encoding="utf-8").splitlines()
    except OSError:  # not yet there
        return ""
    names = list(dict.fromkeys(line.partition(": ")[0] for line in lines))
    if not names:
        return ""
    count = "1 study was" if len(names) == 1 else f"{len(names)} studies were"
    more = " and more" if len(names) > _NAMED else ""
    return f"{count} left out: {', '.join(names[:_NAMED])}{more}. {run.name}/problems.txt says why."


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")
