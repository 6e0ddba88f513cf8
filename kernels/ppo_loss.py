"""PPO's clipped losses of policy and value, their gradients and metrics, in one pass over memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels._launch import data_ptrs, refuse_float64, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._ppo import KL, Clip, PolicyLoss, TokenInputs, Whitening, policy_loss, value_loss, where_valid
from rlhf_fast.kernels._tensors import contiguous_float32, promote_to_float64, upcast, upcast_dtype

IMPORTANCE_MODES = ("truncate", "mask")


class PPOStats(NamedTuple):
    """Statistics of `ppo_loss`, whose docstring defines them: `PPOStats(*stats).ratio_max`."""

    weight: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor
    kl_k1: Tensor
    kl_k3: Tensor
    ratio: Tensor
    ratio_square: Tensor
    importance: Tensor
    importance_capped: Tensor
    value_weight: Tensor
    value_clipped: Tensor
    value: Tensor
    value_error: Tensor
    return_: Tensor
    ratio_max: Tensor
    ratio_min: Tensor


STATS = tuple(name.rstrip("_") for name in PPOStats._fields)


def _fake(_logprobs, _old_logprobs, _advantages, weights, *_options):
    loss = weights.new_empty((), dtype=upcast_dtype(weights))
    return loss, torch.empty_like(loss), loss.new_empty(len(STATS))


@op(fake=_fake)
def ppo_loss(
    logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    weights: Tensor,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    value_weights: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    advantage_shift: Tensor | None = None,
    advantage_scale: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    value_clip: float = 0.2,
    log_ratio_clamp: float = 20.0,
    importance_cap: float = 2.0,
    importance_mode: str = "truncate",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return policy_loss (), value_loss () and stats (17,), all float32, of tokens in one shape.

        ratio = exp(clamp(logprobs - old_logprobs, +-log_ratio_clamp))          A = (advantages - shift) * scale
        policy_loss = sum weights * max(-A ratio, -A clamp(ratio, 1 - clip_low, 1 + clip_high))
        value_loss = sum value_weights * max((V - R)^2, (clamp(V, V_old - value_clip, V_old + value_clip) - R)^2) / 2

    (Schulman et al. 2017, arXiv 1707.06347, eq. 7; the clipped value loss is that of OpenAI's lm-human-preferences.)

    logprobs, old_logprobs, advantages: without these three only value_loss is computed; policy_loss is 0.
    values, returns: without these two only policy_loss is computed; value_loss is 0.
    weights: with 1 / (tokens of the whole optimizer batch) the losses of micro-batches add up. Tokens of weight 0 may
        hold anything, even NaN.
    value_weights: None stands for weights.
    sampler_logprobs: of the engine that sampled the tokens, if old_logprobs were computed again by the trainer. Each
        policy term is then multiplied by w = exp(old_logprobs - sampler_logprobs) (truncated importance sampling).
    importance_mode: "truncate" limits w to importance_cap, "mask" drops tokens whose w is above it.
    advantage_shift, advantage_scale: numbers or tensors of one element, to whiten the advantages.
    dual_clip: c > 0 bounds the policy term by -A c where A < 0 (Ye et al. 2020, arXiv 1912.09729).
    value_clip, log_ratio_clamp, dual_clip: 0 turns them off.

    Gradients: with respect to logprobs and values, computed by the forward pass. They equal autograd's: at a clip bound
    a ratio or a value counts as not clipped. The gradient is halved at a tie with the bound of dual_clip, and where a
    value beyond its clip has equal clipped and unclipped errors. Beyond log_ratio_clamp it is 0.

    Raises ValueError where shapes differ, a part is incomplete, value_clip has no old_values, or importance_mode is
    unknown.

    stats, named in `ppo_loss.stats`, are sums over tokens of weight * x that add up over micro-batches, with x:
        weight: 1
        clipped_low, clipped_high, clipped_dual: 1 where that clip is active, else 0
        kl_k1, kl_k3: -log ratio and ratio - 1 - log ratio, two estimates of KL(old || new) in nats
        ratio, ratio_square: ratio and its square
        importance, importance_capped: w after importance_mode, and 1 where it was above the cap, else 0
    of value_weight * x, with x:
        value_weight: 1
        value_clipped: 1 where the value clip is active, else 0
        value, value_error, return: V, (V - R)^2 and R
    and two extremes, to be joined by max and min:
        ratio_max, ratio_min: the largest and the smallest ratio; -inf and inf without a token
    """
    x = Inputs(
        logprobs, old_logprobs, advantages, weights, values, old_values, returns, value_weights, sampler_logprobs,
        advantage_shift, advantage_scale, clip_low, clip_high, dual_clip, value_clip, log_ratio_clamp, importance_cap,
        importance_mode,
    )  # fmt: skip
    losses = _losses(x)
    return losses.policy, losses.value, losses.stats


