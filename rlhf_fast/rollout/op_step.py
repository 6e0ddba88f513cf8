"""A decoding step as a chain of ops, about ten a layer: the same step as csrc/cpu/decode_step.cpp, on any device.

It answers where there is no compiled step. Activations have the model's dtype, as in its own forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.rollout.architectures import LayerPart, LinearPart, NormPart, Parts
from rlhf_fast.rollout.decoder import Packed
from rlhf_fast.rollout.kv_cache import Arena


class StepByOps:
    """The layers over one arena; cos and sin (positions, r / 2) float32, or None."""

    def __init__(self, parts: Parts, arena: Arena, cos: Tensor | None, sin: Tensor | None):
        self.parts, self.arena, self.cos, self.sin = parts, arena, cos, sin

    def __call__(self, packed: Packed) -> Tensor:
        """(n, D)"""
        parts, positions = self.parts, packed.positions.long()
        pages = packed.block_table[packed.slots.long(), positions // self.arena.page].long()
        places = pages * self.arena.page + positions % self.arena.page
        nothing = torch.empty(len(positions), 0, dtype=torch.float32, device=positions.device)
        angles = (nothing, nothing) if self.cos is None else (self.cos[positions], self.sin[positions])
        x = parts.embedding[packed.tokens]
        if parts.positions is not None:
            x = x + parts.positions[positions]
        for index, layer in enumerate(parts.layers):
            turn = angles if layer.rotates else (nothing, nothing)
            x = self._layer(index, layer, x, packed, places, turn)
        return _norm(parts.last, x if packed.wanted is None else x[packed.wanted])

    def _layer(
        self, index: int, layer: LayerPart, x: Tensor, packed: Packed, places: Tensor, angles: tuple[Tensor, Tensor]
    ) -> Tensor:
        q, k, v = self._split(_norm(layer.before_attention, x), layer)
        k_cache, v_cache = self.arena.k[index], self.arena.v[index]
        q = ops.rope_store(q, k, v, *angles, k_cache, v_cache, places)
        attended = ops.decode_attention(
            q, k_cache, v_cache, packed.block_table, packed.positions + 1, packed.slots, layer.scale, layer.window
        )
        out = _linear(layer.out, attended.flatten(1))
        if self.parts.parallel:
            return x + out + self._mlp(layer, _norm(layer.before_mlp, x))
        y = _norm(layer.before_mlp, out, residual=x)  # adds `out` to x
        return x + self._mlp(layer, y)

    def _split(self, y: Tensor, layer: LayerPart) -> tuple[Tensor, Tensor, Tensor]:
        """(N, H, d), (N, Hkv, d) twice."""
        parts, d = self.parts, self.parts.head_dim
        outs = [_linear(matrix, y) for matrix in layer.qkv]
        if parts.interleaved:
            q, k, v = outs[0].view(len(y), parts.heads, 3, d).unbind(2)
        elif len(outs) == 1:
            q, k, v = outs[0].view(len(y), -1, d).split([parts.heads, parts.kv_heads, parts.kv_heads], 1)
        else:
            q, k, v = (out.view(len(y), -1, d) for out in outs)
        q = q if layer.query is None else _norm(layer.query, q)
        k = k if layer.key is None else _norm(layer.key, k)
        return q, k, v

    def _mlp(self, layer: LayerPart, y: Tensor) -> Tensor:
        up = _linear(layer.up, y)
        if layer.gate is None:
            return _linear(layer.down, self._activate(up))
        gate = _linear(layer.gate, y)
        inner = ops.swiglu(gate, up) if self.parts.activation == "silu" else self._activate(gate) * up
        return _linear(layer.down, inner)

    def _activate(self, x: Tensor) -> Tensor:
        if self.parts.activation == "silu":
            return F.silu(x)
        return ops.gelu(x, "tanh" if self.parts.activation == "gelu_tanh" else "none")


def _linear(part: LinearPart, x: Tensor) -> Tensor:
    """A float32 sum of weight and adapter beside half-precision activations is multiplied in float32."""
    weight = part.weight.t() if part.transposed else part.weight
    bias = None if part.bias is None else part.bias.to(weight.dtype)
    return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def _norm(part: NormPart, x: Tensor, residual: Tensor | None = None) -> Tensor:
    shape = x.shape
    x = x.reshape(-1, shape[-1])
    if part.centered:
        return ops.layer_norm(x, part.weight, part.bias, part.eps, residual).view(shape)
    return ops.rms_norm(x, part.weight, part.eps, residual).view(shape)
