"""The one exception a user can cause: its text is a sentence that says what is wrong, where, and how to mend it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

SHOWN = 8
"""Rows that an error names."""


class UserError(Exception):
    """Bad input, not a bug: the command line prints the sentence without a traceback and exits with status 2."""


class BadRows(UserError):
    """Rows are to blame: `rows` says which, as (type of the batch, uid), so that who read them can name their lines."""

    def __init__(self, message: str, rows: Sequence[tuple[str, int]]):
        super().__init__(message)
        self.rows = list(rows)


@contextmanager
def locating_rows(**places: Callable[[int], str] | None) -> Iterator[None]:
    """Adds file:line to an error that blames rows. `places`: type of the batch -> (uid -> file:line)."""
    try:
        yield
    except BadRows as error:
        found = [place(uid) for kind, uid in error.rows if (place := places.get(kind))]
        shown = ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
        raise UserError(f"{error} ({shown})" if found else str(error)) from error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns what a full or forbidden disk raises while `path` is written into a UserError that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: could not be written ({error}); free some space or give another folder and start the same"
            " command again: it goes on from the newest whole checkpoint"
        ) from error
