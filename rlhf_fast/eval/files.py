"""Rows of a benchmark's file with their lines: JSON lines, a JSON array, CSV or TSV, each plain or gzip."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf_fast.data.fields import InvalidRow
from rlhf_fast.data.files import Content, read_json, read_table
from rlhf_fast.data.rows import columns_of
from rlhf_fast.errors import UserError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
"""Endings of names that are read; `.gz` may follow."""
TABLES = {
    ".csv": partial(read_table, delimiter=","),
    ".tsv": partial(read_table, delimiter="\t", quoting=csv.QUOTE_NONE),
}
"""Suffix -> reader. A benchmark's tsv has quotes as they are."""


def plain_suffix(path: Path) -> str:
    """Return the ending of a file's name without `.gz`, in lower case."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def read_rows(path: str | Path) -> Iterator[tuple[int, Row]]:
    """Yield the line, from 1, and the columns of every row. UserError for what is no such file or row."""
    path = Path(path)
    suffix = plain_suffix(path)
    if not suffix:
        raise UserError(
            f"{path}: is no file of rows; its name must end in {', '.join(SUFFIXES)}, or one of these and .gz"
        )
    reader = TABLES.get(suffix, read_json)
    for line, content in reader(str(path)):
        yield line, _row(path, line, content)


def _row(path: Path, line: int, content: Content) -> Row:
    try:
        return dict(columns_of(content))
    except InvalidRow as error:
        raise UserError(f"{path}:{line}: {error}") from error


def peek_row(path: Path) -> tuple[Row | None, Iterator[tuple[int, Row]]]:
    """Return the first row of a file, None if it has none, and an iterator over all rows."""
    rows = read_rows(path)
    first = next(rows, None)
    return (None, rows) if first is None else (first[1], chain([first], rows))
