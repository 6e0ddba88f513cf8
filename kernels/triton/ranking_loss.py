"""ranking_loss on a GPU: one program per prompt for all pairs of its responses, and a second launch for the sums.

A program walks the K x K table of its group tile by tile, and sees each pair from both sides:

    responses     |  0 .. BLOCK  |  .. 2 BLOCK |        row i collects the gradient of response i,
    0 .. BLOCK    |    tile      |    tile     |        over the columns j that it is compared with
    .. 2 BLOCK    |    tile      |    tile     |

Memory traffic is negligible: a score and a rank per response, and a gradient back. The floor is one exponential per
ordered pair; there are no products and no atomics. A group's part of the sums is stored in float64. The second kernel
adds the groups in their order, the same bits from run to run. Where the weights are 1 / (groups with a pair), whose
number only then is known, it also scales the gradients.
"""

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.kernels._tensors import check_offsets, contiguous, empty_float32
from rlhf_fast.kernels.ranking_loss import STATS
from rlhf_fast.kernels.triton import launch

MERGE_GROUPS = 512  # groups that the second kernel loads at once
SCALE_ROWS = 1024  # gradients that a program of it scales
LOSS, PAIRS, CORRECT, MARGIN = (tl.constexpr(i) for i in range(4))  # a group's part


@triton.jit
def log1p(e):
    """Return log(1 + e) for e in [0, 1], to a few units in the last place: the series of 2 artanh(e / (2 + e))."""
    s = e / (2.0 + e)
    q = s * s
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15 + q / 17)))
    return 2.0 * s * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series))))


@triton.jit
def compare(row_score, column_score, row_rank, column_rank, exists):
    """Return, for a tile of pairs: whether the row is the better one, whether it is the worse one, the margin of the
    better over the worse one, -log sigmoid(margin), and 1 - sigmoid(margin)."""
    is_better = exists & (row_rank < column_rank)
    is_worse = exists & (row_rank > column_rank)
    margin = tl.where(is_worse, column_score - row_score, 0.0)
    margin = tl.where(is_better, row_score - column_score, margin)
    e = tl.exp(-tl.abs(margin))
    loss = tl.where(margin < 0, -margin, 0.0) + log1p(e)
    loss_grad = tl.where(margin < 0, 1.0, e) / (1.0 + e)
    return is_better, is_worse, margin, loss, loss_grad


@triton.jit
def count_pairs(ranks, K, BLOCK: tl.constexpr):
    """Return the number of pairs of different rank in a group."""
    offset = tl.arange(0, BLOCK)
    pairs = tl.zeros((BLOCK,), tl.int64)
    for i in range(0, K, BLOCK):
        rank = tl.load(ranks + i + offset, mask=i + offset < K, other=0)
        for j in range(0, K, BLOCK):
            other_rank = tl.load(ranks + j + offset, mask=j + offset < K, other=0)
            exists = (i + offset < K)[:, None] & (j + offset < K)[None, :]
            pairs += tl.sum((exists & (rank[:, None] < other_rank[None, :])).to(tl.int32), axis=1)
    return tl.sum(pairs, axis=0)


@triton.jit(do_not_specialize=["G"])
def ranking_loss_kernel(scores, offsets, ranks, weights, grads, parts, G, BLOCK: tl.constexpr):
    """Store the sums of the program's group in parts (4, G), and its gradients (without weights, those of its mean)."""
    group = tl.program_id(0)
    start = tl.load(offsets + group).to(tl.int64)
    K = (tl.load(offsets + group + 1) - start).to(tl.int32)
    scores += start
    ranks += start
    pairs = count_pairs(ranks, K, BLOCK)
    coefficient = 1.0 / tl.maximum(pairs, 1).to(tl.float32)
    if weights is not None:
        coefficient = tl.where(pairs > 0, tl.load(weights + group).to(tl.float32) * coefficient, 0.0)
    offset = tl.arange(0, BLOCK)
    losses = tl.zeros((BLOCK,), tl.float64)
    margins = tl.zeros((BLOCK,), tl.float64)
    correct = tl.zeros((BLOCK,), tl.int64)
    for i in range(0, K, BLOCK):
        row = i + offset
        row_score = tl.load(scores + row, mask=row < K, other=0.0).to(tl.float32)
        row_rank = tl.load(ranks + row, mask=row < K, other=0)
        grad = tl.zeros((BLOCK,), tl.float32)
        for j in range(0, K, BLOCK):
            column = j + offset
            column_score = tl.load(scores + column, mask=column < K, other=0.0).to(tl.float32)
            column_rank = tl.load(ranks + column, mask=column < K, other=0)
            exists = (row < K)[:, None] & (column < K)[None, :]
            is_better, is_worse, margin, loss, loss_grad = compare(
                row_score[:, None], column_score[None, :], row_rank[:, None], column_rank[None, :], exists
            )
            grad += tl.sum(tl.where(is_worse, loss_grad, tl.where(is_better, -loss_grad, 0.0)), axis=1)
            losses += tl.sum(tl.where(is_better, loss, 0.0), axis=1).to(tl.float64)
            # Margins have both signs and cancel: they are added in float64.
            margins += tl.sum(tl.where(is_better, margin, 0.0).to(tl.float64), axis=1)
            correct += tl.sum((is_better & (margin > 0)).to(tl.int32), axis=1)
        if grads is not None:
            tl.store(grads + start + row, coefficient * grad, mask=row < K)
    tl.store(parts + LOSS * G + group, tl.sum(losses, axis=0))
    tl.store(parts + PAIRS * G + group, pairs.to(tl.float64))
    tl.store(parts + CORRECT * G + group, tl.sum(correct, axis=0).to(tl.float64))
    tl.store(parts + MARGIN * G + group, tl.sum(margins, axis=0))


