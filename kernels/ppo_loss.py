"""PPO's clipped losses of policy and value, their gradients and metrics, in one visit of memory."""

import torch
from torch import Tensor

from rlhf_fast.kernels._launch import Unsupported, data_ptrs, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._ppo import policy_loss as clipped_loss
from rlhf_fast.kernels._tensors import promote_to_float64, upcast

STATS = (
    "weight", "clipped_low", "clipped_high", "clipped_dual", "kl_k1", "kl_k3", "ratio", "ratio_square",
    "importance", "importance_capped", "value_weight", "value_clipped", "value", "value_error", "return",
    "ratio_max", "ratio_min",
)  # fmt: skip
IMPORTANCE_MODES = ("truncate", "mask")


def _fake(logprobs, old_logprobs, advantages, weights, *rest):
    loss = torch.empty((), dtype=upcast(weights).dtype, device=weights.device)
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
    """policy_loss (), value_loss () and stats (17,), float32, of tokens in any shape, the same for every input.

        ratio = exp(clamp(logprobs - old_logprobs, +-log_ratio_clamp))          A = (advantages - shift) * scale
        policy_loss = sum weights * max(-A ratio, -A clamp(ratio, 1 - clip_low, 1 + clip_high))
        value_loss = sum value_weights * max((V - R)^2, (clamp(V, V_old - value_clip, V_old + value_clip) - R)^2) / 2

    (Schulman et al. 2017, arXiv 1707.06347, eq. 7; the clipped value loss is that of OpenAI's lm-human-preferences.)
    Both are sums: with weights 1 / (tokens of the whole optimizer batch) they add up over micro-batches. Where a weight
    is 0 nothing is evaluated: what stands there may be NaN. value_weights=None means weights. Without logprobs,
    old_logprobs and advantages only the value part is computed, without values only the policy part; the other is 0.

    advantage_shift and advantage_scale, numbers or tensors of one element, whiten the advantages on the fly. dual_clip
    c > 0 bounds the loss by -A c where A < 0 (Ye et al. 2020, arXiv 1912.09729). value_clip, log_ratio_clamp and
    dual_clip 0 mean off. sampler_logprobs, of the engine that drew the tokens where old_logprobs were computed anew:
    each policy term is weighted by w = exp(old_logprobs - sampler_logprobs), "truncate": min(w, importance_cap),
    "mask": dropped where w > importance_cap (truncated importance sampling).

    Gradients by logprobs and values, made in the forward pass, as torch.clamp and torch.maximum have them: it passes at
    a bound of the clip itself, ties out of the bounds share it by halves; beyond log_ratio_clamp it is 0. ValueError
    where shapes differ, a part is given by halves, value_clip has no old_values, or importance_mode is another word.

    stats, named in `ppo_loss.stats`: sums over tokens of weight times 1, the indicators that the lower, the upper and
    the dual clip were active, -log ratio, ratio - 1 - log ratio (both estimate KL(old || new), nats), the ratio, its
    square, w, w > cap; and of value_weight times 1, the indicator that the clip was active, V, (V - R)^2, R. All of
    these add up over micro-batches. The last two are the largest and the smallest ratio (-inf and inf without a token):
    they join by max and min.
    """
    policy_loss, value_loss, stats, _, _ = _losses(
        logprobs, old_logprobs, advantages, weights, values, old_values, returns, value_weights, sampler_logprobs,
        advantage_shift, advantage_scale, clip_low, clip_high, dual_clip, value_clip, log_ratio_clamp, importance_cap,
        importance_mode,
    )  # fmt: skip
    return policy_loss, value_loss, stats


