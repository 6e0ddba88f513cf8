"""Stop criteria of a response: an end token, a token that completes a stop text, or max_new_tokens.

Before min_new_tokens neither an end token nor a stop text counts, and a stop text completed there does not count later.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rlhf_fast.batches import EOS, LENGTH, STOP
from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.errors import UserError
from rlhf_fast.model.end_tokens import end_token_ids
from rlhf_fast.model.model import Model


class Stops(NamedTuple):
    """The responses, of n, that are finished, and why."""

    finished: np.ndarray
    """(n,) bool"""
    reasons: np.ndarray
    """(n,) uint8: EOS, STOP or LENGTH."""
    stop_indices: np.ndarray
    """(n,) int64: for STOP the index of the text in `sampling.stop`, else -1."""


class StopCriteria:
    """Called with the newest token of each running response. Prompts are not searched."""

    def __init__(self, model: Model, cfg: SamplingConfig):
        if cfg.stop and model.tokenizer is None:
            raise UserError("sampling.stop: stop texts need a tokenizer; leave it empty")
        self.cfg = cfg
        self.tokenizer = model.tokenizer
        vocabulary = model.vocabulary
        vocab_size, unused = vocabulary.num_tokens, set(vocabulary.unused)
        if model.softcap and unused:
            raise UserError(
                f"{model.name}: {len(unused)} ids have no token in its tokenizer, for instance {min(unused)}, and could"
                " be sampled: under a soft cap they cannot be masked; give it a tokenizer that names them"
            )
        self.end_tokens = [token for token in end_token_ids(model) if 0 <= token < vocab_size and token not in unused]
        self._is_end_token = np.zeros(vocab_size, dtype=bool)
        self._is_end_token[self.end_tokens] = True
        if cfg.min_new_tokens and len(self.end_tokens) + len(unused) == vocab_size:
            raise UserError(
                f"sampling.min_new_tokens: each of the model's {vocab_size} tokens ends a response, so that none is"
                " left to draw before they are allowed; set it to 0"
            )
        # a stop text of n bytes spans at most n tokens; one more, because some tokenizers drop a leading space
        self._tail_length = max((len(text.encode()) + 1 for text in cfg.stop), default=0)
        self._generated: list[list[int]] = []

    def reset(self, num_responses: int) -> None:
        """Forget earlier responses, and start `num_responses` new ones."""
        self._generated = [[] for _ in range(num_responses)] if self.cfg.stop else []

    def __call__(self, tokens: np.ndarray, responses: np.ndarray, lengths: np.ndarray) -> Stops | None:
        """Append `tokens` (n,) to `responses` (n,), whose lengths are then `lengths` (n,). Return None if all go on."""
        cfg = self.cfg
        long_enough = lengths >= cfg.min_new_tokens
        ended = self._is_end_token[tokens] & long_enough
        stop_indices = np.full(len(tokens), -1)
        if cfg.stop:
            stop_indices = np.where(long_enough & ~ended, self._completed_stop_texts(tokens, responses), -1)
        stopped = stop_indices >= 0
        finished = ended | stopped | (lengths == cfg.max_new_tokens)
        if not finished.any():
            return None
        reasons = np.where(ended, EOS, np.where(stopped, STOP, LENGTH))
        return Stops(finished, reasons.astype(np.uint8), stop_indices)

    def _completed_stop_texts(self, tokens: np.ndarray, responses: np.ndarray) -> np.ndarray:
        """Return (n,) int64: the stop text that the newest token completes, of several the one that ends first; -1 if
        there is none."""
        for response, token in zip(responses.tolist(), tokens.tolist(), strict=True):
            self._generated[response].append(token)
        tails = [self._generated[response][-self._tail_length :] for response in responses.tolist()]
        texts, stops = self.tokenizer.batch_decode(tails), self.cfg.stop
        if not self.cfg.min_new_tokens:
            # an earlier stop text would have ended the response already, so any found here is new
            return np.array([_first_completed(stops, text, 0) for text in texts])
        previous_texts = self.tokenizer.batch_decode([tail[:-1] for tail in tails])
        pairs = zip(texts, previous_texts, strict=True)
        return np.array([_first_completed(stops, text, _common_prefix_length(text, old)) for text, old in pairs])


def _first_completed(stops: tuple[str, ...], text: str, start: int) -> int:
    """Return the index of the stop text that ends first in `text`, after its first `start` characters; -1 = none."""
    found = [(text.find(stop, max(start - len(stop) + 1, 0)), i) for i, stop in enumerate(stops)]
    return min(((at + len(stops[i]), i) for at, i in found if at >= 0), default=(0, -1))[1]


def _common_prefix_length(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