@triton.jit
def ranking_loss_merge_kernel(
    parts, weights, grads, loss, stats, G, N, GROUPS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Add up the groups in the first program. Without weights every program scales its part of the gradients."""
    offset = tl.arange(0, GROUPS)
    has_pairs = tl.zeros((GROUPS,), tl.int32)
    for first in range(0, G, GROUPS):
        group = first + offset
        has_pairs += (tl.load(parts + PAIRS * G + group, mask=group < G, other=0.0) > 0).to(tl.int32)
    groups = tl.sum(has_pairs, axis=0)
    mean_weight = 1.0 / tl.maximum(groups, 1).to(tl.float32)
    if tl.program_id(0) == 0:
        zero = tl.zeros((GROUPS,), tl.float64)
        losses, pairs, correct, margin = zero, zero, zero, zero
        for first in range(0, G, GROUPS):
            group = first + offset
            inside = group < G
            group_pairs = tl.load(parts + PAIRS * G + group, mask=inside, other=0.0)
            weight = mean_weight
            if weights is not None:
                weight = tl.load(weights + group, mask=inside, other=0.0).to(tl.float32)
            group_loss = tl.load(parts + LOSS * G + group, mask=inside, other=0.0)
            losses += tl.where(group_pairs > 0, weight * group_loss / tl.maximum(group_pairs, 1.0), 0.0)
            pairs += group_pairs
            correct += tl.load(parts + CORRECT * G + group, mask=inside, other=0.0)
            margin += tl.load(parts + MARGIN * G + group, mask=inside, other=0.0)
        tl.store(loss, tl.sum(losses, axis=0).to(tl.float32))
        tl.store(stats, tl.sum(pairs, axis=0).to(tl.float32))
        tl.store(stats + 1, tl.sum(correct, axis=0).to(tl.float32))
        tl.store(stats + 2, tl.sum(margin, axis=0).to(tl.float32))
        tl.store(stats + 3, groups.to(tl.float32))
        tl.store(stats + 4, (G - groups).to(tl.float32))
    if grads is not None and weights is None:
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        tl.store(grads + row, mean_weight * tl.load(grads + row, mask=row < N, other=0.0), mask=row < N)


def run_kernels(scores, offsets, ranks, weights, needs_grad):
    """Return the loss (), the statistics, and the gradient of scores or None."""
    if scores.dtype == torch.float64:
        raise Unsupported("no Triton kernel for float64")
    check_offsets("ranking_loss", "group_offsets", offsets, scores.shape[0])
    scores, offsets, ranks, weights = contiguous(scores, offsets, ranks, weights)
    G = offsets.shape[0] - 1
    N = scores.shape[0]
    loss = empty_float32(scores)
    stats = empty_float32(scores, len(STATS))
    grads = empty_float32(scores, N) if needs_grad else None
    parts = torch.empty((4, G), dtype=torch.float64, device=scores.device)
    block = launch.block_size(triton.cdiv(3 * N, 2 * max(G, 1)), 32)  # most groups fit one tile, also if their K differ
    meta = {"BLOCK": block, "num_warps": launch.num_warps_for(block * block, 4)}
    launch.run(ranking_loss_kernel, (G,), scores, offsets, ranks, weights, grads, parts, G, **meta)
    programs = 1
    if needs_grad and weights is None:
        programs = max(1, triton.cdiv(N, SCALE_ROWS))
    meta = {"GROUPS": launch.block_size(G, MERGE_GROUPS), "ROWS": SCALE_ROWS, "num_warps": 4}
    launch.run(ranking_loss_merge_kernel, (programs,), parts, weights, grads, loss, stats, G, N, **meta)
    return loss, stats, grads


def ranking_loss(*args):
    return run_kernels(*args, False)[:2]


def ranking_loss_with_gradients(*args):
    return run_kernels(*args, True)
