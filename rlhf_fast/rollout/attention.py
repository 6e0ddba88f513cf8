"""Any causal language model of transformers, decoded by its own forward pass with our attention over an Arena.

transformers looks its attention up by name (`AttentionInterface`): under ours it calls `_attend` with queries, keys and
values after rotation, builds no mask, and hands on the keyword argument that carries the call. N tokens of many
sequences go through the module as one row (1, N), told apart by their positions.

Some architectures never call the interface, or drop keyword arguments, or ask for what the attention here does not do
(sinks, position biases, chunks). Their tokens would be wrong without an error, so a model is admitted only if every
layer calls once with nothing unknown, and if its hidden states over ragged rows, prefilled and decoded, equal those of
the module's own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface

from rlhf_fast import ops
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.decoder import Packed, Unsupported
from rlhf_fast.rollout.kv_cache import Arena, KVShape
from rlhf_fast.rollout.verify import prove

NAME = "rlhf_fast"
CARRIER = "rlhf_fast_call"
"""The keyword argument that reaches the attention through every layer."""
HARMLESS = frozenset(
    "dropout position_ids position_embeddings is_causal use_cache cache_position output_attentions num_items_in_batch"
    " output_hidden_states output_router_logits return_dict layer_idx".split()
)
"""Keyword arguments that change nothing about causal attention in evaluation mode."""


class AttentionDecoder:
    """See the head of the file; `make` rather than the constructor."""

    name = "attention"

    def __init__(self, model: Model):
        self.model, self.shapes, self.dtype = model, [], torch.float32
        modules = (module for module in model.base.modules() if hasattr(module, "config"))
        configs = {id(module.config): module.config for module in modules}
        self._configs = [config for config in configs.values() if hasattr(config, "_attn_implementation_internal")]

    @classmethod
    @torch.no_grad()
    def make(cls, model: Model) -> AttentionDecoder:
        """A decoder for `model`, or Unsupported."""
        parameters = inspect.signature(model.decoder.forward).parameters
        if "position_ids" not in parameters:
            raise Unsupported("its forward pass takes no positions")
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise Unsupported("its forward pass hands no keyword arguments on to the attention")
        decoder, training = cls(model), model.module.training
        model.module.eval()
        try:
            decoder._survey()
            prove(model, decoder)
        except Unsupported:
            raise
        except Exception as error:  # any architecture's own code may stumble over a forward pass like ours
            raise Unsupported(
                f"its forward pass fails under our attention ({type(error).__name__}: {error})"
            ) from error
        finally:
            model.module.train(training)
        return decoder

    @contextmanager
    def ready(self) -> Iterator[None]:
        """See Decoder; there is nothing to prepare."""
        yield

    def hidden(self, arena: Arena, packed: Packed) -> Tensor:
        """(n, D), see Decoder."""
        call = _Call(arena, packed)
        hidden = self._forward(call, packed.tokens, packed.positions)
        if len(call.layers) != len(self.shapes):
            raise RuntimeError(f"{self.model.name}: {len(call.layers)} of {len(self.shapes)} layers used the cache")
        return hidden if packed.wanted is None else hidden[packed.wanted]

    def _forward(self, call: _Call | _Survey, tokens: Tensor, positions: Tensor) -> Tensor:
        arguments = {CARRIER: call, "position_ids": positions[None].long(), "use_cache": False}
        with self._attached():
            return self.model.run_decoder(input_ids=tokens[None], **arguments).last_hidden_state[0]

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """The module's own attention is back in place after each call: training never meets ours."""
        before = [config._attn_implementation_internal for config in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = NAME
        try:
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = name

    def _survey(self) -> None:
        """The layers' shapes, and whether each asks for no more than the attention here does."""
        config, survey = self.model.text_config, _Survey([])
        two = torch.arange(2, device=self.model.device)
        self._forward(survey, two + 1, two)
        layers = sorted(survey.layers, key=lambda layer: layer.index)
        if [layer.index for layer in layers] != list(range(config.num_hidden_layers)):
            raise Unsupported(
                f"its {config.num_hidden_layers} layers make {len(layers)} calls of transformers' attention interface"
            )
        kinds = getattr(config, "layer_types", None)
        for layer, kind in zip(layers, kinds or [], strict=bool(kinds)):
            if kind not in ("full_attention", "sliding_attention"):
                raise Unsupported(f"layer {layer.index} is of the kind {kind}")
            if kind == "sliding_attention" and not layer.window:
                raise Unsupported(f"layer {layer.index} does not say how wide its window is")
        windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        if windowed and not kinds and not any(layer.window for layer in layers):
            raise Unsupported("its config has a sliding window that its layers do not ask for")
        self.shapes, self.dtype = [layer.shape for layer in layers], layers[0].dtype
        if any(layer.dtype != self.dtype for layer in layers):
            raise Unsupported("its layers' keys have several dtypes")


class _Layer(NamedTuple):
    """What one call of the attention showed."""

    index: int
    shape: KVShape
    dtype: torch.dtype
    window: int


class _Survey(NamedTuple):
    """Answers with zeros and notes who asked."""

    layers: list[_Layer]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float):
        shape = KVShape(k.shape[1], k.shape[2], v.shape[2])
        self.layers.append(_Layer(layer, shape, k.dtype, window))
        return q.new_zeros(*q.shape[:2], v.shape[2])


class _Call:
    """One forward pass over the arena."""

    def __init__(self, arena: Arena, packed: Packed):
        self.arena, self.table, self.rows = arena, packed.block_table, packed.slots
        positions = packed.positions.long()
        self.lengths = packed.positions + 1
        self.pages = packed.block_table[packed.slots.long(), positions // arena.page].long()
        self.offsets = positions % arena.page
        self.layers: set[int] = set()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float):
        """q (N, H, d), k (N, Hkv, d), v (N, Hkv, dv) -> (N, H, dv)."""
        self.layers.add(layer)
        k_cache, v_cache = self.arena.k[layer], self.arena.v[layer]
        k_cache[self.pages, :, self.offsets] = k
        v_cache[self.pages, :, self.offsets] = v
        return ops.decode_attention(q, k_cache, v_cache, self.table, self.lengths, self.rows, scale, window, softcap)


def _attend(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None, **others,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' signature: query (1, H, N, d), key (1, Hkv, N, d), value (1, Hkv, N, dv) -> (1, N, H, dv)."""
    call = others.pop(CARRIER, None)
    if call is None:
        raise Unsupported("its layers drop keyword arguments on the way to the attention")
    unknown = sorted(name for name, x in others.items() if name not in HARMLESS and x is not None)
    if attention_mask is not None:
        unknown.append("attention_mask")
    if unknown:
        raise Unsupported(f"its attention asks for {', '.join(unknown)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    return call(module.layer_idx, q, k, v, scale, int(sliding_window or 0), float(softcap or 0.0))[None], None


AttentionInterface.register(NAME, _attend)
