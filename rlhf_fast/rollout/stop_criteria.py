"""When a response is over: at an end token, at a token that completes a stop text, or at the limit. Before
min_new_tokens neither an end token nor a stop text counts, and a stop text completed there does not count later."""

from __future__ import annotations

from os.path import commonprefix

import numpy as np

from rlhf_fast.batches import END, LIMIT, STOP
from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.data.encode import template_end
from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model


def end_tokens(model: Model) -> list[int]:
    """The ids that end a response: the generation config's (there may be several), the tokenizer's, and the one that
    its chat template puts behind an answer."""
    generation = getattr(model.base, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not ids and (own := model.text_config.eos_token_id) is not None:
        ids = own if isinstance(own, list) else [own]
    own = (getattr(model.tokenizer, "eos_token_id", None), template_end(model.tokenizer))
    return sorted({*ids, *(token for token in own if token is not None)})


class Stops:
    """Called with each new token of the rows that run. Prompts are never looked at."""

    def __init__(self, model: Model, cfg: SamplingConfig):
        if cfg.stop and model.tokenizer is None:
            raise UserError("sampling.stop: stop texts need a tokenizer; leave it empty")
        self.cfg, self.tokenizer = cfg, model.tokenizer
        vocabulary = model.head_weight.shape[0]
        self.ends = [token for token in end_tokens(model) if 0 <= token < vocabulary]
        self._is_end = np.zeros(vocabulary, dtype=bool)
        self._is_end[self.ends] = True
        if cfg.min_new_tokens and self._is_end.all():
            raise UserError(
                f"sampling.min_new_tokens: each of the model's {vocabulary} tokens ends a response, so that none is"
                " left to draw before they are allowed; set it to 0"
            )
        # a token is at least one byte of text, so that many last tokens hold every stop text that has just ended; one
        # more, because some tokenizers drop the space that a text begins with
        self._tail = max((len(text.encode()) + 1 for text in cfg.stop), default=0)
        self._said: list[list[int]] = []

    def begin(self, rows: int) -> None:
        """Forget the responses of an earlier rollout; `rows` new ones follow."""
        self._said = [[] for _ in range(rows)] if self.cfg.stop else []

    def __call__(self, tokens: np.ndarray, rows: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """`tokens` (n,) are the newest of responses `rows` (n,), which hold `sizes` (n,) now. None: all go on.
        Else (n,) bool, who is over, and (n,) uint8, why."""
        cfg = self.cfg
        ended = self._is_end[tokens]
        full = sizes == cfg.max_new_tokens
        long = sizes >= cfg.min_new_tokens
        ended &= long
        stopped = self._stopped(tokens, rows) & long if cfg.stop else None
        over = ended | full if stopped is None else ended | full | stopped
        if not over.any():
            return None
        reasons = np.where(ended, END, LIMIT if stopped is None else np.where(stopped, STOP, LIMIT))
        return over, reasons.astype(np.uint8)

    def _stopped(self, tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self._said[row].append(token)
        tails = [self._said[row][-self._tail :] for row in rows.tolist()]
        texts, stops = self.tokenizer.batch_decode(tails), self.cfg.stop
        if not self.cfg.min_new_tokens:  # else a row would be over already
            return np.array([any(stop in text for stop in stops) for text in texts], dtype=bool)
        before = self.tokenizer.batch_decode([tail[:-1] for tail in tails])
        olds = [len(commonprefix(pair)) for pair in zip(texts, before, strict=True)]
        return np.array(
            [
                any(stop in text[max(old - len(stop) + 1, 0) :] for stop in stops)
                for text, old in zip(texts, olds, strict=True)
            ],
            dtype=bool,
        )
