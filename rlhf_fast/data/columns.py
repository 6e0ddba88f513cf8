"""Columns of a row under our names, and the rule for those that no format reads.

A column or key that is not read is named. One that would change the meaning of the row is refused, unless its text is
in the prompt already or `remove_columns` names it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

from rlhf_fast.data.fields import InvalidRow, column_names, is_empty, shown
from rlhf_fast.errors import UserError

COLUMNS = (
    *("prompt", "completion", "messages", "chosen", "rejected", "responses", "ranks", "scores", "text", "group"),
    *("instruction", "context", "system", "history", "tools"),
)
OPTIONAL = ("group", "context", "system", "history", "tools")
"""Columns that may be mapped although some rows lack them."""
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

MEDIA = re.compile(
    r"(image|audio|video|pixel|attachment)s?(_?(url|path|file|byte|data|value|content)s?)?", re.IGNORECASE
)
IN_PROMPT = "write it into the prompt"
BELOW_PROMPT = "write it into the prompt, or set columns: {instruction: prompt} to put it below"
# Columns that change the meaning of a conversation, and the remedy.
MEANING = {
    **dict.fromkeys(("prompt", "instruction", "question", "query", "documents", "prefix", "suffix"), IN_PROMPT),
    **dict.fromkeys(("passage", "passages", "document", "article", "background", "knowledge"), IN_PROMPT),
    **dict.fromkeys(("choices", "options", "persona"), IN_PROMPT),
    **dict.fromkeys(("context", "input"), BELOW_PROMPT),
    **dict.fromkeys(("system", "history"), "give it as turns of a conversation"),
    **{name: f"set columns: {{system: {name}}}" for name in ("system_prompt", "system_message")},
    **dict.fromkeys(
        ("messages", "conversations", "conversation", "dialog", "dialogue"), "give the whole conversation in one column"
    ),
    "tools": "give it beside a conversation",
    "functions": "give it as tools",
    **dict.fromkeys(("function_call", "function_calls", "tool_calls", "reasoning_content"), "give it in messages"),
}
MASKS = ("mask", "loss_mask", "loss_scale", "train_detail")
# Keys of a turn that change its meaning, and the remedy. Formats that understand a key read it before.
TURN_MEANING = {
    "name": "write who speaks into the content",
    **dict.fromkeys(("function_call", "function_calls"), "give it as tool_calls"),
    **dict.fromkeys(("tools", "functions"), "give them as the row's tools"),
    **dict.fromkeys(("tool_calls", "reasoning_content"), "only the turns of a demonstration or a prompt can have it"),
    **dict.fromkeys(("reasoning", "thinking", "reasoning_details"), "give it as reasoning_content"),
    **dict.fromkeys(MASKS, "give it as weight, 0 or 1"),
    **dict.fromkeys(("role", "from", "content", "value"), "a turn has one role and one content"),
    "prefix": "a turn is learned whole or not at all",
}
WEIGHTS = ("weight", "loss_weight", "sample_weight")
LABELS = ("label", "kto_tag", "kto_label", "desirable")
"""Columns of KTO's unpaired preferences: false marks a bad answer."""
IDENTIFIER = re.compile(r"(.*_)?(id|uuid|idx|index|hash)|group|split|subset|license|model|dataset|url|lang|language")


