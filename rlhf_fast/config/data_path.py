"""The value of `data.path`: a file, a pattern such as data/*.jsonl, a hub name, a list of these, or rows in Python."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from rlhf_fast.errors import UserError, listed

DataPath = str | tuple[str, ...]
SUFFIXES = ("jsonl", "ndjson", "json", "parquet", "csv", "tsv", "gz")
"""Suffixes of the files that are read. A file with another one is read as JSON lines."""
FOREIGN = ("arrow", "feather", "orc", "xlsx", "xls", "pkl", "pickle", "zip", "tar")
"""Suffixes of formats that are not read."""
OTHER_SUFFIXES = ("zst", "bz2", "xz", "txt", "md", "yaml", "yml", "log")
"""More suffixes that a hub name does not have."""
HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.%:+\[\]-]+))?")
GLOB = re.compile(r"[*?\[]")
PYTHON_ROWS = re.compile(r"<\w+ of \d+ rows, sha256 [0-9a-f]{16}>")
"""The text of PythonRows."""


class PythonRows(str):
    """Rows given in Python. As a text it is their kind, number and checksum, which settings and run.json hold, so that
    a run with other rows is another run."""

    rows: Sequence[Mapping[str, Any]]
    kind: str
    """list or Dataset."""
    sha256: str

    def __new__(cls, rows: Sequence[Mapping[str, Any]], kind: str) -> PythonRows:
        digest = rows_sha256(rows)
        self = super().__new__(cls, f"<{kind} of {len(rows)} rows, sha256 {digest[:16]}>")
        self.rows, self.kind, self.sha256 = rows, kind, digest
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PythonRows:
        return self

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return PythonRows, (self.rows, self.kind)


def as_data_path(value: object) -> DataPath:
    """Return what names data as a path. UserError for a value that `path_value` does not take."""
    try:
        return path_value(value)
    except ValueError as error:
        raise UserError(f"data: {error}") from None


def path_value(value: object) -> DataPath:
    """Return a setting's value as a path: text, a list of texts, a list of dicts, or a datasets.Dataset. ValueError for
    others."""
    if isinstance(value, (str, os.PathLike)):
        return value if isinstance(value, str) else os.fspath(value)
    kind = type(value).__name__
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError("is an empty list; give at least one file or row")
        if all(isinstance(entry, Mapping) for entry in value):
            # A copy: the script may change its rows later.
            return PythonRows(tuple(_plain_row(number, row) for number, row in enumerate(value, 1)), "list")
        if all(isinstance(entry, (str, os.PathLike)) for entry in value):
            paths = tuple(entry if isinstance(entry, str) else os.fspath(entry) for entry in value)
            return paths[0] if len(paths) == 1 else paths
        raise ValueError(
            "must be a list of paths or one of rows (dicts), not of both; found"
            f" {listed(list(dict.fromkeys(type(entry).__name__ for entry in value)))}"
        )
    if isinstance(value, Mapping):
        if splits := [str(name) for name, part in value.items() if hasattr(part, "column_names")]:
            raise ValueError(f"is a {kind} of the splits {listed(splits)}; give one, dataset[{splits[0]!r}]")
        raise ValueError("is a dict, not rows; give a list of dicts, one for each row")
    if hasattr(value, "to_pylist"):
        raise ValueError(f"is a {kind} of pyarrow; give table.to_pylist()")
    if hasattr(value, "column_names") and hasattr(value, "__iter__"):
        if not hasattr(value, "__len__"):
            raise ValueError(f"is an {kind}, which is read as a stream; give list(dataset.take(10_000)), say")
        return PythonRows(cast(Sequence[Mapping[str, Any]], value), kind)
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        raise ValueError(f'is a {kind}; give frame.to_dict("records")')
    raise ValueError("must be a path, a list of paths, a list of dicts, or a datasets.Dataset")


def expand_user(path: DataPath) -> DataPath:
    """Return a path with its leading ~ replaced, which no shell has done in a YAML file."""
    if isinstance(path, tuple):
        return tuple(str(expand_user(part)) for part in path)
    return os.path.expanduser(path) if path.startswith("~") else path  # noqa: PTH111


def shown_path(path: DataPath) -> str:
    """Return a path for messages, of a long list the first parts."""
    if isinstance(path, str):
        return path
    return ", ".join(path) if len(path) <= 3 else f"{path[0]}, {path[1]} and {len(path) - 2} more"


def path_key(path: DataPath) -> str:
    """Return the whole path as one text, by which its checksum is kept."""
    return str(path) if isinstance(path, str) else ", ".join(path)


def command_path(path: DataPath) -> str:
    """Return a path as it is written on a command line."""
    return " ".join(map(shlex.quote, [path] if isinstance(path, str) else path))


def is_python(path: DataPath) -> bool:
    """Return whether a path is rows in Python, which no command can read again."""
    return isinstance(path, PythonRows)


def names_python_rows(part: str) -> bool:
    """Return whether a text is that of rows in Python, which run.json has in their place."""
    return PYTHON_ROWS.fullmatch(part) is not None


def parts(path: DataPath) -> list[str]:
    """Return the files, hub names and Python rows of a path in order, its patterns expanded and sorted.

    A pattern without a match stays as it is.
    """
    return list(chain.from_iterable(map(_expanded, path if isinstance(path, tuple) else [path])))


def _expanded(part: str) -> list[str]:
    if not is_pattern(part):
        return [part]
    return sorted(found for found in glob.glob(part, recursive=True) if not Path(found).is_dir()) or [part]  # noqa: PTH207


def is_pattern(part: str) -> bool:
    """Return whether a part is a pattern of file names. A file that is called so is none, nor is a hub's split."""
    if isinstance(part, PythonRows) or not GLOB.search(part):
        return False
    return not os.path.lexists(part) and hub_name(part) is None


def hub_name(part: str) -> tuple[str, str, str] | None:
    """Return name, config ("" if none) and split of a data set of the hub; None for a file or Python rows.

    A file that is there, or whose first folder is, is no hub name, and neither is one with the suffix of a data file.
    """
    match = None if isinstance(part, PythonRows) else HUB_NAME.fullmatch(part)
    if match is None or os.path.lexists(part) or os.path.isdir(part.partition("/")[0]):  # noqa: PTH112
        return None
    last = (match["config"] or match["name"]).rpartition(".")[2].lower()
    if last in (*SUFFIXES, *FOREIGN, *OTHER_SUFFIXES):
        return None
    return match["name"], match["config"] or "", match["split"] or "train"


def rows_sha256(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a checksum of rows, which depends on their order, not on that of their columns."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(plain(row), sort_keys=True, default=_unread).encode() + b"\n")
    return digest.hexdigest()


def _plain_row(number: int, row: Mapping[str, Any]) -> Any:
    try:
        return plain(row)
    except RecursionError:
        raise ValueError(f"is a list whose row {number} contains itself; give rows that JSON could hold") from None


def plain(value: Any) -> Any:
    """Return a value of Python, NumPy, torch or arrow in the types of JSON. Bytes, and what has none, stay."""
    if value is None or isinstance(value, (str, bool, int, float, bytes)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (date, time)):  # a datetime is a date too
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
    if isinstance(value, (UUID, timedelta)):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy's, torch's
        return plain(value.tolist())
    return value


def _unread(value: object) -> str:
    """Return what stands in a checksum for a value without JSON, which no format reads."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return f"{type(value).__module__}.{type(value).__qualname__}"
