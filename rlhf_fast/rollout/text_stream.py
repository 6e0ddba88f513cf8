"""The text of a response while its tokens are sampled: whole characters, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""Character that a decoder writes for bytes which are not yet, or never, a whole one."""


class TextStream:
    """Turns tokens into chunks of text. Together with `finish` they are the decoded response, without special tokens.

    stops: texts that end the response. What may be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.tokens: list[int] = []
        self.text = ""
        """The text of all chunks so far."""
        self._held = ""
        """Decoded, but perhaps a part of a stop text."""
        self._start = self._end = 0
        # Tokens [start, end) are decoded already. They are decoded again before new ones, because the text of a token
        # depends on those before it: a leading space, or the other bytes of its character.

    def push(self, token: int) -> str:
        """Add a token and return the text that is certain now."""
        self.tokens.append(token)
        before, now = (self._decode(self.tokens[self._start : end]) for end in (self._end, None))
        if len(now) <= len(before) or now.endswith(REPLACEMENT):
            return ""
        self._start, self._end = self._end, len(self.tokens)
        chunk = ""
        if any(stop in self._held for stop in self.stops):  # one before min_new_tokens: the response has gone on
            chunk, self._held = self._held, ""
        self._held += now[len(before) :]
        certain = min((self._first_start(stop) for stop in self.stops), default=len(self._held))
        chunk, self._held = chunk + self._held[:certain], self._held[certain:]
        self.text += chunk
        return chunk

    def finish(self, stop: str = "") -> str:
        """Return the rest of the text, without the stop text that ended it and what follows."""
        whole = self._decode(self.tokens)
        if whole.startswith(self.text):
            rest = whole[len(self.text) :]
        else:  # a tokenizer that changes the blanks of the whole text
            before, now = (self._decode(self.tokens[self._start : end]) for end in (self._end, None))
            rest = self._held + now[len(before) :]
        if stop and stop in rest:
            certain = rest.partition(stop)[0]
            tail, rest = rest[len(certain) :], certain
            # the same cut as in `rest`: the tail may hold the stop text more than once
            whole = whole.removesuffix(tail) if whole.endswith(tail) else self.text + rest
        self.text = whole
        return rest

    def _first_start(self, stop: str) -> int:
        """Return the first position of the text held back at which `stop`, or as much of it as fits, stands."""
        held = self._held
        return next((i for i in range(len(held)) if stop.startswith(held[i : i + len(stop)])), len(held))

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True) if tokens else ""
