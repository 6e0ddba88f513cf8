"""What a decoder is: one forward function that serves prefill and decode, N packed tokens over an Arena.

fused          our own step over the module's tensors, for the families it knows
attention      the module's own forward, with our attention in the place of transformers'
transformers   no decoder: transformers' own cache (rollout/cached.py), for whatever is left
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from importlib import import_module
from logging import getLogger
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.model import Model
from rlhf_fast.rollout.arena import Arena, KVShape
from rlhf_fast.rollout.rotation import by_length

Path = Literal["auto", "fused", "attention", "transformers"]
log = getLogger("rlhf_fast")
_told: set[str] = set()


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
        """(n, D): the last layer after the final norm, not scaled (`Model.scale`). Writes the tokens' keys and values
        to the arena."""
        ...


def choose(model: Model, path: Path = "auto") -> Decoder | None:
    """The fastest decoder that serves `model`, or None: transformers' own cache. `path` insists on one, and raises
    UserError where it cannot."""
    if path not in Path.__args__:
        raise UserError(f"rollout: there is no path {path!r}; there are: {', '.join(Path.__args__)}")
    for name, make in (("fused", _fused), ("attention", _attention)):
        if path not in ("auto", name):
            continue
        try:
            if rotation := by_length(model):
                raise Unsupported(f"its rotation ({rotation.kind}) depends on the length of the text")
            if path == "auto" and name == "attention":
                _need_kernel(model.device.type)
            return make(model)
        except Unsupported as reason:
            if path == name:
                raise UserError(f"{model.name}: path {name!r} cannot decode it, because {reason}") from reason
            if name == "attention":
                _warn(model, str(reason))
    return None


def _fused(model: Model) -> Decoder:
    """Imported here, as below: rollout/fused.py imports this file."""
    return import_module("rlhf_fast.rollout.fused").FusedDecoder.make(model)


def _attention(model: Model) -> Decoder:
    return import_module("rlhf_fast.rollout.attention").AttentionDecoder.make(model)


def _need_kernel(device: str) -> None:
    """The reference of decode_attention is right, but slower than transformers' cache."""
    if ops.decode_attention.chosen(device) == "reference":
        raise Unsupported(f"decode_attention has no kernel here: {ops.decode_attention.why(device)}")


def _warn(model: Model, reason: str) -> None:
    """Nobody falls back in silence: once a reason, or an error under RLHF_FAST_STRICT=1."""
    text = f"{model.name}: responses are sampled over transformers' own cache, slower, because {reason}"
    if os.environ.get("RLHF_FAST_STRICT") == "1":
        raise UserError(f"RLHF_FAST_STRICT=1 and {text}")
    if text not in _told:
        _told.add(text)
        log.warning(text)
