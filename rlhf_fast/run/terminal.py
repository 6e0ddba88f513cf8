"""Text for a terminal: aligned tables, durations, and the live line of long work."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, each column padded to its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def format_duration(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


class LiveLine:
    """One line of a terminal that shows a bar, items done, the time left and a summary. It appears at once."""

    def __init__(self, console: Console, title: str, total: int, completed: int = 0, redirect: bool = True):
        """redirect: print what the program writes to stdout and stderr meanwhile above the line."""
        columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[summary]}"))
        self._progress = Progress(
            TextColumn("{task.description}"),
            *columns,
            console=console,
            redirect_stdout=redirect,
            redirect_stderr=redirect,
        )
        self._task = self._progress.add_task(title, total=total, completed=completed, summary="")
        self._progress.start()

    def update(self, completed: int, summary: str) -> None:
        self._progress.update(self._task, completed=completed, summary=summary)

    def stop(self) -> None:
        """Leave the line as it is and go on below it."""
        self._progress.stop()
