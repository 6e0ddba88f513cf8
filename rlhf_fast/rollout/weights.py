"""The weights of a decoder, for the families of model/architectures.py.

`read_weights(model)` returns the module's own tensors, without a copy. Only adapters cost memory: a weight that an
active LoRA changes is returned as a float32 sum, because training does not round that sum either; on a GPU as two
16-bit weights with that sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.model import lora
from rlhf_fast.model.architectures import Decoder, Norm, base_linear, read_decoder, rope_angles
from rlhf_fast.model.model import Model


class LinearWeights(NamedTuple):
    """x weight' + bias. If `transposed`, weight is (in, out), as in GPT-2's Conv1D."""

    weight: Tensor
    bias: Tensor | None
    transposed: bool
    is_split: bool = False
    """`weight` is two side by side along its inputs, of which each is multiplied by x; see `split_weight`."""

    @property
    def out_features(self) -> int:
        return self.weight.shape[1 if self.transposed else 0]


class LayerWeights(NamedTuple):
    """One layer: x + out(attention(norm(x))), then x + mlp(norm(x))."""

    attention_norm: Norm
    mlp_norm: Norm
    qkv: tuple[LinearWeights, ...]
    """One to three projections, whose outputs are concatenated."""
    out: LinearWeights
    gate: LinearWeights | None
    """None: the MLP is down(act(up(x))), else down(act(gate(x)) * up(x))."""
    up: LinearWeights
    down: LinearWeights
    scale: float
    """Factor on the attention scores."""
    window: int = 0
    """Positions that a token sees, itself included; 0 = all."""
    uses_rope: bool = True
    q_norm: Norm | None = None
    """Norm over each head before RoPE, as `k_norm`."""
    k_norm: Norm | None = None
    gate_up: LinearWeights | None = None
    """`gate` and `up` as one, where their weights are adjacent in memory; see model/adjacent_weights.py."""


class DecoderWeights(NamedTuple):
    """A decoder without its head."""

    layers: list[LayerWeights]
    final_norm: Norm
    embedding: Tensor
    position_embedding: Tensor | None
    """Learned positions (T, D)."""
    rotary: nn.Module | None
    """transformers' own module: (x, positions) -> cos, sin."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str
    interleaved_qkv: bool = False
    """A row of qkv holds (q, k, v) of head 0, then of head 1, ...; else all q, then all k, then all v."""
    parallel_residual: bool = False
    """Attention and MLP read the same input, and both outputs are added to it."""


class RopeTable(NamedTuple):
    """cos and sin of the RoPE angles, (positions, r / 2) float32, where r dimensions of each head are rotated."""

    cos: Tensor
    sin: Tensor


def read_weights(model: Model, split_sums: bool | None = None) -> DecoderWeights:
    """Return the weights of `model`. Unsupported if its architecture or their layout is not known.

    split_sums: whether sums of 16-bit weights and their adapters' products are split. None: on a GPU, whose tensor
    cores multiply 16-bit numbers and no float32."""
    if split_sums is None:
        split_sums = model.device.type == "cuda"
    weights = _weights(read_decoder(model.decoder), model.adapter_enabled, split_sums)
    _check_shapes(weights, model.head_weight)
    _check_layout(weights, model.head_weight)
    return weights


def rope_table(weights: DecoderWeights, num_positions: int) -> RopeTable | None:
    """Return the RoPE table of the first positions, rounded as the module rounds it; None without RoPE."""
    if weights.rotary is None:
        return None
    like = torch.empty(0, dtype=weights.embedding.dtype, device=weights.embedding.device)
    return RopeTable(*rope_angles(weights.rotary, like, torch.arange(num_positions, device=like.device)))


def _check_shapes(weights: DecoderWeights, head: Tensor) -> None:
    """Raise Unsupported unless all layers have the widths of the first, and the embedding has the head's tokens."""
    expected = {
        "qkv": (weights.num_heads + 2 * weights.num_kv_heads) * weights.head_dim,
        "out": weights.embedding.shape[1],
        "up": weights.layers[0].up.out_features,
    }
    for layer in weights.layers:
        found = {
            "qkv": sum(linear.out_features for linear in layer.qkv),
            "out": layer.out.out_features,
            "up": layer.up.out_features,
        }
        if found != expected or (layer.gate is not None and layer.gate.out_features != expected["up"]):
            raise Unsupported(f"its layers differ in width: {found}, not {expected}")
    if len(weights.embedding) < len(head):
        raise Unsupported(f"its head has {len(head)} tokens and its embedding {len(weights.embedding)}")


