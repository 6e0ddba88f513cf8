"""Where an architecture keeps the tensors of a decoding step: one short function a family.

`read(model)` gives them as they are now, without a copy. Only adapters cost memory: the weight that an active LoRA
changes is a float32 sum of the two, so that nothing is rounded that training does not round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_fast.model import lora
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.decoder import Unsupported

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip
"""transformers' names of what the step computes."""


class NormPart(NamedTuple):
    """LayerNorm if `centered`, else RMSNorm."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centered: bool


class LinearPart(NamedTuple):
    """x weight' + bias; `transposed`: weight is (in, out), as GPT-2's Conv1D keeps it."""

    weight: Tensor
    bias: Tensor | None
    transposed: bool

    @property
    def out(self) -> int:
        return self.weight.shape[1 if self.transposed else 0]


class LayerPart(NamedTuple):
    """One block: x + out(attention(norm x)), then x + mlp(norm x)."""

    before_attention: NormPart
    before_mlp: NormPart
    qkv: tuple[LinearPart, ...]
    """One to three, their results side by side."""
    out: LinearPart
    gate: LinearPart | None
    """None: down(act(up(x))), else down(act(gate(x)) * up(x))."""
    up: LinearPart
    down: LinearPart
    scale: float
    window: int = 0
    """Positions that a token sees, its own included; 0 = all."""
    rotates: bool = True
    query: NormPart | None = None
    """Over each head, before the rotation; `key` likewise."""
    key: NormPart | None = None


class Parts(NamedTuple):
    """A whole decoder, without its head."""

    layers: list[LayerPart]
    last: NormPart
    embedding: Tensor
    positions: Tensor | None
    """Learned positions (T, D)."""
    rotary: nn.Module | None
    """transformers' own: (x, positions) -> cos, sin."""
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    interleaved: bool = False
    """The row of qkv is (q, k, v) of head 0, of head 1, ...; else all q, then all k, then all v."""
    parallel: bool = False
    """Attention and MLP read the same input, and both are added to it."""


def read(model: Model) -> Parts:
    """The tensors of `model`, or Unsupported."""
    decoder = model.decoder
    family = FAMILIES.get(type(decoder).__name__)
    if family is None or not type(decoder).__module__.startswith("transformers.models."):
        raise Unsupported(f"there is no step for {type(decoder).__name__}")
    parts = family(decoder, _reader(model.adapter_enabled))
    _check(parts, model.head_weight)
    return parts


def _check(parts: Parts, head: Tensor) -> None:
    """What compiled code takes for granted of every tensor whose address it gets."""
    first, d = parts.layers[0], parts.head_dim
    widths = {"qkv": (parts.heads + 2 * parts.kv_heads) * d, "out": parts.embedding.shape[1], "up": first.up.out}
    tables = [parts.embedding] if parts.positions is None else [parts.embedding, parts.positions]
    norms, weights = [parts.last], list(tables)
    for layer in parts.layers:
        found = {"qkv": sum(part.out for part in layer.qkv), "out": layer.out.out, "up": layer.up.out}
        if found != widths or (layer.gate is not None and layer.gate.out != widths["up"]):
            raise Unsupported(f"its layers differ in width: {found}, not {widths}")
        norms += [norm for norm in (layer.before_attention, layer.before_mlp, layer.query, layer.key) if norm]
        linear = [part for part in (*layer.qkv, layer.out, layer.gate, layer.up, layer.down) if part]
        weights += [part.weight for part in linear] + [part.bias for part in linear if part.bias is not None]
    for norm in norms:
        weights += [norm.weight] if norm.bias is None else [norm.weight, norm.bias]
        if norm.bias is not None and norm.bias.dtype != norm.weight.dtype:
            raise Unsupported(f"a norm's weight is {norm.weight.dtype} and its bias {norm.bias.dtype}")
    if tables[-1].dtype != tables[0].dtype or not all(table.is_contiguous() for table in tables):
        raise Unsupported("its embeddings have two dtypes or do not lie in rows")
    if len(parts.embedding) < len(head):
        raise Unsupported(f"its head has {len(head)} tokens and its embedding {len(parts.embedding)}")
    for weight in weights:
        if weight.dtype not in (head.dtype, torch.float32) or weight.device != head.device or weight.stride(-1) != 1:
            raise Unsupported(f"a weight is {weight.dtype} on {weight.device}, strides {weight.stride()}")


def _table(layer: nn.Module) -> Tensor:
    """An embedding's rows; one with an adapter has others than those that its weight shows."""
    if type(layer) is not nn.Embedding:
        raise Unsupported(f"its embedding is a {type(layer).__name__}")
    return layer.weight.detach()


