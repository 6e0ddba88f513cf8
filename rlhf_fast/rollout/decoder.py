"""The interface of a decoder: one forward function, for prefill and decode, on a batch of tokens over a PagedKVCache.

fused          our own step on the module's tensors, for the families it knows
attention      the module's own forward, with our attention in place of transformers'
transformers   no decoder: a generate loop over transformers' own cache, or over none where that is wrong
               (rollout/hf_generate.py), for every other model

A decoder's `make` raises Unsupported for a model that it cannot serve; the text is the reason and follows "because".
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_fast.rollout.kv_cache import KVShape, PagedKVCache

DecodePath = Literal["auto", "fused", "attention", "transformers"]


class TokenBatch(NamedTuple):
    """N tokens of one call, of one or more sequences.

    Tokens of one sequence are adjacent, with rising positions. Their predecessors are in the cache already, or earlier
    in the batch, there also as tokens of another sequence that shares the page. When decoding there is one token of
    each sequence.
    """

    tokens: Tensor
    """(N,) int64"""
    positions: Tensor
    """(N,) int32: position in the sequence, from 0."""
    slots: Tensor
    """(N,) int32: the sequence's row of the block table."""
    block_table: Tensor
    """(num_slots, max_pages_per_slot) int32: [s, m] is the page of positions m * P to m * P + P - 1 of slot s."""
    logits_indices: Tensor | None = None
    """(n,) int64: the tokens whose hidden states are returned, because logits are computed from them. None = all."""
    prompt_lengths: tuple[int, ...] | None = None
    """The tokens are those of whole prompts, one after the other, of these lengths. None = they may be any."""


class Decoder(Protocol):
    """A forward pass over the model's own weights: it sees every optimizer step."""

    name: str
    shapes: list[KVShape]
    """Shape of each layer's keys and values."""
    dtype: torch.dtype
    """Dtype of the cache."""

    def session(self) -> AbstractContextManager[None]:
        """Return the context in which `hidden` is called. The weights must not move or change within it."""
        ...

    def hidden(self, cache: PagedKVCache, batch: TokenBatch) -> Tensor:
        """Write the keys and values of the batch to the cache, and return the last layer's hidden states (n, D) after
        the final norm, not multiplied by `Model.logit_scale`."""
        ...
