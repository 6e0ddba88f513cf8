"""linear_cross_entropy on a GPU: three products and a kernel between them, chunk by chunk; _head.py says how, and what
it costs. The loss joins in double, in the order of its programs: the same bits from run to run."""

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels import _head
from rlhf_fast.kernels.triton import _head as head
from rlhf_fast.kernels.triton import _logits as rows
from rlhf_fast.kernels.triton import launch

IGNORED = tl.constexpr(_head.IGNORE_INDEX)
TILE, PROGRAMS = 1024, 1024


@triton.jit
def _sums(targets, logprobs, weights, count, parts, N, TILE: tl.constexpr):
    total = tl.zeros((TILE,), tl.float32)
    share = 0.0
    if weights is None:
        share = 1.0 / tl.load(count).to(tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * TILE, N, tl.num_programs(0) * TILE):
        at = start + tl.arange(0, TILE)
        here = tl.load(targets + at, mask=at < N, other=IGNORED) != IGNORED
        w = tl.where(here, share, 0.0)
        if weights is not None:
            w = tl.load(weights + at, mask=here, other=0.0).to(tl.float32)
        total -= tl.where(w != 0, w * tl.load(logprobs + at, mask=here, other=0.0), 0.0)
    tl.store(parts + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _join(parts, loss, programs, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(parts + at, mask=at < programs, other=0.0)
    tl.store(loss, tl.sum(x.to(tl.float64), axis=0).to(tl.float32))


def _train(hidden, weight, targets, weights, bias, softcap, *by):
    of = head.Head("linear_cross_entropy", hidden, weight, targets, bias, 1.0, softcap)
    weights = weights if weights is None else weights.contiguous()
    count = (of.targets != _head.IGNORE_INDEX).sum() if weights is None else None
    results, grads = head.train(of, rows.Loss(rows.LIKELIHOOD, weights=weights, count=count), by)
    programs = max(1, min(PROGRAMS, triton.cdiv(of.N, TILE)))
    parts, loss = (torch.empty(n, dtype=torch.float32, device=hidden.device) for n in ((programs,), ()))
    launch.run(_sums, (programs,), of.targets, results.logprobs, weights, count, parts, of.N, TILE=TILE, num_warps=4)
    block = launch.block(programs)
    launch.run(_join, (1,), parts, loss, programs, BLOCK=block, num_warps=launch.warps(block, 8))
    return loss, results.logprobs, *grads


def linear_cross_entropy(*args):
    return _train(*args, False, False, False)[:2]


def linear_cross_entropy_with_gradients(*args):
    return _train(*args)