def _losses(
    logprobs, old_logprobs, advantages, weights, values, old_values, returns, value_weights, sampler_logprobs,
    shift, scale, clip_low, clip_high, dual_clip, value_clip, log_ratio_clamp, importance_cap, importance_mode,
):  # fmt: skip
    """Both losses, stats, and the losses' gradients by logprobs and values (None where the part is absent)."""
    weights = upcast(weights)
    zero = weights.new_zeros(())
    loss, policy_stats, policy_slope = (
        zero,
        torch.cat([zero.new_zeros(10), zero.new_tensor([-torch.inf, torch.inf])]),
        None,
    )
    value_loss, value_stats, value_slope = zero.clone(), zero.new_zeros(5), None
    if logprobs is not None:
        clips = (clip_low, clip_high, dual_clip, log_ratio_clamp)
        importance = (sampler_logprobs, importance_cap, importance_mode)
        given = (upcast(logprobs), old_logprobs, advantages, weights, shift, scale)
        loss, policy_stats, policy_slope = _policy(*given, clips, *importance)
    if values is not None:
        value_weights = weights if value_weights is None else upcast(value_weights)
        value_loss, value_stats, value_slope = _value(values, old_values, returns, value_weights, value_clip)
    stats = torch.cat([policy_stats[:10], value_stats, policy_stats[10:]])
    return loss, value_loss, stats, policy_slope, value_slope


def _where(on: Tensor, x: Tensor) -> Tensor:
    return torch.where(on, upcast(x), 0)


def _policy(logprobs, old_logprobs, advantages, weights, shift, scale, clips, sampler_logprobs, cap, mode):
    *bounds, clamp = clips

    def losses(on, weights):
        kl_and_entropy = (0.0, "k1", 0.0)
        return clipped_loss(
            logprobs, torch.zeros_like(logprobs), on, weights, old_logprobs, advantages, None, shift, scale, *bounds,
            *kl_and_entropy, clamp,
        )  # fmt: skip

    on = weights != 0
    total, stats, slope, _ = losses(on, weights)
    importance, capped = torch.ones_like(weights), torch.zeros_like(on)
    if sampler_logprobs is not None:
        importance = (_where(on, old_logprobs) - _where(on, sampler_logprobs)).exp()
        capped = importance > cap
        importance = torch.where(capped, 0.0 if mode == "mask" else cap, importance)
        trusted = weights * importance
        total, _, slope, _ = losses(trusted != 0, trusted)
    sums = torch.stack([torch.where(on, weights * x, 0).sum() for x in (importance, capped)])
    return total, torch.cat([stats[:8], sums, stats[-2:]]), slope


def _value(values, old_values, returns, weights, value_clip):
    on = weights != 0
    value, target = _where(on, values), _where(on, returns)
    free = (value - target) ** 2
    loss, slope, active = free, (value - target).detach(), torch.zeros_like(on)
    if value_clip > 0:
        old = _where(on, old_values)
        bounded = value.clamp(old - value_clip, old + value_clip)
        clipped = (bounded - target) ** 2
        inside = (value >= old - value_clip) & (value <= old + value_clip)
        active = clipped > free
        outside = torch.where(active, 0, torch.where(clipped == free, 0.5, 1.0)).to(free.dtype)
        slope = torch.where(inside, 1, outside) * slope
        loss = torch.maximum(free, clipped)
    total = torch.where(on, weights * loss, 0).sum() / 2
    with torch.no_grad():
        terms = [torch.ones_like(value), active, value, free, target]
        stats = torch.stack([torch.where(on, weights * term, 0).sum() for term in terms])
        return total, stats, torch.where(on, weights * slope, 0)


ppo_loss.stats = STATS


