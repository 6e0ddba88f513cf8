"""The weights of a decoder, by architecture: one short function a family says where transformers keeps them.

`read_weights(model)` returns the module's own tensors, without a copy. Only adapters cost memory: a weight that an
active LoRA changes is returned as a float32 sum, because training does not round that sum either; on a GPU as two
16-bit weights with that sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.model import lora
from rlhf_fast.model.model import Model

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""transformers' name of an activation -> the step's name of it."""


class NormWeights(NamedTuple):
    """LayerNorm if `centered`, else RMSNorm."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centered: bool


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

    attention_norm: NormWeights
    mlp_norm: NormWeights
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
    q_norm: NormWeights | None = None
    """Norm over each head before RoPE, as `k_norm`."""
    k_norm: NormWeights | None = None
    gate_up: LinearWeights | None = None
    """`gate` and `up` as one, where their weights are adjacent in memory; see rollout/merged_linears.py."""


class DecoderWeights(NamedTuple):
    """A decoder without its head."""

    layers: list[LayerWeights]
    final_norm: NormWeights
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


ReadLinear = Callable[[Any], LinearWeights]


def read_weights(model: Model, split_sums: bool | None = None) -> DecoderWeights:
    """Return the weights of `model`. Unsupported if its architecture or their layout is not known.

    split_sums: whether sums of 16-bit weights and their adapters' products are split. None: on a GPU, whose tensor
    cores multiply 16-bit numbers and no float32."""
    if split_sums is None:
        split_sums = model.device.type == "cuda"
    decoder = model.decoder
    family = FAMILIES.get(type(decoder).__name__)
    if family is None or not type(decoder).__module__.startswith("transformers.models."):
        raise Unsupported(f"there is no step for {type(decoder).__name__}")
    weights = family(decoder, _linear_reader(model.adapter_enabled, split_sums))
    _check_shapes(weights, model.head_weight)
    _check_layout(weights, model.head_weight)
    return weights


def rope_table(weights: DecoderWeights, num_positions: int) -> RopeTable | None:
    """Return the RoPE table of the first positions, rounded as the module rounds it; None without RoPE."""
    if weights.rotary is None:
        return None
    like = torch.empty(0, dtype=weights.embedding.dtype, device=weights.embedding.device)
    cos, sin = weights.rotary(like, torch.arange(num_positions, device=like.device)[None])
    half = cos.shape[-1] // 2  # transformers repeats the angles in the second half
    return RopeTable(cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous())


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


def _embedding(layer: nn.Module) -> Tensor:
    if type(layer) is not nn.Embedding:  # one with an adapter has other rows than its weight
        raise Unsupported(f"its embedding is a {type(layer).__name__}")
    return layer.weight.detach()


def split_weight(weight: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    """Return a float32 weight as two of a 16-bit dtype: its rounding, and beside it, along its inputs, the rounding of
    what that leaves. In bfloat16 they keep 16 bits of the weight instead of 8, in as much memory as float32. Then
    x weight' is [x, x] split'. float16's two reach twice its largest number."""
    limit = torch.finfo(dtype).max
    high = torch.where(weight.isinf(), weight, weight.clamp(-limit, limit)).to(dtype)
    low = torch.where(high.isinf(), 0.0, weight - high.float()).to(dtype)
    return torch.cat((high, low), dim=0 if transposed else 1)


def _linear_reader(adapter_enabled: bool, split_sums: bool) -> ReadLinear:
    """Return the function that reads a linear layer, with its adapter's product added if `adapter_enabled`."""

    def read_linear(layer: Any) -> LinearWeights:
        base = getattr(layer, "base_layer", layer)
        if type(base) not in (nn.Linear, Conv1D):
            raise Unsupported(f"it has a {type(base).__name__} where a linear layer is expected")
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

    return read_linear


