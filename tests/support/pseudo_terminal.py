"""Run a command in a pseudo-terminal of a given width and read what a person sees there."""

import errno
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path
from typing import NamedTuple

import pyte

LINES = 200
ROOT = Path(__file__).resolve().parents[2]


class Seen(NamedTuple):
    """The screen of a terminal during a command and after it, without empty lines."""

    status: int
    during: list[list[str]]
    """The screen before each return to the start of a line."""
    end: list[str]


def run(command: list[str], columns: int, cwd: Path | None = None, env: dict[str, str] | None = None) -> Seen:
    """Run a command whose input and output are a terminal of `columns` columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR", "CI")}
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH")]))
    settings = {"TERM": "xterm-256color", "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env=kept | settings | (env or {})
    ) as process:
        os.close(theirs)
        screen = pyte.Screen(columns, LINES)
        stream = pyte.ByteStream(screen)
        during: list[list[str]] = []
        left = b""
        while True:
            try:
                written = os.read(ours, 65536)
            except OSError as error:  # Linux reports the end of a pseudo-terminal so
                if error.errno != errno.EIO:
                    raise
                break
            if not written:
                break
            *whole, left = re.split(rb"(?=\r)", left + written)  # a line is drawn anew from its start
            for part in filter(None, whole):
                stream.feed(part)
                during.append(_lines(screen))
        stream.feed(left)
        os.close(ours)
    return Seen(process.returncode, during, _lines(screen))


def _lines(screen: pyte.Screen) -> list[str]:
    return [line.rstrip() for line in screen.display if line.strip()]
