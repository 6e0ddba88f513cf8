"""What a decoder is: one forward function that serves prefill and decode, N packed tokens over an Arena.

fused          our own step over the module's tensors, for the families it knows
attention      the module's own forward, with our attention in the place of transformers'
transformers   no decoder: transformers' own cache (rollout/hf_cache.py), for whatever is left
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_fast.rollout.kv_cache import Arena, KVShape

Path = Literal["auto", "fused", "attention", "transformers"]


class Unsupported(Exception):
    """A decoder cannot serve a model; the text is the reason, to follow "because"."""


class Packed(NamedTuple):
    """N tokens of one call. Those of one sequence stand together, in rising position, and whatever precedes them in
    their sequence is in the arena already. Decoding: one token a sequence."""

    tokens: Tensor
    """(N,) int64"""
    positions: Tensor
    """(N,) int32: place in the own sequence, from 0."""
    slots: Tensor
    """(N,) int32: the sequence's row of the block table."""
    block_table: Tensor
    """(S, M) int32: [s, m] is the page of positions m * P to m * P + P - 1 of slot s."""
    wanted: Tensor | None = None
    """(n,) int64: the tokens whose hidden states come back. None = all."""


class Decoder(Protocol):
    """Reads the model's weights where they are, at each call: an optimizer's step between two calls is seen."""

    name: str
    shapes: list[KVShape]
    """Of each layer's cache."""
    dtype: torch.dtype
    """Of the cache."""

    def ready(self) -> AbstractContextManager[None]:
        """Around the calls of a rollout: within the block the weights stay where they are."""
        ...

    def hidden(self, arena: Arena, packed: Packed) -> Tensor:
        """Return the last layer's hidden states (n, D) after the final norm, not multiplied by `Model.logit_scale`.
        Writes the tokens' keys and values to the arena."""
        ...