def _check_layout(weights: DecoderWeights, head: Tensor) -> None:
    """Check the layout that compiled code assumes: dtype, device, contiguous last dimension."""
    embeddings = [weights.embedding]
    if weights.position_embedding is not None:
        embeddings.append(weights.position_embedding)
    norms = [weights.final_norm]
    linears: list[LinearWeights] = []
    for layer in weights.layers:
        norms += [norm for norm in (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm) if norm]
        linears += [linear for linear in (*layer.qkv, layer.out, layer.gate, layer.up, layer.down) if linear]
    for norm in norms:
        if norm.bias is not None and norm.bias.dtype != norm.weight.dtype:
            raise Unsupported(f"a norm's weight is {norm.weight.dtype} and its bias {norm.bias.dtype}")
    if embeddings[-1].dtype != embeddings[0].dtype or not all(x.is_contiguous() for x in embeddings):
        raise Unsupported("its embeddings have two dtypes or are not contiguous")
    tensors = [*embeddings, *(part.weight for part in linears), *(norm.weight for norm in norms)]
    biases = [*(part.bias for part in linears), *(norm.bias for norm in norms)]
    for tensor in (*tensors, *(bias for bias in biases if bias is not None)):
        if tensor.dtype not in (head.dtype, torch.float32) or tensor.device != head.device or tensor.stride(-1) != 1:
            raise Unsupported(f"a weight is {tensor.dtype} on {tensor.device}, strides {tensor.stride()}")


def split_weight(weight: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    """Return a float32 weight as two of a 16-bit dtype: its rounding, and beside it, along its inputs, the rounding of
    what that leaves. In bfloat16 they keep 16 bits of the weight instead of 8, in as much memory as float32. Then
    x weight' is [x, x] split'. float16's two reach twice its largest number."""
    limit = torch.finfo(dtype).max
    high = torch.where(weight.isinf(), weight, weight.clamp(-limit, limit)).to(dtype)
    low = torch.where(high.isinf(), 0.0, weight - high.float()).to(dtype)
    return torch.cat((high, low), dim=0 if transposed else 1)


def _weights(decoder: Decoder, adapter_enabled: bool, split_sums: bool) -> DecoderWeights:
    """Return the weights of these parts, without their graph."""

    def linear(layer: Any) -> LinearWeights:
        return _linear(layer, adapter_enabled, split_sums)

    layers = [
        LayerWeights(
            attention_norm=_detach_norm(layer.attention_norm),
            mlp_norm=_detach_norm(layer.mlp_norm),
            qkv=tuple(linear(part) for part in layer.qkv),
            out=linear(layer.out),
            gate=None if layer.gate is None else linear(layer.gate),
            up=linear(layer.up),
            down=linear(layer.down),
            scale=layer.scale,
            window=layer.window,
            uses_rope=layer.uses_rope,
            q_norm=None if layer.q_norm is None else _detach_norm(layer.q_norm),
            k_norm=None if layer.k_norm is None else _detach_norm(layer.k_norm),
        )
        for layer in decoder.layers
    ]
    positions = decoder.position_embedding
    return DecoderWeights(
        layers=layers,
        final_norm=_detach_norm(decoder.final_norm),
        embedding=decoder.embedding.weight.detach(),
        position_embedding=None if positions is None else positions.weight.detach(),
        rotary=decoder.rotary,
        num_heads=decoder.num_heads,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        activation=decoder.activation,
        interleaved_qkv=decoder.interleaved_qkv,
        parallel_residual=decoder.parallel_residual,
    )


def _linear(layer: Any, adapter_enabled: bool, split_sums: bool) -> LinearWeights:
    """Return the weights of a linear layer, with its adapter's product added if `adapter_enabled`."""
    base = base_linear(layer)
    weight, transposed, is_split = base.weight.detach(), isinstance(base, Conv1D), False
    if base is not layer and adapter_enabled:
        delta = lora.weight_delta(layer)
        if delta is None:
            raise Unsupported(f"its adapter {type(layer).__name__} is more than a sum of weights")
        if isinstance(delta, Tensor):
            is_split = split_sums and weight.dtype in (torch.bfloat16, torch.float16)
            total = weight.float() + delta.float()
            weight = split_weight(total, weight.dtype, transposed) if is_split else total
    return LinearWeights(weight, _detach(base.bias), transposed, is_split)


def _detach(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()


def _detach_norm(norm: Norm) -> Norm:
    return norm._replace(weight=norm.weight.detach(), bias=_detach(norm.bias))
