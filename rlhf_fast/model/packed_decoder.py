"""The training forward: a decoder's layers on packed rows, without padding, built of our ops with gradients.

It runs the families of model/architectures.py where a model's hidden states and gradients were found equal to those of
its own module (`find_refusal`). Norms, rotation, activations and attention are ops, and in float32 on the CPU linear
layers too; model/tape.py says how others are multiplied and where gradients come from. Linear layers with an adapter
are the module's own, called. Activations have the module's dtype, or with `exact` float32.

A prompt that several rows share is computed once, and its gradient is the sum over these rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_fast import ops
from rlhf_fast.graph_capture import captures_on
from rlhf_fast.kernels._backends import forced_backend
from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.model import lora
from rlhf_fast.model.architectures import Decoder, Layer, base_linear, read_decoder, rope_angles
from rlhf_fast.model.modules import all_modules
from rlhf_fast.model.packing import PackedRows, pack_rows, to_device
from rlhf_fast.model.rope_scaling import length_dependent_rope
from rlhf_fast.model.tape import Autograd, TapedLayer, is_plain

PROBE_LENGTHS = (8, 8, 5)
"""Rows of the comparison with the module; the first two share PROBE_PROMPT tokens."""
PROBE_PROMPT = 3
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (0.08, 0.4)}
"""Relative differences, in norm, of hidden states and gradients that rounding explains, by the weights' dtype. Those of
bfloat16 are what the module's own differ by from a float32 copy's."""
NEGLIGIBLE = 0.05
"""A gradient's norm below this share of the largest is compared as if it had this share."""


def packed_hidden(
    parts: Decoder,
    rows: PackedRows,
    kept: Tensor | None,
    dropout: float = 0.0,
    checkpoints: bool = False,
    exact: bool = False,
) -> Tensor:
    """Return the hidden states (n, D) of the tokens at index `kept` (n,), None = all, after the final norm.

    dropout: the probability of residual dropout. checkpoints: compute each layer again in the backward pass instead of
    keeping its activations. exact: in float32 and in the order of sums of the compiled decode step, so that the hidden
    states are those of the rollout, to the bit; on the CPU.
    """
    weight = parts.embedding.weight
    rows, kept = rows.to(weight.device), None if kept is None else to_device(kept, weight.device)
    x = parts.embedding(rows.tokens)
    x = x.float() if exact else x
    if parts.position_embedding is not None:
        x = x + parts.position_embedding(rows.positions)
    rope = None if parts.rotary is None else rope_angles(parts.rotary, weight, rows.positions)
    call = _Call(parts, rows, rope, dropout, exact, Autograd())
    for layer in parts.layers:
        own_kept = kept if layer is parts.layers[-1] else None
        if not torch.is_grad_enabled():
            x = _layer(call, layer, x, own_kept)
        elif _can_be_taped(call, layer, x):
            run = partial(_run_layer, call, layer, own_kept)
            x = TapedLayer.apply(run, checkpoints, x, *_parameters(layer))
        elif checkpoints:
            x = checkpoint(_layer, call, layer, x, own_kept, use_reentrant=False)
        else:
            x = _layer(call, layer, x, own_kept)
    return call.do.norm(parts.final_norm, x)


class _Call(NamedTuple):
    """A forward pass: what all its layers share."""

    parts: Decoder
    rows: PackedRows
    rope: tuple[Tensor, Tensor] | None
    """cos and sin (N, r / 2) float32 of each token's angles."""
    dropout: float
    exact: bool
    do: Autograd
    """The operations."""


def _can_be_taped(call: _Call, layer: Layer, x: Tensor) -> bool:
    """Return whether a tape has all operations of a layer, and a gradient is needed."""
    if not x.is_cpu or call.dropout or not all(map(is_plain, _linears(layer))):
        return False
    return x.requires_grad or any(p.requires_grad for p in _parameters(layer))


