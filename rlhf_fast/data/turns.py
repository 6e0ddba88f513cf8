"""Conversations: turns in the roles and keys of transformers' chat templates, their weights, tools, system, history."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_fast.data.columns import Columns
from rlhf_fast.data.fields import Dialog, InvalidRow, Message, column_names, hh_turns, is_empty, json_type, text_value
from rlhf_fast.data.json_lines import parse_json
from rlhf_fast.data.meaning import THOUGHTS

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
OTHER_ROLES = {
    "assistant": ("bot", "model", "ai", "chatbot", "chatgpt", "gpt-4", "bard", "bing", "claude", "agent", "response"),
    "user": ("customer", "client", "prompter", "question", "instruction", "inquirer"),
    "system": ("instructions", "context", "system_prompt"),
}
"""Names of roles elsewhere, which are not read, to suggest ours."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of the parts of a content that are text."""
LOSS_FLAGS = ("weight", "loss", "loss_weight", "train", "training", "masked")
"""Keys of a turn that say whether it has a loss; `masked` says that it has none."""


def conversation(row: Columns, weights: bool = False) -> list[Message] | None:
    """Return the turns of a `messages` or sharegpt row; None if it is neither."""
    for name in ("messages", "conversations"):
        if name in row:
            return turns_field(row, name, weights)
    return None


def turns_field(row: Columns, name: str, weights: bool = False) -> list[Message]:
    """Return a list of messages with our roles. Sharegpt's keys `from` and `value` are understood.

    weights: read whether a turn has a loss, which only a demonstration can use.
    """
    value = row[name]
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else json_type(value)
        raise InvalidRow(f"{name} must be a list of turns, found {found}")
    return [turn_value(row, turn, f"{name}[{i}]", weights) for i, turn in enumerate(value)]


def turn_value(row: Columns, turn: object, name: str, weights: bool = False) -> Message:
    """Return one turn. Keys that are not read are left to `row`."""
    if not isinstance(turn, dict):
        raise InvalidRow(f'{name} must be an object with "role" and "content", found {json_type(turn)}')
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    calls_tools = not is_empty(turn.get("tool_calls"))
    for key in (role_key, content_key) if not calls_tools else (role_key,):
        if key not in turn:
            raise InvalidRow(f'{name} has no "{key}"; found {column_names(turn)}')
    turn = row.kept_keys(name, turn)
    given = turn[role_key]
    role = ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        raise InvalidRow(
            f"{name}.{role_key} must be system, user, assistant or tool, found {json.dumps(given)}{_role_hint(given)}"
        )
    message: Message = {"role": role}
    content = turn.get(content_key)
    may_be_empty = (role == "assistant" and calls_tools and is_empty(content)) or (role == "tool" and content == "")
    message["content"] = "" if may_be_empty else _content(row, content, f"{name}.{content_key}")
    read = {role_key, content_key}
    if role == "assistant":
        read |= _read_answer(turn, name, message)
    elif role == "tool":
        for key in ("name", "tool_call_id"):
            if not is_empty(turn.get(key)):
                message[key] = text_value(turn[key], f"{name}.{key}")
                read.add(key)
    if weights:
        read |= _read_weight(turn, name, message)
    for key in turn.keys() - read:
        repeats = turn[key] == message["content"] or (key == "role" and ROLES.get(str(turn[key]).lower()) == role)
        row.leave_key(name, key, None if repeats else turn[key])
    return message


def _role_hint(given: object) -> str:
    """Return the remedy for a role of another name."""
    if given == "function_call":
        return "; give the call as tool_calls of an assistant's turn"
    name = given.lower() if isinstance(given, str) else ""
    ours = next((ours for ours, names in OTHER_ROLES.items() if name in names), "")
    return f"; if that is the {ours}, write {ours} instead" if ours else "; rename it"


def _content(row: Columns, value: object, name: str) -> str:
    """Return a content: a text, or a list of parts that are all text."""
    if not isinstance(value, list):
        return text_value(value, name)
    texts = []
    for i, part in enumerate(value):
        if isinstance(part, dict) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
            for key in part.keys() - {"type", "text"}:
                row.leave_key(f"{name}[{i}]", key, part[key])
        elif isinstance(part, str):
            texts.append(part)
        else:
            found = part.get("type", column_names(part)) if isinstance(part, dict) else json_type(part)
            raise InvalidRow(f"{name}[{i}] must be text, found {found}; only text can be trained on")
    return text_value("".join(texts), name)


def _read_answer(turn: Mapping[str, Any], name: str, message: Message) -> set[str]:
    """Read the keys that only an assistant's turn has. Return those that were read."""
    read = set()
    if thought := thought_field(turn, name):
        message["reasoning_content"] = thought
        read |= {key for key in THOUGHTS if turn.get(key) == thought}
    if not is_empty(turn.get("tool_calls")):
        message["tool_calls"] = _functions(turn["tool_calls"], f"{name}.tool_calls", "arguments")
        read.add("tool_calls")
    return read


