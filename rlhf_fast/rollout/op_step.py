"""A forward step as a sequence of ops, about ten a layer, for devices without a compiled step.

It computes what csrc/cpu/decode_step.cpp computes. Activations have the model's dtype, as in the model's own forward.
A token at position -1 is padding, on a GPU: it writes nothing to the cache and attends to nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.rollout.architectures import DecoderWeights, LayerWeights, LinearWeights, NormWeights, RopeTable
from rlhf_fast.rollout.decoder import TokenBatch
from rlhf_fast.rollout.kv_cache import PagedKVCache


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
        slot_mapping = torch.where(positions < 0, -1, pages * page_size + positions % page_size)
        lengths = batch.positions + 1
        no_angles = torch.empty(len(positions), 0, dtype=torch.float32, device=positions.device)
        no_rope = RopeTable(no_angles, no_angles)
        rope = no_rope if self.rope is None else RopeTable(self.rope.cos[positions], self.rope.sin[positions])
        x = weights.embedding[batch.tokens]
        if weights.position_embedding is not None:
            x = x + weights.position_embedding[positions]
        for index, layer in enumerate(weights.layers):
            x = self._layer(index, layer, x, batch, lengths, slot_mapping, rope if layer.uses_rope else no_rope)
        if batch.logits_indices is not None:
            x = x[batch.logits_indices]
        return _norm(weights.final_norm, x)

    def _layer(
        self,
        index: int,
        layer: LayerWeights,
        x: Tensor,
        batch: TokenBatch,
        lengths: Tensor,
        slot_mapping: Tensor,
        rope: RopeTable,
    ) -> Tensor:
        q, k, v = self._qkv(_norm(layer.attention_norm, x), layer)
        k_cache, v_cache = self.cache.k[index], self.cache.v[index]
        q = ops.rope_store(q, k, v, *rope, k_cache, v_cache, slot_mapping)
        attended = ops.decode_attention(
            q, k_cache, v_cache, batch.block_table, lengths, batch.slots, layer.scale, layer.window
        )
        out = _linear(layer.out, attended.flatten(1))
        if self.weights.parallel_residual:
            return x + out + self._mlp(layer, _norm(layer.mlp_norm, x))
        normed = _norm(layer.mlp_norm, out, residual=x)  # this adds `out` to x in place
        return x + self._mlp(layer, normed)

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
        up = _linear(layer.up, x)
        if layer.gate is None:
            return _linear(layer.down, self._activate(up))
        gate = _linear(layer.gate, x)
        inner = ops.swiglu(gate, up) if self.weights.activation == "silu" else self._activate(gate) * up
        return _linear(layer.down, inner)

    def _activate(self, x: Tensor) -> Tensor:
        if self.weights.activation == "silu":
            return F.silu(x)
        return ops.gelu(x, "tanh" if self.weights.activation == "gelu_tanh" else "none")


def _linear(linear: LinearWeights, x: Tensor) -> Tensor:
    """Multiply in the dtype of the weight: a weight with an adapter is float32 also where x is half precision."""
    weight = linear.weight.t() if linear.transposed else linear.weight
    bias = linear.bias
    if weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype):
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.to(weight.dtype)
    return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def _norm(norm: NormWeights, x: Tensor, residual: Tensor | None = None) -> Tensor:
    shape = x.shape
    x = x.reshape(-1, shape[-1])
    if norm.centered:
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, residual).view(shape)
    return ops.rms_norm(x, norm.weight, norm.eps, residual).view(shape)
