"""The parts of a decoder, by architecture: one short function a family says where transformers keeps them.

`read_decoder(decoder)` returns the module's own layers. The fused step of a rollout reads their weights
(rollout/weights.py); the training forward calls them on packed rows (model/packed_decoder.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from rlhf_fast.kernels._launch import Unsupported

ACTIVATIONS = {
    type(ACT2FN[theirs]): ours
    for theirs, ours in {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
    }.items()
}
"""Class of transformers' activation -> our name of it."""


class Norm(NamedTuple):
    """LayerNorm if `centered`, else RMSNorm."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centered: bool


class Layer(NamedTuple):
    """One layer: x + out(attention(norm(x))), then x + mlp(norm(x)). Modules are linear layers, or adapters on them."""

    attention_norm: Norm
    mlp_norm: Norm
    qkv: tuple[nn.Module, ...]
    """One to three projections, whose outputs are concatenated."""
    out: nn.Module
    gate: nn.Module | None
    """None: the MLP is down(act(up(x))), else down(act(gate(x)) * up(x))."""
    up: nn.Module
    down: nn.Module
    scale: float
    """Factor on the attention scores."""
    window: int = 0
    """Positions that a token sees, itself included; 0 = all."""
    uses_rope: bool = True
    q_norm: Norm | None = None
    """Norm over each head before RoPE, as `k_norm`."""
    k_norm: Norm | None = None


class Decoder(NamedTuple):
    """A decoder without its head."""

    layers: list[Layer]
    final_norm: Norm
    embedding: nn.Embedding
    position_embedding: nn.Embedding | None
    """Learned positions."""
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


def read_decoder(decoder: Any) -> Decoder:
    """Return the parts of transformers' `decoder`. Unsupported if its architecture is not known here."""
    family = FAMILIES.get(type(decoder).__name__)
    if family is None or not type(decoder).__module__.startswith("transformers.models."):
        raise Unsupported(f"there is no step for {type(decoder).__name__}")
    if not decoder.config.num_hidden_layers:
        raise Unsupported("it has no layers")
    return family(decoder)


def rope_angles(rotary: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin (N, r / 2) float32 of the angles at `positions` (N,), rounded to x's dtype by the module."""
    with torch.no_grad():
        cos, sin = rotary(x, positions[None])
    half = cos.shape[-1] // 2  # transformers repeats the angles in the second half
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()


def base_linear(layer: Any) -> Any:
    """Return the linear layer below an adapter, or `layer` itself. Unsupported if it is not a plain one."""
    base = getattr(layer, "base_layer", layer)
    if type(base) not in (nn.Linear, Conv1D):
        raise Unsupported(f"it has a {type(base).__name__} where a linear layer is expected")
    return base


def _embedding(layer: nn.Module) -> nn.Embedding:
    if type(layer) is not nn.Embedding:  # one with an adapter has other rows than its weight
        raise Unsupported(f"its embedding is a {type(layer).__name__}")
    return layer


def _norm(layer: Any) -> Norm:
    if isinstance(layer, nn.LayerNorm) and layer.weight is not None:
        return Norm(layer.weight, layer.bias, layer.eps, centered=True)
    if not type(layer).__name__.endswith("RMSNorm") or not hasattr(layer, "variance_epsilon"):
        raise Unsupported(f"it has a {type(layer).__name__} where a norm with a weight is expected")
    return Norm(layer.weight, None, layer.variance_epsilon, centered=False)


def _activation(modules: list[nn.Module]) -> str:
    """Return our name of the layers' activation, which their modules say: a config may be changed afterwards."""
    for module in modules:
        if type(module) not in ACTIVATIONS:
            raise Unsupported(f"its activation is {type(module).__name__.removesuffix('Activation').lower()}")
    return _common([ACTIVATIONS[type(module)] for module in modules], "activation")


def _common(values: list[Any], name: str) -> Any:
    """Return the value that all layers have."""
    if len(set(values)) != 1:
        raise Unsupported(f"its layers differ in their {name}")
    return values[0]


def _llama(decoder: Any) -> Decoder:
    """Read Llama, Mistral, Qwen2, Qwen3 or SmolLM3."""
    config = decoder.config
    model_window = config.sliding_window if type(decoder).__name__ == "MistralModel" else None
    own_layers, layers = decoder.layers[: config.num_hidden_layers], []
    for layer in own_layers:
        attention, mlp = layer.self_attn, layer.mlp
        parts = Layer(
            attention_norm=_norm(layer.input_layernorm),
            mlp_norm=_norm(layer.post_attention_layernorm),
            qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
            out=attention.o_proj,
            gate=mlp.gate_proj,
            up=mlp.up_proj,
            down=mlp.down_proj,
            scale=attention.scaling,
            window=int(getattr(attention, "sliding_window", None) or model_window or 0),
            uses_rope=bool(getattr(attention, "use_rope", True)),
            q_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            k_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        )
        layers.append(parts)
    return Decoder(
        layers=layers,
        final_norm=_norm(decoder.norm),
        embedding=_embedding(decoder.embed_tokens),
        position_embedding=None,
        rotary=decoder.rotary_emb,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=own_layers[0].self_attn.head_dim,
        activation=_activation([layer.mlp.act_fn for layer in own_layers]),
    )


def _gpt2(decoder: Any) -> Decoder:
    config = decoder.config
    if config.add_cross_attention:
        raise Unsupported("it attends to an encoder")
    layers = [
        Layer(
            attention_norm=_norm(layer.ln_1),
            mlp_norm=_norm(layer.ln_2),
            qkv=(layer.attn.c_attn,),
            out=layer.attn.c_proj,
            gate=None,
            up=layer.mlp.c_fc,
            down=layer.mlp.c_proj,
            scale=layer.attn.scaling,
            uses_rope=False,
        )
        for layer in decoder.h
    ]
    return Decoder(
        layers=layers,
        final_norm=_norm(decoder.ln_f),
        embedding=_embedding(decoder.wte),
        position_embedding=_embedding(decoder.wpe),
        rotary=None,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        activation=_activation([layer.mlp.act for layer in decoder.h]),
    )


def _gpt_neox(decoder: Any) -> Decoder:
    config = decoder.config
    layers = [
        Layer(
            attention_norm=_norm(layer.input_layernorm),
            mlp_norm=_norm(layer.post_attention_layernorm),
            qkv=(layer.attention.query_key_value,),
            out=layer.attention.dense,
            gate=None,
            up=layer.mlp.dense_h_to_4h,
            down=layer.mlp.dense_4h_to_h,
            scale=layer.attention.scaling,
        )
        for layer in decoder.layers
    ]
    return Decoder(
        layers=layers,
        final_norm=_norm(decoder.final_layer_norm),
        embedding=_embedding(decoder.embed_in),
        position_embedding=None,
        rotary=decoder.rotary_emb,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        activation=_activation([layer.mlp.act for layer in decoder.layers]),
        interleaved_qkv=True,
        parallel_residual=_common([layer.use_parallel_residual for layer in decoder.layers], "use_parallel_residual"),
    )


FAMILIES: dict[str, Callable[[Any], Decoder]] = {
    "LlamaModel": _llama,
    "MistralModel": _llama,
    "Qwen2Model": _llama,
    "Qwen3Model": _llama,
    "SmolLM3Model": _llama,
    "GPT2Model": _gpt2,
    "GPTNeoXModel": _gpt_neox,
}
"""Class of transformers' decoder -> the function that finds its parts."""
