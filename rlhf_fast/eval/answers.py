"""The answers of a model to a task's rows, kept as JSON lines: what is there is not computed again.

out/answers/MODEL/TASK.jsonl    a line for each row, in whole blocks
out/answers/MODEL/TASK.json     what they were made with, and in how many seconds
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError, writing
from rlhf_fast.eval.files import Row
from rlhf_fast.run.checkpoint import write_json
from rlhf_fast.run.outputs import read_json

FOLDER = "answers"


def row_key(row: Row) -> str:
    """Return a checksum of a row, by which its answer is found again."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


class AnswerFile:
    """Answers to one task by one model.

    made_with: everything but the row that an answer depends on. Answers made with something else are replaced.
    """

    def __init__(self, out: str | Path, model: str, task: str, made_with: Mapping[str, Any]):
        folder = Path(out) / FOLDER / model
        self.rows_path, self.info_path = folder / f"{task}.jsonl", folder / f"{task}.json"
        self.made_with = dict(made_with)
        self.seconds = 0.0
        self.has_new = False
        """True once answers were added."""
        self.info: dict[str, Any] = {}
        """Format of the prompts, and number of contexts that were cut."""
        self._records: dict[str, dict[str, Any]] = {}
        self._read()

    @property
    def keys(self) -> set[str]:
        """Keys of the rows that have an answer."""
        return set(self._records)

    def records(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return the records of these rows, which must all be there."""
        return [self._records[row_key(row)] for row in rows]

    def append(self, rows: Sequence[Row], records: Sequence[Mapping[str, Any]], seconds: float) -> None:
        """Add the records of a block of rows to the file."""
        added = {row_key(row): dict(record) for row, record in zip(rows, records, strict=True)}
        lines = "".join(json.dumps({"key": key, **record}, ensure_ascii=False) + "\n" for key, record in added.items())
        with writing(self.rows_path):
            self.rows_path.parent.mkdir(parents=True, exist_ok=True)
            if not self._records:
                self.rows_path.write_text("", encoding="utf-8")
            with self.rows_path.open("a", encoding="utf-8") as stream:
                stream.write(lines)
                stream.flush()
                os.fsync(stream.fileno())
        self._records |= added
        self.seconds += seconds
        self.has_new = True
        self._write_info()

    def _read(self) -> None:
        found = None
        with suppress(UserError):  # torn, or another program's: made again
            found = read_json(self.info_path)
        if not isinstance(found, dict) or found.get("made_with") != json.loads(json.dumps(self.made_with)):
            return
        self.seconds, self.info = float(found["seconds"]), dict(found["info"])
        with suppress(OSError):
            for line in self.rows_path.read_bytes().split(b"\n")[: int(found["rows"])]:
                record = json.loads(line)
                self._records[record.pop("key")] = record
            self._write_rows()

    def _write_rows(self) -> None:
        """Drop what a killed run has written behind its last whole block."""
        lines = [json.dumps({"key": key, **r}, ensure_ascii=False) for key, r in self._records.items()]
        text = "".join(f"{line}\n" for line in lines)
        if text.encode() != self.rows_path.read_bytes():
            with writing(self.rows_path):
                self.rows_path.write_text(text, encoding="utf-8")

    def _write_info(self) -> None:
        content = {
            "made_with": self.made_with,
            "rows": len(self._records),
            "seconds": self.seconds,
            "info": self.info,
        }
        with writing(self.info_path):
            write_json(self.info_path, content)
