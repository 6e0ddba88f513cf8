"""ppo_loss on a GPU: both losses, their gradients and all sums of the statistics in one visit of memory, two launches.

Floor: at most 36 bytes read and 8 written per token. The weights are loaded first: 4 tokens of weight 0 cost no other
load. Each of up to 1024 programs walks tiles of 512 tokens:

    tokens     | tile 0 | tile 1 | tile 2 | tile 3 | ...        program p has the tiles p, p + programs, ...
    tile       | thread 0: 4 tokens | thread 1: 4 tokens | ... | thread 127: 4 tokens |

A thread keeps each sum in one register and adds the 4 tokens of a load to it. A program's sums are added in float32,
those of all programs in float64, in an order that depends only on the number of tokens: the same bits from run to run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.kernels._ppo_loss import IMPORTANCE_MODES, STATS, Inputs, RowRatios, run_with_row_ratios
from rlhf_fast.kernels._tensors import contiguous, empty_float32
from rlhf_fast.kernels.ppo_loss import empty_grads
from rlhf_fast.kernels.triton import _ppo as ppo
from rlhf_fast.kernels.triton import launch

THREADS = 128
TOKENS_PER_THREAD = 4
MAX_PROGRAMS = 1024
NUM_SUMS = tl.constexpr(len(STATS) - 2)  # parts: these sums, both losses, the largest and the smallest ratio
NUM_PARTS = len(STATS) + 2
RATIO = tl.constexpr(STATS.index("ratio"))


class Tokens(NamedTuple):
    """Inputs with one element per token, all but weights may be None, and two that are one number for all, or None."""

    logprobs: Tensor | None
    old_logprobs: Tensor | None
    advantages: Tensor | None
    weights: Tensor
    value: Tensor | None  # not `values`: tuples have an attribute of that name in Triton
    old_values: Tensor | None
    returns: Tensor | None
    value_weights: Tensor | None
    sampler_logprobs: Tensor | None
    advantage_shift: Tensor | None
    advantage_scale: Tensor | None


@triton.jit
def load_weights(weights, index, inside):
    """Return the weights, which of them are valid (not 0), and which tokens a thread loads: all if any is valid."""
    w = tl.load(weights + index, mask=inside, other=0.0).to(tl.float32)
    valid = w != 0
    any_valid = tl.max(valid.to(tl.int32), axis=1)[:, None] > 0
    return w, valid, any_valid & inside


@triton.jit
def load_and_mask(x, index, loaded, valid):
    """Return x in float32, 0 for tokens that are not valid. `loaded` keeps a thread's load whole."""
    return tl.where(valid, tl.load(x + index, mask=loaded, other=0.0).to(tl.float32), 0.0)


@triton.jit
def policy_terms(
    w, log_ratio, logprob, old_logprob, advantage, sampler_logprob, clip, importance_cap, importance_floor,
    DUAL: tl.constexpr, CISPO: tl.constexpr, IMPORTANCE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Return the tokens' terms of the loss, their gradients by the log-ratio (CISPO's by the log-probability), their 10
    terms of the statistics, and the ratio."""
    terms = ppo.surrogate(log_ratio, logprob, advantage, clip, DUAL, CISPO)
    coefficient = w
    is_capped = w < w
    if IMPORTANCE:
        importance = tl.exp(old_logprob - sampler_logprob)
        is_high = importance > importance_cap
        is_low = importance < importance_floor
        is_capped = is_high | is_low
        importance = tl.where(is_high, 0.0 if MASK else importance_cap, importance)
        coefficient = w * tl.where(is_low, 0.0 if MASK else importance_floor, importance)
    counts = coefficient != 0
    stats = ppo.policy_stats(w, terms) + (coefficient, tl.where(is_capped, w, 0.0))
    loss = tl.where(counts, coefficient * terms.loss, 0.0)
    grad = tl.where(counts, coefficient * terms.logprob_grad, 0.0)
    return loss, grad, stats, terms.ratio


@triton.jit
def value_terms(w, value, old_value, target, value_clip, CLIP: tl.constexpr):
    """Return the tokens' terms of twice the loss, their gradients, and their 5 terms of the statistics."""
    error = value - target
    unclipped = error * error
    loss = unclipped
    grad = error
    is_clipped = w < w
    if CLIP:
        bounded = launch.clamp(value, old_value - value_clip, old_value + value_clip)
        clipped_error = tl.where(old_value == old_value, bounded, old_value) - target
        clipped = clipped_error * clipped_error
        is_clipped = clipped > unclipped
        is_within = (value >= old_value - value_clip) & (value <= old_value + value_clip)
        is_tie = ~is_within & (clipped == unclipped)
        is_nan = clipped != clipped
        grad = tl.where(is_nan, clipped, tl.where(is_clipped, 0.0, tl.where(is_tie, 0.5 * grad, grad)))
        loss = tl.where(is_nan | is_clipped, clipped, unclipped)
    return w * loss, w * grad, (w, tl.where(is_clipped, w, 0.0), w * value, w * unclipped, w * target)


