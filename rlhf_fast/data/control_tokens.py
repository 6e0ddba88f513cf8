"""Text as tokens, with and without control tokens: those that a template writes and no text of the data may become.

Control tokens are the tokenizer's special tokens and its other added tokens, like `<|im_end|>` or `<think>`, which many
tokenizers do not call special. Added tokens that are blanks or plain words are ordinary vocabulary, unless the chat
template writes them.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from rlhf_fast.data.fields import InvalidRow

Segment = tuple[str, bool]
"""A part of a rendered text, and whether it is a control token that the template wrote."""

WORD = re.compile(r"[\w\s'-]*")


class ControlTokens:
    """The control tokens of a tokenizer, and the tokens of texts in which only a template writes them."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.names = control_tokens(tokenizer)
        self.ids = set(tokenizer.convert_tokens_to_ids(self.names)) - {tokenizer.unk_token_id}
        added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
        self._eats_left = {name for name in self.names if getattr(added.get(name), "lstrip", False)}
        self._eats_right = {name for name in self.names if getattr(added.get(name), "rstrip", False)}
        self._by_start: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            if name:
                self._by_start[name[:2]].append(name)
        self._anchors = self._find_anchors()

    def spelled(self, text: str) -> list[str]:
        """Return the control tokens that a text of the data spells."""
        found = [start for start in self._by_start if start in text]
        return [name for start in found for name in self._by_start[start] if name in text]

    def split(self, text: str) -> list[Segment]:
        """Return the parts of a text that the template wrote. At one position the longest token wins."""
        names = sorted(self.spelled(text), key=len, reverse=True)
        if not names:
            return [(text, False)] if text else []
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        return [(part, i % 2 == 1) for i, part in enumerate(parts) if part]

    def text_ids(self, text: str) -> list[int]:
        """Return the tokens of a text of the data, none of which is a control token."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        if self.ids.isdisjoint(ids):
            return ids
        if self._backend is None:
            raise InvalidRow(
                f"the text spells {', '.join(self.spelled(text)) or 'a control token'}, which this tokenizer cannot"
                " read as text; remove it"
            )
        return self._backend.encode(text, add_special_tokens=False).ids

    def continued_ids(self, text: str) -> list[int]:
        """Return the tokens of a text that follows another, without the space that some tokenizers put before a text.

        An anchor, a text before it, is left out again; one that merges with the text is not used.
        """
        for anchor, before in self._anchors:
            ids = self.text_ids(anchor + text)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self.text_ids(text)

    def segment_ids(self, segments: Sequence[Segment], follows: bool) -> list[int]:
        """Return the tokens of consecutive parts. follows: another text comes before the first one."""
        ids: list[int] = []
        for i, (text, control) in enumerate(segments):
            if control:
                ids.append(self.tokenizer.convert_tokens_to_ids(text))
                continue
            if i and segments[i - 1][0] in self._eats_right:
                text = text.lstrip()
            if i + 1 < len(segments) and segments[i + 1][0] in self._eats_left:
                text = text.rstrip()
            if text and (self._space_after_control if i else not follows):
                ids += self.text_ids(text)
            elif text:
                ids += self.continued_ids(text)
        return ids

    @cached_property
    def _backend(self) -> Tokenizer | None:
        """The tokenizer without control tokens; transformers can ignore the special ones alone."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        state = json.loads(backend.to_str())
        names = set(self.names)
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in names]
        return Tokenizer.from_str(json.dumps(state))

    @cached_property
    def _space_after_control(self) -> bool:
        """True if the tokenizer puts a space before a text that follows a control token, as before a whole text."""
        name = next((name for name in self.names if name not in self._eats_left | self._eats_right), "")
        ids = self.tokenizer(f"{name}a", add_special_tokens=False).input_ids
        return ids[1:] == self.text_ids("a") != self.continued_ids("a")

    def _find_anchors(self) -> list[tuple[str, list[int]]]:
        """Return texts to put before another while it is tokenized, and their tokens.

        Only tokenizers that add a space before every text need them: such a space is no part of the text.
        """
        if self.text_ids("\na")[len(self.text_ids("\n")) :] == self.text_ids("a"):
            return []
        return [(anchor, self.text_ids(anchor)) for anchor in ("\n", ".", "a", "1")]


def control_tokens(tokenizer: Any) -> list[str]:
    """Return the texts that a tokenizer reads as control tokens."""
    template = tokenizer.chat_template or ""
    written = "\n".join(template.values()) if isinstance(template, dict) else template
    added = [
        str(token)
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (str(token).strip() and (not WORD.fullmatch(str(token)) or str(token) in written))
    ]
    return [*added, *(token for token in tokenizer.all_special_tokens if token not in added)]


def cut(segments: Sequence[Segment], start: int, stop: int) -> Iterator[Segment]:
    """Yield the parts between two positions of the whole text."""
    position = 0
    for text, control in segments:
        if position >= stop:
            return
        part = text[max(start - position, 0) : max(stop - position, 0)]
        if part:
            yield part, control
        position += len(text)