@ppo_loss.normalize
def _(
    logprobs, old_logprobs, advantages, weights, values, old_values, returns, value_weights, sampler_logprobs,
    advantage_shift, advantage_scale, clip_low, clip_high, dual_clip, value_clip, log_ratio_clamp, importance_cap,
    importance_mode,
):  # fmt: skip
    policy = (logprobs, old_logprobs, advantages)
    if any(x is None for x in policy) and not all(x is None for x in (*policy, sampler_logprobs)):
        raise ValueError("ppo_loss: the policy part needs logprobs, old_logprobs and advantages, or none of them")
    if logprobs is None and values is None:
        raise ValueError("ppo_loss: there is neither logprobs nor values, nothing to compute")
    if (
        (values is None) != (returns is None)
        or values is None
        and (old_values is not None or value_weights is not None)
    ):
        raise ValueError("ppo_loss: the value part needs values and returns, or none of them")
    if values is not None and value_clip > 0 and old_values is None:
        raise ValueError(f"ppo_loss: value_clip={value_clip} needs old_values; value_clip=0 does without")
    given = (logprobs, old_logprobs, advantages, values, old_values, returns, value_weights, sampler_logprobs)
    for x in given:
        if x is not None and x.shape != weights.shape:
            shapes = [list(x.shape) for x in given if x is not None]
            raise ValueError(f"ppo_loss: all must have the shape of weights, {list(weights.shape)}, got {shapes}")
    if importance_mode not in IMPORTANCE_MODES:
        modes = ", ".join(IMPORTANCE_MODES)
        raise ValueError(f"ppo_loss: importance_mode must be one of {modes}, got {importance_mode!r}")
    weights = weights.float() if weights.dtype == torch.bool else weights
    if value_weights is not None and value_weights.dtype == torch.bool:
        value_weights = value_weights.float()
    tensors = promote_to_float64(
        logprobs, old_logprobs, advantages, weights, values, old_values, returns, value_weights, sampler_logprobs
    )
    shift, scale = (
        _one_element("shift", advantage_shift, tensors[3]),
        _one_element("scale", advantage_scale, tensors[3]),
    )
    return (
        *tensors, shift, scale, float(clip_low), float(clip_high), float(dual_clip), float(value_clip),
        float(log_ratio_clamp), float(importance_cap), importance_mode,
    )  # fmt: skip


def _one_element(name: str, x: Tensor | float | None, like: Tensor) -> Tensor | None:
    if x is None or not isinstance(x, Tensor):
        return None if x is None else torch.full((), x, dtype=upcast(like).dtype, device=like.device)
    if x.numel() != 1:
        raise ValueError(f"ppo_loss: advantage_{name} must be a number or one element, got shape {list(x.shape)}")
    return x.detach().reshape(())


def _fake_with_gradients(logprobs, old_logprobs, advantages, weights, values, *rest):
    *rest, by_logprobs, by_values = rest
    loss, value_loss, stats = _fake(logprobs, old_logprobs, advantages, weights)
    nothing = loss.new_empty(0)
    slopes = [loss.new_empty(weights.shape) if wanted else nothing.clone() for wanted in (by_logprobs, by_values)]
    return loss, value_loss, stats, *slopes


