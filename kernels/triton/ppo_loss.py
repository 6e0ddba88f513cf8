"""ppo_loss on a GPU: both losses, their gradients and all sums of the metrics in one visit of memory, two launches.

Per token at most 36 bytes in and 8 out. Weights are read first: 4 tokens of weight 0 cost no other read. Each of up to
1024 programs walks tiles of 512 tokens; a thread keeps each sum, to which it adds the 4 tokens that it read at once, in
one register. A program's sums join in float32, those of all programs in double, in an order that hangs on the number of
tokens alone: the same bits from run to run.
"""

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.kernels.ppo_loss import IMPORTANCE_MODES, STATS
from rlhf_fast.kernels.triton import launch

LANES, EACH, PROGRAMS = 128, 4, 1024
SUMMED = tl.constexpr(len(STATS) - 2)  # behind them: both losses, the largest and the smallest ratio
PARTS = len(STATS) + 2
RATIO = tl.constexpr(STATS.index("ratio"))


@triton.jit
def _get(x, at, some, on):
    """Where the weight is not 0; `some` says where one of a thread's tokens counts, so that a load stays whole."""
    return tl.where(on, tl.load(x + at, mask=some, other=0.0).to(tl.float32), 0.0)


@triton.jit
def _weights(x, at, inside):
    """The weights, where they count, and the mask of what is read there."""
    w = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    on = w != 0
    some = tl.max(on.to(tl.int32), axis=1)[:, None] > 0
    return w, on, some & inside


@triton.jit
def _clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))  # NaN stays


