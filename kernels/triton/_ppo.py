"""PPO's policy loss on a GPU: device functions for one token, and the sums over all tokens. Not an op.

kernels/_ppo.py has the definition. ppo_loss.py, _logits.py and ppo_advantages.py use the device functions.

`loss_and_stats` serves linear_ppo_loss, whose row kernel has made the gradients: two small launches, which read at most
40 bytes per token. Each of up to 1024 programs walks tiles of 512 tokens,

    tokens     | tile 0 | tile 1 | tile 2 | tile 3 | ...        program p has the tiles p, p + programs, ...

and the second launch adds the programs' sums in float64, in their order: the same bits from run to run.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels import _ppo as ppo
from rlhf_fast.kernels._tensors import empty_float32
from rlhf_fast.kernels.triton import launch

TILE = 512  # tokens
MAX_PROGRAMS = 1024
NUM_SUMS = tl.constexpr(len(ppo.SUMS))
POLICY_LOSS, REF_KL, ENTROPY, RATIO = (
    tl.constexpr(ppo.SUMS.index(name)) for name in ("policy_loss", "ref_kl", "entropy", "ratio")
)


class ClipBounds(NamedTuple):
    """Bounds of the clipped surrogate."""

    ratio_low: float  # 1 - clip_low
    ratio_high: float  # 1 + clip_high
    dual: float  # 0 for none
    log_ratio: float  # infinite for none

    @staticmethod
    def of(clip_low: float, clip_high: float, dual_clip: float, log_ratio_clamp: float) -> "ClipBounds":
        return ClipBounds(
            1.0 - clip_low, 1.0 + clip_high, dual_clip, log_ratio_clamp if log_ratio_clamp > 0 else float("inf")
        )


class Tokens(NamedTuple):
    """Inputs of the policy loss with one element per token, and two that are one number for all, or None."""

    weights: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None
    advantage_shift: Tensor | None
    advantage_scale: Tensor | None


class Surrogate(NamedTuple):
    """The clipped surrogate of a token: the term of the loss, its gradient, and what the statistics count."""

    loss: Tensor
    logprob_grad: Tensor
    is_clipped_low: Tensor
    is_clipped_high: Tensor
    is_clipped_dual: Tensor
    log_ratio: Tensor
    ratio: Tensor


@triton.jit
def load_valid(x, index, valid):
    """Return x in float32; tokens that are not valid are not read and are 0."""
    return tl.load(x + index, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def load_advantage(tokens, index, valid):
    """Return (advantage - shift) * scale, 0 for tokens that are not valid."""
    advantage = load_valid(tokens.advantages, index, valid)
    if tokens.advantage_shift is not None:
        advantage -= tl.load(tokens.advantage_shift).to(tl.float32)
    if tokens.advantage_scale is not None:
        advantage *= tl.load(tokens.advantage_scale).to(tl.float32)
    return tl.where(valid, advantage, 0.0)


@triton.jit
def surrogate(unclipped_log_ratio, logprob, advantage, clip, DUAL: tl.constexpr, CISPO: tl.constexpr):
    """Return the `Surrogate` of a token. Its gradient is by the log-ratio, CISPO's by the log-probability."""
    if CISPO:
        out = cispo_surrogate(unclipped_log_ratio, logprob, advantage, clip)
    else:
        out = ppo_surrogate(unclipped_log_ratio, advantage, clip, DUAL)
    return out


@triton.jit
def cispo_surrogate(unclipped_log_ratio, logprob, advantage, clip):
    """Return the `Surrogate` of CISPO, whose ratio has no gradient."""
    log_ratio = launch.clamp(unclipped_log_ratio, -clip.log_ratio, clip.log_ratio)
    ratio = tl.exp(log_ratio)
    never = ratio < float("-inf")
    is_clipped_high = ratio > clip.ratio_high
    logprob_grad = -advantage * tl.where(is_clipped_high, clip.ratio_high, ratio)
    return Surrogate(logprob_grad * logprob, logprob_grad, never, is_clipped_high, never, log_ratio, ratio)


@triton.jit
def ppo_surrogate(unclipped_log_ratio, advantage, clip, DUAL: tl.constexpr):
    """Return the `Surrogate` of PPO."""
    log_ratio = launch.clamp(unclipped_log_ratio, -clip.log_ratio, clip.log_ratio)
    ratio = tl.exp(log_ratio)
    unclipped = -advantage * ratio
    clipped = -advantage * launch.clamp(ratio, clip.ratio_low, clip.ratio_high)
    is_clipped = clipped > unclipped
    loss = tl.where(is_clipped, clipped, unclipped)
    beyond_clamp = tl.abs(unclipped_log_ratio) > clip.log_ratio  # False for NaN, whose gradient is NaN
    logprob_grad = tl.where(beyond_clamp | is_clipped, 0.0, unclipped)
    dual_bound = float("inf")
    if DUAL:
        dual_bound = tl.where(advantage < 0, -advantage * clip.dual, float("inf"))
    is_clipped_dual = loss > dual_bound
    if DUAL:
        logprob_grad = tl.where(loss == dual_bound, 0.5 * logprob_grad, logprob_grad)
        logprob_grad = tl.where(is_clipped_dual, 0.0, logprob_grad)
        loss = tl.where(is_clipped_dual, dual_bound, loss)
    is_clipped_low = is_clipped & (ratio < clip.ratio_low)
    is_clipped_high = is_clipped & (ratio > clip.ratio_high)
    return Surrogate(loss, logprob_grad, is_clipped_low, is_clipped_high, is_clipped_dual, log_ratio, ratio)


