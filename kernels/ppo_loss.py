"""PPO's clipped losses of policy and value, their gradients and metrics, in one pass over memory."""

import functools

import torch
from torch import Tensor
from torch.nn import Parameter

from rlhf_fast.kernels._backends import forced_backend
from rlhf_fast.kernels._launch import (
    data_ptrs,
    dtype_codes,
    refuse_float64,
    scale_in_place,
    stream_or_threads,
    ticket,
    ticket_ptr,
)
from rlhf_fast.kernels._op import is_tracing, op
from rlhf_fast.kernels._ppo import Whitening
from rlhf_fast.kernels._ppo_loss import (
    IMPORTANCE_MODES,
    STATS,
    Inputs,
    check,
    check_parts,
    losses,
    run_with_row_ratios,
)
from rlhf_fast.kernels._tensors import (
    as_float,
    contiguous_float32,
    contiguous_floats,
    empty_float32,
    has_full_weights,
    promote_to_float64,
    token_weights,
    upcast_dtype,
)


def _fake(_logprobs, _old_logprobs, _advantages, weights, *_options):
    loss = weights.new_empty((), dtype=upcast_dtype(weights))
    return loss, torch.empty_like(loss), loss.new_empty(len(STATS))


@op(fake=_fake)
def ppo_loss(
    logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    weights: Tensor | float,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    value_weights: Tensor | float | None = None,
    sampler_logprobs: Tensor | None = None,
    advantage_shift: float | Tensor | None = None,
    advantage_scale: float | Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    value_clip: float = 0.2,
    log_ratio_clamp: float = 20.0,
    importance_cap: float = 2.0,
    importance_mode: str = "truncate",
    importance_floor: float = 0.0,
    clip_mode: str = "ppo",
    ratio_level: str = "token",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return policy_loss (), value_loss () and stats (17,), all float32, of tokens in one shape.

        ratio = exp(clamp(logprobs - old_logprobs, +-log_ratio_clamp))          A = (advantages - shift) * scale
        policy_loss = sum weights * max(-A ratio, -A clamp(ratio, 1 - clip_low, 1 + clip_high))
        value_loss = sum value_weights * max((V - R)^2, (clamp(V, V_old - value_clip, V_old + value_clip) - R)^2) / 2

    (Schulman et al. 2017, arXiv 1707.06347, eq. 7; the clipped value loss is that of OpenAI's lm-human-preferences.)

    logprobs, old_logprobs, advantages: without these three only value_loss is computed; policy_loss is 0.
    values, returns: without these two only policy_loss is computed; value_loss is 0.
    weights: with 1 / (tokens of the whole optimizer batch) the losses of micro-batches add up. Tokens of weight 0 may
        hold anything, even NaN. A number or a tensor () is the weight of every token.
    value_weights: as weights, for value_loss. None stands for weights.
    sampler_logprobs: of the engine that sampled the tokens, if old_logprobs were computed again by the trainer. Each
        policy term is then multiplied by w = exp(old_logprobs - sampler_logprobs) (truncated importance sampling).
    importance_mode: "truncate" limits w to importance_cap from above and to importance_floor from below, "mask" drops
        tokens whose w is beyond one of them: their w is 0.
    advantage_shift, advantage_scale: numbers or tensors of one element, to whiten the advantages.
    dual_clip: c > 0 bounds the policy term by -A c where A < 0 (Ye et al. 2020, arXiv 1912.09729).
    clip_mode: "ppo" as above. "cispo": the policy term is -A min(ratio, 1 + clip_high) logprobs, and the ratio has no
        gradient, so that no token loses its own (MiniMax-M1, Chen et al. 2025, arXiv 2506.13585). clip_low is not used.
        TRL's loss_type="cispo" is the same; its epsilon_high is 1 + clip_high.
    ratio_level: "token" as above. "sequence", for tensors (B, T): the log-ratio of each token is the mean of its row's,
        of the tokens whose weight is not 0, clamped as above (GSPO, Zheng et al. 2025, arXiv 2507.18071; TRL's
        importance_sampling_level). The paper's loss has the weights 1 / (sequences * tokens of the row). Costs a second
        and a third visit of a row, which a CPU's cache still has; on a GPU torch visits all tokens about
        ten times.
    value_clip, log_ratio_clamp, dual_clip, importance_floor: 0 turns them off.

    Gradients: with respect to logprobs and values, computed by the forward pass. They equal autograd's: at a clip bound
    a ratio or a value counts as not clipped. The gradient is halved at a tie with the bound of dual_clip, and where a
    value beyond its clip has equal clipped and unclipped errors. Beyond log_ratio_clamp it is 0. That of a row's ratio
    is shared by the row's tokens: 1 / n of the sum of their terms' derivatives. "cispo" has for each token
    -A min(ratio, 1 + clip_high), also beyond log_ratio_clamp.

    Raises ValueError where shapes differ, a part is incomplete, value_clip has no old_values, importance_mode,
    clip_mode or ratio_level is unknown, importance_floor is above importance_cap, "cispo" is given a dual_clip, or
    "sequence" a shape that is not (B, T).

    stats, named in `ppo_loss.stats`, are sums over tokens of weight * x that add up over micro-batches, with x:
        weight: 1
        clipped_low, clipped_high, clipped_dual: 1 where that clip is active, else 0; of "cispo" clipped_high is 1 where
            ratio > 1 + clip_high, whatever the sign of A, and the other two are 0
        kl_k1, kl_k3: -log ratio and ratio - 1 - log ratio, two estimates of KL(old || new) in nats
        ratio, ratio_square: ratio and its square
        importance, importance_capped: w after importance_mode, and 1 where it was above the cap or below the floor,
            else 0
    of value_weight * x, with x:
        value_weight: 1
        value_clipped: 1 where the value clip is active, else 0
        value, value_error, return: V, (V - R)^2 and R
    and two extremes, to be joined by max and min:
        ratio_max, ratio_min: the largest and the smallest ratio; -inf and inf without a token
    """
    x = Inputs._make((
        logprobs, old_logprobs, advantages, weights, values, old_values, returns, value_weights, sampler_logprobs,
        advantage_shift, advantage_scale, clip_low, clip_high, dual_clip, value_clip, log_ratio_clamp, importance_cap,
        importance_mode, importance_floor, clip_mode, ratio_level,
    ))  # fmt: skip
    out = losses(x)
    return out.policy, out.value, out.stats


ppo_loss.stats = STATS


@ppo_loss.normalize
def _(*args):
    x = Inputs(*args)
    check_parts(x)
    if not (has_full_weights(x.weights) and (x.value_weights is None or has_full_weights(x.value_weights))):
        like = x.values if x.logprobs is None else x.logprobs
        value_weights = None if x.value_weights is None else token_weights(x.value_weights, like, like.shape)
        x = x._replace(weights=token_weights(x.weights, like, like.shape), value_weights=value_weights)
    check(x)
    tensors = promote_to_float64(*x.token_tensors)
    _, _, _, weights, *_ = tensors
    whitening = Whitening.normalize("ppo_loss", x.advantage_shift, x.advantage_scale, weights)
    scalars = (as_float(scalar) for scalar in x.scalars)
    return *tensors, *whitening, *scalars, x.importance_mode, as_float(x.importance_floor), x.clip_mode, x.ratio_level


def _fake_with_gradients(*args):
    *args, logprobs_need_grad, values_need_grad, rounds = args
    x = Inputs(*args)
    losses_and_stats = _fake(x.logprobs, x.old_logprobs, x.advantages, x.weights)
    grads = empty_grads(x, (logprobs_need_grad, values_need_grad), rounds)
    return *losses_and_stats, *_empty_for_none(losses_and_stats[2], *grads)


def empty_grads(x: Inputs, needs_grad: tuple[bool, bool], rounds: bool) -> list[Tensor | None]:
    """Return new memory for the gradients of logprobs and values; None where not needed."""
    return [
        torch.empty(x.weights.shape, dtype=t.dtype if rounds else upcast_dtype(x.weights), device=x.weights.device)
        if needed and t is not None
        else None
        for t, needed in zip((x.logprobs, x.values), needs_grad, strict=True)
    ]


@ppo_loss.variant(outputs=5, flags=("logprobs_need_grad", "values_need_grad", "round_grads"), fake=_fake_with_gradients)
def ppo_loss_with_gradients(*args):
    """Return the outputs of `ppo_loss`, policy_loss's gradient by logprobs and value_loss's by values, (0,) where not
    needed. round_grads: in the dtype of logprobs and of values, else float32."""
    *args, logprobs_need_grad, values_need_grad, rounds = args
    x = Inputs(*args)
    out = losses(x)
    grads = out.logprob_grad if logprobs_need_grad else None, out.value_grad if values_need_grad else None
    if rounds:
        grads = (g if g is None else g.to(t.dtype) for g, t in zip(grads, (x.logprobs, x.values), strict=True))
    return out.policy, out.value, out.stats, *_empty_for_none(out.stats, *grads)


def _empty_for_none(like: Tensor, *grads: Tensor | None) -> list[Tensor]:
    return [like.new_empty(0) if grad is None else grad for grad in grads]


MAX_BLOCKS = 1024  # the largest grid of csrc/cuda/ppo_loss.cu
FULL_GPU_BLOCKS = 256  # in a larger grid each block loops over two or more groups of tokens


def _launch_cpu(kernels, args, needs_grad, rounds):
    """Return both losses, stats and both gradients, None where not needed."""
    x = Inputs(*args)
    refuse_float64(x.weights)
    tensors = contiguous_float32(*x.tensors)
    _, _, _, weights, *_ = tensors
    clip = x.clip
    out = [*_empty_sums(weights), *empty_grads(x, needs_grad, False)]
    kernels.ppo_loss(
        *data_ptrs(*tensors, *out), weights.numel(), weights.shape[1] if clip.is_by_row else 0, *x.scalars,
        x.importance_floor, IMPORTANCE_MODES.index(x.importance_mode), clip.is_cispo, stream_or_threads(weights),
    )  # fmt: skip
    if rounds:
        out[3:] = (g if g is None else g.to(t.dtype) for g, t in zip(out[3:], (x.logprobs, x.values), strict=True))
    return out


def _launch_cuda(kernels, args, needs_grad, rounds):
    x = Inputs(*args)
    refuse_float64(x.weights)
    return run_with_row_ratios(functools.partial(_run_cuda, kernels), x, needs_grad, rounds)


def _run_cuda(kernels, x, needs_grad, rounds, row_ratios):
    tensors = contiguous_floats(*x.tensors)
    _, _, _, weights, *_ = tensors
    N = weights.numel()
    sums, grads = _empty_sums(weights), empty_grads(x, needs_grad, rounds)
    codes = dtype_codes(kernels, *tensors, *grads)
    num_groups = -(-N // kernels.ppo_loss_tokens_per_block)
    blocks = max(1, min(num_groups, MAX_BLOCKS, max(FULL_GPU_BLOCKS, num_groups // 2)))
    partial_sums = empty_float32(weights, kernels.ppo_loss_num_partials, blocks)
    numbers, index = ticket(weights)
    kernels.ppo_loss(
        *data_ptrs(*tensors, *sums, *grads, partial_sums, row_ratios.log_ratios), ticket_ptr(numbers, index),
        sum(code << 2 * i for i, code in enumerate(codes)), blocks, N, row_ratios.length, *x.scalars,
        x.importance_floor, IMPORTANCE_MODES.index(x.importance_mode), x.clip.is_cispo, stream_or_threads(weights),
    )  # fmt: skip
    return *sums, *grads


def _empty_sums(weights: Tensor) -> list[Tensor]:
    """Return new memory for both losses and stats."""
    return [empty_float32(weights), empty_float32(weights), empty_float32(weights, len(STATS))]


# On a GPU before Triton: on an H100, forward and backward at 8192 x 2048 in float32 246 us on the device, Triton 267.
def _register_compiled(device, launch):
    @ppo_loss.compiled(devices=(device,))
    def _(kernels, *args):
        return tuple(launch(kernels, args, (False, False), False)[:3])

    @ppo_loss_with_gradients.compiled(required_symbols=("ppo_loss",), devices=(device,))
    def _(kernels, *args):
        *sums, logprob_grad, value_grad = launch(kernels, args[:-3], args[-3:-1], args[-1])
        return *sums, *_empty_for_none(sums[2], logprob_grad, value_grad)


_register_compiled("cpu", _launch_cpu)
_register_compiled("cuda", _launch_cuda)


def _gpu_backend(x: Tensor) -> str | None:
    """Return the backend that answers ppo_loss on x if it is of a GPU, or simulates one, else None: also for tensors
    without memory of their own, of subclasses and of `is_grads_batched`."""
    if is_tracing() or x.dtype == torch.float64:
        return None
    if type(x) not in (Tensor, Parameter) or torch._C._functorch.is_legacy_batchedtensor(x):
        return None
    backend = forced_backend() or ppo_loss.chosen(x.device.type)
    return backend if backend in ("cuda", "simt", "triton") else None


def _forward(ctx, *args):
    """Keep the gradients that the forward pass makes. On a GPU they have their last dtype, and the backward pass scales
    them in place and hands them over; a second one computes them again. Not in float16: they are mostly too small for
    it until they are multiplied by the scale of a GradScaler."""
    x, needed = Inputs(*args), Inputs(*ctx.needs_input_grad)
    ctx.needs_grad = needed.logprobs, needed.values
    ctx.dtypes = [None if t is None else t.dtype for t in (x.logprobs, x.values)]
    ctx.rounds = _gpu_backend(x.weights) is not None and torch.float16 not in ctx.dtypes
    *sums, stats, logprob_grad, value_grad = ppo_loss_with_gradients.run(*args, *ctx.needs_grad, ctx.rounds)
    ctx.grads = [logprob_grad, value_grad]
    if ctx.rounds:
        ctx.save_for_backward(*x.tensors)
        ctx.options = args[len(x.tensors) :]
    constant = [loss for loss, loss_needed in zip(sums, ctx.needs_grad, strict=True) if not loss_needed]
    ctx.mark_non_differentiable(stats, *constant)
    ctx.set_materialize_grads(False)
    return *sums, stats


def _backward(ctx, policy_grad, value_grad, _stats_grad):
    factors = [f if needed else None for f, needed in zip((policy_grad, value_grad), ctx.needs_grad, strict=True)]
    used = [factor is not None for factor in factors]
    if any(u and grad is None for u, grad in zip(used, ctx.grads, strict=True)):
        again = ppo_loss_with_gradients.run(*ctx.saved_tensors, *ctx.options, *used, True)[3:]
        ctx.grads = [new if u else grad for u, new, grad in zip(used, again, ctx.grads, strict=True)]
    grads = [grad if u else None for u, grad in zip(used, ctx.grads, strict=True)]
    backend = next((_gpu_backend(factor) for factor in factors if ctx.rounds and factor is not None), None)
    if backend is not None:
        ctx.grads = [None if u else grad for u, grad in zip(used, ctx.grads, strict=True)]
        scale_in_place(grads, factors, backend)
    else:
        grads = [
            None if factor is None else (factor * grad).to(dtype)
            for dtype, grad, factor in zip(ctx.dtypes, grads, factors, strict=True)
        ]
    return Inputs(*[None] * len(Inputs._fields))._replace(logprobs=grads[0], values=grads[1])


ppo_loss.gradient(_backward, wrt=("logprobs", "values"), forward=_forward)


def _make_inputs(
    shape, device, dtype, policy=True, value=True, far=False, whiten=False, sampler="", grad=True, **options
):
    """far: log-ratios beyond every bound. Tokens of weight 0 are NaN; there are none where a number is the weight."""
    valid = torch.rand(shape, device=device) > (-1 if "weights" in options else 0.3)
    valid.view(-1)[:1] = True
    weights = torch.rand(shape, device=device) * valid / max(valid.numel(), 1)

    def normal(scale):
        return (scale * torch.randn(shape, device=device)).masked_fill(~valid, torch.nan).to(dtype)

    given = {"weights": weights.to(dtype)} | options
    if policy:
        logprobs = -3 * normal(1).abs()
        old = logprobs + normal(40 if far else 0.3) * (torch.rand(shape, device=device) > 0.2)
        given |= {"logprobs": logprobs.requires_grad_(grad), "old_logprobs": old, "advantages": normal(1)}
        if sampler:
            given |= {"sampler_logprobs": old + normal(0.5), "importance_cap": 1.2, "importance_mode": sampler}
            given |= options
        if whiten:
            given["advantage_shift"] = torch.tensor(0.3, device=device)
            given["advantage_scale"] = torch.tensor(1.7, device=device)
    if value:
        given |= {"values": normal(1).requires_grad_(grad), "old_values": normal(1), "returns": normal(1)}
        given.setdefault("value_weights", (weights * 2).to(dtype) if policy else None)
    return tuple(given.get(name, ppo_loss.defaults.get(name)) for name in ppo_loss.names)


CISPO, SEQUENCE = {"clip_mode": "cispo"}, {"ratio_level": "sequence"}
SMALL = [
    {"shape": (1,), "value_clip": 0.0},
    {"shape": (3, 17), "whiten": True},
    {"shape": (9, 33), "far": True, "dual_clip": 3.0, "clip_high": 0.28},
    {"shape": (5, 8), "value": False, "sampler": "truncate"},
    {"shape": (67,), "value": False, "sampler": "mask", "whiten": True, "log_ratio_clamp": 0.0},
    {"shape": (2, 3, 7), "policy": False},
    {"shape": (40,), "policy": False, "value_clip": 0.0},
    {"shape": (0, 5)},
    {"shape": (5, 9), "value": False, "sampler": "truncate", "importance_floor": 0.8},
    {"shape": (41,), "value": False, "sampler": "mask", "importance_floor": 0.9, "dual_clip": 3.0},
    {"shape": (2, 19), "weights": 0.03, "value_weights": 0.07},
    {"shape": (3, 21), **CISPO, "clip_high": 0.1, "whiten": True},
    {"shape": (7, 5), **CISPO, "far": True, "value": False, "sampler": "mask", "importance_floor": 0.8},
    {"shape": (4, 33), **SEQUENCE, "clip_low": 0.05, "clip_high": 0.02, "sampler": "truncate"},
    {"shape": (3, 70), **SEQUENCE, "far": True, "dual_clip": 3.0, "log_ratio_clamp": 3.0, "whiten": True},
    {"shape": (5, 17), **SEQUENCE, "value": False, "sampler": "mask", "importance_floor": 0.8},
    {"shape": (2, 300), **SEQUENCE, **CISPO, "clip_high": 0.01, "sampler": "mask"},
    {"shape": (2, 0), **SEQUENCE},
]
LARGE = [{"shape": (64, 128)}, {"shape": (64, 1024)}, {"shape": (512, 1024)}]
ppo_loss.inputs(small_sizes=SMALL, large_sizes=LARGE)(_make_inputs)


@ppo_loss_with_gradients.inputs(small_sizes=SMALL[:1] + SMALL[2:6] + SMALL[11:], large_sizes=[])
def _(logprobs_need_grad=True, values_need_grad=True, round_grads=True, **size):
    policy, value = size.get("policy", True), size.get("value", True)
    return *_make_inputs(grad=False, **size), logprobs_need_grad and policy, values_need_grad and value, round_grads
