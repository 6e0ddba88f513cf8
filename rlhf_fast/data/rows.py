"""Rows of a JSONL file as examples: the formats that are understood, and the errors of the rows that are not.

A prompt is a text or a conversation: a list of {"role", "content"} that ends with the turn to answer. The column names
are TRL's; `columns` maps others to them. The first format that fits a row is taken:

    demonstrations  prompt + completion | prompt + response | messages | conversations (sharegpt) | instruction
                    (+ input) + output (alpaca)
    comparisons     prompt + responses + ranks (0 is best, equal is a tie) | prompt + chosen + rejected | chosen +
                    rejected that both begin with the prompt, as text, messages, or HH's "Human: ... Assistant: ..."
    prompts         prompt | messages | conversations | instruction (+ input); a last answer is left out
    texts           text
"""

from __future__ import annotations

import difflib
import gzip
import json
import sys
import textwrap
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.data.fields import (
    Dialog,
    InvalidRow,
    Message,
    alpaca_prompt,
    column_names,
    conversation,
    ending_with_user,
    json_type,
    prompt_field,
    response_field,
    split_text,
    split_turns,
    text_field,
    turns_field,
)
from rlhf_fast.errors import UserError

KINDS = ("demonstrations", "comparisons", "prompts", "texts")
COLUMNS = ("prompt", "completion", "messages", "chosen", "rejected", "responses", "ranks", "text", "group")
EXPECTED = {
    "demonstrations": "prompt + completion, messages, conversations, or instruction + output",
    "comparisons": "prompt + responses + ranks, or prompt + chosen + rejected",
    "prompts": "prompt, messages, conversations, or instruction",
    "texts": "text",
}
# Names of our columns elsewhere, to suggest the `columns` that would fix a file.
ALIASES = {
    "prompt": ("question", "query", "instruction", "context", "input", "source"),
    "completion": ("response", "answer", "output", "reply", "target", "label", "generation"),
    "chosen": ("better", "preferred", "winner", "accepted", "positive"),
    "rejected": ("worse", "loser", "other", "negative", "refused"),
    "responses": ("completions", "answers", "candidates", "outputs", "replies"),
    "ranks": ("rank", "ranking", "order", "labels"),
    "text": ("content", "document", "body", "story"),
    "messages": ("dialog", "dialogue", "conversation", "turns"),
}


class Example(NamedTuple):
    """One row. Fields that a kind does not have stay empty. A text is one response without a prompt."""

    line: int
    """Line of the file, from 1."""
    prompt: Dialog
    responses: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    """Rank of each response: 0 is the best, without gaps; equal ranks are a tie."""
    group: str = ""
    """Rows of one group, like rows of one prompt, stay on one side of a split into training and validation."""
    tools: tuple[dict[str, Any], ...] = ()
    """Descriptions of the tools that the assistant may call, for the chat template."""
    conversation: tuple[Message, ...] = ()
    """The whole conversation of a demonstrations row that is given as turns, with the last answer; else empty."""


def scan_examples(
    path: str | Path, kind: str, columns: Mapping[str, str] | None = None
) -> Iterator[tuple[int, Example | InvalidRow]]:
    """Yield the line number and the example, or its error, of every row that is not blank."""
    for name in columns or {}:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COLUMNS)}"
            raise UserError(f"{path}: columns: no column of ours is called {name!r}; {hint}")
    for number, line in _lines(path):
        yield number, _parse_line(line, kind, columns or {}, number)


def _parse_line(line: bytes, kind: str, columns: Mapping[str, str], number: int) -> Example | InvalidRow:
    try:
        return parse_row(_json(line), kind, columns, number)
    except InvalidRow as error:
        return error


