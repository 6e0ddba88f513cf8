"""The rows of an output embedding that have a token.

An embedding often has more rows than its tokenizer has tokens, rounded up for speed or reserved. Such rows are never
sampled, and get no share of a probability: the head that samples and scores ends at the last token, and the rows below
it that no token has are masked by a bias. The cross-entropy is over all rows, so that other programs give them no
probability either.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.errors import UserError

MASK, MASK_FLOAT16 = -1e12, -6e4
"""Logit of a row without a token: no probability at any temperature in use (it is divided by it), and its square is
finite. float16 holds no such number: there it is small up to a temperature of several hundred."""


class Vocabulary:
    """The ids that a tokenizer gives to its tokens, of a model with `num_rows` rows; without a tokenizer all of them.

    num_tokens: the last id of a token, plus 1.
    unused: the ids below it that no token has.
    """

    def __init__(self, tokenizer: Any, num_rows: int, name: str):
        """Raise UserError if a token has no row in the model `name`."""
        ids = tokens_of_rows(tokenizer, num_rows) if hasattr(tokenizer, "get_vocab") else {}
        used = set(ids.values())
        self.tokenizer = tokenizer
        self.num_tokens = max(used) + 1 if used else num_rows
        missing = sorted(set(range(self.num_tokens)) - used) if 0 < len(used) < self.num_tokens else []
        self.unused = [id for id, token in zip(missing, _names(tokenizer, missing), strict=True) if token is None]
        self._mask: Tensor | None = None
        if self.num_tokens > num_rows:
            last = next(token for token, id in ids.items() if id == self.num_tokens - 1)
            raise UserError(
                f"{name}: its tokenizer's token {last!r} has the id {self.num_tokens - 1}, and its embedding only"
                f" {num_rows} rows; give the model's own tokenizer, or resize the embedding"
            )

    def head_weight(self, weight: Tensor) -> Tensor:
        """Return the rows up to the last token, as a view of the weight of all."""
        return weight if len(weight) == self.num_tokens else weight[: self.num_tokens]

    def head_bias(self, bias: Tensor | None, weight: Tensor) -> Tensor | None:
        """Return the bias of these rows, which masks those without a token."""
        bias = None if bias is None else bias[: self.num_tokens]
        if not self.unused:
            return bias
        if self._mask is None or (self._mask.dtype, self._mask.device) != (weight.dtype, weight.device):
            self._mask = torch.zeros(self.num_tokens, dtype=weight.dtype, device=weight.device)
            self._mask[self.unused] = MASK_FLOAT16 if weight.dtype == torch.float16 else MASK
        return self._mask if bias is None else bias + self._mask


def tokens_of_rows(tokenizer: Any, num_rows: int) -> dict[str, int]:
    """Return the ids of the tokens that rows of data may have, by their texts, for a model with `num_rows` rows.

    A special token beyond them is left out if neither text nor a template gives it: no chat template has it, and it
    does not begin, end or pad a row. A text-only variant of a model may have no row for its image token.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    own = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk", "sep", "cls")}
    template = str(getattr(tokenizer, "chat_template", None) or "")

    def is_unused(token: str, id: int) -> bool:
        return id >= num_rows and id not in own and id in added and added[id].special and token not in template

    return {token: id for token, id in tokenizer.get_vocab().items() if not is_unused(token, id)}


def probe_tokens(num_tokens: int, left_out: Iterable[int | None], rows: int, length: int) -> Tensor:
    """Return fixed tokens (rows, length) below `num_tokens`, none of them `left_out`, to compare two forward passes.
    torch's random state stays as it was."""
    ids = torch.arange(num_tokens)
    ids = ids[torch.isin(ids, torch.tensor([-1 if id is None else id for id in left_out]), invert=True)]
    return ids[(torch.arange(rows * length).view(rows, length) * 7919 + 3) % len(ids)]


def _names(tokenizer: Any, ids: list[int]) -> list[str | None]:
    """Return the names of `ids`, which are not in the tokenizer's vocabulary, or None. Tokens that are parts of
    characters may share a name, and the vocabulary then has one of them."""
    try:
        return tokenizer.convert_ids_to_tokens(ids) if ids else []
    except Exception:  # a model's own tokenizer may fail on such ids in any way
        return [None] * len(ids)
