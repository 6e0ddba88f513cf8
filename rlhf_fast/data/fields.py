"""Fields of a row: texts and conversations, and the prompt that two transcripts share."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

Message = dict[str, Any]
"""A turn: `role` and `content`, and where the row gives them `weight` (0 = no loss on this turn), `tool_calls`,
`reasoning_content`, `name` and `tool_call_id`, as transformers' chat templates read them."""
Dialog = str | list[Message]
"""A prompt: a text, or a conversation whose last turn is the one to answer."""

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class InvalidRow(ValueError):
    """The fault of one row and its remedy, without file and line. `category` (null, empty, equal, other) is counted."""

    def __init__(self, text: str, category: str = "other"):
        super().__init__(text)
        self.category = category


def column_names(row: Mapping[str, Any]) -> str:
    """Return the columns of a row, for messages."""
    return ", ".join(row) or "no columns"


def json_type(value: object) -> str:
    """Return JSON's name for the type of a value, for messages."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def text_field(row: Mapping[str, Any], name: str) -> str:
    """Return a text. InvalidRow for null, another type, blanks, and half a surrogate pair."""
    value = row[name]
    if value is None:
        raise InvalidRow(f"{name} is null; give a text or remove the row", "null")
    if not isinstance(value, str):
        raise InvalidRow(f"{name} must be text, found {json_type(value)}")
    if not value.strip():
        raise InvalidRow(f"{name} is empty; give a text or remove the row", "empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRow(
            f"{name} holds half a surrogate pair at character {error.start + 1}, which is no text"
        ) from error
    return value


def alpaca_prompt(row: Mapping[str, Any]) -> str:
    """Return the prompt of an alpaca row: the instruction, and the input below it."""
    instruction, context = text_field(row, "instruction"), row.get("input")
    return f"{instruction}\n\n{context}" if isinstance(context, str) and context.strip() else instruction


def conversation(row: Mapping[str, Any]) -> list[Message] | None:
    """Return the turns of a `messages` or sharegpt row; None if it is neither."""
    for name in ("messages", "conversations"):
        if name in row:
            return turns_field(row, name)
    return None


def turns_field(row: Mapping[str, Any], name: str) -> list[Message]:
    """Return a list of messages with our roles. Sharegpt's keys `from` and `value` are understood."""
    value = row[name]
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else json_type(value)
        raise InvalidRow(f"{name} must be a list of turns, found {found}")
    turns = []
    for i, turn in enumerate(value):
        turn_name = f"{name}[{i}]"
        if not isinstance(turn, dict):
            raise InvalidRow(f'{turn_name} must be an object with "role" and "content", found {json_type(turn)}')
        role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
        for key in (role_key, content_key):
            if key not in turn:
                raise InvalidRow(f'{turn_name} has no "{key}"; found {column_names(turn)}')
        role = ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            found = json.dumps(turn[role_key])
            raise InvalidRow(f"{turn_name}.{role_key} must be system, user or assistant, found {found}")
        content_name = f"{turn_name}.{content_key}"
        turns.append({"role": role, "content": text_field({content_name: turn[content_key]}, content_name)})
    return turns


def ending_with_user(turns: list[Message]) -> list[Message]:
    """Return `turns`. InvalidRow unless the last one is the user's, so that a response may follow."""
    if not turns or turns[-1]["role"] != "user":
        raise InvalidRow("the conversation needs a user's turn before the response")
    return turns


def prompt_field(row: Mapping[str, Any], name: str) -> Dialog:
    return ending_with_user(turns_field(row, name)) if isinstance(row[name], list) else text_field(row, name)


def response_field(row: Mapping[str, Any], name: str) -> str:
    """Return a response from a text, or from a list with one turn of the assistant."""
    if not isinstance(row[name], list):
        return text_field(row, name)
    turns = turns_field(row, name)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise InvalidRow(f"{name} must be one turn of the assistant, because the prompt has a column of its own")
    return turns[0]["content"]


def split_turns(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], str, str]:
    """Return the turns that both conversations share, and the last turn of each."""
    if chosen[:-1] != rejected[:-1] or chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise InvalidRow("chosen and rejected must be one conversation with two last turns of the assistant")
    return ending_with_user(chosen[:-1]), chosen[-1]["content"], rejected[-1]["content"]


def split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Return the prompt that both texts begin with, and the rest of each.

    The prompt ends after the last common "Assistant:" (HH), else at the end of the last common word.
    """
    if chosen == rejected:
        raise InvalidRow("chosen and rejected are equal, so there is nothing to prefer; remove the row", "equal")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    common = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    assistant_ends = [turn.end() for turn in HH_TURN.finditer(chosen[:common]) if turn[1] == "Assistant"]
    end = assistant_ends[-1] if assistant_ends else max(chosen.rfind(space, 0, common) for space in " \n\t")
    if end <= 0 or not chosen[:end].strip():
        raise InvalidRow('no "prompt" in the row, and chosen and rejected do not begin alike')
    if not chosen[end:].strip() or not rejected[end:].strip():
        raise InvalidRow("one of chosen and rejected is empty behind the prompt they share", "empty")
    return chosen[:end], chosen[end:], rejected[end:]


def hh_turns(prompt: str) -> list[Message] | None:
    """Return the turns of a prompt in HH's form, "Human: ... Assistant:"; None for another text."""
    heads = list(HH_TURN.finditer(prompt))
    speakers = [head[1] for head in heads]
    if len(heads) < 2 or speakers[0] != "Human" or speakers[-2:] != ["Human", "Assistant"]:
        return None
    if prompt[: heads[0].start()].strip() or prompt[heads[-1].end() :].strip():
        return None
    turns = []
    for head, following in pairwise(heads):
        turns.append({"role": ROLES[head[1].lower()], "content": prompt[head.end() : following.start()].strip()})
    return turns