def _linears(layer: Layer) -> list[Any]:
    linears = (*layer.qkv, layer.out, layer.gate, layer.up, layer.down)
    return [module for module in linears if module is not None]


def _parameters(layer: Layer) -> list[Tensor]:
    """Return the weights and biases of a layer whose linear layers have no adapters."""
    norms = (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
    parts = [part for part in (*norms, *_linears(layer)) if part is not None]
    return [p for part in parts for p in (part.weight, part.bias) if p is not None]


def _run_layer(call: _Call, layer: Layer, kept: Tensor | None, do: Autograd, x: Tensor) -> Tensor:
    return _layer(call._replace(do=do), layer, x, kept)


def _layer(call: _Call, layer: Layer, x: Tensor, kept: Tensor | None) -> Tensor:
    """Return the residual stream after `layer`; of the `kept` tokens alone, if they are given."""
    do = call.do
    attended = _attention(call, layer, do.norm(layer.attention_norm, x))
    if kept is not None:  # no later token reads the others
        is_unique = call.rows.parents is None  # rows that share a prompt keep its last token, each for itself
        x, attended = do.rows(x, kept, is_unique), do.rows(attended, kept, is_unique)
    out = _drop(call, do.linear(layer.out, attended, call.exact))
    if call.parts.parallel_residual:
        normed = do.norm(layer.mlp_norm, x)
        return do.add(do.add(x, out), _drop(call, _mlp(call, layer, normed)))
    x, normed = do.add_norm(layer.mlp_norm, x, out)
    return do.add(x, _drop(call, _mlp(call, layer, normed)))


def _attention(call: _Call, layer: Layer, x: Tensor) -> Tensor:
    """Return the heads' outputs (N, H d), before the output projection."""
    do, parts, N, d = call.do, call.parts, x.shape[0], call.parts.head_dim
    H, Hkv = parts.num_heads, parts.num_kv_heads
    rope = call.rope if layer.uses_rope else None
    outputs = do.linears(layer.qkv, x, call.exact)
    if len(outputs) == 3:
        q, k, v = (do.view(output, N, heads, d) for output, heads in zip(outputs, (H, Hkv, Hkv), strict=True))
    elif parts.interleaved_qkv:
        q, k, v = do.unbind(do.view(outputs[0], N, H, 3, d), 2)
    else:
        heads = do.view(outputs[0], N, H + 2 * Hkv, d)
        if rope is not None and layer.q_norm is None and layer.k_norm is None:  # q and k by one call
            heads, rope = do.apply(ops.rope, heads, *rope, H + Hkv), None
        q, k, v = do.split(heads, [H, Hkv, Hkv])
    q = q if layer.q_norm is None else do.norm(layer.q_norm, q)
    k = k if layer.k_norm is None else do.norm(layer.k_norm, k)
    if rope is not None:
        q, k = do.apply(ops.rope, q, *rope), do.apply(ops.rope, k, *rope)
    if call.exact:  # the cache has the weights' dtype
        dtype = parts.embedding.weight.dtype
        k, v = do.rounded(k, dtype), do.rounded(v, dtype)
    rows = call.rows
    options = rows.offsets, layer.scale, layer.window, 0.0, rows.parents, call.exact
    attended = do.apply(ops.varlen_attention, q, k, v, *options)
    if rows.attends is not None:
        attended = do.multiply(attended, rows.attends[:, None, None].to(attended.dtype))
    return do.view(attended, N, H * d)


def _mlp(call: _Call, layer: Layer, x: Tensor) -> Tensor:
    do = call.do
    if layer.gate is None:
        inner = _activate(call, do.linear(layer.up, x, call.exact))
    else:
        outputs = do.linears((layer.gate, layer.up), x, call.exact)
        gate, up = outputs if len(outputs) == 2 else do.split(outputs[0], [outputs[0].shape[1] // 2] * 2)
        is_silu = call.parts.activation == "silu"
        inner = do.apply(ops.swiglu, gate, up) if is_silu else do.multiply(_activate(call, gate), up)
    return do.linear(layer.down, inner, call.exact)


def _activate(call: _Call, x: Tensor) -> Tensor:
    if call.parts.activation == "silu":
        return call.do.silu(x, call.exact)
    return call.do.apply(ops.gelu, x, "tanh" if call.parts.activation == "gelu_tanh" else "none")


def _drop(call: _Call, x: Tensor) -> Tensor:
    return F.dropout(x, call.dropout) if call.dropout else x


OF_TRANSFORMERS = ("make_inputs_require_grads", "output_capturing_hook")
"""Hooks of transformers that change nothing here: on the embedding's output, which is called, and on layers whose
outputs were once asked for, idle in a pass that does not ask."""
HOOK_DICTIONARIES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""torch's names of a module's hooks."""


class Inspection(NamedTuple):
    """A decoder's modules and tensors, as far as our layers depend on them."""

    modules: list[nn.Module]
    """The decoder first."""
    kinds: tuple[tuple[type, Any, bool], ...]
    """The class of each module, its forward, and whether the instance has another."""
    adapters: tuple[str, ...]
    """Adapters that each layer applies, and their factors, as text to compare."""
    hooks: list[Any]
    """Hooks of the modules, and of all modules of the process. They see other tensors here than in the module's own
    forward, or none."""
    parameters: list[Tensor]
    buffers: list[Tensor]
    dropouts: tuple[bool, ...]
    """Switches of the adapters' dropouts."""
    checkpoints: bool
    """True where the activations of layers are computed again in the backward pass."""


def inspect(decoder: nn.Module) -> Inspection:
    """Look at the modules of `decoder`, before each pass."""
    modules = all_modules(decoder)
    kinds, adapters, hooks, buffers, dropouts = [], [], [], [], []
    parameters: dict[int, Tensor] = {}  # one may belong to several modules
    checkpoints = False
    for module in modules:
        attributes = vars(module)
        kinds.append((type(module), type(module).forward, "forward" in attributes))
        if state := lora.state_of(module):
            adapters.append(state)
        for name in HOOK_DICTIONARIES:
            if attributes[name]:
                hooks += attributes[name].values()
        for p in attributes["_parameters"].values():
            if p is not None:
                parameters[id(p)] = p
        if attributes["_buffers"]:
            buffers += [x for x in attributes["_buffers"].values() if x is not None]
        if isinstance(module, nn.Dropout) and module.p:
            dropouts.append(module.training)
        checkpoints |= module.training and bool(attributes.get("gradient_checkpointing"))
    hooks = [hook for hook in hooks if getattr(hook, "__name__", "") not in OF_TRANSFORMERS]
    if torch.nn.modules.module._has_any_global_hook():
        hooks.append("of all modules of the process")
    found = [*parameters.values()], buffers
    return Inspection(modules, tuple(kinds), tuple(adapters), hooks, *found, tuple(dropouts), checkpoints)


def find_obstacle(model: Any, found: Inspection, own_hooks: object, capture_failed: bool) -> str | None:
    """Return why our layers do not run now for `model`, a Model, on its device, or None. Hooks of `own_hooks` are
    allowed."""
    if model.exact and model.module is not model.base:
        return "it has an adapter, which a rollout merges into the weights and a training pass does not"
    if model.exact and not (forced_backend() or "cpu:avx").startswith("cpu:avx"):
        return f"RLHF_FAST_BACKEND={forced_backend()} replaces the kernels that it needs"
    if any(getattr(hook, "__self__", None) is not own_hooks for hook in found.hooks):
        return "its modules have hooks, which ours would not call"
    device = model.device
    if device.type not in ("cpu", "cuda") or ops.varlen_attention.chosen(device.type) == "reference":
        return "our layers have no kernels here"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    if device.type == "cpu":
        return None
    # Launched op by op, our layers take the host more time than the module's, and a GPU waits for the host.
    if found.checkpoints:
        return "on a GPU our layers run as CUDA graphs, and gradient checkpointing cannot be captured"
    if capture_failed or not captures_on(device):
        return "on a GPU our layers run as CUDA graphs, which are off or could not be captured"
    return None


def find_refusal(model: Any) -> str | None:
    """Return why `packed_hidden` cannot stand for the forward of `model`, a Model, or None if it can.

    Hidden states are compared with the module's, and the gradients of all parameters that are trained.
    """
    if model.head_weight.dtype not in TOLERANCES:
        return f"weights of {model.head_weight.dtype} are not trained"
    if length_dependent_rope(model) is not None:
        return "its rotary embedding depends on the longest row of a call"
    try:
        parts = read_decoder(model.decoder)
        for layer in parts.layers:
            for module in _linears(layer):
                base_linear(module)
        length = min(model.max_positions or PROBE_LENGTHS[0], PROBE_LENGTHS[0])
        with torch.inference_mode(False), model.eval_mode(), lora.nonzero_adapters(model.module):
            tokens = model.probe_tokens(len(PROBE_LENGTHS), length)
            return find_difference(model.decoder, tokens, model.hidden, partial(model.run_packed, graphs=False))
    except Unsupported as reason:
        return str(reason)


def find_difference(
    decoder: nn.Module,
    tokens: Tensor,
    own_forward: Callable[[Tensor], Tensor],
    packed_forward: Callable[[PackedRows, Tensor], Tensor],
) -> str | None:
    """Return how the packed forward of a few rows differs from the module's, or None where rounding explains it.

    tokens (3, T); own_forward(tokens) returns hidden states (3, T, D), packed_forward(rows, kept) those at `kept`.
    """
    tolerance, gradient_tolerance = TOLERANCES[next(decoder.parameters()).dtype]
    tokens, length = tokens.cpu(), tokens.shape[1]
    lengths = torch.tensor(PROBE_LENGTHS).clamp_max(length)
    prompt = min(PROBE_PROMPT, length - 1)
    tokens[1, :prompt] = tokens[0, :prompt]
    rows = pack_rows(tokens, lengths, torch.full_like(lengths, prompt))
    row_index, columns = (torch.arange(length) < lengths[:, None]).nonzero(as_tuple=True)
    kept = rows.locate(row_index, columns)
    generator = torch.Generator().manual_seed(0)
    wanted = [p for p in decoder.parameters() if p.requires_grad]

    def states_and_gradients(forward: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            states = forward()
            weights = torch.randn(states.shape, generator=generator.manual_seed(0))
            total = (states.float() * weights.to(states.device)).sum()
        if not (wanted and total.requires_grad):  # the reference of a model with adapters
            return states, []
        # an adapter that is not active has no gradient
        gradients = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        return states.detach(), list(gradients)

    own, own_gradients = states_and_gradients(lambda: own_forward(tokens)[row_index, columns])
    packed, packed_gradients = states_and_gradients(lambda: packed_forward(rows, kept))
    if _difference(packed, own) > tolerance:
        return f"its hidden states differ from the module's by {_difference(packed, own):.1e} of their norm"
    # some gradients are only rounding: a bias of the keys shifts all scores of a token alike
    smallest = NEGLIGIBLE * max((float(gradient.double().norm()) for gradient in own_gradients), default=0.0)
    for mine, theirs in zip(packed_gradients, own_gradients, strict=True):
        if _difference(mine, theirs, smallest) > gradient_tolerance:
            return f"a gradient differs from the module's by {_difference(mine, theirs, smallest):.1e} of its norm"
    return None


def _difference(actual: Tensor, expected: Tensor, smallest: float = 0.0) -> float:
    """Return the norm of the difference over that of `expected`, or `smallest` if it is less; infinity if NaN."""
    norm = max(float(expected.double().norm()), smallest)
    difference = float((actual.double() - expected.double()).norm()) / (norm or 1.0)
    return difference if difference == difference else float("inf")