@triton.jit
def add_terms(sums, terms, N: tl.constexpr):
    """Add to each of N sums its term, summed over a thread's tokens."""
    out = ()
    for i in tl.static_range(N):
        out = out + (sums[i] + tl.sum(terms[i], axis=1),)
    return out


@triton.jit
def ppo_loss_kernel(
    tokens, row_log_ratios, logprob_grads, value_grads, parts, N, row_length, clip, value_clip, importance_cap,
    importance_floor,
    DUAL: tl.constexpr, CISPO: tl.constexpr, CLIP: tl.constexpr, MASK: tl.constexpr,
    THREADS: tl.constexpr, TOKENS_PER_THREAD: tl.constexpr,
):  # fmt: skip
    """parts (NUM_PARTS, programs): the program's sums, losses, and largest and smallest ratio."""
    IMPORTANCE: tl.constexpr = tokens.sampler_logprobs is not None
    offset = tl.arange(0, THREADS)[:, None] * TOKENS_PER_THREAD + tl.arange(0, TOKENS_PER_THREAD)[None, :]
    zero = tl.zeros((THREADS,), tl.float32)
    policy_loss = (zero,)
    value_loss = (zero,)
    policy_stats = (zero,) * 10
    value_stats = (zero,) * 5
    ratio_max = zero - float("inf")
    ratio_min = zero + float("inf")
    shift = 0.0
    scale = 1.0
    if tokens.advantage_shift is not None:
        shift = tl.load(tokens.advantage_shift).to(tl.float32)
    if tokens.advantage_scale is not None:
        scale = tl.load(tokens.advantage_scale).to(tl.float32)
    size: tl.constexpr = THREADS * TOKENS_PER_THREAD
    for start in range(tl.program_id(0).to(tl.int64) * size, N, tl.num_programs(0) * size):
        index = start + offset
        inside = index < N
        # All loads are issued before the first of them is needed: weights, then the policy's, then the values.
        if tokens.logprobs is not None:
            w, valid, loaded = load_weights(tokens.weights, index, inside)
        if tokens.value is not None:
            value_w, value_valid, value_loaded = load_weights(tokens.value_weights, index, inside)
        if tokens.logprobs is not None:
            old_logprob = load_and_mask(tokens.old_logprobs, index, loaded, valid)
            logprob = load_and_mask(tokens.logprobs, index, loaded, valid)
            advantage = load_and_mask(tokens.advantages, index, loaded, valid)
            sampler_logprob = old_logprob
            if IMPORTANCE:
                sampler_logprob = load_and_mask(tokens.sampler_logprobs, index, loaded, valid)
        if tokens.value is not None:
            value = load_and_mask(tokens.value, index, value_loaded, value_valid)
            target = load_and_mask(tokens.returns, index, value_loaded, value_valid)
            old_value = value
            if CLIP:
                old_value = load_and_mask(tokens.old_values, index, value_loaded, value_valid)
        if tokens.logprobs is not None:
            advantage = tl.where(valid, (advantage - shift) * scale, 0.0)
            log_ratio = logprob - old_logprob
            if row_log_ratios is not None:
                log_ratio = load_and_mask(row_log_ratios, index // row_length, loaded, valid)
            loss, grad, terms, ratio = policy_terms(
                w, log_ratio, logprob, old_logprob, advantage, sampler_logprob, clip, importance_cap, importance_floor,
                DUAL, CISPO, IMPORTANCE, MASK,
            )  # fmt: skip
            policy_loss = add_terms(policy_loss, (loss,), 1)
            policy_stats = add_terms(policy_stats, terms, 10)
            ratio_max = tl.maximum(ratio_max, tl.max(tl.where(valid, ratio, float("-inf")), axis=1))
            ratio_min = tl.minimum(ratio_min, tl.min(tl.where(valid, ratio, float("inf")), axis=1))
            if logprob_grads is not None:
                tl.store(logprob_grads + index, launch.cast(grad, logprob_grads.dtype.element_ty), mask=inside)
        if tokens.value is not None:
            loss, grad, terms = value_terms(value_w, value, old_value, target, value_clip, CLIP)
            value_loss = add_terms(value_loss, (loss,), 1)
            value_stats = add_terms(value_stats, terms, 5)
            if value_grads is not None:
                tl.store(value_grads + index, launch.cast(grad, value_grads.dtype.element_ty), mask=inside)
    sums = policy_stats + value_stats + policy_loss + value_loss
    part = parts + tl.program_id(0)
    stride = tl.num_programs(0)
    for i in tl.static_range(NUM_SUMS + 2):
        tl.store(part + i * stride, tl.sum(sums[i], axis=0))
    tl.store(part + (NUM_SUMS + 2) * stride, tl.max(ratio_max, axis=0))
    tl.store(part + (NUM_SUMS + 3) * stride, tl.min(ratio_min, axis=0))


@triton.jit(do_not_specialize=["programs"])
def ppo_loss_merge_kernel(parts, policy_loss, value_loss, stats, programs, BLOCK: tl.constexpr):
    """Merge the programs' parts: one program for each sum, each loss, and the largest and the smallest ratio."""
    i = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    inside = index < programs
    x = tl.load(parts + i * programs + index, mask=inside, other=0.0)
    if i >= NUM_SUMS + 2:
        ratio_sum = tl.sum(tl.load(parts + RATIO * programs + index, mask=inside, other=0.0), axis=0)
        extreme = tl.max(tl.where(inside, x, float("-inf")), axis=0)
        if i == NUM_SUMS + 3:
            extreme = tl.min(tl.where(inside, x, float("inf")), axis=0)
        # max and min ignore NaN, which the sum of the ratios does not.
        tl.store(stats + i - 2, tl.where(ratio_sum == ratio_sum, extreme, ratio_sum))
    else:
        total = tl.sum(x.to(tl.float64), axis=0)
        tl.store(stats + i, total.to(tl.float32), mask=i < NUM_SUMS)
        tl.store(policy_loss, total.to(tl.float32), mask=i == NUM_SUMS)
        tl.store(value_loss, (0.5 * total).to(tl.float32), mask=i == NUM_SUMS + 1)


def run_kernels(x: Inputs, needs_grad: tuple[bool, bool], round_grads: bool, row_ratios: RowRatios):
    """Return both losses, stats, and the gradients of logprobs and values, None where not needed."""
    tokens = Tokens(*contiguous(*x.tensors))
    if tokens.value is not None and tokens.value_weights is None:
        tokens = tokens._replace(value_weights=tokens.weights)
    clip = ppo.ClipBounds.of(x.clip_low, x.clip_high, x.dual_clip, x.log_ratio_clamp)
    weights = tokens.weights
    N = weights.numel()
    grads = empty_grads(x, needs_grad, round_grads)
    programs = max(1, min(MAX_PROGRAMS, triton.cdiv(N, THREADS * TOKENS_PER_THREAD)))
    parts = empty_float32(weights, NUM_PARTS, programs)
    outputs = (empty_float32(weights), empty_float32(weights), empty_float32(weights, len(STATS)))
    meta = {
        "DUAL": x.dual_clip > 0,
        "CISPO": x.clip.is_cispo,
        "CLIP": x.value_clip > 0,
        "MASK": x.importance_mode == IMPORTANCE_MODES[1],
        "THREADS": THREADS,
        "TOKENS_PER_THREAD": TOKENS_PER_THREAD,
        "num_warps": THREADS // 32,
    }
    outputs_and_sizes = (*grads, parts, N, row_ratios.length)
    options = (clip, x.value_clip, x.importance_cap, x.importance_floor)
    launch.run(ppo_loss_kernel, (programs,), tokens, row_ratios.log_ratios, *outputs_and_sizes, *options, **meta)
    block = launch.block_size(programs)
    meta = {"BLOCK": block, "num_warps": launch.num_warps_for(block, 8)}
    launch.run(ppo_loss_merge_kernel, (NUM_PARTS,), parts, *outputs, programs, **meta)
    return *outputs, *grads


def run(args: tuple, needs_grad: tuple[bool, bool], round_grads: bool) -> list:
    """Return both losses, stats, and the gradients of logprobs and values, None where not needed."""
    x = Inputs(*args)
    if x.weights.dtype == torch.float64:
        raise Unsupported("no Triton kernel for float64")
    return run_with_row_ratios(run_kernels, x, needs_grad, round_grads)


def ppo_loss(*args):
    return tuple(run(args, (False, False), False)[:3])


def ppo_loss_with_gradients(*args):
    *outputs, logprob_grad, value_grad = run(args[:-3], args[-3:-1], args[-1])
    return *outputs, *(outputs[2].new_empty(0) if grad is None else grad for grad in (logprob_grad, value_grad))