@op(fake=_fake_with_gradients)
def ppo_loss_with_gradients(
    logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    weights: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    value_weights: Tensor | None,
    sampler_logprobs: Tensor | None,
    advantage_shift: Tensor | None,
    advantage_scale: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    value_clip: float,
    log_ratio_clamp: float,
    importance_cap: float,
    importance_mode: str,
    by_logprobs: bool,
    by_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `ppo_loss` gives, then policy_loss's gradient by logprobs and value_loss's by values, float32, in the shape
    of weights; empty (0,) where not asked for."""
    policy_loss, value_loss, stats, *slopes = _losses(
        logprobs, old_logprobs, advantages, weights, values, old_values, returns, value_weights, sampler_logprobs,
        advantage_shift, advantage_scale, clip_low, clip_high, dual_clip, value_clip, log_ratio_clamp, importance_cap,
        importance_mode,
    )  # fmt: skip
    wanted = zip(slopes, (by_logprobs, by_values), strict=True)
    return policy_loss, value_loss, stats, *(slope if by else stats.new_empty(0) for slope, by in wanted)


PER_BLOCK, FEW, BLOCKS = 1024, 256, 1024  # tokens that a GPU's block takes in a round; blocks of a GPU, and at most


def _launch(kernels, device, args, wanted):
    """Both losses, stats, and the gradients, None where not asked for."""
    tensors, numbers, mode = list(args[:11]), args[11:17], args[17]
    weights = tensors[3]
    if weights.dtype == torch.float64:
        raise Unsupported("float64 has no compiled kernel")
    if tensors[4] is not None and tensors[7] is None:
        tensors[7] = weights
    tensors = [x if x is None else x.float().contiguous() for x in tensors]
    weights, N = tensors[3], tensors[3].numel()
    out = [weights.new_empty(()), weights.new_empty(()), weights.new_empty(len(STATS))]
    out += [torch.empty_like(weights) if by else None for by in wanted]
    blocks, parts = [], []
    if device == "cuda":  # and room for what each block sums
        rounds = -(-N // PER_BLOCK)
        blocks = [max(1, min(rounds, BLOCKS, max(FEW, rounds // 2)))]  # once a GPU is full, two rounds and more
        parts = [weights.new_empty(len(STATS) + 2, *blocks)]
    kernels.ppo_loss(
        *data_ptrs(*tensors, *out, *parts), *blocks, N, *numbers,
        IMPORTANCE_MODES.index(mode), stream_or_threads(weights),
    )  # fmt: skip
    return out


def _compiled(device):
    @ppo_loss.compiled(devices=(device,))
    def _(kernels, *args):
        return _launch(kernels, device, args, (False, False))[:3]

    @ppo_loss_with_gradients.compiled(required_symbols=("ppo_loss",), devices=(device,))
    def _(kernels, *args):
        *sums, by_logprobs, by_values = _launch(kernels, device, args[:-2], args[-2:])
        return *sums, *(sums[2].new_empty(0) if slope is None else slope for slope in (by_logprobs, by_values))


_compiled("cpu")
_compiled("cuda")


def _forward(ctx, *args):
    wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    policy_loss, value_loss, stats, *slopes = ppo_loss_with_gradients.run(*args, *wanted)
    ctx.save_for_backward(*slopes)
    ctx.dtypes = [x.dtype if by else None for x, by in zip((args[0], args[4]), wanted, strict=True)]
    losses = (policy_loss, value_loss)
    ctx.mark_non_differentiable(stats, *(loss for loss, by in zip(losses, wanted, strict=True) if not by))
    return *losses, stats


def _backward(ctx, grad_policy, grad_value, _grad_stats):
    grads = [
        None if dtype is None else (grad * slope).to(dtype)
        for dtype, slope, grad in zip(ctx.dtypes, ctx.saved_tensors, (grad_policy, grad_value), strict=True)
    ]
    return grads[0], None, None, None, grads[1], *[None] * 13


ppo_loss.gradient(_backward, forward=_forward)


def _make(shape, device, dtype, policy=True, value=True, far=False, whiten=False, sampler="", grad=True, **numbers):
    """far: log-ratios beyond every bound; NaN stands wherever a weight is 0."""
    kept = torch.rand(shape, device=device) > 0.3
    kept.view(-1)[:1] = True
    weights = torch.rand(shape, device=device) * kept / max(kept.numel(), 1)

    def normal(scale):
        return (scale * torch.randn(shape, device=device)).masked_fill(~kept, torch.nan).to(dtype)

    given = {"weights": weights.to(dtype)} | numbers
    if policy:
        logprobs = -3 * normal(1).abs()
        old = logprobs + normal(40 if far else 0.3) * (torch.rand(shape, device=device) > 0.2)
        given |= {"logprobs": logprobs.requires_grad_(grad), "old_logprobs": old, "advantages": normal(1)}
        if sampler:
            given |= {"sampler_logprobs": old + normal(0.5), "importance_cap": 1.2, "importance_mode": sampler}
        if whiten:
            given |= {f"advantage_{k}": torch.tensor(x, device=device) for k, x in (("shift", 0.3), ("scale", 1.7))}
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
ppo_loss.inputs(small_sizes=SMALL, large_sizes=[{"shape": (64, 128)}, {"shape": (64, 1024)}, {"shape": (512, 1024)}])(
    _make
)


@ppo_loss_with_gradients.inputs(small_sizes=SMALL[:1] + SMALL[2:6], large_sizes=[])
def _(by_logprobs=True, by_values=True, **size):
    policy, value = size.get("policy", True), size.get("value", True)
    return *_make(grad=False, **size), by_logprobs and policy, by_values and value
