"""Standard input and output that are closed, cannot write every character, or break while a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class Unbreakable:
    """A text stream whose writes never fail: once its reader or terminal is gone, what follows goes nowhere.

    A run must not end because nobody reads its progress any more.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            silence(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Replace standard streams that are closed or may break, within the block.

    A closed one gets the null device, so that no file of the run gets its number. Characters that the encoding of
    stdout lacks are written as escapes.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123
    if getattr(sys.stdout, "errors", "") == "strict":
        cast(Any, sys.stdout).reconfigure(errors="backslashreplace")
    sys.stderr = cast(TextIO, Unbreakable(sys.stderr))
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def silence(stream: Any) -> None:
    """Send what is still to be written to a stream, and all that follows, to the null device."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def is_closed(stream: TextIO) -> bool:
    """Return whether a standard stream was closed when the command began."""
    return getattr(stream, "name", "") == os.devnull


def is_utf8(stream: TextIO) -> bool:
    """Return whether a stream can write any character."""
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "") == "utf8"
