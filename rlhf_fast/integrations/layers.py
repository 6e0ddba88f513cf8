"""Our training layers in a model of transformers: norms, rotation, activations and attention on rows without padding.

    with layers.fused(model):
        Trainer(model, ...).train()

The decoder's `forward` is replaced on the instance. A pass that our layers can compute runs on them
(model/packed_decoder.py). Any other runs the module's own forward: `handle.status` says how often and why. On the CPU.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.errors import UserError
from rlhf_fast.integrations.calls import Calls, log, need_grad
from rlhf_fast.integrations.decoder_cache import DecoderCache
from rlhf_fast.integrations.handle import Handle
from rlhf_fast.integrations.head import find_model
from rlhf_fast.integrations.switch import OwnForward, Switch, alive, compiles_backward, is_own, traces_or_transforms
from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.model import lora, packed_decoder
from rlhf_fast.model.architectures import FAMILIES, read_decoder
from rlhf_fast.model.modules import set_training_modes, training_modes
from rlhf_fast.model.packing import PackedRows, pack_sequences
from rlhf_fast.model.rope_scaling import is_length_dependent
from rlhf_fast.model.vocabulary import probe_tokens

READ = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache")
"""The arguments of a decoder's forward that our layers know."""
ATTENTION = ("sdpa", "eager")
"""Implementations of transformers that ours equals."""
KEPT_NUMBERS = 16
"""Sets of the numbers of modules and config whose comparisons are kept."""
OF_PACKED_ROWS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Boundaries of packed rows, which position_ids have too."""


class FusedForward:
    """The decoder's forward: by our layers, where they can. It has a weak reference to the decoder, which holds it: a
    circle would keep the weights until the garbage collector runs."""

    def __init__(self, decoder: Any, status: Calls, switch: Switch):
        self._reference = weakref.ref(decoder)
        self.status, self.switch = status, switch
        self._name = f"{type(decoder).__name__}.forward"
        self._output: type | None = None
        self._padding_is_read = False
        self._refusals: dict[Hashable, dict[Any, str | None]] = {}
        self._cache: DecoderCache | None = None

    @property
    def decoder(self) -> Any:
        """The module whose forward this is. RuntimeError if it is gone."""
        return alive(self._reference, "the decoder")

    def remove(self) -> None:
        """Give the decoder its own forward back. What wrapped this one since then stays there, and calls it."""
        self._cache = None
        decoder = self._reference()
        if decoder is not None and vars(decoder).get("forward") is self:
            del decoder.forward

    def __reduce__(self) -> tuple:
        """A saved model is a plain one."""
        return OwnForward, (self.decoder,)

    def __deepcopy__(self, memo: dict) -> FusedForward:
        """A copy of the model has counts of its own, and the switch in common."""
        twin = object.__new__(FusedForward)
        memo[id(self)] = twin
        kept = {name: x for name, x in vars(self).items() if name not in ("_cache", "_reference")}
        vars(twin).update(copy.deepcopy(kept, memo), _cache=None)
        twin._reference = weakref.ref(copy.deepcopy(self.decoder, memo))
        return twin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder: by our layers, where they can."""
        if traces_or_transforms() or not self.switch.on:
            return self._own_forward(*args, **kwargs)
        self.switch.reached = True
        given = self._given(args, kwargs)
        why = self._why_not_given(given)
        found = packed_decoder.inspect(self.decoder) if why is None else None
        why = self._why_not_now(found) if found is not None else why
        if why is not None or found is None or self._cache is None:
            # Without a gradient a cache is usual: it is counted, and not warned of.
            with_grad = self._has_gradient(given)
            self.status.note_fallback(self._name, str(why), with_grad, warns=with_grad)
            return self._own_forward(*args, **kwargs)
        self.status.answered[self._name] += 1
        tokens = given["input_ids"]
        packed, places = pack_sequences(tokens, given["attention_mask"], given["position_ids"])
        states = packed_decoder.packed_hidden(self._cache.parts(self.decoder), packed, None, 0.0, found.checkpoints)
        if places is not None:
            zeros = states.new_zeros(tokens.numel(), states.shape[1])
            states = zeros.index_copy(0, places, states)
            if states.requires_grad and not compiles_backward():
                states.register_hook(functools.partial(self._look_at_padding, places))
        assert self._output is not None
        return self._output(last_hidden_state=states.view(*tokens.shape, -1))

    def _look_at_padding(self, places: Tensor, grad: Tensor) -> None:
        """Note a loss that reads hidden states of padding, which are 0: what it computed is not the model's own."""
        if self._padding_is_read or traces_or_transforms() or torch._C._functorch.is_legacy_batchedtensor(grad):
            return
        is_padding = torch.ones(len(grad), dtype=torch.bool).index_fill_(0, places, False)
        if not grad[is_padding].nan_to_num(0).any():  # a loss that multiplies padding by 0 may have a NaN there
            return
        self._padding_is_read = True
        why = "a loss read padding, which has no hidden states in our layers; give it the label -100"
        self.status.note_fallback(self._name, why, with_grad=True)

    def install(self) -> str | None:
        """Replace the decoder's forward, or return why our layers do not run here: the decoder is then as it was."""
        decoder = self.decoder
        found = packed_decoder.inspect(decoder)
        if why := _why_hooked(found) or self._find_refusal(found):
            return why
        decoder.forward = self
        found = packed_decoder.inspect(decoder)
        self._known_refusals(found)[_key(found)] = None
        return None

    def _known_refusals(self, found: packed_decoder.Inspection) -> dict[Any, str | None]:
        """Return what comparisons found with the numbers that modules and config have now, after reading the parts
        again if they changed."""
        if self._cache is None or not self._cache.is_valid(self.decoder, found):
            self._cache = DecoderCache(self.decoder, found)
            if len(self._refusals) >= KEPT_NUMBERS:
                self._refusals.clear()
        return self._refusals.setdefault(self._cache.key, {})

    def _own_forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.decoder).forward(self.decoder, *args, **kwargs)

    def _has_gradient(self, given: dict[str, Any]) -> bool:
        """Return whether a pass with these arguments has a gradient, of weights or of what it was given."""
        cache = getattr(given["past_key_values"], "layers", ())  # a trained prefix comes as a cache
        keys = [getattr(layer, "keys", None) for layer in cache]
        tensors = [x for x in (*given.values(), *keys) if isinstance(x, Tensor)]
        return need_grad(*tensors, *self.decoder.parameters())

    def _given(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """Return the arguments of a pass by name, without those that change nothing."""
        signature = _signature(type(self.decoder).forward)
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
        if self._padding_is_read and not mask.all():
            return "an earlier loss read padding"
        if not is_first.all() and self.decoder.config._attn_implementation != "sdpa":
            return "a row begins with padding, to which only sdpa gives an attention of 0"
        return None

    def _why_not_now(self, found: packed_decoder.Inspection) -> str | None:
        """Return why our layers do not run in the decoder as it is now, or None."""
        if why := _why_hooked(found):
            return why
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        known, key = self._known_refusals(found), _key(found)
        if key not in known:
            known[key] = self._find_refusal(found)
        if why := known[key]:
            return why
        assert self._cache is not None
        return "it trains with dropout" if self._cache.drops(self.decoder) else None

    def _find_refusal(self, found: packed_decoder.Inspection) -> str | None:
        """Return why our layers cannot stand for the decoder's own, or None: on a few rows hidden states and gradients
        are compared."""
        decoder = self.decoder
        parameter = found.parameters[0] if found.parameters else None
        if parameter is None or not parameter.is_cpu or hasattr(parameter, "full_tensor"):
            return "its weights are not on the CPU, whole; load it there, without device_map and sharding"
        if parameter.dtype not in packed_decoder.TOLERANCES:
            return f"its weights are {str(parameter.dtype).removeprefix('torch.')}; load it in float32 or bfloat16"
        attention = decoder.config._attn_implementation
        if attention not in ATTENTION:
            return f"its attention is {attention}; load it with attn_implementation='sdpa'"
        if not getattr(decoder.config, "is_causal", True):
            return "its attention is not causal"
        if others := [kind.__name__ for kind, forward, _ in found.kinds if _is_other(kind, forward)]:
            return f"the forward of {others[0]} is not that of transformers, torch or peft"
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

        modes, lengths = training_modes(decoder), packed_decoder.PROBE_LENGTHS
        try:
            embedding = read_decoder(decoder).embedding
            shape = len(lengths), min(lengths[0], decoder.config.max_position_embeddings)
            set_training_modes([(module, False) for module, _ in modes])
            with torch.inference_mode(False), torch.autocast("cpu", enabled=False), lora.nonzero_adapters(decoder):
                tokens = probe_tokens(embedding.num_embeddings, [embedding.padding_idx], *shape)
                return packed_decoder.find_difference(decoder, tokens, own, packed)
        except Unsupported as reason:
            return f"{reason}; the families are {', '.join(sorted(FAMILIES))}"
        except Exception as error:  # the code of a model may fail in any way
            return f"a comparison with its own fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        finally:
            set_training_modes(modes)


class FusedLayers(Handle):
    """The handle that `fused` returns. `status` counts the passes that our layers computed, and those of the module's
    own forward by their reason. Who holds it does not hold the weights, which the decoder's forward has."""

    call = "layers.fused(model)"

    def __init__(self, forward: FusedForward):
        self.status, self._switch = forward.status, forward.switch
        self._forward = weakref.ref(forward)

    @property
    def is_open(self) -> bool:
        return self._switch.on

    def remove(self) -> None:
        """Give the model, and copies of it, its own layers back."""
        if self._switch.on and not (self._switch.reached or self.failed):
            log.warning(
                "layers.fused: no pass of %s came to this handle. torch.compile of the whole model, torch.func, and a"
                " trainer that makes the model itself (model_init), pass it by",
                self.status.owner,
            )
        self._switch.on = False
        if forward := self._forward():
            forward.remove()


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
    name = type(model).__name__
    base: Any = lora.unwrap(find_model(model))
    # Llama4ForCausalLM has no base_model, and a decoder is its own.
    decoder: Any = getattr(base, "model", base) if base.base_model is base else base.base_model
    before = vars(decoder).get("forward")
    if isinstance(before, FusedForward) and before.switch.on:
        raise UserError(f"{name}: has our layers already; call remove() of the first handle, or leave its block, first")
    if before is not None and not is_own(decoder, before):
        raise UserError(
            f"{name}: something else replaced its decoder's forward, as offloading by accelerate does; load the model"
            " onto one device"
        )
    forward = FusedForward(decoder, Calls(name), Switch())
    if why := forward.install():
        raise UserError(f"{name}: our layers do not run here, {why}")
    return FusedLayers(forward)


@functools.lru_cache(maxsize=16)  # inspect.signature takes as long as a small op
def _signature(forward: Any) -> inspect.Signature:
    return inspect.signature(forward)


def _key(found: packed_decoder.Inspection) -> tuple[Any, ...]:
    """Return what a comparison of our layers with the own ones depends on, beside DecoderCache.key."""
    trained = tuple(p.requires_grad for p in found.parameters)
    return found.kinds, found.adapters, found.parameters[0].dtype if found.parameters else None, trained


def _why_hooked(found: packed_decoder.Inspection) -> str | None:
    """Return the refusal of modules with hooks, or None."""
    return "its modules have hooks, which ours would not call" if found.hooks else None


def _is_other(kind: type, forward: Any) -> bool:
    """Return whether a module's class or forward is of another program, as a wrapper or a patch of the class is."""
    places = kind.__module__, inspect.unwrap(forward).__module__
    return not all(place.startswith(("transformers.", "torch.nn.modules.", "peft.")) for place in places)
