"""A decoding step as one call of compiled code: csrc/cpu/decode_step.cpp. The structures here mirror those there."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from rlhf_fast.kernels import linear_sample_tokens
from rlhf_fast.kernels._backends import COMPILED, forced_backend
from rlhf_fast.kernels._launch import stream_or_threads
from rlhf_fast.rollout.architectures import LinearPart, NormPart, Parts
from rlhf_fast.rollout.decoder import Packed
from rlhf_fast.rollout.kv_cache import Arena

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
SERVED = (torch.float32, torch.bfloat16)
LEAST = 1_000_000
"""Nanoseconds of one thread from which on others are called: they wait for one another eight times a layer."""


class _Norm(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("is_bf16", c_int32), ("centered", c_int32),
                ("eps", c_float), ("padding", c_float)]  # fmt: skip


class _Matrix(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("out", c_int64), ("inner", c_int64), ("stride", c_int64),
                ("is_bf16", c_int32), ("transposed", c_int32)]  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = [("before_attention", _Norm), ("before_mlp", _Norm), ("query", _Norm), ("key", _Norm),
                ("qkv", _Matrix * 3), ("out", _Matrix), ("gate", _Matrix), ("up", _Matrix), ("down", _Matrix),
                ("k_cache", c_void_p), ("v_cache", c_void_p), ("window", c_int64), ("rotary", c_int32),
                ("scale", c_float)]  # fmt: skip


class _Decoder(ctypes.Structure):
    _fields_ = [*((name, c_int64) for name in "layers D F vocabulary heads kv_heads head_dim page".split()),
                *((name, c_int64) for name in "q_at k_at v_at q_step kv_step".split()),
                ("layer", c_void_p), ("embedding", c_void_p), ("position_embedding", c_void_p), ("cos", c_void_p),
                ("sin", c_void_p), ("last", _Norm), ("activation", c_int32), ("parallel", c_int32),
                ("embedding_is_bf16", c_int32), ("cache_is_bf16", c_int32)]  # fmt: skip


def kernels(device: torch.device | None = None):
    """The compiled module that has the step for `device` (default: the CPU), or None: none is built, or the
    environment forces the reference."""
    backend, kind = forced_backend(), "cpu" if device is None else device.type
    able = [
        name for name, module in COMPILED.items() if name.partition(":")[0] == kind and hasattr(module, "decode_step")
    ]
    able = [name for name in able if backend in (None, name)]
    return COMPILED[able[-1]] if able else None


class CompiledStep:
    """The layers over one arena. Holds every tensor whose address it has handed out."""

    def __init__(self, parts: Parts, arena: Arena, cos: Tensor | None, sin: Tensor | None):
        self.kernels, self.parts, self.arena = kernels(arena.memory.device), parts, arena
        self.kept = [cos, sin]
        self.workspace = torch.empty(0, dtype=torch.uint8, device="cpu")
        layers = (_Layer * len(parts.layers))()
        half = 0 if cos is None else cos.shape[1]
        for i, (into, part) in enumerate(zip(layers, parts.layers, strict=True)):
            into.before_attention, into.before_mlp = self._norm(part.before_attention), self._norm(part.before_mlp)
            into.query, into.key = self._norm(part.query), self._norm(part.key)
            for j, matrix in enumerate(part.qkv):
                into.qkv[j] = self._matrix(matrix)
            into.out, into.gate = self._matrix(part.out), self._matrix(part.gate)
            into.up, into.down = self._matrix(part.up), self._matrix(part.down)
            into.k_cache, into.v_cache = arena.k[i].data_ptr(), arena.v[i].data_ptr()
            into.window, into.scale, into.rotary = part.window, part.scale, 2 * half if part.rotates else 0
        self.layers = layers
        q, kv, d = parts.heads * parts.head_dim, parts.kv_heads * parts.head_dim, parts.head_dim
        places = (0, d, 2 * d, 3 * d, 3 * d) if parts.interleaved else (0, q, q + kv, d, d)
        self.width = parts.embedding.shape[1]
        self.decoder = _Decoder(
            len(layers), self.width, parts.layers[0].up.out, len(parts.embedding),
            parts.heads, parts.kv_heads, d, arena.page, *places, ctypes.addressof(layers),
            self._address(parts.embedding), self._address(parts.positions), self._address(cos), self._address(sin),
            self._norm(parts.last), ACTIVATIONS.index(parts.activation), parts.parallel,
            parts.embedding.dtype == torch.bfloat16, arena.dtype == torch.bfloat16,
        )  # fmt: skip

    def __call__(self, packed: Packed) -> Tensor:
        """(n, D) float32"""
        count = len(packed.tokens)
        wanted = torch.arange(count, device="cpu") if packed.wanted is None else packed.wanted
        hidden = torch.empty(len(wanted), self.width, dtype=torch.float32, device="cpu")  # whatever the defaults are
        self._make_room(min(count, 64), packed)
        self._run(packed, count, wanted, hidden, self.workspace.data_ptr(), 0)
        return hidden

    def _make_room(self, rows: int, packed: Packed) -> None:
        needed = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._run(packed, rows, packed.tokens, packed.tokens, 0, needed.data_ptr())
        if int(needed) > len(self.workspace):
            self.workspace = torch.empty(int(needed), dtype=torch.uint8, device="cpu")

    def _run(self, packed: Packed, count: int, wanted: Tensor, hidden: Tensor, workspace: int, needed: int) -> None:
        self.kernels.decode_step(
            ctypes.addressof(self.decoder), ctypes.sizeof(_Decoder), ctypes.sizeof(_Layer), packed.tokens.data_ptr(),
            packed.positions.data_ptr(), packed.slots.data_ptr(), count, packed.block_table.data_ptr(),
            packed.block_table.shape[1], wanted.data_ptr(), len(wanted), hidden.data_ptr(),
            linear_sample_tokens.BF16_DOT, LEAST, workspace, needed, stream_or_threads(hidden),
        )  # fmt: skip

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _norm(self, part: NormPart | None) -> _Norm:
        if part is None:
            return _Norm()
        half = part.weight.dtype == torch.bfloat16
        return _Norm(self._address(part.weight), self._address(part.bias), half, part.centered, part.eps, 0.0)

    def _matrix(self, part: LinearPart | None) -> _Matrix:
        if part is None:
            return _Matrix()
        bias = None if part.bias is None else part.bias.to(part.weight.dtype)
        inner = part.weight.shape[0 if part.transposed else 1]
        return _Matrix(
            self._address(part.weight), self._address(bias), part.out, inner, part.weight.stride(0),
            part.weight.dtype == torch.bfloat16, part.transposed,
        )  # fmt: skip
