"""Lines of a JSONL file: plain or gzip, from a file or a pipe, read exactly once; and one line as a JSON object."""

from __future__ import annotations

import errno
import gzip
import json
import stat
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rlhf_fast.data.fields import InvalidRow, json_type
from rlhf_fast.errors import UserError, nearest_file

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GZIP_START = b"\x1f"
"""The first byte of a gzip file, with which no JSON begins."""


def require_file(path: str | Path, pipe: bool = False) -> None:
    """Raise UserError unless `path` is a file that can hold JSON lines, or with `pipe` a pipe."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        near = nearest_file(path.name, _siblings(path))
        hint = f"did you mean {path.parent / near}?" if near else "look at the path"
        raise UserError(f"{path}: there is no such file; {hint}") from error
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a folder; give the JSONL file in it")
    if path.suffix in (".parquet", ".arrow", ".csv", ".tsv", ".xlsx"):
        raise UserError(f"{path}: is {path.suffix[1:]}, not JSON lines; convert it, for instance with pandas' to_json")
    if not pipe and not stat.S_ISREG(mode):
        raise UserError(
            f"{path}: is no file but a pipe or device, and a stage reads its data again; write it to a file"
        )


def _siblings(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return []


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of every line that is not blank."""
    require_file(path, pipe=True)
    path, number = Path(path), 0
    try:
        with ExitStack() as stack:
            file = stack.enter_context(path.open("rb"))
            is_gzip = path.suffix == ".gz" or file.peek(1)[:1] == GZIP_START
            for line in stack.enter_context(gzip.GzipFile(fileobj=file)) if is_gzip else file:
                number += 1
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                    if line.lstrip().startswith(b"["):
                        raise UserError(f"{path}: is one JSON array, not JSON lines; `jq -c '.[]' {path}` converts it")
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the gzip file is damaged after line {number}: {error}; fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def parse_object(line: bytes, unique_keys: bool = True) -> dict[str, Any]:
    """Return the JSON object of a line."""
    value = parse_json(line.strip(), unique_keys)
    if not isinstance(value, dict):
        raise InvalidRow(f"expected a JSON object with the fields of a row, found {json_type(value)}")
    return value


def parse_json(text: bytes | str, unique_keys: bool = True) -> Any:
    """Return the JSON value of a text. InvalidRow if it is none, or with unique_keys if a key is given twice."""
    try:
        text = text.decode().removeprefix("\ufeff") if isinstance(text, bytes) else text
        return UNIQUE_KEYS.decode(text) if unique_keys else json.loads(text)
    except InvalidRow:
        raise
    except UnicodeDecodeError as error:
        raise InvalidRow(f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from error
    except ValueError as error:
        detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise InvalidRow(f"not JSON: {detail}; every line must be one JSON object") from error
    except RecursionError as error:
        raise InvalidRow("not a row: nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        key = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise InvalidRow(f"the key {json.dumps(key)} is given twice, and only one value can be meant; remove the other")
    return found


UNIQUE_KEYS = json.JSONDecoder(object_pairs_hook=_object)
