"""ranking_loss on a GPU: a program a prompt, every two of its responses at once, in two launches.

Memory is nothing (a score and a rank a response, a slope back). A program meets the K x K table of its group tile by
tile, each pair from both of its sides: one exponential, no product, no atomic. What a group adds to the sums waits in
double for the second kernel, which joins the groups in their order and, where the weights are 1 / (groups with a pair),
scales the slopes by what only then is known.
"""

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.kernels._tensors import check_offsets
from rlhf_fast.kernels.ranking_loss import STATS
from rlhf_fast.kernels.triton import launch

GROUPS, ROWS = 512, 1024  # what the second kernel takes at once
LOSS, PAIRS, CORRECT, MARGIN = (tl.constexpr(i) for i in range(4))


@triton.jit
def _log1p(e):
    """log(1 + e) for e from 0 to 1, to a few units in the last place: 2 artanh(e / (2 + e)) by its series."""
    s = e / (2.0 + e)
    q = s * s
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15 + q / 17)))
    return 2.0 * s * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series))))


@triton.jit
def _pair(ours, theirs, our_rank, their_rank, both):
    """Of a tile of pairs: whether the row or the column is the better one, by what margin, and -log and 1 - sigmoid."""
    better, worse = both & (our_rank < their_rank), both & (our_rank > their_rank)
    margin = tl.where(better, ours - theirs, tl.where(worse, theirs - ours, 0.0))
    e = tl.exp(-tl.abs(margin))
    loss = tl.where(margin < 0, -margin, 0.0) + _log1p(e)
    push = tl.where(margin < 0, 1.0, e) / (1.0 + e)
    return better, worse, margin, loss, push


@triton.jit
def _pairs(ranks, K, BLOCK: tl.constexpr):
    """Ordered pairs of a group: what its slopes are divided by."""
    at = tl.arange(0, BLOCK)
    pairs = tl.zeros((BLOCK,), tl.int64)
    for i in range(0, K, BLOCK):
        rank = tl.load(ranks + i + at, mask=i + at < K, other=0)
        for j in range(0, K, BLOCK):
            other = tl.load(ranks + j + at, mask=j + at < K, other=0)
            both = (i + at < K)[:, None] & (j + at < K)[None, :]
            pairs += tl.sum((both & (rank[:, None] < other[None, :])).to(tl.int32), axis=1)
    return tl.sum(pairs, axis=0)


@triton.jit
def _groups(scores, offsets, ranks, weights, slopes, parts, G, BLOCK: tl.constexpr):
    group = tl.program_id(0)
    start = tl.load(offsets + group).to(tl.int64)
    K = (tl.load(offsets + group + 1) - start).to(tl.int32)
    scores += start
    ranks += start
    pairs = _pairs(ranks, K, BLOCK)
    coefficient = 1.0 / tl.maximum(pairs, 1).to(tl.float32)
    if weights is not None:
        coefficient = tl.where(pairs > 0, tl.load(weights + group).to(tl.float32) * coefficient, 0.0)
    at = tl.arange(0, BLOCK)
    losses, margins = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    correct = tl.zeros((BLOCK,), tl.int64)
    for i in range(0, K, BLOCK):
        row = i + at
        ours = tl.load(scores + row, mask=row < K, other=0.0).to(tl.float32)
        our_rank = tl.load(ranks + row, mask=row < K, other=0)
        pull = tl.zeros((BLOCK,), tl.float32)
        for j in range(0, K, BLOCK):
            column = j + at
            theirs = tl.load(scores + column, mask=column < K, other=0.0).to(tl.float32)
            their_rank = tl.load(ranks + column, mask=column < K, other=0)
            both = (row < K)[:, None] & (column < K)[None, :]
            better, worse, margin, loss, push = _pair(
                ours[:, None], theirs[None, :], our_rank[:, None], their_rank[None, :], both
            )
            pull += tl.sum(tl.where(worse, push, tl.where(better, -push, 0.0)), axis=1)
            losses += tl.sum(tl.where(better, loss, 0.0), axis=1).to(tl.float64)
            margins += tl.sum(tl.where(better, margin, 0.0).to(tl.float64), axis=1)  # of both signs: they cancel
            correct += tl.sum((better & (margin > 0)).to(tl.int32), axis=1)
        if slopes is not None:
            tl.store(slopes + start + row, coefficient * pull, mask=row < K)
    tl.store(parts + LOSS * G + group, tl.sum(losses, axis=0))
    tl.store(parts + PAIRS * G + group, pairs.to(tl.float64))
    tl.store(parts + CORRECT * G + group, tl.sum(correct, axis=0).to(tl.float64))
    tl.store(parts + MARGIN * G + group, tl.sum(margins, axis=0))