def thought_field(fields: Mapping[str, Any], path: str = "") -> str:
    """Return the thought of an answer, "" if it has none. InvalidRow if two names give different ones."""
    found = {key: fields[key] for key in THOUGHTS if isinstance(fields.get(key), str) and not is_empty(fields[key])}
    if len(set(found.values())) > 1:
        raise InvalidRow(f"{path or 'the row'}: {' and '.join(found)} differ, and an answer has one thought")
    return next((text_value(text, f"{path}.{key}" if path else key) for key, text in found.items()), "")


def _read_weight(turn: Mapping[str, Any], name: str, message: Message) -> set[str]:
    """Read whether a turn has a loss: `weight` 0 or 1, or the flags of other tools. Return the keys that were read."""
    found: dict[str, int] = {}
    for key in LOSS_FLAGS:
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise InvalidRow(
                f"{name}.{key} must be 0 or 1, found {json.dumps(value)}; a turn has a loss or it has none"
            )
        found[key] = int(not value if key == "masked" else value)
    if len(set(found.values())) > 1:
        raise InvalidRow(f"{name}: {' and '.join(found)} contradict each other")
    for key, weight in found.items():
        if weight and message["role"] != "assistant":
            raise InvalidRow(
                f"{name}.{key} asks for a loss on a turn of the {message['role']}; only the assistant's have one"
            )
        message["weight"] = weight
    return set(found)


def _functions(value: object, name: str, content: str) -> list[dict[str, Any]]:
    """Return tools or calls of tools in OpenAI's form, {"type": "function", "function": {"name", ...}}.

    Arguments that are JSON as text become the object that templates of transformers expect.
    """
    if isinstance(value, str):
        value = _json_text(value, name)
    if not isinstance(value, list):
        raise InvalidRow(f"{name} must be a list, found {json_type(value)}")
    functions = []
    for i, entry in enumerate(value):
        if isinstance(entry, str):
            entry = _json_text(entry, f"{name}[{i}]")
        function = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            found = column_names(entry) if isinstance(entry, dict) else json_type(entry)
            raise InvalidRow(f"{name}[{i}] must be a function with a name and {content}, found {found}")
        if isinstance(function.get(content), str):
            function = function | {content: _json_text(function[content], f"{name}[{i}].{content}")}
        outer = entry if "function" in entry else {}
        functions.append({"type": "function"} | outer | {"function": function})
    return functions


def _json_text(text: str, name: str) -> Any:
    try:
        return parse_json(text)
    except InvalidRow as error:
        raise InvalidRow(f"{name} must be JSON: {error}") from error


def tools_field(row: Columns) -> tuple[dict[str, Any], ...]:
    """Return the tools of a row: a list, or the same as JSON text."""
    return tuple(_functions(row["tools"], "tools", "parameters")) if row.filled("tools") else ()


def with_context(row: Columns, dialog: Dialog) -> Dialog:
    """Return a prompt with the row's `system` and `history` before it. Without them it stays as it is."""
    system = text_value(row["system"], "system") if row.filled("system") else ""
    history = _history(row) if row.filled("history") else []
    if not system and not history:
        return dialog
    turns = dialog if isinstance(dialog, list) else hh_turns(dialog) or [{"role": "user", "content": dialog}]
    if turns[0]["role"] == "system":
        if system and system != turns[0]["content"]:
            raise InvalidRow("system and the conversation's own turn of the system differ; keep one of them")
        system, turns = turns[0]["content"], turns[1:]
    if history and len(turns) > 1:
        raise InvalidRow("history stands beside a conversation of several turns; give all turns in one column")
    return [*([{"role": "system", "content": system}] if system else []), *history, *turns]


def _history(row: Columns) -> list[Message]:
    """Return the earlier turns of a row: a list of [question, answer], or of turns."""
    value = row["history"]
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return turns_field(row, "history", weights=row.kind == "demonstrations")
    turns: list[Message] = []
    for i, pair in enumerate(value if isinstance(value, list) else [value]):
        name = f"history[{i}]" if isinstance(value, list) else "history"
        if not isinstance(pair, list) or len(pair) != 2:
            found = f"a list of {len(pair)}" if isinstance(pair, list) else json_type(pair)
            raise InvalidRow(f"{name} must be a list of [question, answer], found {found}")
        for j, role in enumerate(("user", "assistant")):
            turns.append({"role": role, "content": text_value(pair[j], f"{name}[{j}]")})
    return turns


def ending_with_user(turns: Sequence[Message]) -> list[Message]:
    """Return `turns`. InvalidRow unless the last one is the user's or a tool's, so that a response may follow."""
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise InvalidRow("the conversation needs a user's turn before the response")
    return list(turns)


def split_turns(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], Message, Message]:
    """Return the turns that both conversations share, and the last turn of each."""
    if chosen[:-1] != rejected[:-1] or chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise InvalidRow("chosen and rejected must be one conversation with two last turns of the assistant")
    return ending_with_user(chosen[:-1]), chosen[-1], rejected[-1]
