"""Texts of the tasks as tokens: pairs of context and continuation as lm-eval's HFLM encodes them, windows, prompts."""

from __future__ import annotations

from typing import Any

from rlhf_fast.data.encode import Encoder as PromptEncoder
from rlhf_fast.data.encode import PromptFormat
from rlhf_fast.data.fields import Dialog
from rlhf_fast.errors import UserError
from rlhf_fast.scoring import Request

PLAIN = PromptFormat("plain")
WINDOW = 1024
"""Tokens of a window of text."""


class Encoder:
    """A tokenizer, the number of positions of its model (0 = no limit), and the format of prompts.

    prompt_format: "plain" leaves a context as it is; another one writes it as the prompt that the continuation answers.
    overlong: number of requests and prompts whose context was cut on the left. shortened: number of texts whose windows
    have fewer tokens than asked for, because the model has fewer positions.
    """

    def __init__(self, tokenizer: Any, max_positions: int = 0, prompt_format: PromptFormat = PLAIN):
        self.tokenizer, self.max_positions = tokenizer, max_positions
        self.prompts = PromptEncoder(tokenizer, prompt_format.template, eos=False, date=prompt_format.date)
        self.overlong = self.shortened = 0
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            name = tokenizer.name_or_path or "the tokenizer"
            raise UserError(
                f"{name}: has neither a start nor an end token, one of which stands for an empty context; name one in"
                " tokenizer_config.json (bos_token or eos_token)"
            )
        self.start: int = start
        self._start_text = tokenizer.decode([start])

    @property
    def template(self) -> str:
        """The format of prompts: plain, chat or dialog."""
        return self.prompts.template

    def pair(self, context: str, continuation: str) -> Request:
        """Return the tokens of a context and of its continuation.

        Spaces that end the context go to the continuation. Both are tokenized as one text, which is cut at the number
        of tokens of the context alone. An empty context is the start token (bos, else eos), which the continuation
        loses if it begins with it. UserError if nothing is left of the continuation.
        """
        if context and self.template != "plain":
            tokens, _ = self.prompts.prompt(context)
            return self._fitting(tokens, self.prompts.response(continuation), continuation)
        bare = context.rstrip()
        if not bare:
            ids = self.ids(context + continuation, add_special_tokens=False)
            return self._fitting([self.start], ids[1:] if ids[:1] == [self.start] else ids, continuation)
        tokens = self.ids(bare)
        whole = self.ids(context + continuation)
        return self._fitting(tokens or [self.start], whole[len(tokens) :], continuation)

    def windows(self, text: str, size: int = WINDOW) -> list[Request]:
        """Return a document as requests of at most `size` tokens, the start token before each; each token is in one."""
        ids = self.ids(text, add_special_tokens=False)
        ids = ids[1:] if ids[:1] == [self.start] else ids
        if not ids:
            raise _no_tokens(text)
        if 0 < self.max_positions < min(size, len(ids)):
            size = self.max_positions
            self.shortened += 1
        return [([self.start], ids[i : i + size]) for i in range(0, len(ids), size)]

    def prompt(self, dialog: Dialog, max_new_tokens: int) -> list[int]:
        """Return the tokens of a prompt, cut on the left where `max_new_tokens` more would not fit."""
        tokens = self.prompts.prompt(dialog)[0] or [self.start]
        return self.cut(tokens, max_new_tokens)

    def max_new_tokens(self, wanted: int) -> int:
        """Return the number of new tokens that leaves a prompt at least half of the positions."""
        return min(wanted, self.max_positions // 2) if self.max_positions else wanted

    def _fitting(self, context: list[int], continuation: list[int], text: str) -> Request:
        if not continuation:
            raise _no_tokens(text)
        if self.max_positions and len(continuation) > self.max_positions:
            raise UserError(
                f"a continuation has {len(continuation)} tokens, more than the model's {self.max_positions} positions:"
                f" {text[:40]!r}; remove its row"
            )
        return self.cut(context, len(continuation) - 1), continuation

    def cut(self, context: list[int], following: int) -> list[int]:
        """Return the end of a context that fits before so many tokens."""
        room = max(self.max_positions - following, 1)
        if not self.max_positions or len(context) <= room:
            return context
        self.overlong += 1
        return context[-room:]

    def ids(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return a text's tokens; with None as the tokenizer does by itself, but for a second start token."""
        if add_special_tokens is None:
            add_special_tokens = not (self._start_text and text.startswith(self._start_text))
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _no_tokens(text: str) -> UserError:
    return UserError(f"the tokenizer gives no token of its own to {text[:40]!r}; remove its row")