ppo_loss.stats = STATS


class Inputs(NamedTuple):
    """The arguments of `ppo_loss`, in its order."""

    logprobs: Tensor | None
    old_logprobs: Tensor | None
    advantages: Tensor | None
    weights: Tensor
    values: Tensor | None
    old_values: Tensor | None
    returns: Tensor | None
    value_weights: Tensor | None
    sampler_logprobs: Tensor | None
    advantage_shift: Tensor | None
    advantage_scale: Tensor | None
    clip_low: float
    clip_high: float
    dual_clip: float
    value_clip: float
    log_ratio_clamp: float
    importance_cap: float
    importance_mode: str

    @property
    def token_tensors(self) -> tuple[Tensor | None, ...]:
        """logprobs to sampler_logprobs: tensors with one element for each token."""
        return self[:9]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:11]

    @property
    def scalars(self) -> tuple[float, ...]:
        """clip_low to importance_cap."""
        return self[11:17]

    @property
    def clip(self) -> Clip:
        return Clip(self.clip_low, self.clip_high, self.dual_clip, self.value_clip, self.log_ratio_clamp)


class _Losses(NamedTuple):
    policy: Tensor
    value: Tensor
    stats: Tensor
    logprob_grad: Tensor | None = None
    value_grad: Tensor | None = None


def _losses(x: Inputs) -> _Losses:
    zero = x.weights.new_zeros((), dtype=upcast_dtype(x.weights))
    losses = _Losses(zero, zero.clone(), zero)
    stats = dict.fromkeys(PPOStats._fields, zero) | {"ratio_max": zero - torch.inf, "ratio_min": zero + torch.inf}
    if x.logprobs is not None:
        policy, importance_stats = _policy_loss(x)
        losses = losses._replace(policy=policy.loss, logprob_grad=policy.logprob_grad)
        stats |= importance_stats
    if x.values is not None and x.returns is not None:
        value_weights = upcast(x.weights if x.value_weights is None else x.value_weights)
        value = value_loss(x.values, x.old_values, x.returns, value_weights, x.clip)
        losses = losses._replace(value=value.loss, value_grad=value.value_grad)
        stats |= value.stats._asdict()
    return losses._replace(stats=torch.stack(PPOStats(**stats)))


def _policy_loss(x) -> tuple[PolicyLoss, dict[str, Tensor]]:
    """Return the policy loss with importance weights, and the statistics of PPOStats, of which only importance and
    importance_capped are with importance weights."""
    logprobs, weights = upcast(x.logprobs), upcast(x.weights)
    valid = weights != 0
    no_entropy = torch.zeros_like(logprobs)
    whitening = Whitening(x.advantage_shift, x.advantage_scale)

    def loss_with(weights: Tensor) -> PolicyLoss:
        inputs = TokenInputs(x.old_logprobs, x.advantages, weights)
        return policy_loss(logprobs, no_entropy, weights != 0, inputs, whitening, x.clip, KL(0.0, "k1"), 0.0)

    policy = loss_with(weights)
    stats = {name: total for name, total in policy.stats._asdict().items() if name in PPOStats._fields}
    importance = torch.ones_like(weights)
    is_capped = torch.zeros_like(valid)
    if x.sampler_logprobs is not None:
        importance = (where_valid(valid, x.old_logprobs) - where_valid(valid, x.sampler_logprobs)).exp()
        is_capped = importance > x.importance_cap
        importance = torch.where(is_capped, 0.0 if x.importance_mode == "mask" else x.importance_cap, importance)
        policy = loss_with(weights * importance)
    stats["importance"] = torch.where(valid, weights * importance, 0).sum()
    stats["importance_capped"] = torch.where(valid, weights * is_capped, 0).sum()
    return policy, stats


