"""When a response is over: at an end token, once its text holds a stop text, or at the limit."""

from __future__ import annotations

import numpy as np

from rlhf_fast.batches import END, LIMIT, STOP
from rlhf_fast.config import SamplingConfig
from rlhf_fast.data.encode import template_end
from rlhf_fast.errors import UserError
from rlhf_fast.model import Model


def end_tokens(model: Model) -> list[int]:
    """The ids that end a response: the generation config's (there may be several), the tokenizer's, and the one that
    its chat template puts behind an answer."""
    generation = getattr(model.base, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not ids and (own := model.base.config.get_text_config().eos_token_id) is not None:
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
        stopped = self._stopped(tokens, rows) if cfg.stop else None
        if cfg.min_new_tokens:
            long = sizes >= cfg.min_new_tokens
            ended &= long
            stopped = stopped if stopped is None else stopped & long
        over = ended | full if stopped is None else ended | full | stopped
        if not over.any():
            return None
        reasons = np.where(ended, END, LIMIT if stopped is None else np.where(stopped, STOP, LIMIT))
        return over, reasons.astype(np.uint8)

    def _stopped(self, tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self._said[row].append(token)
        tails = self.tokenizer.batch_decode([self._said[row][-self._tail :] for row in rows.tolist()])
        return np.array([any(text in tail for text in self.cfg.stop) for tail in tails], dtype=bool)
