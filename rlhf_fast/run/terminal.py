"""Text for a terminal: aligned tables, durations, numbers, and the live line of long work."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

BAR = 20
"""Widest bar of a live line."""
SMALLEST_BAR = 8
GAP = "  "
"""Stands between two parts of a live line."""
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Characters that move a cursor, change colours, end a line or turn the direction of a text. Tab and newline are not
among them."""


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, each column padded to its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def format_duration(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


def format_speed(tokens_per_second: float) -> str:
    """Return a speed to three digits, as people write it: 85.2 tok/s, 850 tok/s, 1.77k tok/s, 1.2M tok/s."""
    if not math.isfinite(tokens_per_second):
        return f"{tokens_per_second} tok/s"
    rounded, unit = float(f"{tokens_per_second:.3g}"), ""
    for larger in ("k", "M", "G"):
        if rounded < 1000:
            break
        rounded, unit = float(f"{rounded / 1000:.3g}"), larger
    return f"{rounded:.10g}{unit} tok/s"


def printable(text: str) -> str:
    """Return a text without controls, and with blanks for tabs: a model may have sampled it."""
    return without_controls(text.replace("\r\n", "\n").expandtabs(4))


def without_controls(text: str) -> str:
    """Return a text, or a part of one, with U+FFFD for each control character; tabs and newlines stay."""
    return CONTROLS.sub("\ufffd", text)


def quoted(text: str) -> str:
    """Return a text as a JSON string in which control characters are escaped and all others stand as they are."""
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def shortened_lines(text: str, width: int, count: int) -> list[str]:
    """Return a text as at most `count` lines of at most `width` columns; the last ends in an ellipsis if it goes on."""
    text = text.strip("\r\n")
    part = printable(text[: width * (count + 1)])  # characters that are left out anyway need no wrapping
    lines = [line.plain.rstrip() for line in Text(part).wrap(Console(width=width), width)] or [""]
    if len(lines) <= count and len(text) <= width * (count + 1):
        return lines
    *first, last = lines[:count]
    shorter = Text(last)
    shorter.truncate(width - 2)
    return [*first, shorter.plain.rstrip() + " …"]


def has_cursor(console: Console) -> bool:
    """Return whether a line that was printed can be drawn anew: a terminal, and not one of TERM=dumb."""
    return console.is_terminal and not console.is_dumb_terminal


JOIN_SECONDS = 2.0
"""Longest wait for the thread of a live line."""


class LiveLine:
    """One line of a terminal that shows work done, the time left and a summary in parts. It appears at once.

    No part is cut and the line does not wrap: what the width has no room for is left out whole, the bar first, then the
    last parts.
    """

    def __init__(self, console: Console, title: str, total: int, completed: int = 0, redirect: bool = True):
        """redirect: print what the program writes to stdout and stderr meanwhile above the line."""
        self._title, self._total, self._completed = title, total, completed
        self._first, self._started = completed, time.perf_counter()
        self._updated = self._started
        self._parts: Sequence[str] = ()
        self._live = Live(
            self,
            console=console,
            refresh_per_second=5,
            redirect_stdout=redirect,
            redirect_stderr=redirect,
            vertical_overflow="visible",
        )
        self._live.start(refresh=True)

    def update(self, completed: int, parts: Sequence[str]) -> None:
        """Show `completed` of the total, and `parts` in the order of their importance."""
        self._completed, self._parts, self._updated = completed, parts, time.perf_counter()

    def stop(self) -> None:
        """Leave the line as it is and go on below it.

        Its thread has ended then: rich only tells it to, and one that wakes while Python shuts down can crash there.
        """
        thread = getattr(self._live, "_refresh_thread", None)
        self._live.stop()
        if thread is not None:
            thread.join(JOIN_SECONDS)

    def remaining(self) -> str:
        """Return the time left as h:mm:ss, by the pace so far; -:--:-- before anything is done."""
        done = self._completed - self._first
        if done <= 0:
            return "-:--:--" if self._completed < self._total else format_duration(0)
        pace = (self._updated - self._started) / done
        left = pace * (self._total - self._completed) - (time.perf_counter() - self._updated)
        return format_duration(max(left, 0.0))

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        parts = [f"{self._completed}/{self._total}", f"ETA {self.remaining()}", *self._parts]
        text = Text(self._title, style="bold", no_wrap=True, overflow="crop", end="")
        line = Text(no_wrap=True, overflow="crop")
        line.append_text(text)
        left = options.max_width - line.cell_len
        shown = []
        for part in parts:
            left -= len(GAP) + Text(part).cell_len
            if left < 0:
                break
            shown.append(part)
        bar = min(BAR, left - len(GAP))
        if len(shown) == len(parts) and bar >= SMALLEST_BAR:
            self._append_bar(line, bar, options.ascii_only)
        for i, part in enumerate(shown):
            line.append(GAP + part, style="cyan" if i == 1 else "")
        yield line

    def _append_bar(self, line: Text, width: int, ascii_only: bool) -> None:
        filled = round(width * self._completed / self._total) if self._total else width
        sign, rest = ("#", "-") if ascii_only else ("━", "━")
        line.append(GAP)
        line.append(sign * filled, style="green")
        line.append(rest * (width - filled), style="bright_black")
