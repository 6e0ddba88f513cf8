"""linear_cross_entropy on a GPU: three products, chunk by chunk, with one kernel between them.

_head.py has the products, the floor and the picture. The loss is the sum over all rows, at the end: each of up to 1024
programs walks tiles of 1024 rows, and a last program adds their sums in float64, in their order: the same bits from run
to run.
"""

import triton
import triton.language as tl

from rlhf_fast.kernels._head import IGNORE_INDEX
from rlhf_fast.kernels._tensors import empty_float32
from rlhf_fast.kernels.triton import _head as head
from rlhf_fast.kernels.triton import launch
from rlhf_fast.kernels.triton._logits import Loss

TILE = 1024  # rows
MAX_PROGRAMS = 1024


@triton.jit
def linear_cross_entropy_sum_kernel(targets, logprobs, weights, num_valid, parts, N, TILE: tl.constexpr):
    """Store the sum of the program's rows, -weight log p each, in parts (programs,)."""
    total = tl.zeros((TILE,), tl.float32)
    default_weight = 0.0
    if weights is None:
        default_weight = 1.0 / tl.load(num_valid).to(tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * TILE, N, tl.num_programs(0) * TILE):
        index = start + tl.arange(0, TILE)
        valid = tl.load(targets + index, mask=index < N, other=launch.IGNORE_INDEX) != launch.IGNORE_INDEX
        w = tl.where(valid, default_weight, 0.0)
        if weights is not None:
            w = tl.load(weights + index, mask=valid, other=0.0).to(tl.float32)
        total -= tl.where(w != 0, w * tl.load(logprobs + index, mask=valid, other=0.0), 0.0)
    tl.store(parts + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["programs"])
def linear_cross_entropy_merge_kernel(parts, loss, programs, BLOCK: tl.constexpr):
    """Store the sum of all parts."""
    index = tl.arange(0, BLOCK)
    x = tl.load(parts + index, mask=index < programs, other=0.0)
    tl.store(loss, tl.sum(x.to(tl.float64), axis=0).to(tl.float32))


def linear_cross_entropy_with_gradients(hidden, weight, targets, weights, bias, softcap, temperature, *needs_grad):
    policy = head.GpuHead("linear_cross_entropy", hidden, weight, targets, bias, temperature, softcap)
    weights = weights if weights is None else weights.contiguous()
    num_valid = (policy.targets != IGNORE_INDEX).sum() if weights is None else None
    statistics, grads = head.train(policy, Loss.cross_entropy(weights, num_valid), needs_grad)
    programs = max(1, min(MAX_PROGRAMS, triton.cdiv(policy.N, TILE)))
    parts = empty_float32(hidden, programs)
    loss = empty_float32(hidden)
    inputs = (policy.targets, statistics.logprobs, weights, num_valid)
    launch.run(linear_cross_entropy_sum_kernel, (programs,), *inputs, parts, policy.N, TILE=TILE, num_warps=4)
    block = launch.block_size(programs)
    meta = {"BLOCK": block, "num_warps": launch.num_warps_for(block, 8)}
    launch.run(linear_cross_entropy_merge_kernel, (1,), parts, loss, programs, **meta)
    return loss, statistics.logprobs, *grads


def linear_cross_entropy(*args):
    return linear_cross_entropy_with_gradients(*args, False, False, False)[:2]