@ppo_loss.normalize
def _(*args):
    x = Inputs(*args)
    _check(x)
    if x.weights.dtype == torch.bool:
        x = x._replace(weights=x.weights.float())
    if x.value_weights is not None and x.value_weights.dtype == torch.bool:
        x = x._replace(value_weights=x.value_weights.float())
    tensors = promote_to_float64(*x.token_tensors)
    _, _, _, weights, *_ = tensors
    whitening = Whitening.normalize("ppo_loss", x.advantage_shift, x.advantage_scale, weights)
    return *tensors, *whitening, *map(float, x.scalars), x.importance_mode


def _check(x: Inputs) -> None:
    num_missing = (x.logprobs is None) + (x.old_logprobs is None) + (x.advantages is None)
    if num_missing and (num_missing < 3 or x.sampler_logprobs is not None):
        raise ValueError("ppo_loss: the policy part needs logprobs, old_logprobs and advantages, or none of them")
    if x.logprobs is None and x.values is None:
        raise ValueError("ppo_loss: there is neither logprobs nor values, nothing to compute")
    without_values = x.values is None and (x.old_values is not None or x.value_weights is not None)
    if without_values or (x.values is None) != (x.returns is None):
        raise ValueError("ppo_loss: the value part needs values and returns, or none of them")
    if x.values is not None and x.value_clip > 0 and x.old_values is None:
        raise ValueError(f"ppo_loss: value_clip={x.value_clip} needs old_values; value_clip=0 does without")
    shape = x.weights.shape
    shapes = [t.shape for t in x.token_tensors if t is not None]
    if shapes != [shape] * len(shapes):
        got = list(map(list, shapes))
        raise ValueError(f"ppo_loss: all must have the shape of weights, {list(shape)}, got {got}")
    if x.importance_mode not in IMPORTANCE_MODES:
        modes = ", ".join(IMPORTANCE_MODES)
        raise ValueError(f"ppo_loss: importance_mode must be one of {modes}, got {x.importance_mode!r}")


def _fake_with_gradients(logprobs, old_logprobs, advantages, weights, *options):
    losses_and_stats = _fake(logprobs, old_logprobs, advantages, weights)
    shapes = (weights.shape if needed else (0,) for needed in options[-2:])
    return *losses_and_stats, *(losses_and_stats[0].new_empty(shape) for shape in shapes)


@ppo_loss.variant(outputs=5, flags=("logprobs_need_grad", "values_need_grad"), fake=_fake_with_gradients)
def ppo_loss_with_gradients(*args):
    """Return the outputs of `ppo_loss`, policy_loss's gradient by logprobs and value_loss's by values, float32 in the
    shape of weights; (0,) where not needed."""
    *args, logprobs_need_grad, values_need_grad = args
    x = Inputs(*args)
    losses = _losses(x)
    logprob_grad = losses.logprob_grad if logprobs_need_grad else None
    value_grad = losses.value_grad if values_need_grad else None
    return losses.policy, losses.value, losses.stats, *_empty_for_none(losses.stats, logprob_grad, value_grad)


def _empty_for_none(like: Tensor, *grads: Tensor | None) -> list[Tensor]:
    return [like.new_empty(0) if grad is None else grad for grad in grads]


MAX_BLOCKS = 1024  # the largest grid of csrc/cuda/ppo_loss.cu
FULL_GPU_BLOCKS = 256  # in a larger grid each block loops over two or more groups of tokens


