"""A forward step as one call of compiled code, csrc/cpu/decode_step.cpp, whose structures are mirrored here."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.kernels import _product
from rlhf_fast.kernels._backends import COMPILED, forced_backend
from rlhf_fast.kernels._launch import stream_or_threads
from rlhf_fast.model.architectures import Norm
from rlhf_fast.rollout.decoder import TokenBatch
from rlhf_fast.rollout.kv_cache import PagedKVCache
from rlhf_fast.rollout.weights import DecoderWeights, LayerWeights, LinearWeights, RopeTable

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16)
MIN_NANOSECONDS_TO_THREAD = 1_000_000
"""A step that takes one thread less than this runs on one thread: threads wait for one another eight times a layer."""


class _Norm(ctypes.Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("is_bf16", c_int32),
        ("centered", c_int32),
        ("eps", c_float),
        ("padding", c_float),
    ]


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("stride", c_int64),
        ("is_bf16", c_int32),
        ("transposed", c_int32),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("attention_norm", _Norm),
        ("mlp_norm", _Norm),
        ("q_norm", _Norm),
        ("k_norm", _Norm),
        ("qkv", _Matrix * 3),
        ("out", _Matrix),
        ("gate", _Matrix),
        ("up", _Matrix),
        ("down", _Matrix),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("window", c_int64),
        ("rotary_dim", c_int32),
        ("scale", c_float),
    ]


class _Decoder(ctypes.Structure):
    _fields_ = [
        ("num_layers", c_int64),
        ("hidden_size", c_int64),
        ("mlp_size", c_int64),
        ("vocab_size", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("page_size", c_int64),
        # head h of q is at q_offset + h * q_stride of a row of qkv, and so on
        ("q_offset", c_int64),
        ("k_offset", c_int64),
        ("v_offset", c_int64),
        ("q_stride", c_int64),
        ("kv_stride", c_int64),
        ("layers", c_void_p),
        ("embedding", c_void_p),
        ("position_embedding", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("final_norm", _Norm),
        ("activation", c_int32),
        ("parallel_residual", c_int32),
        ("embedding_is_bf16", c_int32),
        ("cache_is_bf16", c_int32),
    ]


def find_kernels(device: torch.device | None = None) -> Any:
    """Return the compiled module that has the step for `device` (default: the CPU). None if none is built, or if the
    reference is forced."""
    forced, device_type = forced_backend(), "cpu" if device is None else device.type
    able = [
        name
        for name, module in COMPILED.items()
        if name.partition(":")[0] == device_type and hasattr(module, "decode_step") and forced in (None, name)
    ]
    return COMPILED[able[-1]] if able else None


class CompiledStep:
    """The forward step over one cache. It keeps a reference to every tensor whose address it stores."""

    def __init__(self, kernels: Any, weights: DecoderWeights, cache: PagedKVCache, rope: RopeTable | None):
        self.kernels = kernels
        self.cache = cache
        self.hidden_size = weights.embedding.shape[1]
        self.workspace = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._workspace_bytes: dict[tuple[int, int, int], int] = {}
        self._kept: list[Tensor] = []
        rotary_dim = 0 if rope is None else 2 * rope.cos.shape[1]
        self.layers = (_Layer * len(weights.layers))()
        for i, layer in enumerate(weights.layers):
            self._fill_layer(self.layers[i], layer, cache.k[i], cache.v[i], rotary_dim if layer.uses_rope else 0)
        d = weights.head_dim
        q_size, kv_size = weights.num_heads * d, weights.num_kv_heads * d
        self.decoder = _Decoder(
            num_layers=len(weights.layers),
            hidden_size=self.hidden_size,
            mlp_size=weights.layers[0].up.out_features,
            vocab_size=len(weights.embedding),
            num_heads=weights.num_heads,
            num_kv_heads=weights.num_kv_heads,
            head_dim=d,
            page_size=cache.page_size,
            q_offset=0,
            k_offset=d if weights.interleaved_qkv else q_size,
            v_offset=2 * d if weights.interleaved_qkv else q_size + kv_size,
            q_stride=3 * d if weights.interleaved_qkv else d,
            kv_stride=3 * d if weights.interleaved_qkv else d,
            layers=ctypes.addressof(self.layers),
            embedding=self._data_ptr(weights.embedding),
            position_embedding=self._data_ptr(weights.position_embedding),
            cos=None if rope is None else self._data_ptr(rope.cos),
            sin=None if rope is None else self._data_ptr(rope.sin),
            final_norm=self._norm(weights.final_norm),
            activation=getattr(kernels, f"activation_{weights.activation}"),
            parallel_residual=weights.parallel_residual,
            embedding_is_bf16=weights.embedding.dtype == torch.bfloat16,
            cache_is_bf16=cache.dtype == torch.bfloat16,
        )

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Return the hidden states (n, D) float32."""
        indices = batch.logits_indices
        if indices is None:
            indices = torch.arange(len(batch.tokens), device="cpu")
        # dtype and device are given, whatever torch's defaults are
        hidden = torch.empty(len(indices), self.hidden_size, dtype=torch.float32, device="cpu")
        num_threads = stream_or_threads(hidden)
        self._reserve_workspace(len(batch.tokens), num_threads)
        self.kernels.decode_step(
            ctypes.addressof(self.decoder),
            batch.tokens.data_ptr(),
            batch.positions.data_ptr(),
            batch.slots.data_ptr(),
            len(batch.tokens),
            batch.block_table.data_ptr(),
            batch.block_table.shape[1],
            indices.data_ptr(),
            len(indices),
            hidden.data_ptr(),
            _product.BF16_DOT,
            MIN_NANOSECONDS_TO_THREAD,
            self.workspace.data_ptr(),
            num_threads,
        )
        return hidden

    def _reserve_workspace(self, num_tokens: int, num_threads: int) -> None:
        """Make the workspace large enough for a call. Its size is queried once for each key."""
        key = (min(num_tokens, self.kernels.decode_step_block), num_threads, _product.BF16_DOT)
        if key not in self._workspace_bytes:
            size = torch.zeros(1, dtype=torch.int64, device="cpu")
            self.kernels.decode_step_workspace(
                ctypes.addressof(self.decoder),
                ctypes.sizeof(_Decoder),
                ctypes.sizeof(_Layer),
                num_tokens,
                _product.BF16_DOT,
                num_threads,
                size.data_ptr(),
            )
            self._workspace_bytes[key] = int(size)
        if self._workspace_bytes[key] > len(self.workspace):
            self.workspace = torch.empty(self._workspace_bytes[key], dtype=torch.uint8, device="cpu")

    def _fill_layer(self, target: _Layer, layer: LayerWeights, k_cache: Tensor, v_cache: Tensor, rotary_dim: int):
        target.attention_norm = self._norm(layer.attention_norm)
        target.mlp_norm = self._norm(layer.mlp_norm)
        target.q_norm = self._norm(layer.q_norm)
        target.k_norm = self._norm(layer.k_norm)
        for i, linear in enumerate(layer.qkv):
            target.qkv[i] = self._matrix(linear)
        target.out = self._matrix(layer.out)
        target.gate = self._matrix(layer.gate)
        target.up = self._matrix(layer.up)
        target.down = self._matrix(layer.down)
        target.k_cache = k_cache.data_ptr()
        target.v_cache = v_cache.data_ptr()
        target.window = layer.window
        target.rotary_dim = rotary_dim
        target.scale = layer.scale

    def _data_ptr(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _norm(self, norm: Norm | None) -> _Norm:
        if norm is None:
            return _Norm()
        return _Norm(
            weight=self._data_ptr(norm.weight),
            bias=self._data_ptr(norm.bias),
            is_bf16=norm.weight.dtype == torch.bfloat16,
            centered=norm.centered,
            eps=norm.eps,
        )

    def _matrix(self, linear: LinearWeights | None) -> _Matrix:
        if linear is None:
            return _Matrix()
        assert not linear.is_split, "only a GPU's step multiplies split weights"
        bias = None if linear.bias is None else linear.bias.to(linear.weight.dtype)
        return _Matrix(
            weight=self._data_ptr(linear.weight),
            bias=self._data_ptr(bias),
            out_features=linear.out_features,
            in_features=linear.weight.shape[0 if linear.transposed else 1],
            stride=linear.weight.stride(0),
            is_bf16=linear.weight.dtype == torch.bfloat16,
            transposed=linear.transposed,
        )
