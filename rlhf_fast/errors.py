"""UserError, the one exception that users can cause. Its text names the fault, its place and the remedy."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

SHOWN = 8
"""Number of rows that an error names."""


class UserError(Exception):
    """Bad input, not a bug: the command line prints the sentence without a traceback and exits with status 2."""


class FunctionFailed(UserError):
    """A function of the user's raised, was too slow, or returned what is no reward: it can be mended."""


class BadRows(UserError):
    """Rows of the data cause the error. `rows`: pairs (type of the batch, uid), which `row_locations` looks up.

    unlocated: the rows in words, for where no file has them. by_function: a function is to be mended, not the rows.
    """

    def __init__(self, message: str, rows: Sequence[tuple[str, int]], unlocated: str = "", by_function: bool = False):
        super().__init__(f"{message} ({unlocated})" if unlocated else message)
        self.message, self.rows, self.by_function = message, list(rows), by_function


def listed(items: Sequence[str], shown: int = SHOWN) -> str:
    """Join the first `shown` items with commas; ", ..." stands for the rest."""
    return ", ".join(items[:shown]) + (", ..." if len(items) > shown else "")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the known name that is most like `name`; "" if none has this share of its characters in this order."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), "")


def nearest_file(name: str, files: Iterable[str]) -> str:
    """Return the file name that is most like `name`; "" if none is near. A common ending such as .jsonl says nothing
    about that, so the parts before it are compared."""
    names = {file: file.partition(".")[0] for file in files if file != name}
    near = nearest(name.partition(".")[0], names.values(), cutoff=0.75)
    return nearest(name, [file for file, stem in names.items() if near and stem == near], cutoff=0.0)


def did_you_mean(name: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """Return the hint at the known name that was meant, or `otherwise` if none is near."""
    near = nearest(name, known, cutoff)
    return f"did you mean {near}?" if near else otherwise


@contextmanager
def row_locations(**locations: Callable[[int], str] | None) -> Iterator[None]:
    """Add file:line to a BadRows error. `locations` has for each type of batch a function from uid to file:line."""
    try:
        yield
    except BadRows as error:
        found = [location(uid) for kind, uid in error.rows if (location := locations.get(kind))]
        kind = FunctionFailed if error.by_function else UserError
        raise kind(f"{error.message} ({listed(found)})" if found else str(error)) from error


def shortened(path: object, width: int = 80) -> str:
    """Return a path as text, without the middle of a very long one."""
    text = str(path)
    half = (width - 5) // 2
    return text if len(text) <= width else f"{text[:half]} ... {text[-half:]}"


REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "give another folder, since this disk is read-only",
    errno.EACCES: "give another folder, or change its permissions",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "look at the path",
}


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into a UserError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        remedy = REMEDIES.get(getattr(error, "errno", None) or errno.ENOSPC, "give another folder")
        raise UserError(
            f"{shortened(path)}: could not be written ({_reason(error)}); {remedy} and start the same command again:"
            " runs and evaluations go on where they stopped"
        ) from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
