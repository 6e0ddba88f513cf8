"""The fused decoder: our own forward pass over the module's tensors, for the families of model/architectures.py.

One call of compiled code runs all layers (csrc/cpu/decode_step.cpp). On a device without it, the same step is a
sequence of ops (rollout/op_step.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.model import lora
from rlhf_fast.model.adjacent_weights import make_adjacent
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.compiled_step import SUPPORTED_DTYPES, CompiledStep, find_kernels
from rlhf_fast.rollout.decoder import TokenBatch
from rlhf_fast.rollout.kv_cache import KVShape, PagedKVCache
from rlhf_fast.rollout.merged_linears import merge_adjacent
from rlhf_fast.rollout.op_step import OpStep
from rlhf_fast.rollout.verify import verify_decoder
from rlhf_fast.rollout.weights import DecoderWeights, read_weights, rope_table


class FusedDecoder:
    """A Decoder that runs our own step. Create it by `make`."""

    name = "fused"

    def __init__(self, model: Model, weights: DecoderWeights):
        self.model = model
        self.dtype = model.head_weight.dtype
        self.shapes = [KVShape(weights.num_kv_heads, weights.head_dim, weights.head_dim)] * len(weights.layers)
        self._weights: DecoderWeights | None = None
        self._step: CompiledStep | OpStep | None = None

    @property
    def is_compiled(self) -> bool:
        """True where the step is one call of compiled code, not a sequence of ops."""
        return find_kernels(self.model.device) is not None and self.dtype in SUPPORTED_DTYPES

    @classmethod
    @torch.no_grad()
    def make(cls, model: Model) -> FusedDecoder:
        """Return a decoder for `model`, compared with its own forward. Unsupported if there is none."""
        if model.device.type == "cuda":
            read_weights(model)  # nothing is moved in a model that is refused
            make_adjacent(model.decoder)
        with model.eval_mode(), lora.nonzero_adapters(model.module):
            weights = read_weights(model)
            decoder = cls(model, weights)
            with decoder._use(weights):
                verify_decoder(model, decoder)
        return decoder

    @contextmanager
    def session(self) -> Iterator[None]:
        """Read the weights' addresses, and use them within the block; see Decoder."""
        try:
            weights = read_weights(self.model)
        except Unsupported as reason:  # the model was changed after `make`
            raise UserError(
                f"{self.model.name}: can no longer be decoded, because {reason}; make a new Rollout"
            ) from None
        with self._use(weights):
            yield

    @contextmanager
    def _use(self, weights: DecoderWeights) -> Iterator[None]:
        self._weights = weights
        try:
            yield
        finally:
            self._weights = self._step = None

    def hidden(self, cache: PagedKVCache, batch: TokenBatch) -> Tensor:
        """Return the hidden states (n, D); see Decoder."""
        return self._get_step(cache)(batch)

    def op_step(self, cache: PagedKVCache) -> OpStep | None:
        """Return the step over `cache` if it is a sequence of ops; call it only within `with decoder.session()`."""
        step = self._get_step(cache)
        return step if isinstance(step, OpStep) else None

    def _get_step(self, cache: PagedKVCache) -> CompiledStep | OpStep:
        if self._weights is None:
            raise RuntimeError("FusedDecoder.hidden: only within `with decoder.session()`")
        if self._step is None or self._step.cache is not cache:
            self._step = self._make_step(self._weights, cache)
        return self._step

    def _make_step(self, weights: DecoderWeights, cache: PagedKVCache) -> CompiledStep | OpStep:
        rope = rope_table(weights, cache.max_pages_per_slot * cache.page_size)
        if not self.is_compiled:
            return OpStep(merge_adjacent(weights), cache, rope)
        return CompiledStep(find_kernels(self.model.device), weights, cache, rope)
