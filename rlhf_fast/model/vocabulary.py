"""Which rows of an output embedding have a token.

An embedding often has more rows than its tokenizer has tokens, rounded up for speed or reserved. Such rows are never
sampled, and get no share of a probability: the head that samples and scores ends at the last token, and the rows below
it that no token has are masked by a bias.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.errors import UserError

MASK = -1e4
"""Logit of a row without a token: no probability in float32, finite in float16, and its square is finite too."""


class Vocabulary(NamedTuple):
    """The ids that a tokenizer gives to its tokens."""

    num_tokens: int
    """Last id of a token, plus 1."""
    unused: list[int]
    """Ids below `num_tokens` that no token has."""

    def mask(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return the bias (num_tokens,) that masks the unused ids, or None if there are none."""
        if not self.unused:
            return None
        bias = torch.zeros(self.num_tokens, dtype=dtype, device=device)
        bias[self.unused] = MASK
        return bias


def read_vocabulary(tokenizer: Any, num_rows: int, name: str) -> Vocabulary:
    """Return the vocabulary of `tokenizer`, or all rows without one. UserError if a token has no row."""
    if not hasattr(tokenizer, "get_vocab"):
        return Vocabulary(num_rows, [])
    ids = tokenizer.get_vocab()
    last = max(ids, key=lambda token: ids[token], default=None)
    if last is None:
        return Vocabulary(num_rows, [])
    num_tokens = ids[last] + 1
    if num_tokens > num_rows:
        raise UserError(
            f"{name}: its tokenizer's token {last!r} has the id {ids[last]}, and its embedding only {num_rows} rows;"
            " give the model's own tokenizer, or resize the embedding"
        )
    return Vocabulary(num_tokens, sorted(set(range(num_tokens)) - set(ids.values())))
