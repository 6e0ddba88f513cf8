"""The answers of a model to a task's rows, kept as JSON lines: what is there is not computed again.

    out/answers/MODEL/TASK.jsonl    a line for each row: its key, what it was made with, and the answer

Lines that were made with another model or other settings are replaced; a torn last line of a killed run is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.errors import writing
from rlhf_fast.eval.files import Row
from rlhf_fast.run.outputs import replacing

FOLDER = "answers"
KEY, MADE_WITH, SECONDS, TEMPLATE, OVERLONG, UNKNOWN = "key", "made_with", "seconds", "template", "overlong", "unknown"
"""Columns of every line. The last is the share of tokens that the tokenizer does not know."""
DATE = "date"
"""Column of every line: the date that the chat template takes for today's, None where it writes none."""
SHORTENED, FINISHED = "shortened", "finished"
"""Columns of scores and of answers: windows are shorter for the model's positions; an answer ends by itself."""


def row_key(row: Row) -> str:
    """Return a checksum of a row, by which its answer is found again."""
    return _checksum(row)


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class AnswerFile:
    """Answers to one task by one model.

    made_with: everything but the row that an answer depends on. Each line has its checksum, so that no other answer can
    be taken for one of these, whenever a run is killed.
    """

    def __init__(self, out: str | Path, model: str, task: str, made_with: Mapping[str, Any]):
        self.path = Path(out) / FOLDER / model / f"{task}.jsonl"
        self.made_with = _checksum(made_with)
        self.has_new = False
        """True once answers were added."""
        self.num_stale = 0
        """Number of lines that were made with something else."""
        self._records: dict[str, dict[str, Any]] = {}
        self._is_clean = False
        self._read()

    @property
    def keys(self) -> set[str]:
        """Keys of the rows that have an answer."""
        return set(self._records)

    def records(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return the records of these rows, which must all be there."""
        return [self._records[row_key(row)] for row in rows]

    def append(self, rows: Sequence[Row], records: Sequence[Mapping[str, Any]]) -> None:
        """Add the records of a block of rows to the file."""
        added = {row_key(row): dict(record) for row, record in zip(rows, records, strict=True)}
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._is_clean:
                with replacing(self.path) as unfinished:
                    unfinished.write_text(self._lines(self._records), encoding="utf-8")
                self._is_clean = True
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(self._lines(added))
                stream.flush()
                os.fsync(stream.fileno())
        self._records |= added
        self.has_new = True

    def _lines(self, records: Mapping[str, Mapping[str, Any]]) -> str:
        lines = ({KEY: key, MADE_WITH: self.made_with, **record} for key, record in records.items())
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def _read(self) -> None:
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except OSError:
            return
        self._is_clean = True
        for line in lines:
            record = _record(line)
            if record is not None and record.pop(MADE_WITH) == self.made_with:
                self._records[record.pop(KEY)] = record
            else:
                self._is_clean = False
                self.num_stale += record is not None


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record of a whole line, or None for one that is torn or not ours."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get(KEY), str) and MADE_WITH in record else None
