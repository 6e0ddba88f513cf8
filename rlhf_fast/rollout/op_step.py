"""A forward step as a sequence of ops, about ten a layer, for devices without a compiled step.

It computes what csrc/cpu/decode_step.cpp computes. Activations have the model's dtype, as in the model's own forward.
A token at position -1 is padding, on a GPU: it writes nothing to the cache and attends to nothing.

A layer's output is added to the residual stream by the norm after it, which reads both in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.model.architectures import Norm
from rlhf_fast.rollout.decoder import TokenBatch
from rlhf_fast.rollout.kv_cache import PagedKVCache
from rlhf_fast.rollout.prompt_attention import PromptAttention, fast_kernels
from rlhf_fast.rollout.weights import DecoderWeights, LayerWeights, LinearWeights, RopeTable

Attend = Callable[[int, LayerWeights, Tensor, Tensor, Tensor], Tensor]
"""(index of the layer, layer, q, k, v) -> the attention's output"""


class OpStep:
    """The forward step over one cache; `rope` is None for a model without RoPE."""

    def __init__(self, weights: DecoderWeights, cache: PagedKVCache, rope: RopeTable | None):
        self.weights = weights
        self.cache = cache
        self.rope = rope

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Return the hidden states (n, D)."""
        weights, positions, page_size = self.weights, batch.positions.long(), self.cache.page_size
        pages = batch.block_table[batch.slots.long(), positions // page_size].long()
        # not torch.where, which copies a number to the GPU and waits
        slot_mapping = (pages * page_size + positions % page_size).masked_fill(positions < 0, -1)
        lengths = batch.positions + 1
        no_angles = torch.empty(len(positions), 0, dtype=torch.float32, device=positions.device)
        no_rope = RopeTable(no_angles, no_angles)
        rope = no_rope if self.rope is None else RopeTable(self.rope.cos[positions], self.rope.sin[positions])
        x = weights.embedding[batch.tokens]
        if weights.position_embedding is not None:
            x = x + weights.position_embedding[positions]
        prompts = None
        if batch.prompt_lengths is not None:
            prompts = PromptAttention(batch.prompt_lengths, slot_mapping, self.cache, weights.num_heads)

        def attend(index: int, layer: LayerWeights, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """Store keys and values, and return the attention's output (N, H, d)."""
            k_cache, v_cache = self.cache.k[index], self.cache.v[index]
            q = ops.rope_store(q, k, v, *(rope if layer.uses_rope else no_rope), k_cache, v_cache, slot_mapping)
            if prompts is not None and prompts.serves(q, k_cache, layer.window):
                return prompts(q, k_cache, v_cache, layer.scale)
            return ops.decode_attention(
                q, k_cache, v_cache, batch.block_table, lengths, batch.slots, layer.scale, layer.window
            )

        out = None
        with nullcontext() if prompts is None else fast_kernels():
            for index, layer in enumerate(weights.layers):
                kept = batch.logits_indices if index == len(weights.layers) - 1 else None
                x, out = self._layer(index, layer, x, out, attend, kept)
        return _add_and_norm(weights.final_norm, x, out)

    def _layer(
        self, index: int, layer: LayerWeights, x: Tensor, previous: Tensor | None, attend: Attend, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Add the output of the previous layer to x in place. Return x and what the next one shall add to it; of the
        `kept` tokens alone, if they are given."""
        normed = _add_and_norm(layer.attention_norm, x, previous)
        attended = attend(index, layer, *self._qkv(normed, layer)).flatten(1)
        if kept is not None:
            x, attended = x[kept], attended[kept]
        out = _linear(layer.out, attended)
        if self.weights.parallel_residual:
            return x, out + self._mlp(layer, _norm(layer.mlp_norm, x))
        return x, self._mlp(layer, _add_and_norm(layer.mlp_norm, x, out))

    def _qkv(self, x: Tensor, layer: LayerWeights) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (N, num_heads, d), and k and v (N, num_kv_heads, d)."""
        weights, d = self.weights, self.weights.head_dim
        outputs = [_linear(linear, x) for linear in layer.qkv]
        if weights.interleaved_qkv:
            q, k, v = outputs[0].view(len(x), weights.num_heads, 3, d).unbind(2)
        elif len(outputs) == 1:
            sizes = [weights.num_heads, weights.num_kv_heads, weights.num_kv_heads]
            q, k, v = outputs[0].view(len(x), -1, d).split(sizes, 1)
        else:
            q, k, v = (output.view(len(x), -1, d) for output in outputs)
        if layer.q_norm is not None:
            q = _norm(layer.q_norm, q)
        if layer.k_norm is not None:
            k = _norm(layer.k_norm, k)
        return q, k, v

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        if layer.gate is None:
            return _linear(layer.down, self._activate(_linear(layer.up, x)))
        if layer.gate_up is None:
            gate, up = _linear(layer.gate, x), _linear(layer.up, x)
        else:
            gate, up = _linear(layer.gate_up, x).chunk(2, dim=-1)
        inner = ops.swiglu(gate, up) if self.weights.activation == "silu" else self._activate(gate) * up
        return _linear(layer.down, inner)

    def _activate(self, x: Tensor) -> Tensor:
        if self.weights.activation == "silu":
            return F.silu(x)
        return ops.gelu(x, "tanh" if self.weights.activation == "gelu_tanh" else "none")


def _linear(linear: LinearWeights, x: Tensor) -> Tensor:
    """Multiply in the dtype of the weight: one with an adapter may be float32 also where x is half precision."""
    weight = linear.weight.t() if linear.transposed else linear.weight
    if linear.is_split:
        x = torch.cat((x, x), dim=-1)
    bias = linear.bias
    if weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype):
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.to(weight.dtype)
    return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def _add_and_norm(norm: Norm, x: Tensor, out: Tensor | None) -> Tensor:
    """Add `out` to x in place, and return the norm of x."""
    return _norm(norm, x) if out is None else _norm(norm, out, residual=x)


def _norm(norm: Norm, x: Tensor, residual: Tensor | None = None) -> Tensor:
    shape = x.shape
    x = x.reshape(-1, shape[-1])
    if norm.centered:
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, residual).view(shape)
    return ops.rms_norm(x, norm.weight, norm.eps, residual).view(shape)