def _launch(kernels, device, args, needs_grad):
    """Return both losses, stats and both gradients, None where not needed."""
    x = Inputs(*args)
    refuse_float64(x.weights)
    tensors = contiguous_float32(*x.tensors)
    _, _, _, weights, *_ = tensors
    N = weights.numel()
    out = [weights.new_empty(()), weights.new_empty(()), weights.new_empty(len(STATS))]
    out += [torch.empty_like(weights) if needed else None for needed in needs_grad]
    grid, partial_sums = [], []
    if device == "cuda":
        num_groups = -(-N // kernels.ppo_loss_tokens_per_block)
        grid = [max(1, min(num_groups, MAX_BLOCKS, max(FULL_GPU_BLOCKS, num_groups // 2)))]
        partial_sums = [weights.new_empty(kernels.ppo_loss_num_partials, *grid)]
    kernels.ppo_loss(
        *data_ptrs(*tensors, *out, *partial_sums), *grid, N, *x.scalars,
        IMPORTANCE_MODES.index(x.importance_mode), stream_or_threads(weights),
    )  # fmt: skip
    return out


def _register_compiled(device):
    @ppo_loss.compiled(devices=(device,))
    def _(kernels, *args):
        return _launch(kernels, device, args, (False, False))[:3]

    @ppo_loss_with_gradients.compiled(required_symbols=("ppo_loss",), devices=(device,))
    def _(kernels, *args):
        *sums, logprob_grad, value_grad = _launch(kernels, device, args[:-2], args[-2:])
        return *sums, *_empty_for_none(sums[2], logprob_grad, value_grad)


_register_compiled("cpu")
_register_compiled("cuda")


def _forward(ctx, *args):
    x, needed = Inputs(*args), Inputs(*ctx.needs_input_grad)
    needs_grad = needed.logprobs, needed.values
    *losses, stats, logprob_grad, value_grad = ppo_loss_with_gradients.run(*args, *needs_grad)
    ctx.save_for_backward(logprob_grad, value_grad)
    ctx.dtypes = [t.dtype if t_needed else None for t, t_needed in zip((x.logprobs, x.values), needs_grad, strict=True)]
    constant = [loss for loss, loss_needed in zip(losses, needs_grad, strict=True) if not loss_needed]
    ctx.mark_non_differentiable(stats, *constant)
    return *losses, stats


def _backward(ctx, *grad_outputs):
    d_logprobs, d_values = (
        None if dtype is None else (grad_loss * grad).to(dtype)
        for dtype, grad, grad_loss in zip(ctx.dtypes, ctx.saved_tensors, grad_outputs[:2], strict=True)
    )
    return Inputs(*[None] * len(Inputs._fields))._replace(logprobs=d_logprobs, values=d_values)


ppo_loss.gradient(_backward, forward=_forward)


def _make_inputs(
    shape, device, dtype, policy=True, value=True, far=False, whiten=False, sampler="", grad=True, **options
):
    """far: log-ratios beyond every bound. Tokens of weight 0 are NaN."""
    valid = torch.rand(shape, device=device) > 0.3
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
        if whiten:
            given["advantage_shift"] = torch.tensor(0.3, device=device)
            given["advantage_scale"] = torch.tensor(1.7, device=device)
    if value:
        given |= {"values": normal(1).requires_grad_(grad), "old_values": normal(1), "returns": normal(1)}
        given["value_weights"] = (weights * 2).to(dtype) if policy else None
    return tuple(given.get(name, ppo_loss.defaults.get(name)) for name in ppo_loss.names)


SMALL = [
    {"shape": (1,), "value_clip": 0.0},
    {"shape": (3, 17), "whiten": True},
    {"shape": (9, 33), "far": True, "dual_clip": 3.0, "clip_high": 0.28},
    {"shape": (5, 8), "value": False, "sampler": "truncate"},
    {"shape": (67,), "value": False, "sampler": "mask", "whiten": True, "log_ratio_clamp": 0.0},
    {"shape": (2, 3, 7), "policy": False},
    {"shape": (40,), "policy": False, "value_clip": 0.0},
    {"shape": (0, 5)},
]
LARGE = [{"shape": (64, 128)}, {"shape": (64, 1024)}, {"shape": (512, 1024)}]
ppo_loss.inputs(small_sizes=SMALL, large_sizes=LARGE)(_make_inputs)


@ppo_loss_with_gradients.inputs(small_sizes=SMALL[:1] + SMALL[2:6], large_sizes=[])
def _(logprobs_need_grad=True, values_need_grad=True, **size):
    policy, value = size.get("policy", True), size.get("value", True)
    return *_make_inputs(grad=False, **size), logprobs_need_grad and policy, values_need_grad and value
