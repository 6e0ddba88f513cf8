"""The attention decoder: a transformers model's own forward, with our attention over a PagedKVCache.

transformers looks up its attention function by name (`AttentionInterface`). Under our name it calls `_attend` with
queries, keys and values after RoPE, builds no mask, and passes on CALL_KWARG, which carries the state of the call.
N tokens of many sequences go through the module as one row (1, N); their positions and slots keep them apart.

Some architectures never call the interface, drop keyword arguments, or need what our attention does not compute (sinks,
position biases, chunks). They would sample wrong tokens without an error. So a model is accepted only if every layer
calls the interface once with known arguments, and if its hidden states agree with the module's own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from rlhf_fast import ops
from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.decoder import TokenBatch
from rlhf_fast.rollout.kv_cache import KVShape, PagedKVCache
from rlhf_fast.rollout.verify import verify_decoder

ATTENTION_NAME = "rlhf_fast"
CALL_KWARG = "rlhf_fast_call"
"""The keyword argument that carries the state of a call through every layer to `_attend`."""
IGNORED_KWARGS = frozenset(
    (
        "dropout",
        "position_ids",
        "position_embeddings",
        "is_causal",
        "use_cache",
        "cache_position",
        "output_attentions",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "layer_idx",
    )
)
"""Keyword arguments that do not change causal attention in evaluation mode."""


class AttentionDecoder:
    """A Decoder that runs the module's own forward. Create it by `make`."""

    name = "attention"

    def __init__(self, model: Model):
        self.model = model
        self.shapes: list[KVShape] = []
        self.dtype = torch.float32
        modules = (module for module in model.base.modules() if hasattr(module, "config"))
        configs: dict[int, Any] = {id(module.config): module.config for module in modules}
        self._configs = [config for config in configs.values() if hasattr(config, "_attn_implementation_internal")]

    @classmethod
    @torch.no_grad()
    def make(cls, model: Model) -> AttentionDecoder:
        """Return a decoder for `model`, compared with its own forward. Unsupported if there is none."""
        parameters = inspect.signature(model.decoder.forward).parameters
        if "position_ids" not in parameters:
            raise Unsupported("its forward pass takes no positions")
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise Unsupported("its forward pass hands no keyword arguments on to the attention")
        decoder, training = cls(model), model.module.training
        model.module.eval()
        try:
            decoder._read_layers()
            verify_decoder(model, decoder)
        except Unsupported:
            raise
        except Exception as error:  # an architecture's own code may fail on a forward pass like ours
            raise Unsupported(
                f"its forward pass fails under our attention ({type(error).__name__}: {error})"
            ) from error
        finally:
            model.module.train(training)
        return decoder

    @contextmanager
    def session(self) -> Iterator[None]:
        """Do nothing; see Decoder."""
        yield

    def hidden(self, cache: PagedKVCache, batch: TokenBatch) -> Tensor:
        """Return the hidden states (n, D); see Decoder."""
        call = _CacheCall(cache, batch)
        hidden = self._forward(call, batch.tokens, batch.positions)
        if len(call.layers) != len(self.shapes):
            raise RuntimeError(f"{self.model.name}: {len(call.layers)} of {len(self.shapes)} layers used the cache")
        return hidden if batch.logits_indices is None else hidden[batch.logits_indices]

    def _forward(self, call: _Call, tokens: Tensor, positions: Tensor) -> Tensor:
        kwargs = {CALL_KWARG: call, "position_ids": positions[None].long(), "use_cache": False}
        with self._our_attention():
            return self.model.run_decoder(input_ids=tokens[None], **kwargs).last_hidden_state[0]

    @contextmanager
    def _our_attention(self) -> Iterator[None]:
        """Select our attention within the block. Training always runs the module's own."""
        previous = [config._attn_implementation_internal for config in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = ATTENTION_NAME
        try:
            yield
        finally:
            for config, name in zip(self._configs, previous, strict=True):
                config._attn_implementation_internal = name

    def _read_layers(self) -> None:
        """Set the shapes and dtype of the cache from one forward pass. Unsupported if a layer needs other attention
        than ours."""
        config, call = self.model.text_config, _RecordingCall([])
        two = torch.arange(2, device=self.model.device)
        self._forward(call, two + 1, two)
        layers = sorted(call.layers, key=lambda layer: layer.layer_idx)
        if [layer.layer_idx for layer in layers] != list(range(config.num_hidden_layers)):
            raise Unsupported(
                f"its {config.num_hidden_layers} layers make {len(layers)} calls of transformers' attention interface"
            )
        kinds = getattr(config, "layer_types", None)
        for layer, kind in zip(layers, kinds or [], strict=bool(kinds)):
            if kind not in ("full_attention", "sliding_attention"):
                raise Unsupported(f"layer {layer.layer_idx} is of the kind {kind}")
            if kind == "sliding_attention" and not layer.window:
                raise Unsupported(f"layer {layer.layer_idx} does not say how wide its window is")
        windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        if windowed and not kinds and not any(layer.window for layer in layers):
            raise Unsupported("its config has a sliding window that its layers do not ask for")
        self.shapes, self.dtype = [layer.shape for layer in layers], layers[0].dtype
        if any(layer.dtype != self.dtype for layer in layers):
            raise Unsupported("its layers' keys have several dtypes")


class _Attention(NamedTuple):
    """The arguments of one layer's attention beside q, k and v."""

    layer_idx: int
    scale: float
    window: int
    softcap: float


class _Call(Protocol):
    """The state of one forward pass, called once by each layer."""

    def __call__(self, attention: _Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return (N, H, dv) for q (N, H, d), k (N, Hkv, d) and v (N, Hkv, dv)."""
        ...


class _LayerInfo(NamedTuple):
    """A layer's number, cache shape, dtype and window, read from a call of its attention."""

    layer_idx: int
    shape: KVShape
    dtype: torch.dtype
    window: int


class _RecordingCall(NamedTuple):
    """A forward pass that records its layers and returns zeros."""

    layers: list[_LayerInfo]

    def __call__(self, attention: _Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = KVShape(k.shape[1], k.shape[2], v.shape[2])
        self.layers.append(_LayerInfo(attention.layer_idx, shape, k.dtype, attention.window))
        return q.new_zeros(*q.shape[:2], v.shape[2])


class _CacheCall:
    """A forward pass over the cache."""

    def __init__(self, cache: PagedKVCache, batch: TokenBatch):
        positions = batch.positions.long()
        self.cache = cache
        self.block_table = batch.block_table
        self.slots = batch.slots
        self.lengths = batch.positions + 1
        self.pages = batch.block_table[batch.slots.long(), positions // cache.page_size].long()
        self.offsets = positions % cache.page_size
        self.layers: set[int] = set()

    def __call__(self, attention: _Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer_idx, scale, window, softcap = attention
        self.layers.add(layer_idx)
        k_cache, v_cache = self.cache.k[layer_idx], self.cache.v[layer_idx]
        k_cache[self.pages, :, self.offsets] = k
        v_cache[self.pages, :, self.offsets] = v
        return ops.decode_attention(
            q, k_cache, v_cache, self.block_table, self.lengths, self.slots, scale, window, softcap
        )


def _attend(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others,
) -> tuple[Tensor, None]:
    """Compute attention as transformers calls it: query (1, H, N, d), key (1, Hkv, N, d), value (1, Hkv, N, dv)
    -> (1, N, H, dv)."""
    call: _Call | None = others.pop(CALL_KWARG, None)
    if call is None:
        raise Unsupported("its layers drop keyword arguments on the way to the attention")
    unknown = sorted(name for name, x in others.items() if name not in IGNORED_KWARGS and x is not None)
    if attention_mask is not None:
        unknown.append("attention_mask")
    if unknown:
        raise Unsupported(f"its attention asks for {', '.join(unknown)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    attention = _Attention(module.layer_idx, scale, int(sliding_window or 0), float(softcap or 0.0))
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    return call(attention, q, k, v)[None], None


AttentionInterface.register(ATTENTION_NAME, _attend)
