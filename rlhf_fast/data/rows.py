"""Rows of a JSONL file as examples: the formats that are understood, and the errors of the rows that are not.

A prompt is a text or a conversation: a list of {"role", "content"} that ends with the turn to answer. The column names
are TRL's; `columns` maps others to them. The first format that fits a row is taken:

    demonstrations  messages | conversations (sharegpt) | instruction (+ input or context) + output or response (alpaca,
                    Dolly) | prompt + completion | prompt + response
    comparisons     prompt + responses + ranks (0 is best, equal is a tie) or scores (the highest is best) | prompt +
                    chosen + rejected | chosen + rejected that both begin with the prompt, as text, messages, or HH's
                    "Human: ... Assistant: ..."; the prompt may also be messages, conversations or an instruction
    prompts         prompt | messages | conversations | instruction (+ input or context); a last answer is left out
    texts           text

All but texts may also have `system`, `history` (earlier [question, answer] pairs) and `tools`. Every other column is
named, or refused if it changes the meaning of the row (columns.py).
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.data.columns import EXPECTED, Columns, missing_column, removal, require_our_names
from rlhf_fast.data.fields import (
    HH_TURN,
    Dialog,
    InvalidRow,
    Message,
    hh_turns,
    is_empty,
    json_type,
    plain_text,
    split_text,
    text_or_number,
    text_value,
)
from rlhf_fast.data.json_lines import parse_object, read_lines
from rlhf_fast.data.turns import (
    conversation,
    ending_with_user,
    split_turns,
    thought_field,
    tools_field,
    turn_value,
    turns_field,
    with_context,
)
from rlhf_fast.errors import UserError

KINDS = ("demonstrations", "comparisons", "prompts", "texts")
ANSWERS = ("completion", "response", "output")
FROM_OBJECTS = (
    "`jq -c '{prompt: .instruction, responses: [.completions[].response], scores: [.completions[].overall_score]}'`"
    " converts UltraFeedback's rows"
)


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
    unused: tuple[str, ...] = ()
    """Columns of the row and keys of its turns that are not read."""
    row: Mapping[str, Any] = {}
    """The row of a prompt as the file has it; other kinds have none."""


def scan_examples(
    path: str | Path, kind: str, columns: Mapping[str, str] | None = None, removed: Collection[str] = ()
) -> Iterator[tuple[int, Example | InvalidRow]]:
    """Yield the line number and the example, or its error, of every row that is not blank."""
    require_our_names(path, columns or {})
    return parse_lines(read_lines(path), kind, columns or {}, removed)


def parse_lines(
    lines: Iterable[tuple[int, bytes]], kind: str, columns: Mapping[str, str], removed: Collection[str] = ()
) -> Iterator[tuple[int, Example | InvalidRow]]:
    """Yield the number and the example, or its error, of every line."""
    for number, line in lines:
        yield number, _parse_line(line, kind, columns, number, removed)


def _parse_line(
    line: bytes, kind: str, columns: Mapping[str, str], number: int, removed: Collection[str]
) -> Example | InvalidRow:
    try:
        return parse_row(parse_object(line), kind, columns, number, removed)
    except InvalidRow as error:
        return error


def read_examples(
    path: str | Path,
    kind: str,
    columns: Mapping[str, str] | None = None,
    limit: int = 0,
    removed: Collection[str] = (),
) -> list[Example]:
    """Return the first `limit` examples (0 = all). UserError at the first invalid row, or if there is no row."""
    examples = []
    for number, found in scan_examples(path, kind, columns, removed):
        if isinstance(found, InvalidRow):
            raise UserError(f"{path}:{number}: {found}; `rlhf-fast check {path} --as {kind}` lists every such row")
        examples.append(found)
        if len(examples) == limit:
            break
    if not examples:
        raise UserError(f"{path}: the file holds no rows; expected JSON lines with {EXPECTED[kind]}")
    return examples


def parse_row(
    row: Mapping[str, Any],
    kind: str,
    columns: Mapping[str, str] | None = None,
    line: int = 0,
    removed: Collection[str] = (),
) -> Example:
    """Return the row as an example of `kind`. InvalidRow if it is none."""
    found = Columns(row, columns or {}, removed, kind)
    parsers = {"demonstrations": _demonstration, "comparisons": _comparison, "prompts": _prompt, "texts": _text}
    example = parsers[kind](found)
    group = found.get("group")
    tools = tools_field(found) if kind != "texts" else ()
    texts = [example.prompt] if isinstance(example.prompt, str) else [turn["content"] for turn in example.prompt]
    found.require_meaning(texts)
    group = "" if group is None else str(group)
    example = example._replace(line=line, group=group, tools=tools, unused=found.unused())
    return example._replace(row=row) if kind == "prompts" else example


def _demonstration(row: Columns) -> Example:
    turns = conversation(row, weights=True)
    if turns is not None:
        if turns[-1]["role"] != "assistant":
            raise InvalidRow("the conversation must end with the assistant's turn, the response to learn")
        _require_same_answer(row, turns)
        return _learned([*with_context(row, ending_with_user(turns[:-1])), turns[-1]])
    if "prompt" in row and ("completion" in row or "response" in row):
        prompt = _prompt_field(row)
        if isinstance(prompt, list):  # only the completion is learned
            prompt = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in prompt]
    elif "instruction" in row and "prompt" not in row and any(name in row for name in ANSWERS):
        prompt = _instruction(row)
    else:
        raise missing_column(row, "demonstrations", ("prompt", "completion"))
    answer = _answer(row)
    prompt = with_context(row, prompt)
    if row.filled("history") or answer.keys() - {"role", "content", "weight"}:
        turns = prompt if isinstance(prompt, list) else hh_turns(prompt) or [{"role": "user", "content": prompt}]
        return _learned([*turns, answer])
    _require_weight([answer])
    return Example(0, prompt, (answer["content"],))


def _answer(row: Columns) -> Message:
    """Return the response of a demonstration as a turn. InvalidRow if the row gives two different ones."""
    names = ["completion"] if "completion" in row.columns else [name for name in ANSWERS if name in row]
    name = next(filter(row.filled, names), names[0])
    for other in names if len(names) > 1 else ():
        if row.filled(other) and row[other] != row[name]:
            raise InvalidRow(f"{name} and {other} differ, and only one can be the response; {removal(other)}")
    given = _transcript(row, name, weights=True)
    answer = {"role": "assistant", "content": given} if isinstance(given, str) else _one_answer(given, name)
    thought = thought_field(row)
    if thought and answer.get("reasoning_content", thought) != thought:
        raise InvalidRow(f"{name} has another reasoning_content than the row, and an answer has one thought")
    return answer | {"reasoning_content": thought} if thought else answer


def _require_same_answer(row: Columns, turns: Iterable[Message]) -> None:
    """Raise InvalidRow if a conversation stands beside a response that is none of its answers."""
    answers = [turn["content"].strip() for turn in turns if turn["role"] == "assistant"]
    for name in ANSWERS if "messages" not in row.columns else ():
        value = row.get(name)
        if not is_empty(value) and not (isinstance(value, str) and value.strip() in answers):
            raise InvalidRow(f"{name} is no answer of the conversation, and only one can be learned; {removal(name)}")


def _learned(turns: list[Message]) -> Example:
    """Return the demonstration that a conversation is. InvalidRow if none of its turns has a loss."""
    _require_weight(turns)
    return Example(0, turns[:-1], (turns[-1]["content"],), conversation=tuple(turns))


def _require_weight(turns: Iterable[Message]) -> None:
    if all(turn.get("weight") == 0 for turn in turns if turn["role"] == "assistant"):
        raise InvalidRow("every answer has weight 0, so nothing is learned from the row; remove it")


def _comparison(row: Columns) -> Example:
    if "responses" in row or "ranks" in row:
        return _ranked(row)
    if _has_objects(row.get("completions")):
        raise InvalidRow(f"completions[0] must be text, found an object; {FROM_OBJECTS}")
    if "chosen" not in row or "rejected" not in row:
        raise missing_column(row, "comparisons", ("prompt", "chosen", "rejected"))
    chosen, rejected = (_transcript(row, name) for name in ("chosen", "rejected"))
    given = None
    if not any(isinstance(transcript, list) and len(transcript) > 1 for transcript in (chosen, rejected)):
        given = _given_prompt(row)
    if given is not None:
        prompt, better, worse = given, _answer_text(chosen, "chosen"), _answer_text(rejected, "rejected")
    elif isinstance(chosen, list) and isinstance(rejected, list):
        prompt, *last = split_turns(chosen, rejected)
        better, worse = (_answer_text([turn], name) for turn, name in zip(last, ("chosen", "rejected"), strict=True))
    elif isinstance(chosen, str) and isinstance(rejected, str):
        other = row.other_text()
        if other and not (HH_TURN.match(chosen) and HH_TURN.match(rejected)):
            raise InvalidRow(
                f'no "prompt" in the row, but {other}; if that is the prompt, set columns: {{prompt: {other}}};'
                f" {removal(other)}"
            )
        prompt, better, worse = split_text(chosen, rejected)
    else:
        raise InvalidRow(
            f"chosen is {json_type(row['chosen'])}, rejected {json_type(row['rejected'])}; give both alike"
        )
    if better == worse:
        raise InvalidRow("chosen and rejected are equal, so there is nothing to prefer; remove the row", "equal")
    return Example(0, with_context(row, prompt), (better, worse), (0, 1))


def _ranked(row: Columns) -> Example:
    levels_name = "scores" if "scores" in row and "ranks" not in row else "ranks"
    prompt = _given_prompt(row)
    if prompt is None or "responses" not in row or levels_name not in row:
        raise missing_column(row, "comparisons", ("prompt", "responses", "ranks"))
    responses, ranks = row["responses"], row[levels_name]
    for name in ("responses", levels_name):
        if not isinstance(row[name], list):
            raise InvalidRow(f"{name} must be a list, found {json_type(row[name])}")
    if _has_objects(responses):
        raise InvalidRow(f"responses[0] must be text, found an object; {FROM_OBJECTS}")
    if len(responses) != len(ranks):
        raise InvalidRow(f"{len(responses)} responses but {len(ranks)} {levels_name}; each response needs one")
    texts = tuple(text_value(text, f"responses[{i}]") for i, text in enumerate(responses))
    for i, rank in enumerate(ranks):
        if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not abs(rank) <= sys.float_info.max:
            found = textwrap.shorten(json.dumps(rank), 40, placeholder="...")
            best = "0 is best" if levels_name == "ranks" else "the highest is best"
            raise InvalidRow(f"{levels_name}[{i}] must be a number ({best}, equal numbers are a tie), found {found}")
    levels = sorted(set(ranks), reverse=levels_name == "scores")
    if len(levels) < 2:
        raise InvalidRow(f"{len(ranks)} responses, all of one rank: nothing is preferred; remove the row")
    if levels_name == "ranks" and row.filled("scores"):
        _require_same_order(ranks, row["scores"])
    rank_of: dict[str, float] = {}
    for i, (text, rank) in enumerate(zip(texts, ranks, strict=True)):
        if rank_of.setdefault(text, rank) != rank:
            first = texts.index(text)
            raise InvalidRow(f"responses[{first}] and responses[{i}] are equal but ranked {rank_of[text]} and {rank}")
    return Example(0, with_context(row, prompt), texts, tuple(levels.index(rank) for rank in ranks))


def _require_same_order(ranks: list[float], scores: object) -> None:
    """Raise InvalidRow if scores beside ranks order two responses the other way, or cannot be compared."""
    numbers = [score for score in scores if isinstance(score, (int, float))] if isinstance(scores, list) else []
    if len(numbers) != len(ranks):
        raise InvalidRow(f"scores beside ranks must be a list of {len(ranks)} numbers; {removal('scores')}")
    for (i, (rank, score)), (j, (other, lower)) in combinations(enumerate(zip(ranks, numbers, strict=True)), 2):
        if (rank < other and score < lower) or (rank > other and score > lower):
            raise InvalidRow(
                f"ranks and scores contradict each other: responses[{i}] has rank {rank} and score {score},"
                f" responses[{j}] rank {other} and score {lower} (rank 0 is best, the highest score is best);"
                f" {removal('scores')}"
            )


def _has_objects(responses: object) -> bool:
    """Return whether responses are objects with a "response" each, as UltraFeedback's."""
    return isinstance(responses, list) and any(isinstance(entry, dict) and "response" in entry for entry in responses)


