"""Our training layers in a model of transformers: norms, rotation, activations and attention on rows without padding.

    with layers.fused(model):
        Trainer(model, ...).train()

The decoder's `forward` is replaced on the instance. A pass that our layers can compute runs on them
(model/packed_decoder.py). Any other runs the module's own forward, and `handle.own` says how often and why. On the CPU.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections import Counter
from logging import getLogger
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.integrations.hooks import Hook
from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.model import lora, packed_decoder
from rlhf_fast.model.architectures import read_decoder
from rlhf_fast.model.dropout import has_dropout
from rlhf_fast.model.modules import set_training_modes, training_modes
from rlhf_fast.model.packing import PackedRows, pack_sequences
from rlhf_fast.model.rope_scaling import is_length_dependent

log = getLogger("rlhf_fast")
TESTED = "5.23.0"
PLACES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("models/llama/modeling_llama.py", "LlamaForCausalLM.forward", {"contains": "self.model("}),
    ("models/llama/modeling_llama.py", "LlamaForCausalLM.forward", {"contains": "self.lm_head("}),
    ("models/llama/modeling_llama.py", "LlamaModel.forward", {"contains": "create_causal_mask("}),
    ("masking_utils.py", "_preprocess_mask_arguments", {"contains": "find_packed_sequence_indices("}),
    ("loss/loss_utils.py", "fixed_cross_entropy", {"contains": "cross_entropy(source, target"}),
    ("trainer.py", "Trainer.compute_loss", {"contains": "model(**inputs)"}),
)
HOOKS = tuple(Hook("transformers", TESTED, f"transformers/{file}", name, **rest) for file, name, rest in PLACES)
"""Code of transformers that `lazy_head` and `fused` stand on."""
READ = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache")
"""The arguments of a decoder's forward that our layers know."""
OF_PACKED_ROWS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Boundaries of packed rows, which position_ids have too."""


class FusedLayers(contextlib.AbstractContextManager):
    """The handle that `fused` returns.

    calls: passes that our layers computed.
    own: passes of the module's own forward, counted by their reason.
    """

    def __init__(self, model: Any):
        self.name = type(model).__name__
        self.module = _unwrap(model)
        base = lora.unwrap(self.module)
        self.decoder: Any = base.model if base.base_model is base else base.base_model
        self.calls = 0
        self.own: Counter[str] = Counter()
        self._output: type | None = None
        self._refusals: dict[Any, str | None] = {}

    def remove(self) -> None:
        """Give the model its own layers back."""
        if getattr(vars(self.decoder).get("forward"), "__self__", None) is self:
            del self.decoder.forward

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder: by our layers, where they can."""
        given = self._given(args, kwargs)
        found = packed_decoder.inspect(self.decoder)
        why = self._why_not_given(given) or self._why_not_now(found)
        if why is not None:
            self._note_own(why)
            return self._own_forward(*args, **kwargs)
        self.calls += 1
        tokens = given["input_ids"]
        packed, places = pack_sequences(tokens, given["attention_mask"], given["position_ids"])
        states = packed_decoder.packed_hidden(read_decoder(self.decoder), packed, None, 0.0, found.checkpoints)
        if places is not None:
            zeros = states.new_zeros(tokens.numel(), states.shape[1])
            states = zeros.index_copy(0, places, states)
        assert self._output is not None
        return self._output(last_hidden_state=states.view(*tokens.shape, -1))

    def install(self) -> None:
        """Replace the decoder's forward. UserError if our layers do not run here; the model is then as it was."""
        before = vars(self.decoder).get("forward")
        if isinstance(getattr(before, "__self__", None), FusedLayers):
            raise UserError(
                f"{self.name}: has our layers already; remove the first handle, or leave its `with` block, before"
            )
        if before is not None:
            raise UserError(
                f"{self.name}: something else replaced its decoder's forward (offloading, for one); undo that first"
            )
        if why := self._find_refusal():
            raise UserError(f"{self.name}: our layers do not run here, {why}")
        self.decoder.forward = self.forward
        self._refusals[_key(packed_decoder.inspect(self.decoder))] = None

    def _own_forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.decoder).forward(self.decoder, *args, **kwargs)

    def _note_own(self, why: str) -> None:
        if torch.is_grad_enabled():
            if os.environ.get("RLHF_FAST_STRICT") == "1":
                raise RuntimeError(f"RLHF_FAST_STRICT=1 and the own layers of {self.name} run: {why}")
            if why not in self.own:
                log.warning("layers.fused: the own layers of %s run: %s", self.name, why)
        self.own[why] += 1

    def _given(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """Return the arguments of a pass by name, without those that change nothing."""
        signature = inspect.signature(type(self.decoder).forward)
        rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
        bound = signature.bind(self.decoder, *args, **kwargs).arguments
        given = {**bound, **bound.get(rest, {})}
        without_effect = {next(iter(signature.parameters)), rest, "num_items_in_batch"}
        if given.get("position_ids") is not None:
            without_effect |= set(OF_PACKED_ROWS)
        if given.get("return_dict") is not False:
            without_effect.add("return_dict")
        off = {name for name, x in given.items() if x is None or (x is False and name.startswith("output_"))}
        return dict.fromkeys(READ) | {k: x for k, x in given.items() if k not in without_effect | off}

    def _why_not_given(self, given: dict[str, Any]) -> str | None:
        """Return why our layers do not compute a pass with these arguments, or None."""
        config = self.decoder.config
        if others := sorted(given.keys() - set(READ)):
            return f"it was given {', '.join(others)}"
        if config.output_hidden_states or config.output_attentions:
            return "its config asks for the hidden states or attentions of all layers"
        tokens, mask, positions = given["input_ids"], given["attention_mask"], given["position_ids"]
        if tokens is None or tokens.dim() != 2 or not tokens.numel():
            return "it was given no tokens (B, T)"
        if not tokens.is_cpu:
            return "on a GPU its own layers are faster than ours without CUDA graphs"
        writes_cache = getattr(config, "use_cache", False) if given["use_cache"] is None else given["use_cache"]
        if given["past_key_values"] is not None:
            return "it reads a cache"
        if given["use_cache"] or (writes_cache and not torch.is_grad_enabled()):
            return "it writes a cache"
        if mask is not None:
            return self._why_not_masked(mask, tokens)
        if positions is not None and writes_cache and (positions.diff() != 1).any():
            return "with use_cache transformers lets packed rows see one another; pass use_cache=False"
        return None

    def _why_not_masked(self, mask: Any, tokens: Tensor) -> str | None:
        """Return why an attention mask is none for our layers, or None."""
        if not isinstance(mask, Tensor) or mask.shape != tokens.shape:
            return "its attention mask is not (B, T)"
        begins, is_first = mask.bool().int().diff(dim=1) == 1, mask[:, 0].bool()
        if (begins.sum(1) + is_first > 1).any():
            return "its attention mask has holes"
        if not is_first.all() and self.decoder.config._attn_implementation != "sdpa":
            return "a row begins with padding, to which only sdpa gives an attention of 0"
        return None

    def _why_not_now(self, found: packed_decoder.Inspection) -> str | None:
        """Return why our layers do not run in the decoder as it is now, or None."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "it is compiled"
        if found.hooks:
            return "its modules have hooks, which ours would not call"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        if has_dropout(self.decoder):
            return "it trains with dropout"
        key = _key(found)
        if key not in self._refusals:
            self._refusals[key] = self._find_refusal()
        return self._refusals[key]

    def _find_refusal(self) -> str | None:
        """Return why our layers cannot stand for the decoder's own, or None: on a few rows hidden states and gradients
        are compared."""
        decoder = self.decoder
        if (dtype := next(decoder.parameters()).dtype) not in packed_decoder.TOLERANCES:
            return f"weights of {dtype} are not trained"
        if is_length_dependent(decoder.config):
            return "its rotary embedding depends on the longest row of a call"
        if ops.varlen_attention.chosen("cpu") == "reference":
            return "our layers have no kernels here"

        def own(tokens: Tensor) -> Tensor:
            output = self._own_forward(input_ids=tokens, use_cache=False)
            self._output = type(output)
            return output.last_hidden_state

        def packed(rows: PackedRows, kept: Tensor) -> Tensor:
            return packed_decoder.packed_hidden(read_decoder(decoder), rows, kept)

        modes = training_modes(decoder)
        try:
            read_decoder(decoder)
            set_training_modes([(module, False) for module, _ in modes])
            with torch.inference_mode(False), torch.autocast("cpu", enabled=False), lora.nonzero_adapters(self.module):
                return packed_decoder.find_difference(decoder, _probe_tokens(decoder), own, packed)
        except Unsupported as reason:
            return str(reason)
        finally:
            set_training_modes(modes)


def fused(model: Any) -> FusedLayers:
    """Let a language model of transformers compute its passes by our layers, where they can.

    model: of a family of model/architectures.py (Llama, Mistral, Qwen2, Qwen3, SmolLM3, GPT-2, GPT-NeoX), with any
    head. peft, DDP or accelerate may have wrapped it before or will wrap it after. Its hidden states and gradients on a
    few rows are compared with its own first. Use the result in a `with` block, or call its `remove()`.

    Rows may be padded on either side by an attention mask, or packed by position_ids that begin again. Hidden states of
    padding are 0, but for the one that predicts a row's first token. A pass with a gradient returns no cache, unless
    one is asked for. Passes that run the module's own forward: with a cache, dropout, hooks, autocast, torch.compile,
    or arguments that our layers do not know. RLHF_FAST_STRICT=1 makes these an error where there is a gradient.

    Raises UserError if the family is not known, the forward was replaced before, or the comparison fails.
    """
    handle = FusedLayers(model)
    handle.install()
    return handle


def _key(found: packed_decoder.Inspection) -> tuple[Any, ...]:
    """Return what a comparison of our layers with the own ones depends on."""
    trained = tuple(p.requires_grad for p in found.parameters)
    return found.kinds, found.adapters, found.parameters[0].dtype, trained


def _unwrap(model: Any) -> Any:
    """Return the model within DDP, torch.compile or accelerate. One of peft stays."""
    name = type(model).__name__
    while not hasattr(model, "get_output_embeddings"):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if inner is None:
            raise UserError(f"{name}: is no model of transformers")
        model = inner
    return model


def _probe_tokens(decoder: Any) -> Tensor:
    """Return fixed tokens (3, T), none of them padding, to compare two forward passes."""
    embedding, lengths = decoder.get_input_embeddings(), packed_decoder.PROBE_LENGTHS
    ids = torch.arange(embedding.weight.shape[0])
    ids = ids[ids != (-1 if embedding.padding_idx is None else embedding.padding_idx)]
    shape = len(lengths), min(lengths[0], decoder.config.max_position_embeddings)
    return ids[(torch.arange(shape[0] * shape[1]).view(shape) * 7919 + 3) % len(ids)]