@triton.jit
def exp_minus_1_minus(x, exp_x):
    """Return e^x - 1 - x, where exp_x = e^x. Near 0 the difference would cancel, down to negative numbers."""
    series = 1.0 + x * 0.2 * (1.0 + x * (1 / 6) * (1.0 + x * (1 / 7) * (1.0 + x * 0.125)))
    series = 0.5 * x * x * (1.0 + x * (1 / 3) * (1.0 + x * 0.25 * series))
    return tl.where(tl.abs(x) <= 0.5, series, exp_x - 1.0 - x)


@triton.jit
def policy_stats(w, terms):
    """Return the 8 terms of the statistics that linear_ppo_loss and ppo_loss share, of tokens with weights w."""
    return (
        w,
        tl.where(terms.is_clipped_low, w, 0.0),
        tl.where(terms.is_clipped_high, w, 0.0),
        tl.where(terms.is_clipped_dual, w, 0.0),
        -w * terms.log_ratio,
        w * exp_minus_1_minus(terms.log_ratio, terms.ratio),
        w * terms.ratio,
        w * (terms.ratio * terms.ratio),
    )


@triton.jit
def kl_estimate(log_ratio, max_exponent, ESTIMATOR: tl.constexpr):
    """Return the estimate of KL(policy || reference) from log p - log p_ref of the sampled token.

    k1: d; k2: d^2 / 2; k3: e^-d - 1 + d, where the exponent is at most max_exponent; abs: |d|."""
    if ESTIMATOR == "k1":
        kl = log_ratio
    elif ESTIMATOR == "k2":
        kl = 0.5 * log_ratio * log_ratio
    elif ESTIMATOR == "k3":
        e = tl.exp(tl.where(log_ratio < -max_exponent, max_exponent, -log_ratio))
        kl = exp_minus_1_minus(-log_ratio, e)
    else:
        kl = tl.abs(log_ratio)
    return kl


@triton.jit
def ref_kl(log_ratio, clip, ESTIMATOR: tl.constexpr):
    """Return the KL estimate of the policy loss; k3's log-ratio is clamped."""
    if ESTIMATOR == "k3":
        log_ratio = launch.clamp(log_ratio, -clip.log_ratio, clip.log_ratio)
    return kl_estimate(log_ratio, clip.log_ratio, ESTIMATOR)


@triton.jit
def ref_kl_grad(log_ratio, clip, ESTIMATOR: tl.constexpr):
    """Return the gradient of `ref_kl` with respect to log p."""
    if ESTIMATOR == "k1":
        grad = 1.0  # also where the reference's log p is NaN: the KL is, its gradient is not
    elif ESTIMATOR == "k2":
        grad = log_ratio
    else:
        x = -launch.clamp(log_ratio, -clip.log_ratio, clip.log_ratio)
        e = tl.exp(x)
        grad = tl.where(tl.abs(x) <= 0.5, -x - exp_minus_1_minus(x, e), 1.0 - e)
        grad = tl.where(tl.abs(log_ratio) > clip.log_ratio, 0.0, grad)
    return grad


@triton.jit
def row_grads(
    row, logprob, tokens, clip, kl_coef, entropy_coef,
    DUAL: tl.constexpr, CISPO: tl.constexpr, ESTIMATOR: tl.constexpr,
):  # fmt: skip
    """Return the gradients of the loss with respect to log p and to the entropy of one row."""
    weight = tl.load(tokens.weights + row).to(tl.float32)
    valid = weight != 0
    advantage = load_advantage(tokens, row, valid)
    log_ratio = logprob - load_valid(tokens.old_logprobs, row, valid)
    grad = surrogate(log_ratio, logprob, advantage, clip, DUAL, CISPO).logprob_grad
    if tokens.ref_logprobs is not None:
        log_ratio = logprob - load_valid(tokens.ref_logprobs, row, valid)
        grad += kl_coef * ref_kl_grad(log_ratio, clip, ESTIMATOR)
    return tl.where(valid, weight * grad, 0.0), -entropy_coef * weight


