"""Lines of a text file: plain or gzip, from a file or a pipe, read exactly once; and one line as a JSON object."""

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

from rlhf_fast.config.data_path import FOREIGN, SUFFIXES, names_python_rows
from rlhf_fast.data.fields import InvalidRow, json_type
from rlhf_fast.errors import UserError, nearest_file

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GZIP_START = b"\x1f"
"""The first byte of a gzip file, with which no JSON begins."""
UTF16 = (b"\xff\xfe", b"\xfe\xff")
"""Byte order marks of UTF-16."""
FORMATS = {
    b"PAR1": ("parquet", "give it a name that ends in .parquet"),
    b"ARROW1": ("arrow", "write it as JSON lines, parquet or csv"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or save it as csv"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "`zstd -d` unpacks it; only gzip is read as it is"),
    b"BZh": ("compressed by bzip2", "`bunzip2` unpacks it; only gzip is read as it is"),
    b"\xfd7zXZ": ("compressed by xz", "`unxz` unpacks it; only gzip is read as it is"),
}
"""First bytes of a file -> its format, and the remedy."""


def suffix_of(path: str | Path) -> str:
    """Return the suffix of a file's name in lower case, without the dot and without .gz."""
    name = Path(path).name.lower().removesuffix(".gz")
    return name.rpartition(".")[2] if "." in name else ""


def require_file(path: str | Path, pipe: bool = False) -> None:
    """Raise UserError unless `path` is a file that can hold rows, or with `pipe` a pipe."""
    if names_python_rows(str(path)):
        raise UserError(f"{path}: stands for rows that a script gave; start the script again, or give --data.path")
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
        names = _siblings(path / "x")
        if "dataset_info.json" in names or "dataset_dict.json" in names:
            raise UserError(
                f"{path}: is a folder of save_to_disk; give its rows in Python,"
                f" DataConfig(path=datasets.load_from_disk({str(path)!r}))"
            )
        suffix = next((suffix_of(name) for name in sorted(names) if suffix_of(name) in SUFFIXES), "")
        hint = f"give its files, {path / '*'}.{suffix}" if suffix else "give the file in it"
        raise UserError(f"{path}: is a folder; {hint}")
    if suffix_of(path) in FOREIGN:
        raise UserError(f"{path}: is {suffix_of(path)}, which is not read; write it as JSON lines, parquet or csv")
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
    """Yield the number and the bytes of every line of a JSONL file that is not blank."""
    if suffix_of(path) in ("parquet", "csv", "tsv"):
        raise UserError(f"{path}: is {suffix_of(path)}, not JSON lines; convert it, for instance with pandas' to_json")
    for number, line in raw_lines(path):
        if number == 1 and line.lstrip().startswith(b"["):
            raise UserError(f"{path}: is one JSON array, not JSON lines; `jq -c '.[]' {path}` converts it")
        if line.strip():
            yield number, line


def raw_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of every line, without a byte order mark. UserError for what is no text."""
    require_file(path, pipe=True)
    path, number = Path(path), 0
    try:
        with ExitStack() as stack:
            file = stack.enter_context(path.open("rb"))
            is_gzip = path.suffix == ".gz" or file.peek(1)[:1] == GZIP_START
            lines = stack.enter_context(gzip.GzipFile(fileobj=file)) if is_gzip else file
            for line in lines:
                number += 1
                if number == 1:
                    _require_text(path, line)
                    line = line.removeprefix(BYTE_ORDER_MARK)
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the gzip file is damaged after line {number}: {error}; fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _require_text(path: Path, line: bytes) -> None:
    """Raise UserError if the first line shows that a file is UTF-16 or of a format that is no text."""
    for start, (kind, remedy) in FORMATS.items():
        if line.startswith(start):
            raise UserError(f"{path}: is {kind}, not text; {remedy}")
    if line.startswith(UTF16) or b"\0" in line[:64]:
        raise UserError(f"{path}: is UTF-16, not UTF-8; `iconv -f UTF-16 -t UTF-8 {path} > NEW` converts it")


def decoding_fault(error: UnicodeDecodeError, start: int = 0) -> InvalidRow:
    """Return the fault of a line that is not UTF-8. start: the byte at which the line begins."""
    byte = error.object[error.start]
    char = bytes([byte]).decode("cp1252", errors="replace")
    meant = f" (0x{byte:02x}, in Windows-1252 {char!r})" if char.isprintable() and char != "\ufffd" else ""
    return InvalidRow(
        f"not UTF-8 at byte {error.start - start + 1}{meant}; save the file as UTF-8, or convert it with"
        " `iconv -f WINDOWS-1252 -t UTF-8`"
    )


def too_deep() -> InvalidRow:
    return InvalidRow("not a row: nested too deeply")


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
        raise decoding_fault(error) from error
    except ValueError as error:
        detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise InvalidRow(f"not JSON: {detail}; every line must be one JSON object") from error
    except RecursionError as error:
        raise too_deep() from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        key = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise InvalidRow(f"the key {json.dumps(key)} is given twice, and only one value can be meant; remove the other")
    return found


UNIQUE_KEYS = json.JSONDecoder(object_pairs_hook=_object)
PLAIN_DECODER = json.JSONDecoder()
