"""Fields of a row: texts, and the prompt that two transcripts share."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

Message = dict[str, Any]
"""A turn: `role` and `content`, and where the row gives them `weight` (0 = no loss on this turn), `tool_calls`,
`reasoning_content`, `name` and `tool_call_id`, as transformers' chat templates read them."""
Dialog = str | list[Message]
"""A prompt: a text, or a conversation whose last turn is the one to answer."""

HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
TURNS_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content|from|value)\1\s*:""")
INVISIBLE = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and symbols that are drawn as nothing: Hangul fillers and the empty Braille pattern."""


class InvalidRow(ValueError):
    """The fault of one row and its remedy, without file and line. `category` (null, empty, equal, other) is counted."""

    def __init__(self, text: str, category: str = "other"):
        super().__init__(text)
        self.category = category


def column_names(row: Mapping[str, Any]) -> str:
    """Return the columns of a row, for messages."""
    return ", ".join(map(shown, row)) or "no columns"


def shown(name: str) -> str:
    """Return the name of a column or key as it can be printed."""
    return name if name.strip() and name.isprintable() else json.dumps(name)


def json_type(value: object) -> str:
    """Return JSON's name for the type of a value, for messages."""
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN or infinity, which is no JSON"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def is_empty(value: object) -> bool:
    """Return whether a value holds nothing: null, blanks, no entries."""
    return value is None or (
        isinstance(value, (str, list, dict)) and not (value.strip() if isinstance(value, str) else value)
    )


def is_blank(text: str) -> bool:
    """Return whether no character of a text can be seen: spaces, zero-width and other format characters."""
    for char in text:
        if not char.isspace() and char not in INVISIBLE and unicodedata.category(char) not in ("Cc", "Cf"):
            return False
    return True


def text_value(value: object, name: str) -> str:
    """Return a text. InvalidRow for null, another type, blanks, and half a surrogate pair."""
    if value is None:
        raise InvalidRow(f"{name} is null; give a text or remove the row", "null")
    if not isinstance(value, str):
        raise InvalidRow(f"{name} must be text, found {json_type(value)}")
    if not value.strip():
        raise InvalidRow(f"{name} is empty; give a text or remove the row", "empty")
    if is_blank(value):
        raise InvalidRow(f"{name} holds only characters that cannot be seen; give a text or remove the row", "empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRow(
            f"{name} holds half a surrogate pair at character {error.start + 1}, which is no text"
        ) from error
    return value


def plain_text(value: object, name: str) -> str:
    """Return a text. InvalidRow also for turns that were written as text, in JSON or as Python shows them."""
    text = text_value(value, name)
    if TURNS_AS_TEXT.match(text) and text.rstrip().endswith("]"):
        raise InvalidRow(f"{name} is text that spells a list of turns; give the list itself, or bare text")
    return text


def text_or_number(value: object, name: str) -> str:
    """Return a text, or a number as its text."""
    if isinstance(value, int | float) and not isinstance(value, bool) and json_type(value) == "a number":
        return str(value)
    if isinstance(value, (list, dict)):
        raise InvalidRow(
            f"{name} must be text, found {json_type(value)}; write it as the text that the model shall read"
        )
    return text_value(value, name)


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
        role = "user" if head[1] == "Human" else "assistant"
        turns.append({"role": role, "content": prompt[head.end() : following.start()].strip()})
    return turns