class Columns(dict[str, Any]):
    """A row under our names. It records which of the file's columns and keys are read.

    A column that `columns` maps to one of our names is not seen under its own (that of `group` is). `removed` are not
    seen at all.
    """

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str], removed: Collection[str] = ()):
        super().__init__(row)
        self.row, self.columns, self.removed = row, columns, removed
        self.read: set[str] = set()
        self.unused_keys: dict[str, None] = {}
        for name in (*removed, *(theirs for ours, theirs in columns.items() if ours != "group")):
            self.pop(name, None)
        for ours, theirs in columns.items():
            if theirs in row:
                self[ours] = row[theirs]
            elif ours in OPTIONAL:
                self.pop(ours, None)
            else:
                raise InvalidRow(f"columns maps {ours} to {theirs!r}, which the row lacks; it has {column_names(row)}")

    def __getitem__(self, name: str) -> Any:
        self.read.add(self.columns.get(name, name))
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self:
            return default
        return self[name]

    def filled(self, name: str) -> bool:
        """Return whether a column is there and holds something."""
        return name in self and not is_empty(self[name])

    def leave_key(self, path: str, key: str, value: object) -> None:
        """Record a key of a turn that is not read. InvalidRow if it changes the turn's meaning."""
        name = f"{path}.{key}"
        general = re.sub(r"\[\d+\]", "[]", name)
        self.unused_keys[general] = None
        if general in self.removed or is_empty(value) or (value is False and key not in MASKS):
            return
        remedy = "only text can be trained on" if MEDIA.fullmatch(key) else TURN_MEANING.get(key)
        if remedy:
            raise InvalidRow(f"{name} changes the turn's meaning and is not used: {remedy}; {removal(general)}")

    def unused(self) -> tuple[str, ...]:
        """Return the file's columns and keys that were not read."""
        return (*(name for name in self.row if name not in self.read), *self.unused_keys)

    def require_meaning(self, kind: str, texts: Sequence[str]) -> None:
        """Raise InvalidRow if a column that was not read changes the row's meaning. `texts`: those of the prompt."""
        for name, value in self.row.items():
            if name in self.read or name in self.removed or is_empty(value):
                continue
            rule = _rule(name)
            if not rule:
                continue
            if rule == "weight" and value not in (1, "1"):
                raise InvalidRow(f"{name} is {value!r}, and every row weighs 1; remove the row, or {removal(name)}")
            if rule == "label" and value is False and kind == "demonstrations":
                raise InvalidRow(f"{name} is false, which marks a bad answer; remove the row, or {removal(name)}")
            if value is False or rule in ("weight", "label"):
                continue
            if rule == "media":
                raise InvalidRow(f"{name}: only text can be trained on; {removal(name)}")
            if kind != "texts" and not _all_held(_texts(value), texts):
                raise InvalidRow(f"{name} changes the row's meaning and is not used: {rule}; {removal(name)}")

    def other_text(self) -> str:
        """Return the column that was not read and may be the prompt, or ""."""
        left = {*self.read, *self.removed, *(self.columns.get(name, name) for name in ("system", "group"))}
        texts = [name for name, value in self.row.items() if isinstance(value, str) and value.strip()]
        found = [name for name in texts if name not in left and not IDENTIFIER.fullmatch(name.lower())]
        known = [name for alias in ALIASES["prompt"] for name in found if name.lower() == alias]
        return (known or found or [""])[0]


@cache
def _rule(name: str) -> str:
    """Return the rule for a column that no format reads: media, weight, label, a remedy of MEANING, or ""."""
    lower = name.lower()
    if MEDIA.fullmatch(name):
        return "media"
    return "weight" if lower in WEIGHTS else "label" if lower in LABELS else MEANING.get(lower, "")


def require_our_names(path: object, columns: Mapping[str, str]) -> None:
    """Raise UserError for a name in `columns` that is none of ours, and for a column that is mapped twice."""
    for name in columns:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COLUMNS)}"
            raise UserError(f"{path}: columns: no column of ours is called {name!r}; {hint}")
    ours_of: dict[str, str] = {}
    for ours, theirs in columns.items():
        if ours != "group" and ours_of.setdefault(theirs, ours) != ours:
            raise UserError(
                f"{path}: columns maps both {ours_of[theirs]} and {ours} to {theirs!r}; one of them is wrong"
            )


def removal(name: str) -> str:
    """Return the setting that leaves a column or key out."""
    return f"to leave it out, set remove_columns: [{shown(name)}]"


def _texts(value: object) -> list[str]:
    """Return the texts that a column adds to a prompt: its own, or those of its turns before an answer."""
    if isinstance(value, list):
        entries = [turn for turn in value if not isinstance(turn, dict) or not _is_answer(turn)]
        return [text for entry in entries for text in _texts(entry)]
    if isinstance(value, dict):
        return _texts(value.get("content", value.get("value")))
    return [str(value).strip()] if isinstance(value, (str, int, float)) else []


def _is_answer(turn: Mapping[str, Any]) -> bool:
    return turn.get("role", turn.get("from")) in ("assistant", "gpt")


def _all_held(parts: Sequence[str], texts: Sequence[str]) -> bool:
    """Return whether there are parts, and each stands in one of the texts as whole words."""
    return bool(parts) and all(any(_holds(text, part) for text in texts) for part in parts)


def _holds(text: str, part: str) -> bool:
    return part in text and bool(re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text))


def missing_column(row: Columns, kind: str, wanted: tuple[str, ...]) -> InvalidRow:
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
