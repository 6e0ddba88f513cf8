"""Fields of a row: texts and conversations, and the prompt that two transcripts share."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

Message = dict[str, str]
Dialog = str | list[Message]

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Bad(ValueError):
    """What is wrong with one row and how to mend it, without the place. `sort` is for counting: null, empty, equal."""

    def __init__(self, text: str, sort: str = "other"):
        super().__init__(text)
        self.sort = sort


def names(row: Mapping[str, Any]) -> str:
    """The columns of a row, for messages."""
    return ", ".join(row) or "no columns"


def typename(value: object) -> str:
    """What JSON calls this kind of value, for messages."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def string(row: Mapping[str, Any], name: str) -> str:
    """A text that says something. Bad for null, another type, blanks, or half a surrogate pair."""
    value = row[name]
    if value is None:
        raise Bad(f"{name} is null; give a text or remove the row", "null")
    if not isinstance(value, str):
        raise Bad(f"{name} must be text, found {typename(value)}")
    if not value.strip():
        raise Bad(f"{name} is empty; give a text or remove the row", "empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Bad(f"{name} holds half a surrogate pair at character {error.start + 1}, which is no text") from error
    return value


def alpaca(row: Mapping[str, Any]) -> str:
    """The prompt of an alpaca row: the instruction, and the input below it."""
    instruction, given = string(row, "instruction"), row.get("input")
    return f"{instruction}\n\n{given}" if isinstance(given, str) and given.strip() else instruction


def conversation(row: Mapping[str, Any]) -> list[Message] | None:
    """The turns of a `messages` or sharegpt row."""
    for name in ("messages", "conversations"):
        if name in row:
            return turns_of(row, name)
    return None


def turns_of(row: Mapping[str, Any], name: str) -> list[Message]:
    """The turns of a list of messages, in our form; sharegpt's from and value are understood."""
    value = row[name]
    if not isinstance(value, list) or not value:
        raise Bad(f"{name} must be a list of turns, found {typename(value) if value != [] else 'an empty list'}")
    turns = []
    for i, turn in enumerate(value):
        place = f"{name}[{i}]"
        if not isinstance(turn, dict):
            raise Bad(f'{place} must be an object with "role" and "content", found {typename(turn)}')
        role, content = ("from", "value") if "from" in turn else ("role", "content")
        for key in (role, content):
            if key not in turn:
                raise Bad(f'{place} has no "{key}"; found {names(turn)}')
        speaker = _SPEAKERS.get(turn[role]) if isinstance(turn[role], str) else None
        if speaker is None:
            raise Bad(f"{place}.{role} must be system, user or assistant, found {json.dumps(turn[role])}")
        text = string({f"{place}.{content}": turn[content]}, f"{place}.{content}")
        turns.append({"role": speaker, "content": text})
    return turns


def answerable(turns: list[Message]) -> list[Message]:
    """The turns, if a response may follow them."""
    if not turns or turns[-1]["role"] != "user":
        raise Bad("the conversation needs a user's turn before the response")
    return turns


def dialog(row: Mapping[str, Any], name: str) -> Dialog:
    """A prompt: text or turns."""
    return answerable(turns_of(row, name)) if isinstance(row[name], list) else string(row, name)


def answer(row: Mapping[str, Any], name: str) -> str:
    """A response: text, or a list with the assistant's one turn."""
    if not isinstance(row[name], list):
        return string(row, name)
    turns = turns_of(row, name)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise Bad(f"{name} must be one turn of the assistant, because the prompt has a column of its own")
    return turns[0]["content"]


def common_turns(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], str, str]:
    """The turns both begin with, then the one in which they differ."""
    if chosen[:-1] != rejected[:-1] or chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Bad("chosen and rejected must be one conversation with two last turns of the assistant")
    return answerable(chosen[:-1]), chosen[-1]["content"], rejected[-1]["content"]


def common_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The prompt is what both begin with, up to the last "Assistant:" (HH) or else to the end of a word."""
    if chosen == rejected:
        raise Bad("chosen and rejected are equal, so there is nothing to prefer; remove the row", "equal")
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    same = min(len(chosen), len(rejected)) if same is None else same
    answers = [turn.end() for turn in _TURN.finditer(chosen[:same]) if turn[1] == "Assistant"]
    cut = answers[-1] if answers else max(chosen.rfind(space, 0, same) for space in " \n\t")
    if cut <= 0 or not chosen[:cut].strip():
        raise Bad('no "prompt" in the row, and chosen and rejected do not begin alike')
    if not chosen[cut:].strip() or not rejected[cut:].strip():
        raise Bad("one of chosen and rejected is empty behind the prompt they share", "empty")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def hh_turns(prompt: str) -> list[Message] | None:
    """The turns of a prompt written as HH's "Human: ... Assistant:"; None if it is not."""
    marks = list(_TURN.finditer(prompt))
    if not marks or marks[0][1] != "Human" or prompt[: marks[0].start()].strip() or marks[-1][1] != "Assistant":
        return None
    if prompt[marks[-1].end() :].strip() or len(marks) < 2 or marks[-2][1] != "Human":
        return None
    ends = [mark.start() for mark in marks[1:]]
    contents = [prompt[mark.end() : end].strip() for mark, end in zip(marks[:-1], ends, strict=True)]
    return [{"role": _SPEAKERS[m[1].lower()], "content": c} for m, c in zip(marks[:-1], contents, strict=True)]
