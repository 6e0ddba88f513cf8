"""The weights and the metadata of a model as llama.cpp reads them, by transformers' architecture.

llama.cpp computes each architecture in one way. A model whose config asks for another one is refused by name, because
the file would load and give other numbers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from rlhf_fast.errors import UserError, listed
from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.model.architectures import Decoder, read_decoder
from rlhf_fast.model.model import Model

NO_ROPE_STEP = 4
"""llama.cpp rotates no queries and keys in every 4th layer of SmolLM3, whatever the config says."""


class Family(NamedTuple):
    """The way in which llama.cpp computes an architecture."""

    name: str
    """gguf's MODEL_ARCH."""
    activation: str = "silu"
    interleaved_rope: bool = False
    """It rotates neighbouring elements (transformers: those half a head apart), so that rows of q and k are permuted.
    """
    head_bias: bool = False
    """It adds a bias to the logits."""
    tied_head: bool = True
    """It takes the embedding for a head that the file does not have."""
    rope_factors: bool = False
    """It reads a factor for each frequency of the rotation."""
    square_attention: bool = False
    """Heads times their size must be the hidden size."""


FAMILIES = {
    "LlamaForCausalLM": Family("LLAMA", interleaved_rope=True, rope_factors=True),
    "MistralForCausalLM": Family("LLAMA", interleaved_rope=True, rope_factors=True),
    "SmolLM3ForCausalLM": Family("SMOLLM3", interleaved_rope=True),
    "Qwen2ForCausalLM": Family("QWEN2", head_bias=True, square_attention=True),
    "Qwen3ForCausalLM": Family("QWEN3"),
    "GPT2LMHeadModel": Family("GPT2", activation="gelu_tanh"),
    "GPTNeoXForCausalLM": Family("GPTNEOX", activation="gelu_tanh", tied_head=False),
}
"""transformers' class -> llama.cpp's way."""


class Weight(NamedTuple):
    """A tensor of the file and the parameter that it holds."""

    name: str
    parameter: Tensor
    rows: Tensor | None = None
    """Row i of the tensor is this row of the parameter."""
    transposed: bool = False

    def to_file(self) -> Tensor:
        """Return the tensor in float32, on the CPU."""
        value = self.parameter.detach().float().cpu()
        value = value.T if self.transposed else value
        return (value if self.rows is None else value[self.rows]).contiguous()

    def from_file(self, value: Tensor) -> Tensor:
        """Return the parameter that a tensor of the file stands for."""
        value = value if self.rows is None else value[torch.argsort(self.rows)]
        return value.T if self.transposed else value


class Contents(NamedTuple):
    """The contents of a GGUF file, its tokenizer apart."""

    family: Family
    metadata: list[tuple[str, Any]]
    """Pairs of a method of gguf's writer and its argument."""
    weights: list[Weight]
    context_length: int
    notes: list[str]


def contents(model: Model, gguf: Any) -> Contents:
    """Return what a file of the model holds. UserError for one that llama.cpp would compute in another way."""
    name = type(model.base).__name__
    family = FAMILIES.get(name)
    if model.head == "scalar":
        raise UserError(
            f"{model.name}: is a reward model, and llama.cpp has no scalar head; --safetensors-dtype writes it for"
            " other programs"
        )
    if family is None or not type(model.base).__module__.startswith("transformers.models."):
        raise UserError(f"{model.name}: {name} is not exported to GGUF; served are {', '.join(FAMILIES)}")
    try:
        decoder = read_decoder(model.decoder)
    except Unsupported as error:
        raise UserError(f"{model.name}: {name} is not exported to GGUF, because {error}") from error
    if refused := _difference(model, decoder, family):
        raise UserError(
            f"{model.name}: is not exported to GGUF, because {refused}, and llama.cpp computes {refused.llama}"
        )
    length, notes = _context_length(model, decoder)
    rope, factors = _rope(model, decoder, family, gguf)
    weights = _weights(model, decoder, family, gguf)
    if factors is not None:
        weights.append(Weight("rope_freqs.weight", factors))
    return Contents(family, [*_shape(model, decoder, length), *rope], weights, length, notes)


class _Refused(str):
    """A property of the model, and `llama`, what llama.cpp computes instead."""

    llama: str

    def __new__(cls, found: str, llama: str) -> _Refused:
        text = super().__new__(cls, found)
        text.llama = llama
        return text


def _difference(model: Model, decoder: Decoder, family: Family) -> _Refused | None:
    """Return the first property of the model that llama.cpp does not have."""
    config, layers = model.text_config, decoder.layers
    width, sized = config.hidden_size, decoder.num_heads * decoder.head_dim
    if decoder.activation != family.activation and not (family.name == "GPTNEOX" and decoder.activation == "gelu"):
        return _Refused(f"its activation is {decoder.activation}", family.activation)
    if any(not math.isclose(layer.scale, decoder.head_dim**-0.5, rel_tol=1e-6) for layer in layers):
        return _Refused("it scales attention scores in its own way", "1 / sqrt(head size)")
    if family.square_attention and sized != width:
        return _Refused(f"its heads have {sized} elements together", f"with {width}, the hidden size")
    if family.name == "SMOLLM3":
        if any(layer.uses_rope != bool((i + 1) % NO_ROPE_STEP) for i, layer in enumerate(layers)):
            return _Refused("its layers without rotation are not every 4th", "SmolLM3 with those alone")
    elif any(not layer.uses_rope for layer in layers) and family.name != "GPT2":
        return _Refused("it has layers without rotation", "all with rotation")
    if getattr(model.head_layer, "bias", None) is not None and not family.head_bias:
        return _Refused("its output embedding has a bias", "none")
    if model.softcap or not math.isclose(model.logit_scale, 1.0, rel_tol=1e-6):
        return _Refused("it scales or caps its logits", "them as they are")
    inner = getattr(config, "n_inner", None)
    if family.name == "GPT2" and inner not in (None, 4 * width):
        return _Refused(f"its n_inner is {inner}", f"with {4 * width}, four times the hidden size")
    embedding: Any = model.base.get_input_embeddings()
    rows = {len(embedding.weight), len(model.head_layer.weight)}
    return _Refused(f"its embeddings have {sorted(rows)} rows", "with one number of rows") if len(rows) > 1 else None


