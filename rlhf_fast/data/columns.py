"""Columns of a row under our names, and the rule for those that no format reads.

A column or key that is not read is named. One that would change the meaning of the row is refused, unless its text is
in the prompt already or `remove_columns` names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rlhf_fast.data.fields import InvalidRow, column_names, is_empty, shown
from rlhf_fast.data.meaning import NO_LOSS, THOUGHT, Rule, compact, is_question, rule_of, says_no
from rlhf_fast.errors import UserError, did_you_mean, nearest

COLUMNS = (
    *("prompt", "completion", "messages", "chosen", "rejected", "responses", "ranks", "scores", "text", "group"),
    *("instruction", "context", "system", "history", "tools", "reasoning_content"),
)
OPTIONAL = ("group", "context", "system", "history", "tools", "reasoning_content")
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

LONG_TEXT = 80
"""Characters from which on a text that no name explains may be a prompt."""
IDENTIFIER = re.compile(r"(.*_)?(id|uuid|idx|index|hash)|group|split|subset|license|model|dataset|url|lang|language")


class Columns(dict[str, Any]):
    """A row under our names. It records which of the file's columns and keys are read.

    A column that `columns` maps to one of our names is not seen under its own (that of `group` is). `removed` are not
    seen at all.
    """

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str], removed: Collection[str], kind: str):
        super().__init__(row)
        self.row, self.columns, self.removed, self.kind = row, columns, removed, kind
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

    def kept_keys(self, path: str, turn: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a turn without the keys that are removed."""
        if not any("[" in name for name in self.removed):
            return turn
        general = {key: re.sub(r"\[\d+\]", "[]", f"{path}.{key}") for key in turn}
        self.unused_keys |= {name: None for name in general.values() if name in self.removed}
        return {key: value for key, value in turn.items() if general[key] not in self.removed}

    def leave_key(self, path: str, key: str, value: object) -> None:
        """Record a key of a turn that is not read. InvalidRow if it changes the turn's meaning."""
        name = f"{path}.{key}"
        general = re.sub(r"\[\d+\]", "[]", name)
        self.unused_keys[general] = None
        rule = rule_of(key, turn=True)
        if rule is None or general in self.removed or is_empty(value):
            return
        learned = path.startswith(("chosen", "rejected")) or (self.kind == "demonstrations" and path[:7] != "prompt[")
        if rule.remedy == NO_LOSS and not learned:
            return
        if _changes(rule, value):
            raise InvalidRow(f"{name} changes the turn's meaning and is not used: {rule.remedy}; {removal(general)}")

    def unused(self) -> tuple[str, ...]:
        """Return the file's columns and keys that were not read."""
        return (*(name for name in self.row if name not in self.read), *self.unused_keys)

    def require_meaning(self, texts: Sequence[str]) -> None:
        """Raise InvalidRow if a column that was not read changes the row's meaning. `texts`: those of the prompt."""
        for name, value in self.row.items():
            if name not in self.read and name not in self.removed and not is_empty(value):
                self._require_meaning(name, name, value, texts)

    def _require_meaning(self, path: str, name: str, value: object, texts: Sequence[str]) -> None:
        """Check one column, or one entry of a column that is an object without a rule of its own."""
        rule = rule_of(name)
        if rule is None:
            for key, entry in value.items() if isinstance(value, dict) else ():
                inner = f"{path}.{key}"
                if inner in self.removed:
                    self.unused_keys[inner] = None
                elif not is_empty(entry):
                    self._require_meaning(inner, key, entry, texts)
            if compact(name) == "margin" and self.kind == "comparisons" and value != 0:
                raise InvalidRow(
                    f"{shown(path)} is {value!r}, and the loss of a comparison has no margin; {removal(path)}"
                )
            return
        if rule.kind == "media":
            if value is not False:
                raise InvalidRow(f"{shown(path)}: {rule.remedy}; {removal(path)}")
        elif self.kind == "texts" and rule.kind in ("text", "any", "thought"):
            return
        elif rule.kind == "weight" or (rule.kind == "off" and self.kind != "prompts"):
            if _changes(rule, value):
                raise InvalidRow(
                    f"{shown(path)} is {value!r}, and every row weighs 1; remove the row, or {removal(path)}"
                )
        elif rule.kind == "label":
            if self.kind == "demonstrations" and path == name and says_no(value):
                found = json.dumps(value)
                raise InvalidRow(
                    f"{shown(path)} is {found}, which marks a bad answer (KTO's form), and sft learns every answer;"
                    f" keep the rows whose {shown(path)} is true; {removal(path)}"
                )
        elif rule.kind == "text":
            if value is not False and not _all_held(_prompt_parts(value), texts):
                raise InvalidRow(
                    f"{shown(path)} changes the row's meaning and is not used: {rule.remedy}; {removal(path)}"
                )
        elif not (self.kind == "prompts" and rule.remedy in (THOUGHT, NO_LOSS)) and _changes(rule, value):
            raise InvalidRow(f"{shown(path)} changes the row's meaning and is not used: {rule.remedy}; {removal(path)}")

    def other_text(self) -> str:
        """Return the column that was not read and may be the prompt, or ""; a short text is a label, if no question."""
        left = {*self.read, *self.removed, *(self.columns.get(name, name) for name in ("system", "group"))}
        texts = {name: value.strip() for name, value in self.row.items() if isinstance(value, str) and value.strip()}
        found = [name for name in texts if name not in left and not IDENTIFIER.fullmatch(name.lower())]
        asking = [name for name in found if is_question(name)]
        telling = [name for name in found if len(texts[name]) > LONG_TEXT or texts[name][-1] in "?？"]
        return (asking or telling or [""])[0]


