"""PPO's policy loss of a row on a GPU: its slopes, in the kernel that has just made the row's statistics, and the sums
over all rows, in two small launches at the end. kernels/_policy.py has the definition. Not an op.

The sums read at most 40 bytes a token. Each of up to 1024 programs walks tiles of 512 tokens; the programs' sums join
in double, in their order: the same bits from run to run.
"""

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels import _head as head
from rlhf_fast.kernels import _ppo as policy
from rlhf_fast.kernels.triton import launch

TILE, PROGRAMS = 512, 1024
IGNORED = tl.constexpr(head.IGNORE_INDEX)
SUMS = tl.constexpr(len(policy.SUMS))
SURROGATE, DIVERGENCE, ENTROPY = (
    tl.constexpr(policy.SUMS.index(name)) for name in ("policy_loss", "ref_kl", "entropy")
)


@triton.jit
def _clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))  # NaN stays


@triton.jit
def number(x, at, on):
    """In float32, and read only where the token counts."""
    return tl.load(x + at, mask=on, other=0.0).to(tl.float32)


@triton.jit
def advantage_of(advantages, shift, factor, at, on):
    """The advantages, whitened on the fly."""
    y = number(advantages, at, on)
    if shift is not None:
        y -= tl.load(shift).to(tl.float32)
    if factor is not None:
        y *= tl.load(factor).to(tl.float32)
    return tl.where(on, y, 0.0)


@triton.jit
def surrogate(logp, old, advantage, bounds, DUAL: tl.constexpr):
    """The clipped term, its slope by log p, which of the clips is active, the log-ratio and the ratio.

    bounds: 1 - clip_low, 1 + clip_high, dual_clip, log_ratio_clamp."""
    difference = logp - old
    log_ratio = _clamp(difference, -bounds[3], bounds[3])
    ratio = tl.exp(log_ratio)
    free, clipped = -advantage * ratio, -advantage * _clamp(ratio, bounds[0], bounds[1])
    worse = clipped > free
    term = tl.where(worse, clipped, free)
    slope = tl.where(worse | (tl.abs(difference) > bounds[3]), 0.0, free)
    dual = worse & ~worse
    if DUAL:
        limit = tl.where(advantage < 0, -advantage * bounds[2], float("inf"))
        dual = term > limit
        slope = tl.where(dual, 0.0, tl.where(term == limit, 0.5 * slope, slope))
        term = tl.where(dual, limit, term)
    below, above = worse & (ratio < bounds[0]), worse & (ratio > bounds[1])
    return term, slope, below, above, dual, log_ratio, ratio


@triton.jit
def divergence(difference, bound, ESTIMATOR: tl.constexpr):
    """The estimate of KL(policy || reference) and its slope by log p."""
    if ESTIMATOR == "k1":
        kl, slope = difference, difference * 0.0 + 1.0
    elif ESTIMATOR == "k2":
        kl, slope = 0.5 * difference * difference, difference
    else:
        inverse = _clamp(-difference, -bound, bound)
        e = tl.exp(inverse)
        kl, slope = e - 1.0 - inverse, tl.where(tl.abs(difference) <= bound, 1.0 - e, 0.0)
    return kl, slope


@triton.jit
def row_slopes(
    row, logp, weights, old_logprobs, advantages, ref_logprobs, shift, factor, bounds, kl_coef, entropy_coef,
    DUAL: tl.constexpr, ESTIMATOR: tl.constexpr,
):  # fmt: skip
    """The loss's slopes by log p and by entropy, of one row."""
    w = tl.load(weights + row).to(tl.float32)
    on = w != 0
    advantage = advantage_of(advantages, shift, factor, row, on)
    slope = surrogate(logp, number(old_logprobs, row, on), advantage, bounds, DUAL)[1]
    if ref_logprobs is not None:
        slope += kl_coef * divergence(logp - number(ref_logprobs, row, on), bounds[3], ESTIMATOR)[1]
    return tl.where(on, w * slope, 0.0), -entropy_coef * w


