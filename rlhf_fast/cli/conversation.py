"""A conversation with a model: its turns, the prompt that they make, and answers that are sampled token by token."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from rlhf_fast.batches import EOS, LENGTH, STOP, Prompts
from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.data.encode import Encoder, PromptFormat
from rlhf_fast.data.fields import InvalidRow, Message, text_value
from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.model.rope_scaling import length_dependent_rope
from rlhf_fast.rollout.response_buffer import TokenSample
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.rollout.text_stream import TextStream


class Stopped(Exception):
    """Raised by the receiver of a chunk of text, to end the answer."""


class Answer(NamedTuple):
    """A sampled answer."""

    text: str
    """Without the end token or the stop text that ended it."""
    tokens: list[int]
    logprobs: list[float]
    """Log-probability of each token, in nats at temperature 1."""
    reason: int | None
    """EOS, STOP or LENGTH; None if it was stopped."""


class Exchange(NamedTuple):
    message: str
    answer: Answer


class PromptOfTurn(NamedTuple):
    tokens: list[int]
    text: str
    left_out: int
    """Number of the first exchanges that do not fit."""


def positions_of(model: Model) -> int:
    """Return how many tokens a prompt and its answer may have together; 0 = any number."""
    rope = length_dependent_rope(model)
    return rope.original_positions if rope else model.max_positions


class Conversation:
    """The turns so far. With a format of prompts without turns (plain) each message is a prompt of its own."""

    def __init__(self, model: Model, prompt_format: PromptFormat, sampling: SamplingConfig, seed: int = 0):
        self.model, self.sampling = model, sampling
        self.encoder = Encoder(model.tokenizer, prompt_format.template, eos=False, date=prompt_format.date)
        self.exchanges: list[Exchange] = []
        self.positions = positions_of(model)
        self._rollout = Rollout(model, sampling, seed, keep_cache=True)
        self._calls = 0
        self.system = ""
        """Text of the system turn; "" = none."""

    @property
    def has_turns(self) -> bool:
        return self.encoder.template != "plain"

    def set_system(self, text: str) -> None:
        """Set the system turn, which stands before all others; "" = none. UserError if the format shows none."""
        if text and not self.has_turns:
            raise UserError("the format of prompts is plain, which has no system turn; put the text into the message")
        if text:
            self._encode([{"role": "system", "content": text}, {"role": "user", "content": "Hello"}])
        self.system = text

    def messages(self, first: int = 0) -> list[Message]:
        """Return the system turn and the turns of the exchanges from number `first` on."""
        turns = [{"role": "system", "content": self.system}] if self.system else []
        for message, answer in self.exchanges[first:]:
            turns += [{"role": "user", "content": message}, {"role": "assistant", "content": answer.text}]
        return turns

    def prompt(self, message: str) -> PromptOfTurn:
        """Return the prompt of the next turn. The first exchanges are left out of it if they and the longest answer do
        not fit the model's positions. UserError if the message alone does not."""
        room = self.positions - self.sampling.max_new_tokens
        for first in range(len(self.exchanges) + 1) if self.has_turns else (0,):
            turns = [*self.messages(first), {"role": "user", "content": message}]
            tokens, text = self._encode(turns if self.has_turns else message)
            if not self.positions or len(tokens) <= room:
                return PromptOfTurn(tokens, text, first)
        raise UserError(
            f"the message makes a prompt of {len(tokens)} tokens, over the {room} that max_new_tokens"
            f" {self.sampling.max_new_tokens} leaves of {self.positions} positions; write a shorter one, or give a"
            " smaller --max-new-tokens"
        )

    def ask(self, message: str, show: Callable[[str], None], prompt: PromptOfTurn | None = None) -> Answer:
        """Sample the answer to a message, and append both to the conversation.

        show: called with each chunk of the answer's text as soon as it is certain; it may raise Stopped.
        prompt: that of `self.prompt(message)`, if it is known.
        """
        tokens, text, _ = prompt or self.prompt(message)
        ids: list[int] = []
        logprobs: list[float] = []
        stream = TextStream(self.model.tokenizer, self.sampling.stop)
        end_tokens = set(self._rollout.stop_criteria.end_tokens)

        def receive(_: np.ndarray, sampled: np.ndarray, sample: TokenSample) -> None:
            ids.append(int(sampled[0]))
            logprobs.append(float(sample.raw_logprobs[0]))
            show("" if ids[-1] in end_tokens else stream.push(ids[-1]))

        self._calls += 1
        reason, stop = None, ""
        try:
            responses = self._rollout.generate(Prompts([0], [tokens], [text]), step=self._calls - 1, on_tokens=receive)
        except Stopped:
            pass
        else:
            reason = int(responses.finish_reasons[0])
            assert responses.stop_indices is not None
            stop = self.sampling.stop[int(responses.stop_indices[0])] if reason == STOP else ""
        rest = stream.finish(stop)
        answer = Answer(self._content(stream.text), ids, logprobs, reason)
        if ids:
            self.exchanges.append(Exchange(message, answer))
        with suppress(Stopped):
            show(rest)
        return answer

    def ask_again(self, show: Callable[[str], None]) -> Answer:
        """Replace the last answer by another sample."""
        last = self.undo()
        try:
            answer = self.ask(last.message, show)
        except BaseException:
            self.exchanges.append(last)
            raise
        if not answer.tokens:
            self.exchanges.append(last)
        return answer

    def last(self) -> Exchange:
        """Return the last exchange. UserError if there is none."""
        if not self.exchanges:
            raise UserError("there is no answer yet; write a message first")
        return self.exchanges[-1]

    def undo(self) -> Exchange:
        """Remove the last exchange and return it."""
        self.last()
        return self.exchanges.pop()

    def rows(self) -> list[dict[str, Any]]:
        """Return the conversation as rows of demonstrations."""
        if self.has_turns:
            return [{"messages": self.messages()}]
        return [{"prompt": message, "completion": answer.text} for message, answer in self.exchanges]

    def token_texts(self, tokens: list[int]) -> list[str]:
        """Return the text of each token, as it follows the one before it."""
        tokenizer = self.model.tokenizer
        texts = []
        for i, token in enumerate(tokens):
            before = tokenizer.decode(tokens[max(i - 1, 0) : i]) if i else ""
            both = tokenizer.decode(tokens[max(i - 1, 0) : i + 1])
            text = both[len(before) :] if both.startswith(before) else ""
            texts.append(text if text and "\ufffd" not in both else tokenizer.convert_ids_to_tokens(token))
        return texts

    def _content(self, text: str) -> str:
        """Return an answer as the turn of a conversation has it: without what the format writes before an answer."""
        if not self.has_turns:
            return text
        if self.encoder.chat is None:
            return text.lstrip()
        answer = self.encoder.chat.answer
        before = answer.before if answer else ""
        return text if before.strip() else text.removeprefix(before)

    def _encode(self, dialog: str | list[Message]) -> tuple[list[int], str]:
        """Return a prompt as tokens and as text. UserError if the format cannot show it."""
        try:
            for turn in dialog if isinstance(dialog, list) else [{"role": "user", "content": dialog}]:
                if turn["role"] != "assistant":
                    text_value(turn["content"], "the message" if turn["role"] == "user" else "the system turn")
            return self.encoder.prompt(dialog)
        except InvalidRow as error:
            raise UserError(str(error)) from error


def ending(answer: Answer, sampling: SamplingConfig) -> str:
    """Return a sentence on an answer that is empty or did not end by itself; "" for others."""
    if answer.reason == LENGTH:
        return f"cut at {sampling.max_new_tokens} tokens; --max-new-tokens sets the limit"
    if answer.reason not in (EOS, STOP):
        return "stopped"
    if not answer.text.strip():
        return "the answer is empty" + (": the model ended at once" if len(answer.tokens) <= 1 else "")
    return ""
