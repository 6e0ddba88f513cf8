"""Rows of data in the forms that it has, one reader for each: JSON lines, JSON arrays, csv and tsv, parquet, a data set
of the hub, rows in Python. `read_records` takes what `data.path` may be, and gives each row with its file and line."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.config.data_path import DataPath, PythonRows, hub_name, is_pattern, parts, plain
from rlhf_fast.data.fields import TURNS_AS_TEXT, InvalidRow, json_type
from rlhf_fast.data.hub import load_split, require_datasets
from rlhf_fast.data.json_lines import (
    PLAIN_DECODER,
    UNIQUE_KEYS,
    decoding_fault,
    parse_json,
    raw_lines,
    require_file,
    suffix_of,
    too_deep,
)
from rlhf_fast.errors import UserError

LISTS = ("messages", "conversations", "responses", "ranks", "scores", "completions", "history")
"""Columns that hold lists, which a cell of a table has as JSON."""
TURNS = ("prompt", "chosen", "rejected", "completion", "response")
"""Columns that may hold a list of turns."""
HOLDERS = ("data", "rows", "examples", "instances", "items", "records", "train")
"""Names under which an object holds a list of rows."""
MAX_CELL = 1 << 30
"""Largest number of characters in a cell of a table."""
DELIMITERS = {"csv": ",", "tsv": "\t"}
PARQUET_ROWS = 1024
"""Rows of a parquet file that are made Python objects at a time."""
BLANK = re.compile(r"[ \t\r\n]*")

Content = bytes | Mapping[str, Any] | InvalidRow
"""A row: a line of JSON, its columns, or its fault."""


class Record(NamedTuple):
    """A row, the file that holds it, and its line or, where there are no lines, its number; both count from 1."""

    file: str
    line: int
    row: Content


def require_data(path: DataPath, pipe: bool = False) -> None:
    """Raise UserError unless every file of a path is there and can be read. No row is read.

    pipe: pipes will do too.
    """
    for part in parts(path):
        if isinstance(part, PythonRows):
            continue
        if is_pattern(part):
            raise UserError(f"{part}: no file is called so; look at the pattern, which counts from {Path.cwd()}")
        if hub_name(part):
            require_datasets(part)
            continue
        require_file(part, pipe)
        if suffix_of(part) == "parquet":
            _pyarrow(part)


def read_records(path: DataPath, columns: Mapping[str, str]) -> Iterator[Record]:
    """Yield every row of every file in order. UserError for what cannot be read at all.

    columns: our name -> the files'. A table's cells are read by it.
    """
    for part in parts(path):
        require_data(part, pipe=True)
        if isinstance(part, PythonRows):
            for number, row in enumerate(part.rows, 1):
                yield Record(f"<{part.kind}>", number, plain(row))
        elif hub_name(part):
            for number, row in enumerate(load_split(part), 1):
                yield Record(part, number, plain(row))
        else:
            for line, content in reader_of(part, columns)(part):
                yield Record(part, line, content)


def reader_of(path: str, columns: Mapping[str, str]) -> Callable[[str], Iterator[tuple[int, Content]]]:
    """Return the reader of a file, by its suffix."""
    suffix = suffix_of(path)
    if suffix == "parquet":
        return read_parquet
    if suffix in DELIMITERS:
        return partial(read_table, delimiter=DELIMITERS[suffix], columns=columns)
    return read_json


def read_json(path: str) -> Iterator[tuple[int, Content]]:
    """Yield the rows of a file of JSON lines, or of one JSON array, whatever its suffix is."""
    lines = raw_lines(path)
    start = next(((number, line) for number, line in lines if line.strip()), None)
    if start is None:
        return
    number, line = start
    if line.lstrip().startswith(b"["):
        whole = b"".join([line, *(line for _, line in lines)])
        try:
            yield from read_array(whole.decode(), number)
        except UnicodeDecodeError as error:
            row = whole.count(b"\n", 0, error.start)
            yield number + row, decoding_fault(error, whole.rfind(b"\n", 0, error.start) + 1)
        return
    if line.lstrip().startswith(b"{") and suffix_of(path) == "json":
        following = list(lines)
        _require_rows(path, line, b"".join(line for _, line in following))
        lines = iter(following)
    yield number, line
    for number, line in lines:
        if line.strip():
            yield number, line


def read_array(text: str, line: int = 1) -> Iterator[tuple[int, Content]]:
    """Yield the objects of a JSON array with the line at which each begins, the array at `line`. A fault ends it."""
    position = text.index("[") + 1
    line += text.count("\n", 0, position)
    counted = position
    first = True
    while True:
        position = _behind_blanks(text, position)
        line, counted = line + text.count("\n", counted, position), position
        char = text[position : position + 1]
        if not first and char == ",":
            position = _behind_blanks(text, position + 1)
            line, counted = line + text.count("\n", counted, position), position
        elif char == "]":
            if text[position + 1 :].strip():
                line += text.count("\n", position, _behind_blanks(text, position + 1))
                yield line, InvalidRow("not JSON: the array has ended, and more text follows; remove it")
            return
        elif not first:
            found = "the file ends" if not char else f"found {char!r}"
            yield line, InvalidRow(f"not JSON: expected , or ] behind a row of the array, {found}; mend the file here")
            return
        first = False
        fault = None
        try:
            value, position = UNIQUE_KEYS.raw_decode(text, position)
        except InvalidRow as error:  # a key that is given twice
            fault = error
            value, position = PLAIN_DECODER.raw_decode(text, position)
        except ValueError as error:
            where = getattr(error, "pos", position)
            column = where - text.rfind("\n", 0, where)
            line += text.count("\n", counted, where)
            problem = getattr(error, "msg", str(error))
            yield line, InvalidRow(f"not JSON: {problem} at column {column}; the file must be one array of objects")
            return
        except RecursionError:
            yield line, too_deep()
            return
        if fault is None and not isinstance(value, dict):
            fault = InvalidRow(f"expected a JSON object with the fields of a row, found {json_type(value)}")
        yield line, fault or value


def _behind_blanks(text: str, position: int) -> int:
    match = BLANK.match(text, position)
    return match.end() if match else position


def _require_rows(path: str, line: bytes, rest: bytes) -> None:
    """Raise UserError if a .json file is one object that holds the rows, or columns, instead of lines of rows."""
    try:
        whole = parse_json(line + rest)
    except InvalidRow:
        return
    inner = [name for name, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if not rest.strip():  # one line, which may be a row that holds a list of objects
        inner = [name for name in inner if name in HOLDERS and len(inner) == 1]
    if inner:
        raise UserError(f"{path}: is one JSON object; the rows are in it: `jq '.{inner[0]}' {path} > rows.json`")
    if not rest.strip():
        return
    hint = 'frame.to_json(path, orient="records")' if all(isinstance(v, dict) for v in whole.values()) else "[...]"
    raise UserError(f"{path}: is one JSON object of several lines, not rows; write an array of rows ({hint})")


def read_table(
    path: str, delimiter: str = ",", columns: Mapping[str, str] | None = None, quoting: int = csv.QUOTE_MINIMAL
) -> Iterator[tuple[int, Content]]:
    """Yield the rows of a table under its header, each with the line at which it begins. All cells are text; but with
    `columns` (our name -> the table's) those of columns that hold lists or turns are read as JSON."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL))
    faults: dict[int, InvalidRow] = {}
    table = csv.reader(_text_lines(path, faults), delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    line = 1
    header: list[str] = []
    lists, turns = (set() if columns is None else _names(ours, columns) for ours in (LISTS, TURNS))
    try:
        for cells in table:
            last = table.line_num
            fault = next((faults[number] for number in range(line, last + 1) if number in faults), None)
            if any(map(str.strip, cells)):
                if not header:
                    header = cells
                    _require_header(path, line, header, delimiter, fault)
                elif fault:
                    yield line, fault
                elif len(cells) != len(header):
                    yield line, _uneven(cells, header, delimiter)
                else:
                    yield line, _row_of_cells(dict(zip(header, cells, strict=True)), lists, turns)
            line = last + 1
    except csv.Error as error:
        hint = (
            f"a quote that opens at or below line {line} is never closed"
            if "unexpected end" in str(error)
            else f"{error}; write a quote inside a quoted cell twice"
        )
        raise UserError(f"{path}:{line}: not {suffix_of(path) or 'csv'}: {hint}") from error


def _text_lines(path: str, faults: dict[int, InvalidRow]) -> Iterator[str]:
    """Yield the lines as text, and note those that are not UTF-8."""
    for number, line in raw_lines(path):
        text, fault = _decoded(line)
        if fault:
            faults[number] = fault
        yield text


def _decoded(line: bytes) -> tuple[str, InvalidRow | None]:
    try:
        return line.decode(), None
    except UnicodeDecodeError as error:
        return line.decode(errors="replace"), decoding_fault(error)


def _names(ours: Iterable[str], columns: Mapping[str, str]) -> set[str]:
    return {columns.get(name, name) for name in ours}


def _require_header(path: str, line: int, header: list[str], delimiter: str, fault: InvalidRow | None) -> None:
    if fault:
        raise UserError(f"{path}:{line}: {fault}")
    if twice := [name for i, name in enumerate(header) if name and name in header[:i]]:
        raise UserError(f"{path}:{line}: the header has the column {twice[0]!r} twice; rename one of them")
    others = [other for other in ";\t,|" if other != delimiter and other in header[0]]
    if len(header) == 1 and others:
        name = {"\t": "a tab", ",": "a comma"}.get(others[0], others[0])
        suffix = {"\t": "call the file .tsv", ",": "call the file .csv"}.get(others[0], "save it with commas")
        raise UserError(f"{path}:{line}: the header {header[0]!r} is one column; if {name} separates them, {suffix}")


def _uneven(cells: list[str], header: list[str], delimiter: str) -> InvalidRow:
    sign = "tab" if delimiter == "\t" else "comma"
    found = f"{len(cells)} cell" if len(cells) == 1 else f"{len(cells)} cells"
    return InvalidRow(
        f"has {found}, the header {len(header)} ({', '.join(header)}); put quotes around a cell with a {sign} or a line"
        " break in it"
    )


def _row_of_cells(row: dict[str, Any], lists: set[str], turns: set[str]) -> Content:
    """Return a row with its lists and turns read from JSON."""
    for name, cell in row.items():
        text = cell.strip()
        if not (name in lists and text[:1] in ("[", "{")) and not (name in turns and TURNS_AS_TEXT.match(text)):
            continue
        try:
            row[name] = parse_json(text)
        except InvalidRow as error:
            if name in lists:
                problem = str(error).partition(";")[0]
                return InvalidRow(f"{name} must be a list as JSON, with double quotes: {problem}")
    return row


def read_parquet(path: str) -> Iterator[tuple[int, Content]]:
    """Yield the rows of a parquet file with their numbers."""
    pyarrow = _pyarrow(path)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := [name for i, name in enumerate(names) if name in names[:i]]:
                raise UserError(f"{path}: has the column {twice[0]!r} twice; rename one of them")
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, plain(row)
    except (pyarrow.ArrowException, OSError) as error:
        detail = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"{path}: cannot be read as parquet after row {number}: {detail}; fetch or write it again"
        ) from error


def _pyarrow(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: parquet needs pyarrow; pip install pyarrow") from error
    return pyarrow
