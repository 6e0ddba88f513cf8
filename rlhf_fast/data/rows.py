"""Rows of a JSONL file as examples: which formats are understood, and what is said of a row that is not.

A prompt is text, or a conversation: a list of {"role", "content"} that ends with the turn to be answered. Formats, by
the names that TRL made common; `columns` maps other names, and the first that fits is taken:

    demonstrations  prompt + completion | prompt + response | messages | conversations (sharegpt) | instruction
                    (+ input) + output (alpaca)
    comparisons     prompt + responses + ranks (0 is best, equal is a tie) | prompt + chosen + rejected | chosen +
                    rejected with the prompt in front of both, as text, messages, or HH's "Human: ... Assistant: ..."
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
    Bad,
    Dialog,
    alpaca,
    answer,
    answerable,
    common_text,
    common_turns,
    conversation,
    dialog,
    names,
    string,
    turns_of,
    typename,
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
# What others call our columns; only to say which map would mend a file.
OTHER_NAMES = {
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
    """One row. What a kind does not have stays empty; a text is a single response without prompt."""

    line: int
    """Of the file, from 1."""
    prompt: Dialog
    responses: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    """0 = best, without gaps; equal = tie."""
    group: str = ""
    """Rows that must not be split between training and validation, beside those of one prompt."""


def scan(path: str | Path, kind: str, columns: Mapping[str, str] | None = None) -> Iterator[tuple[int, Example | Bad]]:
    """(line number, example or what is wrong with it) of every row that is not blank."""
    for name in columns or {}:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COLUMNS)}"
            raise UserError(f"{path}: columns: no column of ours is called {name!r}; {hint}")
    for number, line in _lines(path):
        try:
            yield number, parse(_json(line), kind, columns or {}, number)
        except Bad as bad:
            yield number, bad


def raw_rows(path: str | Path, count: int) -> Iterator[dict[str, Any]]:
    """The first rows that are JSON objects, as they stand."""
    for _, line in _lines(path):
        try:
            yield dict(_json(line))
        except Bad:
            continue
        count -= 1
        if not count:
            return


def read(path: str | Path, kind: str, columns: Mapping[str, str] | None = None, limit: int = 0) -> list[Example]:
    """The first `limit` examples (0 = all). UserError at the first bad row, or if there is none."""
    examples = []
    for number, found in scan(path, kind, columns):
        if isinstance(found, Bad):
            raise UserError(f"{path}:{number}: {found}; `rlhf-fast check {path} --as {kind}` lists every such row")
        examples.append(found)
        if len(examples) == limit:
            break
    if not examples:
        raise UserError(f"{path}: the file holds no rows; expected JSON lines with {EXPECTED[kind]}")
    return examples


def must_exist(path: str | Path) -> None:
    """UserError unless `path` is a file that could hold JSON lines."""
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
    must_exist(path)
    path, number = Path(path), 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):  # noqa: B007 (the error below needs the number)
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


def _json(line: bytes) -> Mapping[str, Any]:
    try:
        row = json.loads(line.strip())
    except UnicodeDecodeError as error:
        raise Bad(f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from error
    except ValueError as error:
        detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise Bad(f"not JSON: {detail}; every line must be one JSON object") from error
    except RecursionError as error:
        raise Bad("not a row: nested too deeply") from error
    if not isinstance(row, dict):
        raise Bad(f"expected a JSON object with {' or '.join(KINDS)} fields, found {typename(row)}")
    return row


def parse(row: Mapping[str, Any], kind: str, columns: Mapping[str, str] | None = None, line: int = 0) -> Example:
    """The row as an example of `kind`. Bad if it is none."""
    row = dict(row)
    for ours, theirs in (columns or {}).items():
        if theirs not in row:
            if ours == "group":
                continue
            raise Bad(f"columns maps {ours} to {theirs!r}, which the row lacks; it has {names(row)}")
        row[ours] = row[theirs]
    group = row.get("group")
    make = {"demonstrations": _demonstration, "comparisons": _comparison, "prompts": _prompt, "texts": _text}[kind]
    return make(row)._replace(line=line, group="" if group is None else str(group))


def _demonstration(row: Mapping[str, Any]) -> Example:
    turns = conversation(row)
    if turns is not None:
        if turns[-1]["role"] != "assistant":
            raise Bad("the conversation must end with the assistant's turn, the response to learn")
        return Example(0, answerable(turns[:-1]), (turns[-1]["content"],))
    if "instruction" in row and "output" in row and "prompt" not in row:
        return Example(0, alpaca(row), (string(row, "output"),))
    if "prompt" in row and ("completion" in row or "response" in row):
        return Example(0, dialog(row, "prompt"), (answer(row, "completion" if "completion" in row else "response"),))
    raise _missing(row, "demonstrations", ("prompt", "completion"))


def _comparison(row: Mapping[str, Any]) -> Example:
    if "responses" in row or "ranks" in row:
        for name in ("prompt", "responses", "ranks"):
            if name not in row:
                raise _missing(row, "comparisons", ("prompt", "responses", "ranks"))
        return _ranked(row)
    if "chosen" not in row or "rejected" not in row:
        raise _missing(row, "comparisons", ("prompt", "chosen", "rejected"))
    if "prompt" in row:
        prompt, chosen, rejected = dialog(row, "prompt"), answer(row, "chosen"), answer(row, "rejected")
    elif isinstance(row["chosen"], list):
        prompt, chosen, rejected = common_turns(turns_of(row, "chosen"), turns_of(row, "rejected"))
    else:
        prompt, chosen, rejected = common_text(string(row, "chosen"), string(row, "rejected"))
    if chosen == rejected:
        raise Bad("chosen and rejected are equal, so there is nothing to prefer; remove the row", "equal")
    return Example(0, prompt, (chosen, rejected), (0, 1))


def _ranked(row: Mapping[str, Any]) -> Example:
    responses, ranks = row["responses"], row["ranks"]
    for name in ("responses", "ranks"):
        if not isinstance(row[name], list):
            raise Bad(f"{name} must be a list, found {typename(row[name])}")
    if len(responses) != len(ranks):
        raise Bad(f"{len(responses)} responses but {len(ranks)} ranks; each response needs one")
    texts = tuple(string({f"responses[{i}]": text}, f"responses[{i}]") for i, text in enumerate(responses))
    for i, rank in enumerate(ranks):
        if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not abs(rank) <= sys.float_info.max:
            found = textwrap.shorten(json.dumps(rank), 40, placeholder="...")
            raise Bad(f"ranks[{i}] must be a number (0 is best, equal numbers are a tie), found {found}")
    levels = sorted(set(ranks))
    if len(levels) < 2:
        raise Bad(f"{len(ranks)} responses, all of one rank: nothing is preferred; remove the row")
    rank_of: dict[str, float] = {}
    for i, (text, rank) in enumerate(zip(texts, ranks, strict=True)):
        if rank_of.setdefault(text, rank) != rank:
            first = texts.index(text)
            raise Bad(f"responses[{first}] and responses[{i}] are equal but ranked {rank_of[text]} and {rank}")
    return Example(0, dialog(row, "prompt"), texts, tuple(levels.index(rank) for rank in ranks))


def _prompt(row: Mapping[str, Any]) -> Example:
    if "prompt" in row:
        return Example(0, dialog(row, "prompt"))
    turns = conversation(row)
    if turns is not None:
        return Example(0, answerable(turns[:-1] if turns[-1]["role"] == "assistant" else turns))
    if "instruction" in row:
        return Example(0, alpaca(row))
    raise _missing(row, "prompts", ("prompt",))


def _text(row: Mapping[str, Any]) -> Example:
    if "text" not in row:
        raise _missing(row, "texts", ("text",))
    return Example(0, "", (string(row, "text"),))


def _missing(row: Mapping[str, Any], kind: str, wanted: tuple[str, ...]) -> Bad:
    """Which column is not there, and the map that would supply it."""
    lacking = [name for name in wanted if name not in row]
    mends = {}
    for name in lacking:
        near = [other for other in OTHER_NAMES.get(name, ()) if other in row and other not in wanted]
        near += difflib.get_close_matches(name, [key for key in row if key not in wanted], n=1, cutoff=0.7)
        if near:
            mends[name] = near[0]
    hint = ""
    if mends:
        hint = f"; if that is what they are, set columns: {{{', '.join(f'{k}: {v}' for k, v in mends.items())}}}"
    missing = " and ".join(f'"{name}"' for name in lacking)
    return Bad(f"no {missing} in the row; found {names(row)}; expected {EXPECTED[kind]}{hint}")