def _reader(adapter: bool) -> Callable[[nn.Module], LinearPart]:
    def linear(layer: nn.Module) -> LinearPart:
        plain = getattr(layer, "base_layer", layer)
        if type(plain) not in (nn.Linear, Conv1D):
            raise Unsupported(f"it has a {type(plain).__name__} where a linear layer is expected")
        weight = plain.weight
        if plain is not layer and adapter:
            delta = lora.weight_delta(layer)
            if delta is None:
                raise Unsupported(f"its adapter {type(layer).__name__} is more than a sum of weights")
            weight = weight if isinstance(delta, int) else weight.detach().float() + delta.float()
        return LinearPart(weight.detach(), _data(plain.bias), isinstance(plain, Conv1D))

    return linear


def _data(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()


def _norm(layer: nn.Module) -> NormPart:
    if isinstance(layer, nn.LayerNorm):
        return NormPart(layer.weight.detach(), _data(layer.bias), layer.eps, centered=True)
    if not type(layer).__name__.endswith("RMSNorm"):
        raise Unsupported(f"it has a {type(layer).__name__} where a norm is expected")
    return NormPart(layer.weight.detach(), None, layer.variance_epsilon, centered=False)


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise Unsupported(f"its activation is {name}")
    return ACTIVATIONS[name]


def _llama(decoder: nn.Module, linear: Callable) -> Parts:
    """Llama, Mistral, Qwen2, Qwen3, SmolLM3."""
    config, layers = decoder.config, []
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        everywhere = config.sliding_window if type(decoder).__name__ == "MistralModel" else None
        layers.append(
            LayerPart(
                before_attention=_norm(layer.input_layernorm),
                before_mlp=_norm(layer.post_attention_layernorm),
                qkv=(linear(attention.q_proj), linear(attention.k_proj), linear(attention.v_proj)),
                out=linear(attention.o_proj),
                gate=linear(mlp.gate_proj),
                up=linear(mlp.up_proj),
                down=linear(mlp.down_proj),
                scale=attention.scaling,
                window=int(getattr(attention, "sliding_window", None) or everywhere or 0),
                rotates=bool(getattr(attention, "use_rope", True)),
                query=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
                key=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
            )
        )
    return Parts(
        layers, _norm(decoder.norm), _table(decoder.embed_tokens), None, decoder.rotary_emb,
        config.num_attention_heads, config.num_key_value_heads, decoder.layers[0].self_attn.head_dim,
        _activation(config.hidden_act),
    )  # fmt: skip


def _gpt2(decoder: nn.Module, linear: Callable) -> Parts:
    config, layers = decoder.config, []
    if config.add_cross_attention:
        raise Unsupported("it attends to an encoder")
    for layer in decoder.h:
        layers.append(
            LayerPart(
                before_attention=_norm(layer.ln_1),
                before_mlp=_norm(layer.ln_2),
                qkv=(linear(layer.attn.c_attn),),
                out=linear(layer.attn.c_proj),
                gate=None,
                up=linear(layer.mlp.c_fc),
                down=linear(layer.mlp.c_proj),
                scale=layer.attn.scaling,
                rotates=False,
            )
        )
    return Parts(
        layers, _norm(decoder.ln_f), _table(decoder.wte), _table(decoder.wpe), None,
        config.num_attention_heads, config.num_attention_heads, config.hidden_size // config.num_attention_heads,
        _activation(config.activation_function),
    )  # fmt: skip


def _gpt_neox(decoder: nn.Module, linear: Callable) -> Parts:
    config, layers = decoder.config, []
    for layer in decoder.layers:
        layers.append(
            LayerPart(
                before_attention=_norm(layer.input_layernorm),
                before_mlp=_norm(layer.post_attention_layernorm),
                qkv=(linear(layer.attention.query_key_value),),
                out=linear(layer.attention.dense),
                gate=None,
                up=linear(layer.mlp.dense_h_to_4h),
                down=linear(layer.mlp.dense_4h_to_h),
                scale=layer.attention.scaling,
            )
        )
    return Parts(
        layers, _norm(decoder.final_layer_norm), _table(decoder.embed_in), None, decoder.rotary_emb,
        config.num_attention_heads, config.num_attention_heads, config.hidden_size // config.num_attention_heads,
        _activation(config.hidden_act), interleaved=True, parallel=config.use_parallel_residual,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[nn.Module, Callable], Parts]] = {
    "LlamaModel": _llama, "MistralModel": _llama, "Qwen2Model": _llama, "Qwen3Model": _llama, "SmolLM3Model": _llama,
    "GPT2Model": _gpt2, "GPTNeoXModel": _gpt_neox,
}  # fmt: skip