@triton.jit
def _policy(
    w, logprobs, old, advantages, drawn, low, high, dual_clip, bound, cap,
    DUAL: tl.constexpr, SAMPLED: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Of a tile: the loss's terms, its slopes, the stats' terms, and the ratio."""
    raw = logprobs - old
    log_ratio = _clamp(raw, -bound, bound)
    ratio = tl.exp(log_ratio)
    free, clipped = -advantages * ratio, -advantages * _clamp(ratio, low, high)
    worse = clipped > free
    loss = tl.where(worse, clipped, free)
    slope = tl.where(worse | (tl.abs(raw) > bound), 0.0, free)
    dual = w != w
    if DUAL:
        limit = tl.where(advantages < 0, -advantages * dual_clip, float("inf"))
        dual = loss > limit
        slope = tl.where(dual, 0.0, tl.where(loss == limit, 0.5 * slope, slope))
        loss = tl.where(dual, limit, loss)
    coefficient, capped = w, w != w
    if SAMPLED:
        trust = tl.exp(old - drawn)
        capped = trust > cap
        coefficient = w * tl.where(capped, 0.0 if MASK else cap, trust)
    counts = coefficient != 0
    terms = (
        w,
        tl.where(worse & (ratio < low), w, 0.0),
        tl.where(worse & (ratio > high), w, 0.0),
        tl.where(dual, w, 0.0),
        -w * log_ratio,
        w * (ratio - 1.0 - log_ratio),
        w * ratio,
        w * (ratio * ratio),
        coefficient,
        tl.where(capped, w, 0.0),
    )
    return tl.where(counts, coefficient * loss, 0.0), tl.where(counts, coefficient * slope, 0.0), terms, ratio


@triton.jit
def _value(w, value, old, target, clip, CLIP: tl.constexpr):
    """Of a tile: the loss's terms, its slopes, and the stats' terms."""
    error = value - target
    free = error * error
    loss, slope, active = free, error, w != w
    if CLIP:
        bounded = _clamp(value, old - clip, old + clip) - target
        clipped = bounded * bounded
        active = clipped > free
        within = (value >= old - clip) & (value <= old + clip)
        slope = tl.where(active, 0.0, tl.where(~within & (clipped == free), 0.5 * slope, slope))
        loss = tl.where(active, clipped, free)
    return w * loss, w * slope, (w, tl.where(active, w, 0.0), w * value, w * free, w * target)


@triton.jit
def _added(sums, terms, N: tl.constexpr):
    """Each of the N sums and, over a thread's tokens, its term."""
    out = ()
    for i in tl.static_range(N):
        out = out + (sums[i] + tl.sum(terms[i], axis=1),)
    return out


@triton.jit
def _kernel(
    logprobs, old_logprobs, advantages, weights, values, old_values, returns, value_weights, sampler, shift, scale,
    logprob_slopes, value_slopes, parts, N, low, high, dual_clip, value_clip, bound, cap,
    DUAL: tl.constexpr, CLIP: tl.constexpr, MASK: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    zero = tl.zeros((LANES,), tl.float32)
    policy_loss, value_loss = (zero,), (zero,)
    policy, value = (zero,) * 10, (zero,) * 5
    most, least = zero - float("inf"), zero + float("inf")
    a, b = 0.0, 1.0
    if shift is not None:
        a = tl.load(shift).to(tl.float32)
    if scale is not None:
        b = tl.load(scale).to(tl.float32)
    size: tl.constexpr = LANES * EACH
    for start in range(tl.program_id(0).to(tl.int64) * size, N, tl.num_programs(0) * size):
        here = start + at
        inside = here < N
        if logprobs is not None:
            w, on, some = _weights(weights, here, inside)
        if values is not None:
            value_w, value_on, value_some = _weights(value_weights, here, inside)
        if logprobs is not None:  # everything that is read is on its way before the first of it is needed
            old, new = _get(old_logprobs, here, some, on), _get(logprobs, here, some, on)
            advantage, drawn = _get(advantages, here, some, on), old
            if sampler is not None:
                drawn = _get(sampler, here, some, on)
        if values is not None:
            seen, target = _get(values, here, value_some, value_on), _get(returns, here, value_some, value_on)
            before = seen
            if CLIP:
                before = _get(old_values, here, value_some, value_on)
        if logprobs is not None:
            advantage = tl.where(on, (advantage - a) * b, 0.0)
            loss, slope, terms, ratio = _policy(
                w, new, old, advantage, drawn, low, high, dual_clip, bound, cap, DUAL, sampler is not None, MASK
            )
            policy_loss, policy = _added(policy_loss, (loss,), 1), _added(policy, terms, 10)
            most = tl.maximum(most, tl.max(tl.where(on, ratio, float("-inf")), axis=1))
            least = tl.minimum(least, tl.min(tl.where(on, ratio, float("inf")), axis=1))
            if logprob_slopes is not None:
                tl.store(logprob_slopes + here, slope, mask=inside)
        if values is not None:
            loss, slope, terms = _value(value_w, seen, before, target, value_clip, CLIP)
            value_loss, value = _added(value_loss, (loss,), 1), _added(value, terms, 5)
            if value_slopes is not None:
                tl.store(value_slopes + here, slope, mask=inside)
    sums = policy + value + policy_loss + value_loss
    part, stride = parts + tl.program_id(0), tl.num_programs(0)
    for i in tl.static_range(SUMMED + 2):
        tl.store(part + i * stride, tl.sum(sums[i], axis=0))
    tl.store(part + (SUMMED + 2) * stride, tl.max(most, axis=0))
    tl.store(part + (SUMMED + 3) * stride, tl.min(least, axis=0))


@triton.jit
def _join(parts, policy_loss, value_loss, stats, programs, BLOCK: tl.constexpr):
    """One program for each of the sums, and for the largest and the smallest ratio."""
    i, at = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(parts + i * programs + at, mask=at < programs, other=0.0)
    if i >= SUMMED + 2:
        ratios = tl.sum(tl.load(parts + RATIO * programs + at, mask=at < programs, other=0.0), axis=0)
        end = tl.max(tl.where(at < programs, x, float("-inf")), axis=0)
        if i == SUMMED + 3:
            end = tl.min(tl.where(at < programs, x, float("inf")), axis=0)
        tl.store(stats + i - 2, tl.where(ratios == ratios, end, ratios))  # max and min pass a NaN over
    else:
        total = tl.sum(x.to(tl.float64), axis=0)
        tl.store(stats + i, total.to(tl.float32), mask=i < SUMMED)
        tl.store(policy_loss, total.to(tl.float32), mask=i == SUMMED)
        tl.store(value_loss, (0.5 * total).to(tl.float32), mask=i == SUMMED + 1)


def _launch(args, by_logprobs, by_values):
    """Both losses, stats, and the gradients, None where not asked for."""
    *tensors, low, high, dual, clip, bound, cap, mode = args
    if tensors[3].dtype == torch.float64:
        raise Unsupported("no Triton kernel for float64")
    if tensors[4] is not None and tensors[7] is None:
        tensors[7] = tensors[3]
    tensors = [x if x is None else x.contiguous() for x in tensors]
    weights = tensors[3]

    def empty(*shape):
        return torch.empty(shape, dtype=torch.float32, device=weights.device)

    slopes = [empty(*weights.shape) if by else None for by in (by_logprobs, by_values)]
    N = weights.numel()
    programs = max(1, min(PROGRAMS, triton.cdiv(N, LANES * EACH)))
    parts, policy_loss, value_loss, stats = empty(PARTS, programs), empty(), empty(), empty(len(STATS))
    launch.run(
        _kernel,
        (programs,),
        *tensors,
        *slopes,
        parts,
        N,
        1.0 - low,
        1.0 + high,
        dual,
        clip,
        bound if bound > 0 else float("inf"),
        cap,
        DUAL=dual > 0,
        CLIP=clip > 0,
        MASK=mode == IMPORTANCE_MODES[1],
        LANES=LANES,
        EACH=EACH,
        num_warps=LANES // 32,
    )
    block = launch.block(programs)
    launch.run(
        _join, (PARTS,), parts, policy_loss, value_loss, stats, programs, BLOCK=block, num_warps=launch.warps(block, 8)
    )
    return policy_loss, value_loss, stats, slopes


def ppo_loss(*args):
    return _launch(args, False, False)[:3]


def ppo_loss_with_gradients(*args):
    *sums, slopes = _launch(args[:-2], *args[-2:])
    return *sums, *(sums[2].new_empty(0) if x is None else x for x in slopes)