def _context_length(model: Model, decoder: Decoder) -> tuple[int, list[str]]:
    """Return the number of positions to write. llama.cpp has no window in these architectures, so that longer texts
    than the window would give other numbers."""
    windows = [layer.window for layer in decoder.layers if layer.window]
    length = model.max_positions
    if windows and (not length or min(windows) < length):
        return min(windows), [
            f"the context length is {min(windows)}, the width of the model's attention window: llama.cpp has no window"
            f" in this architecture (the model has {length} positions)"
        ]
    if not length:
        raise UserError(f"{model.name}: its config names no number of positions, which a GGUF file must have")
    return length, []


def _shape(model: Model, decoder: Decoder, length: int) -> list[tuple[str, Any]]:
    """Return the sizes of the model."""
    norm = decoder.final_norm
    config, layers = model.text_config, decoder.layers
    width = config.hidden_size
    sizes: list[tuple[str, Any]] = [
        ("add_context_length", length),
        ("add_embedding_length", width),
        ("add_block_count", len(layers)),
        ("add_feed_forward_length", getattr(config, "intermediate_size", None) or 4 * width),
        ("add_head_count", decoder.num_heads),
        ("add_head_count_kv", decoder.num_kv_heads),
        ("add_vocab_size", model.num_rows),
        ("add_layer_norm_eps" if norm.centered else "add_layer_norm_rms_eps", float(norm.eps)),
    ]
    if decoder.position_embedding is None:
        sizes += [("add_key_length", decoder.head_dim), ("add_value_length", decoder.head_dim)]
    if hasattr(config, "use_parallel_residual"):
        sizes.append(("add_parallel_residual", bool(decoder.parallel_residual)))
    return sizes


def _rope(model: Model, decoder: Decoder, family: Family, gguf: Any) -> tuple[list[tuple[str, Any]], Tensor | None]:
    """Return the metadata of the rotation, and the factors of its frequencies if it has some."""
    if decoder.rotary is None:
        return [], None
    rotary: Any = decoder.rotary
    settings = getattr(model.text_config, "rope_parameters", None) or {}
    kind, base = settings.get("rope_type", "default"), float(settings.get("rope_theta", 10000.0))
    inverse = rotary.inv_freq.detach().float().cpu()
    size = 2 * len(inverse)
    if family.interleaved_rope and size != decoder.head_dim:
        raise UserError(
            f"{model.name}: is not exported to GGUF, because it rotates {size} of {decoder.head_dim} elements"
        )
    metadata: list[tuple[str, Any]] = [("add_rope_dimension_count", size), ("add_rope_freq_base", base)]
    factors = 1.0 / (base ** (torch.arange(0, size, 2).float() / size)) / inverse
    if kind == "default" and torch.allclose(factors, torch.ones(()), rtol=1e-5):
        return metadata, None
    if kind == "linear" and torch.allclose(factors, factors[0], rtol=1e-5):
        factor = float(settings["factor"])
        return [
            *metadata,
            ("add_rope_scaling_type", gguf.RopeScalingType.LINEAR),
            ("add_rope_scaling_factor", factor),
        ], None
    if kind == "llama3" and family.rope_factors and rotary.attention_scaling == 1:
        return metadata, factors
    raise UserError(
        f"{model.name}: is not exported to GGUF, because its rotation is {kind}; default, linear and (for Llama) llama3"
        " are served"
    )


def _weights(model: Model, decoder: Decoder, family: Family, gguf: Any) -> list[Weight]:
    """Return the tensors of the file. UserError for a parameter that the architecture has no name for."""
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.name), len(decoder.layers))
    modules = dict(model.base.named_modules())
    found, unknown = [], []
    parameters = dict(model.base.named_parameters())
    tied = model.head_layer.weight is model.base.get_input_embeddings().weight  # type: ignore[union-attr]
    for name, parameter in parameters.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            unknown.append(name)
            continue
        layer = modules[name.rpartition(".")[0]]
        transposed = isinstance(layer, Conv1D) and parameter.dim() == 2
        found.append(Weight(target, parameter, _row_order(name, decoder, family), transposed))
    if unknown:
        raise UserError(
            f"{model.name}: is not exported to GGUF, because {family.name} has no place for {listed(unknown, 3)}"
        )
    if tied and not family.tied_head:
        found.append(Weight("output.weight", model.head_layer.weight))
    return found


def _row_order(name: str, decoder: Decoder, family: Family) -> Tensor | None:
    """Return the order of a parameter's rows in the file, None if it is the parameter's."""
    heads, size = decoder.num_heads, decoder.head_dim
    if family.interleaved_rope and (".q_proj." in name or ".k_proj." in name):
        heads = heads if ".q_proj." in name else decoder.num_kv_heads
        return torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).reshape(-1)
    if decoder.interleaved_qkv and ".query_key_value." in name:
        return torch.arange(3 * heads * size).view(heads, 3, size).transpose(0, 1).reshape(-1)
    return None
