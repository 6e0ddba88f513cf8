"""The fused decoder: our own forward pass over the module's tensors, for the families of rollout/architectures.py.

One call of compiled code does all layers of a step (csrc/cpu/decode_step.cpp). Where there is none for the device, the
same step is a chain of ops (rollout/op_step.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.rollout import compiled_step
from rlhf_fast.rollout.architectures import Parts, read
from rlhf_fast.rollout.decoder import Packed, Unsupported
from rlhf_fast.rollout.kv_cache import Arena, KVShape
from rlhf_fast.rollout.op_step import StepByOps
from rlhf_fast.rollout.verify import prove


class FusedDecoder:
    """See the head of the file; `make` rather than the constructor."""

    name = "fused"

    def __init__(self, model: Model, parts: Parts):
        self.model, self.dtype = model, model.head_weight.dtype
        self.shapes = [KVShape(parts.kv_heads, parts.head_dim, parts.head_dim)] * len(parts.layers)
        self._parts: Parts | None = None
        self._step: compiled_step.CompiledStep | StepByOps | None = None

    @classmethod
    @torch.no_grad()
    def make(cls, model: Model) -> FusedDecoder:
        """A decoder for `model`, or Unsupported."""
        parts = read(model)
        decoder, training = cls(model, parts), model.module.training
        model.module.eval()
        try:
            with decoder.ready():
                prove(model, decoder)
        finally:
            model.module.train(training)
        return decoder

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within the block the weights are where they were at its begin. What the block needs is gone after it."""
        try:
            self._parts = read(self.model)
        except Unsupported as reason:  # it was not so when the decoder was made
            raise UserError(
                f"{self.model.name}: can no longer be decoded, because {reason}; make a new Rollout"
            ) from None
        try:
            yield
        finally:
            self._parts = self._step = None

    def hidden(self, arena: Arena, packed: Packed) -> Tensor:
        """(n, D), see Decoder."""
        if self._parts is None:
            raise RuntimeError("FusedDecoder.hidden: only within `with decoder.ready()`")
        if self._step is None or self._step.arena is not arena:
            cos, sin = self._angles(arena.width * arena.page)
            compiled = self.dtype in compiled_step.SERVED and compiled_step.kernels(self.model.device) is not None
            self._step = (compiled_step.CompiledStep if compiled else StepByOps)(self._parts, arena, cos, sin)
        return self._step(packed)

    def _angles(self, positions: int) -> tuple[Tensor | None, Tensor | None]:
        """cos and sin (positions, r / 2) float32, rounded as the module rounds them."""
        rotary = self._parts.rotary
        if rotary is None:
            return None, None
        like = torch.empty(0, dtype=self._parts.embedding.dtype, device=self.model.device)
        cos, sin = rotary(like, torch.arange(positions, device=like.device)[None])
        half = cos.shape[-1] // 2
        return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()