@triton.jit
def _sums(
    targets, logprobs, entropy, weights, old_logprobs, advantages, ref_logprobs, shift, factor, parts, N, low, high,
    dual_clip, bound, DUAL: tl.constexpr, ESTIMATOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    zero = tl.zeros((TILE,), tl.float32)
    sums = (zero,) * 11
    most, least = zero - float("inf"), zero + float("inf")
    bounds = (low, high, dual_clip, bound)
    for start in range(tl.program_id(0).to(tl.int64) * TILE, N, tl.num_programs(0) * TILE):
        at = start + tl.arange(0, TILE)
        here = tl.load(targets + at, mask=at < N, other=IGNORED) != IGNORED
        w = number(weights, at, here)
        on = w != 0
        logp = number(logprobs, at, on)
        term, _, below, above, dual, log_ratio, ratio = surrogate(
            logp, number(old_logprobs, at, on), advantage_of(advantages, shift, factor, at, on), bounds, DUAL
        )
        kl = zero
        if ref_logprobs is not None:
            kl = divergence(logp - number(ref_logprobs, at, on), bound, ESTIMATOR)[0]
        terms = (
            w, tl.where(below, w, 0.0), tl.where(above, w, 0.0), tl.where(dual, w, 0.0), -w * log_ratio,
            w * (ratio - 1.0 - log_ratio), w * ratio, w * (ratio * ratio), w * term, w * kl,
            w * number(entropy, at, on),
        )  # fmt: skip
        added = ()
        for i in tl.static_range(SUMS):
            added = added + (sums[i] + terms[i],)
        sums = added
        most = tl.maximum(most, tl.where(on, ratio, float("-inf")))
        least = tl.minimum(least, tl.where(on, ratio, float("inf")))
    part, stride = parts + tl.program_id(0), tl.num_programs(0)
    for i in tl.static_range(SUMS):
        tl.store(part + i * stride, tl.sum(sums[i], axis=0))
    tl.store(part + SUMS * stride, tl.max(most, axis=0))
    tl.store(part + (SUMS + 1) * stride, tl.min(least, axis=0))


@triton.jit
def _part(parts, i, programs, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    return tl.sum(tl.load(parts + i * programs + at, mask=at < programs, other=0.0).to(tl.float64), axis=0)


@triton.jit
def _join(parts, loss, stats, programs, kl_coef, entropy_coef, BLOCK: tl.constexpr):
    """One program for each of the sums, for the largest and the smallest ratio, and for the loss."""
    i, at = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(parts + tl.minimum(i, SUMS + 1) * programs + at, mask=at < programs, other=0.0)
    if i < SUMS:
        tl.store(stats + i, tl.sum(x.to(tl.float64), axis=0).to(tl.float32))
    elif i == SUMS:
        tl.store(stats + i, tl.max(tl.where(at < programs, x, float("-inf")), axis=0))
    elif i == SUMS + 1:
        tl.store(stats + i, tl.min(tl.where(at < programs, x, float("inf")), axis=0))
    else:
        total = _part(parts, SURROGATE, programs, BLOCK)
        if kl_coef != 0:
            total += kl_coef * _part(parts, DIVERGENCE, programs, BLOCK)
        if entropy_coef != 0:
            total -= entropy_coef * _part(parts, ENTROPY, programs, BLOCK)
        tl.store(loss, total.to(tl.float32))


def sums(targets, logprobs, entropy, rows, bounds, coefficients, estimator):
    """The loss () and stats (13,). rows: weights, old log-probabilities, advantages, the reference's, shift, scale."""
    N = targets.numel()
    programs = max(1, min(PROGRAMS, triton.cdiv(N, TILE)))
    parts, loss, stats = (
        torch.empty(shape, dtype=torch.float32, device=targets.device)
        for shape in ((len(policy.STATS), programs), (), (len(policy.STATS),))
    )
    launch.run(
        _sums,
        (programs,),
        targets,
        logprobs,
        entropy,
        *rows,
        parts,
        N,
        *bounds,
        DUAL=bounds[2] > 0,
        ESTIMATOR=estimator,
        TILE=TILE,
        num_warps=4,
    )
    block = launch.block(programs)
    launch.run(
        _join,
        (len(policy.STATS) + 1,),
        parts,
        loss,
        stats,
        programs,
        *coefficients,
        BLOCK=block,
        num_warps=launch.warps(block, 8),
    )
    return loss, stats