def _changes(rule: Rule, value: object) -> bool:
    """Return whether a value that is not empty changes the meaning of its row or turn."""
    if rule.kind == "weight":
        return value not in (1, "1")
    if rule.kind == "off":
        return says_no(value) or isinstance(value, (list, dict))
    if rule.kind == "on":
        return not says_no(value)
    if rule.kind == "channel":
        return value != "final"
    if rule.kind == "thought":
        return isinstance(value, (str, list, dict))
    return rule.kind == "any" or value is not False


def require_our_names(path: object, columns: Mapping[str, str]) -> None:
    """Raise UserError for a name in `columns` that is none of ours, and for a column that is mapped twice."""
    for name in columns:
        if name not in COLUMNS:
            hint = did_you_mean(name, COLUMNS, f"there are {', '.join(COLUMNS)}")
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


def _prompt_parts(value: object) -> list[str]:
    """Return the texts that a column adds to a prompt: its own, or those of its turns before an answer."""
    if isinstance(value, list):
        entries = [turn for turn in value if not isinstance(turn, dict) or not _is_answer(turn)]
        return [text for entry in entries for text in _prompt_parts(entry)]
    if isinstance(value, dict):
        return _prompt_parts(value.get("content", value.get("value")))
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
    columns = suggested_columns(row, wanted)
    hint = ""
    if columns:
        pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
        hint = f"; if that is what they are, set columns: {{{pairs}}}"
    missing = " and ".join(f'"{name}"' for name in absent)
    return InvalidRow(f"no {missing} in the row; found {column_names(row)}; expected {EXPECTED[kind]}{hint}")


def suggested_columns(names: Collection[str], wanted: Sequence[str]) -> dict[str, str]:
    """Return for each of our columns that `names` lack the one that may be it, by its name, if there is one."""
    columns: dict[str, str] = {}
    for ours in wanted:
        if ours in names:
            continue
        left = {name.lower(): name for name in names if name not in wanted and name not in columns.values()}
        near = [left[other] for other in (ours, *ALIASES.get(ours, ())) if other in left]
        if near or (name := nearest(ours, left, cutoff=0.7)):
            columns[ours] = near[0] if near else left[name]
    return columns