@triton.jit
def ppo_sums_kernel(
    targets, logprobs, entropy, tokens, clip, parts, N,
    DUAL: tl.constexpr, CISPO: tl.constexpr, ESTIMATOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """parts (len(STATS), programs): the sums of ppo.SUMS, the largest and the smallest ratio, by program."""
    zero = tl.zeros((TILE,), tl.float32)
    sums = (zero,) * NUM_SUMS
    ratio_max = zero - float("inf")
    ratio_min = zero + float("inf")
    for start in range(tl.program_id(0).to(tl.int64) * TILE, N, tl.num_programs(0) * TILE):
        index = start + tl.arange(0, TILE)
        counts = tl.load(targets + index, mask=index < N, other=launch.IGNORE_INDEX) != launch.IGNORE_INDEX
        w = load_valid(tokens.weights, index, counts)
        valid = w != 0
        logprob = load_valid(logprobs, index, valid)
        old_logprob = load_valid(tokens.old_logprobs, index, valid)
        advantage = load_advantage(tokens, index, valid)
        terms = surrogate(logprob - old_logprob, logprob, advantage, clip, DUAL, CISPO)
        kl = zero
        if tokens.ref_logprobs is not None:
            kl = ref_kl(logprob - load_valid(tokens.ref_logprobs, index, valid), clip, ESTIMATOR)
        added = policy_stats(w, terms) + (w * terms.loss, w * kl, w * load_valid(entropy, index, valid))
        new_sums = ()
        for i in tl.static_range(NUM_SUMS):
            new_sums = new_sums + (sums[i] + added[i],)
        sums = new_sums
        ratio_max = tl.maximum(ratio_max, tl.where(valid, terms.ratio, float("-inf")))
        ratio_min = tl.minimum(ratio_min, tl.where(valid, terms.ratio, float("inf")))
    part = parts + tl.program_id(0)
    stride = tl.num_programs(0)
    for i in tl.static_range(NUM_SUMS):
        tl.store(part + i * stride, tl.sum(sums[i], axis=0))
    tl.store(part + NUM_SUMS * stride, tl.max(ratio_max, axis=0))
    tl.store(part + (NUM_SUMS + 1) * stride, tl.min(ratio_min, axis=0))


@triton.jit
def sum_part(parts, i, programs, BLOCK: tl.constexpr):
    """Return the sum number i over all programs, in float64."""
    index = tl.arange(0, BLOCK)
    return tl.sum(tl.load(parts + i * programs + index, mask=index < programs, other=0.0).to(tl.float64), axis=0)


@triton.jit(do_not_specialize=["programs"])
def ppo_merge_kernel(parts, loss, stats, programs, kl_coef, entropy_coef, BLOCK: tl.constexpr):
    """Merge the programs' parts: one program for each sum, for the largest and the smallest ratio, and for the loss."""
    i = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    x = tl.load(parts + tl.minimum(i, NUM_SUMS + 1) * programs + index, mask=index < programs, other=0.0)
    if i < NUM_SUMS:
        tl.store(stats + i, tl.sum(x.to(tl.float64), axis=0).to(tl.float32))
    elif i <= NUM_SUMS + 1:
        ratio_sum = sum_part(parts, RATIO, programs, BLOCK).to(tl.float32)
        extreme = tl.max(tl.where(index < programs, x, float("-inf")), axis=0)
        if i == NUM_SUMS + 1:
            extreme = tl.min(tl.where(index < programs, x, float("inf")), axis=0)
        # max and min ignore NaN, which the sum of the ratios does not.
        tl.store(stats + i, tl.where(ratio_sum == ratio_sum, extreme, ratio_sum))
    else:
        total = sum_part(parts, POLICY_LOSS, programs, BLOCK)
        if kl_coef != 0:
            total += kl_coef * sum_part(parts, REF_KL, programs, BLOCK)
        if entropy_coef != 0:
            total -= entropy_coef * sum_part(parts, ENTROPY, programs, BLOCK)
        tl.store(loss, total.to(tl.float32))


def loss_and_stats(
    targets: Tensor, logprobs: Tensor, entropy: Tensor, tokens: Tokens, clip: ClipBounds,
    kl_coef: float, kl_estimator: str, entropy_coef: float, is_cispo: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the loss () and the statistics (len(STATS),), float32, of rows with known log-probability and entropy."""
    N = targets.numel()
    programs = max(1, min(MAX_PROGRAMS, triton.cdiv(N, TILE)))
    parts = empty_float32(targets, len(ppo.STATS), programs)
    loss = empty_float32(targets)
    stats = empty_float32(targets, len(ppo.STATS))
    meta = {"DUAL": clip.dual > 0, "CISPO": is_cispo, "ESTIMATOR": kl_estimator, "TILE": TILE, "num_warps": 4}
    launch.run(ppo_sums_kernel, (programs,), targets, logprobs, entropy, tokens, clip, parts, N, **meta)
    block = launch.block_size(programs)
    meta = {"BLOCK": block, "num_warps": launch.num_warps_for(block, 8)}
    grid = (len(ppo.STATS) + 1,)
    launch.run(ppo_merge_kernel, grid, parts, loss, stats, programs, kl_coef, entropy_coef, **meta)
    return loss, stats