def raw_rows(path: str | Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield the first `count` rows that are JSON objects."""
    for _, line in _lines(path):
        try:
            row = _json(line)
        except InvalidRow:
            continue
        yield row
        count -= 1
        if not count:
            return


def read_examples(
    path: str | Path, kind: str, columns: Mapping[str, str] | None = None, limit: int = 0
) -> list[Example]:
    """Return the first `limit` examples (0 = all). UserError at the first invalid row, or if there is no row."""
    examples = []
    for number, found in scan_examples(path, kind, columns):
        if isinstance(found, InvalidRow):
            raise UserError(f"{path}:{number}: {found}; `rlhf-fast check {path} --as {kind}` lists every such row")
        examples.append(found)
        if len(examples) == limit:
            break
    if not examples:
        raise UserError(f"{path}: the file holds no rows; expected JSON lines with {EXPECTED[kind]}")
    return examples


def require_file(path: str | Path) -> None:
    """Raise UserError unless `path` is a file that can hold JSON lines."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the JSONL file in it")
    if not path.exists():
        near = difflib.get_close_matches(path.name, _siblings(path), n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "look at the path"
        raise UserError(f"{path}: there is no such file; {hint}")
    if path.suffix in (".parquet", ".arrow", ".csv", ".tsv", ".xlsx"):
        raise UserError(f"{path}: is {path.suffix[1:]}, not JSON lines; convert it, for instance with pandas' to_json")


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of every line that is not blank."""
    require_file(path)
    path, number = Path(path), 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for line in stream:
                number += 1
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                    if line.lstrip().startswith(b"["):
                        raise UserError(f"{path}: is one JSON array, not JSON lines; `jq -c '.[]' {path}` converts it")
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the gzip file is damaged after line {number}: {error}; fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _siblings(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []


def _json(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.strip())
    except UnicodeDecodeError as error:
        raise InvalidRow(f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from error
    except ValueError as error:
        detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise InvalidRow(f"not JSON: {detail}; every line must be one JSON object") from error
    except RecursionError as error:
        raise InvalidRow("not a row: nested too deeply") from error
    if not isinstance(row, dict):
        raise InvalidRow(f"expected a JSON object with {' or '.join(KINDS)} fields, found {json_type(row)}")
    return row


def parse_row(row: Mapping[str, Any], kind: str, columns: Mapping[str, str] | None = None, line: int = 0) -> Example:
    """Return the row as an example of `kind`. InvalidRow if it is none."""
    row = dict(row)
    for ours, theirs in (columns or {}).items():
        if theirs not in row:
            if ours == "group":
                continue
            raise InvalidRow(f"columns maps {ours} to {theirs!r}, which the row lacks; it has {column_names(row)}")
        row[ours] = row[theirs]
    group = row.get("group")
    parsers = {"demonstrations": _demonstration, "comparisons": _comparison, "prompts": _prompt, "texts": _text}
    return parsers[kind](row)._replace(line=line, group="" if group is None else str(group))


def _demonstration(row: Mapping[str, Any]) -> Example:
    turns = conversation(row)
    if turns is not None:
        if turns[-1]["role"] != "assistant":
            raise InvalidRow("the conversation must end with the assistant's turn, the response to learn")
        return Example(0, ending_with_user(turns[:-1]), (turns[-1]["content"],), conversation=tuple(turns))
    if "instruction" in row and "output" in row and "prompt" not in row:
        return Example(0, alpaca_prompt(row), (text_field(row, "output"),))
    if "prompt" in row and ("completion" in row or "response" in row):
        column = "completion" if "completion" in row else "response"
        return Example(0, prompt_field(row, "prompt"), (response_field(row, column),))
    raise _missing_column(row, "demonstrations", ("prompt", "completion"))


def _comparison(row: Mapping[str, Any]) -> Example:
    if "responses" in row or "ranks" in row:
        for name in ("prompt", "responses", "ranks"):
            if name not in row:
                raise _missing_column(row, "comparisons", ("prompt", "responses", "ranks"))
        return _ranked(row)
    if "chosen" not in row or "rejected" not in row:
        raise _missing_column(row, "comparisons", ("prompt", "chosen", "rejected"))
    if "prompt" in row:
        prompt = prompt_field(row, "prompt")
        chosen, rejected = (response_field(row, name) for name in ("chosen", "rejected"))
    elif isinstance(row["chosen"], list):
        prompt, chosen, rejected = split_turns(turns_field(row, "chosen"), turns_field(row, "rejected"))
    else:
        prompt, chosen, rejected = split_text(text_field(row, "chosen"), text_field(row, "rejected"))
    if chosen == rejected:
        raise InvalidRow("chosen and rejected are equal, so there is nothing to prefer; remove the row", "equal")
    return Example(0, prompt, (chosen, rejected), (0, 1))


def _ranked(row: Mapping[str, Any]) -> Example:
    responses, ranks = row["responses"], row["ranks"]
    for name in ("responses", "ranks"):
        if not isinstance(row[name], list):
            raise InvalidRow(f"{name} must be a list, found {json_type(row[name])}")
    if len(responses) != len(ranks):
        raise InvalidRow(f"{len(responses)} responses but {len(ranks)} ranks; each response needs one")
    texts = tuple(text_field({f"responses[{i}]": text}, f"responses[{i}]") for i, text in enumerate(responses))
    for i, rank in enumerate(ranks):
        if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not abs(rank) <= sys.float_info.max:
            found = textwrap.shorten(json.dumps(rank), 40, placeholder="...")
            raise InvalidRow(f"ranks[{i}] must be a number (0 is best, equal numbers are a tie), found {found}")
    levels = sorted(set(ranks))
    if len(levels) < 2:
        raise InvalidRow(f"{len(ranks)} responses, all of one rank: nothing is preferred; remove the row")
    rank_of: dict[str, float] = {}
    for i, (text, rank) in enumerate(zip(texts, ranks, strict=True)):
        if rank_of.setdefault(text, rank) != rank:
            first = texts.index(text)
            raise InvalidRow(f"responses[{first}] and responses[{i}] are equal but ranked {rank_of[text]} and {rank}")
    return Example(0, prompt_field(row, "prompt"), texts, tuple(levels.index(rank) for rank in ranks))


def _prompt(row: Mapping[str, Any]) -> Example:
    if "prompt" in row:
        return Example(0, prompt_field(row, "prompt"))
    turns = conversation(row)
    if turns is not None:
        return Example(0, ending_with_user(turns[:-1] if turns[-1]["role"] == "assistant" else turns))
    if "instruction" in row:
        return Example(0, alpaca_prompt(row))
    raise _missing_column(row, "prompts", ("prompt",))


def _text(row: Mapping[str, Any]) -> Example:
    if "text" not in row:
        raise _missing_column(row, "texts", ("text",))
    return Example(0, "", (text_field(row, "text"),))


def _missing_column(row: Mapping[str, Any], kind: str, wanted: tuple[str, ...]) -> InvalidRow:
    """Return the error for missing columns, with the `columns` that may supply them."""
    absent = [name for name in wanted if name not in row]
    columns = {}
    for name in absent:
        near = [other for other in ALIASES.get(name, ()) if other in row and other not in wanted]
        near += difflib.get_close_matches(name, [key for key in row if key not in wanted], n=1, cutoff=0.7)
        if near:
            columns[name] = near[0]
    hint = ""
    if columns:
        pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
        hint = f"; if that is what they are, set columns: {{{pairs}}}"
    missing = " and ".join(f'"{name}"' for name in absent)
    return InvalidRow(f"no {missing} in the row; found {column_names(row)}; expected {EXPECTED[kind]}{hint}")