def _detach(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()


def _norm(layer: Any) -> NormWeights:
    if isinstance(layer, nn.LayerNorm):
        return NormWeights(layer.weight.detach(), _detach(layer.bias), layer.eps, centered=True)
    if not type(layer).__name__.endswith("RMSNorm"):
        raise Unsupported(f"it has a {type(layer).__name__} where a norm is expected")
    return NormWeights(layer.weight.detach(), None, layer.variance_epsilon, centered=False)


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise Unsupported(f"its activation is {name}")
    return ACTIVATIONS[name]


def _llama(decoder: Any, linear: ReadLinear) -> DecoderWeights:
    """Read Llama, Mistral, Qwen2, Qwen3 or SmolLM3."""
    config = decoder.config
    model_window = config.sliding_window if type(decoder).__name__ == "MistralModel" else None
    layers = []
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        weights = LayerWeights(
            attention_norm=_norm(layer.input_layernorm),
            mlp_norm=_norm(layer.post_attention_layernorm),
            qkv=(linear(attention.q_proj), linear(attention.k_proj), linear(attention.v_proj)),
            out=linear(attention.o_proj),
            gate=linear(mlp.gate_proj),
            up=linear(mlp.up_proj),
            down=linear(mlp.down_proj),
            scale=attention.scaling,
            window=int(getattr(attention, "sliding_window", None) or model_window or 0),
            uses_rope=bool(getattr(attention, "use_rope", True)),
            q_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            k_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        )
        layers.append(weights)
    return DecoderWeights(
        layers=layers,
        final_norm=_norm(decoder.norm),
        embedding=_embedding(decoder.embed_tokens),
        position_embedding=None,
        rotary=decoder.rotary_emb,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=decoder.layers[0].self_attn.head_dim,
        activation=_activation(config.hidden_act),
    )


def _gpt2(decoder: Any, linear: ReadLinear) -> DecoderWeights:
    config = decoder.config
    if config.add_cross_attention:
        raise Unsupported("it attends to an encoder")
    layers = [
        LayerWeights(
            attention_norm=_norm(layer.ln_1),
            mlp_norm=_norm(layer.ln_2),
            qkv=(linear(layer.attn.c_attn),),
            out=linear(layer.attn.c_proj),
            gate=None,
            up=linear(layer.mlp.c_fc),
            down=linear(layer.mlp.c_proj),
            scale=layer.attn.scaling,
            uses_rope=False,
        )
        for layer in decoder.h
    ]
    return DecoderWeights(
        layers=layers,
        final_norm=_norm(decoder.ln_f),
        embedding=_embedding(decoder.wte),
        position_embedding=_embedding(decoder.wpe),
        rotary=None,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        activation=_activation(config.activation_function),
    )


def _gpt_neox(decoder: Any, linear: ReadLinear) -> DecoderWeights:
    config = decoder.config
    layers = [
        LayerWeights(
            attention_norm=_norm(layer.input_layernorm),
            mlp_norm=_norm(layer.post_attention_layernorm),
            qkv=(linear(layer.attention.query_key_value),),
            out=linear(layer.attention.dense),
            gate=None,
            up=linear(layer.mlp.dense_h_to_4h),
            down=linear(layer.mlp.dense_4h_to_h),
            scale=layer.attention.scaling,
        )
        for layer in decoder.layers
    ]
    return DecoderWeights(
        layers=layers,
        final_norm=_norm(decoder.final_layer_norm),
        embedding=_embedding(decoder.embed_in),
        position_embedding=None,
        rotary=decoder.rotary_emb,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        activation=_activation(config.hidden_act),
        interleaved_qkv=True,
        parallel_residual=config.use_parallel_residual,
    )


FAMILIES: dict[str, Callable[[Any, ReadLinear], DecoderWeights]] = {
    "LlamaModel": _llama,
    "MistralModel": _llama,
    "Qwen2Model": _llama,
    "Qwen3Model": _llama,
    "SmolLM3Model": _llama,
    "GPT2Model": _gpt2,
    "GPTNeoXModel": _gpt_neox,
}
"""Class of transformers' decoder -> the function that reads its weights."""
