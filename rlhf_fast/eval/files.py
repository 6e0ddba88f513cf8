"""Rows of a benchmark's file with their lines: JSON lines, a JSON array, CSV or TSV, each plain or gzip."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf_fast.data.fields import InvalidRow, json_type
from rlhf_fast.data.json_lines import GZIP_START, parse_object, read_lines
from rlhf_fast.errors import UserError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
"""Endings of names that are read; `.gz` may follow."""
MAX_CELL = 1 << 24
"""Largest number of characters in a cell of a table."""


def plain_suffix(path: Path) -> str:
    """Return the ending of a file's name without `.gz`, in lower case."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def read_rows(path: str | Path) -> Iterator[tuple[int, Row]]:
    """Yield the line, from 1, and the columns of every row. UserError for what is no such file or row."""
    path = Path(path)
    suffix = plain_suffix(path)
    if suffix in (".csv", ".tsv"):
        yield from _table_rows(path, "," if suffix == ".csv" else "\t")
    elif suffix == ".json" and (text := _read_text(path)).lstrip().startswith("["):
        yield from _array_rows(path, text)
    elif suffix:
        for line, content in read_lines(path):
            yield line, _object(path, line, content)
    else:
        raise UserError(
            f"{path}: is no file of rows; its name must end in {', '.join(SUFFIXES)}, or one of these and .gz"
        )


def _object(path: Path, line: int, content: bytes) -> Row:
    try:
        return parse_object(content)
    except InvalidRow as error:
        raise UserError(f"{path}:{line}: {error}") from error


def _read_text(path: Path) -> str:
    """Return a whole file as text, without a byte order mark."""
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz" or content[:1] == GZIP_START:
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8; save the file as UTF-8") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; look at the path") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the gzip file is damaged: {error}; fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; look at the path") from error


def _array_rows(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    """Yield the objects of a JSON array, each with the line at which it begins."""
    decoder, position, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        position += len(text) - position - len(text[position:].lstrip(" \t\r\n,"))
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{error.lineno}: not JSON: {error.msg}; the file must be one whole array of objects"
            ) from error
        if not isinstance(value, dict):
            raise UserError(f"{path}:{line}: expected a JSON object, found {json_type(value)}")
        yield line, value


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a table under its header. A cell may hold line breaks if it is quoted."""
    csv.field_size_limit(MAX_CELL)
    table = csv.reader(
        io.StringIO(_read_text(path), newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE,
        strict=True,
    )
    try:
        header = next(table, [])
        line = table.line_num + 1
        for cells in table:
            if any(map(str.strip, cells)):
                if len(cells) != len(header):
                    raise UserError(
                        f"{path}:{line}: has {len(cells)} cells where the header has {len(header)}; put quotes around"
                        " a cell that holds the delimiter or a line break"
                    )
                yield line, dict(zip(header, cells, strict=True))
            line = table.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{table.line_num}: {error}; save the table again with quotes around its cells"
        ) from error


def peek_row(path: Path) -> tuple[Row | None, Iterator[tuple[int, Row]]]:
    """Return the first row of a file, None if it has none, and an iterator over all rows."""
    rows = read_rows(path)
    first = next(rows, None)
    return (None, rows) if first is None else (first[1], chain([first], rows))