@triton.jit
def _join(parts, weights, slopes, loss, stats, G, N, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """The first program adds the groups up; each of them scales its part of the slopes where there are no weights."""
    at = tl.arange(0, GROUPS)
    count = tl.zeros((GROUPS,), tl.int32)
    for first in range(0, G, GROUPS):
        group = first + at
        count += (tl.load(parts + PAIRS * G + group, mask=group < G, other=0.0) > 0).to(tl.int32)
    groups = tl.sum(count, axis=0)
    share = 1.0 / tl.maximum(groups, 1).to(tl.float32)
    if tl.program_id(0) == 0:
        losses = tl.zeros((GROUPS,), tl.float64)
        pairs, correct, margin = losses, losses, losses
        for first in range(0, G, GROUPS):
            group = first + at
            inside = group < G
            own = tl.load(parts + PAIRS * G + group, mask=inside, other=0.0)
            weight = share
            if weights is not None:
                weight = tl.load(weights + group, mask=inside, other=0.0).to(tl.float32)
            each = tl.load(parts + LOSS * G + group, mask=inside, other=0.0)
            losses += tl.where(own > 0, weight * each / tl.maximum(own, 1.0), 0.0)
            pairs += own
            correct += tl.load(parts + CORRECT * G + group, mask=inside, other=0.0)
            margin += tl.load(parts + MARGIN * G + group, mask=inside, other=0.0)
        tl.store(loss, tl.sum(losses, axis=0).to(tl.float32))
        tl.store(stats, tl.sum(pairs, axis=0).to(tl.float32))
        tl.store(stats + 1, tl.sum(correct, axis=0).to(tl.float32))
        tl.store(stats + 2, tl.sum(margin, axis=0).to(tl.float32))
        tl.store(stats + 3, groups.to(tl.float32))
        tl.store(stats + 4, (G - groups).to(tl.float32))
    if slopes is not None and weights is None:
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        tl.store(slopes + row, share * tl.load(slopes + row, mask=row < N, other=0.0), mask=row < N)


def _launch(scores, offsets, ranks, weights, with_slope):
    if scores.dtype == torch.float64:
        raise Unsupported("no Triton kernel for float64")
    check_offsets("ranking_loss", "group_offsets", offsets, scores.shape[0])
    scores, offsets, ranks = scores.contiguous(), offsets.contiguous(), ranks.contiguous()
    weights = weights if weights is None else weights.contiguous()
    G, N = offsets.shape[0] - 1, scores.shape[0]

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=scores.device)

    loss, stats, parts = empty(), empty(len(STATS)), empty(4, G, dtype=torch.float64)
    slopes = empty(N) if with_slope else None
    block = launch.block_size(triton.cdiv(3 * N, 2 * max(G, 1)), 32)  # most groups in one tile, where their K differ
    launch.run(
        _groups,
        (G,),
        scores,
        offsets,
        ranks,
        weights,
        slopes,
        parts,
        G,
        BLOCK=block,
        num_warps=launch.num_warps_for(block * block, 4),
    )
    launch.run(
        _join,
        (max(1, triton.cdiv(N, ROWS)) if with_slope and weights is None else 1,),
        parts,
        weights,
        slopes,
        loss,
        stats,
        G,
        N,
        GROUPS=launch.block_size(G, GROUPS),
        ROWS=ROWS,
        num_warps=4,
    )
    return loss, stats, slopes


def ranking_loss(*args):
    return _launch(*args, False)[:2]


def ranking_loss_with_gradients(*args):
    return _launch(*args, True)