def _prompt(row: Columns) -> Example:
    turns = conversation(row)
    if "prompt" in row:
        prompt = _prompt_field(row)
        if turns is not None:
            prompt = _up_to(prompt, turns)
    elif turns is not None:
        prompt = ending_with_user(turns[:-1] if turns[-1]["role"] == "assistant" else turns)
    elif "instruction" in row:
        prompt = _instruction(row)
    else:
        raise missing_column(row, "prompts", ("prompt",))
    return Example(0, with_context(row, prompt))


def _up_to(prompt: Dialog, turns: list[Message]) -> Dialog:
    """Return the turns of a conversation up to the one that `prompt` repeats."""
    last = prompt[-1]["content"] if isinstance(prompt, list) else prompt
    for i, turn in enumerate(turns):
        if turn["role"] == "user" and turn["content"].strip() == last.strip():
            return turns[: i + 1] if i else prompt
    raise InvalidRow(
        f"prompt is no user's turn of the conversation, and only one can be the prompt; {removal('prompt')}"
    )


def _text(row: Columns) -> Example:
    if "text" not in row:
        raise missing_column(row, "texts", ("text",))
    return Example(0, "", (text_value(row["text"], "text"),))


def _given_prompt(row: Columns) -> Dialog | None:
    """Return the prompt that a column of its own gives, or None."""
    if "prompt" in row:
        return _prompt_field(row)
    turns = conversation(row)
    if turns is not None:
        return ending_with_user(turns)
    return _instruction(row) if "instruction" in row else None


def _prompt_field(row: Columns) -> Dialog:
    if isinstance(row["prompt"], list):
        return ending_with_user(turns_field(row, "prompt"))
    return plain_text(row["prompt"], "prompt")


def _instruction(row: Columns) -> str:
    """Return the prompt of an alpaca or Dolly row: the instruction, and the input or context below it."""
    instruction = text_value(row["instruction"], "instruction")
    for name in ("input", "context"):
        value = row.get(name)
        if value is not None and not (isinstance(value, str) and not value.strip()):
            return f"{instruction}\n\n{text_or_number(value, name)}"
    return instruction


def _transcript(row: Columns, name: str, weights: bool = False) -> str | list[Message]:
    """Return a response, or a conversation that ends with one: a text, one turn as an object, or a list of turns."""
    if isinstance(row[name], dict):
        return [turn_value(row, row[name], name, weights)]
    return turns_field(row, name, weights) if isinstance(row[name], list) else plain_text(row[name], name)


def _one_answer(turns: list[Message], name: str) -> Message:
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise InvalidRow(f"{name} must be one turn of the assistant, because the prompt has a column of its own")
    return turns[0]


def _answer_text(transcript: str | list[Message], name: str) -> str:
    """Return a response of a comparison. InvalidRow for calls of tools and thoughts, which are no part of its text."""
    if isinstance(transcript, str):
        return transcript
    answer = _one_answer(transcript, name)
    for key in answer.keys() - {"role", "content"}:
        raise InvalidRow(f"{name} has {key}, which no comparison can have; write it into the content")
    return answer["content"]
