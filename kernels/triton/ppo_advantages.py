"""ppo_advantages on a GPU: rewards, their scan and the statistics in one visit of memory, two launches.

_scan.py has the scan and the picture of a tile. A row's score is part of the first carry of the row, so no thread needs
to find the row's last valid token.

Floor: 13 bytes read and 8 written per token; a token outside the mask costs only its mask. Rows are walked or split as
in gae. Split rows need a third launch, which comes first and computes the maps of their tiles; the last launch then
adds their KL.

A tile's moments are computed while it is in registers, in two steps: first its mean, then the distances from that mean,
which keep their digits where the mean is large beside the spread. Tiles, rows and programs are merged by Chan's rule in
float64, in an order that depends only on the shape and the number of SMs: the same bits from run to run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._tensors import contiguous, empty_float32
from rlhf_fast.kernels.ppo_advantages import STATS
from rlhf_fast.kernels.triton import _ppo as ppo
from rlhf_fast.kernels.triton import _scan as scan
from rlhf_fast.kernels.triton import launch

MAX_EXPONENT = tl.constexpr(20.0)  # of the k3 estimator


class Tokens(NamedTuple):
    """Inputs with one element per token."""

    logprobs: Tensor
    ref_logprobs: Tensor
    value: Tensor  # not `values`: tuples have an attribute of that name in Triton
    mask: Tensor


class Tile(NamedTuple):
    """The tokens of a tile, each (ROWS, GROUPS, 4)."""

    valid: Tensor
    logprob: Tensor
    ref_logprob: Tensor
    value: Tensor


class Moments(NamedTuple):
    """Number of tokens, mean advantage and the sum of squared distances from it, and both of the returns; float64."""

    n: Tensor
    mean: Tensor
    m2: Tensor
    return_mean: Tensor
    return_m2: Tensor


@triton.jit
def load_tile(tokens, start, length, tile, GROUPS: tl.constexpr):
    """Return the `Tile` number `tile` of the rows. Only valid tokens are read."""
    column = scan.tile_columns(tile, GROUPS)
    inside = (column >= 0) & (column < length[:, None, None])
    index = start[:, None, None] + column
    valid, loaded = scan.load_mask(tokens.mask, index, inside)
    return Tile(
        valid,
        scan.load(tokens.logprobs, index, loaded),
        scan.load(tokens.ref_logprobs, index, loaded),
        scan.load(tokens.value, index, loaded),
    )


@triton.jit
def kl_and_reward(x, kl_coef, ESTIMATOR: tl.constexpr):
    """Return the KL estimates and the rewards of a tile, in `unpack4`'s form."""
    kl = ppo.kl_estimate(x.logprob - x.ref_logprob, MAX_EXPONENT, ESTIMATOR)
    return scan.unpack4(kl), scan.unpack4(-kl_coef * kl)


@triton.jit
def first_carry(scores, bootstrap, row, exists, discount, score_clip):
    """Return the carry that a row's last token receives: its clipped score, and gamma times the value after it."""
    carry = scan.load_row(scores, row, exists)
    carry = tl.where(score_clip > 0, launch.clamp(carry, -score_clip, score_clip), carry)
    gamma, decay = scan.row_discount(discount, row, exists)
    if bootstrap is not None:
        carry = gamma * scan.load_row(bootstrap, row, exists) + carry
    return scan.reached_by_nan(carry, discount, decay)


@triton.jit
def merge_moments(n, mean, m2, return_mean, return_m2, n_b, mean_b, m2_b, return_mean_b, return_m2_b):
    """Return the `Moments` of two groups of tokens by Chan's rule, in float64 except for n_b / (n + n_b)."""
    total = n + n_b
    share = tl.div_rn(n_b.to(tl.float32), tl.where(total > 0, total, 1.0).to(tl.float32)).to(tl.float64)
    gap = mean_b - mean
    return_gap = return_mean_b - return_mean
    weight = n * share
    m2 = m2 + m2_b + gap * gap * weight
    return_m2 = return_m2 + return_m2_b + return_gap * return_gap * weight
    return total, mean + gap * share, m2, return_mean + return_gap * share, return_m2


@triton.jit
def group_sum(valid, x):
    """Return the sum over each group's valid tokens."""
    right = tl.where(valid[0], x[0], 0.0) + tl.where(valid[1], x[1], 0.0)
    left = tl.where(valid[2], x[2], 0.0) + tl.where(valid[3], x[3], 0.0)
    return right + left


@triton.jit
def group_distances(valid, x, mean):
    """Return the sums over each group's valid tokens of x - mean and of (x - mean)^2."""
    distances = ()
    squares = ()
    for i in tl.static_range(4):
        distance = x[i] - mean[:, None]
        distances = distances + (distance,)
        squares = squares + (distance * distance,)
    return group_sum(valid, distances), group_sum(valid, squares)


@triton.jit
def tile_moments(valid, advantage, token_return, kl):
    """Return the sums of KL (ROWS,) and the `Moments` (ROWS,) of a tile."""
    ones = (1.0, 1.0, 1.0, 1.0)
    n, total, return_total, kl = scan.sum4(
        group_sum(valid, ones), group_sum(valid, advantage), group_sum(valid, token_return), group_sum(valid, kl)
    )
    count = tl.where(n > 0, n, 1.0)
    mean = tl.div_rn(total, count)
    return_mean = tl.div_rn(return_total, count)
    distance, square = group_distances(valid, advantage, mean)
    return_distance, return_square = group_distances(valid, token_return, return_mean)
    distance, square, return_distance, return_square = scan.sum4(distance, square, return_distance, return_square)
    # The sum of the distances is not 0, because the mean is rounded. It corrects both the mean and the squares.
    count = count.to(tl.float64)
    distance = distance.to(tl.float64)
    return_distance = return_distance.to(tl.float64)
    correction = distance / count
    return_correction = return_distance / count
    m2 = square.to(tl.float64) - distance * correction
    return_m2 = return_square.to(tl.float64) - return_distance * return_correction
    mean = mean.to(tl.float64) + correction
    return_mean = return_mean.to(tl.float64) + return_correction
    return kl, Moments(n.to(tl.float64), mean, m2, return_mean, return_m2)


@triton.jit
def scan_and_store(
    advantages, returns, x, carry, start, length, tile, kl_coef, gamma, decay, ESTIMATOR: tl.constexpr
):  # fmt: skip
    """Store a tile's outputs. Return the carry that leaves each group, the rows' sums of KL, and their `Moments`."""
    valid, value = scan.unpack4(x.valid), scan.unpack4(x.value)
    kl, reward = kl_and_reward(x, kl_coef, ESTIMATOR)
    advantage, carry = scan.scan_tile(valid, reward, value, carry, gamma, decay)
    token_returns = scan.store_outputs(advantages, returns, valid, advantage, value, start, length, tile)
    kl, moments = tile_moments(valid, advantage, token_returns, kl)
    return carry, kl, moments


@triton.jit
def store_moments(parts, moments):
    """Store the merged moments of the program's rows; parts (5, programs)."""
    merged = tl.reduce((moments.n, moments.mean, moments.m2, moments.return_mean, moments.return_m2), 0, merge_moments)
    part = parts + tl.program_id(0)
    for i in tl.static_range(5):
        tl.store(part + i * tl.num_programs(0), merged[i])


@triton.jit(do_not_specialize=["B", "T"])
def ppo_advantages_kernel(
    tokens, scores, bootstrap, advantages, returns, kl, parts, B, T, kl_coef, discount, score_clip,
    ESTIMATOR: tl.constexpr, ALIGNED: tl.constexpr, SINGLE_TILE: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Walk ROWS rows from right to left. The next tile is loaded while one is scanned."""
    if ALIGNED:
        T = T // 4 * 4
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = row * T
    length = tl.where(row < B, T, 0)
    carry = first_carry(scores, bootstrap, row, row < B, discount, score_clip)
    gamma, decay = scan.row_discount(discount, row[:, None], row[:, None] < B)
    last = tl.cdiv(T, 4 * GROUPS) - 1
    x = load_tile(tokens, start, length, last, GROUPS)
    if SINGLE_TILE:
        _, row_kl, moments = scan_and_store(
            advantages, returns, x, carry, start, length, last, kl_coef, gamma, decay, ESTIMATOR
        )
    else:
        row_kl = tl.zeros((ROWS,), tl.float32)
        zero = tl.zeros((ROWS,), tl.float64)
        moments = Moments(zero, zero, zero, zero, zero)
        for i in range(0, last + 1):
            tile = last - i
            if ALIGNED:
                next_x = load_tile(tokens, start, length, tile - 1, GROUPS)
            group_carry, tile_kl, tile_moments_ = scan_and_store(
                advantages, returns, x, carry, start, length, tile, kl_coef, gamma, decay, ESTIMATOR
            )
            row_kl += tile_kl
            moments = Moments(*merge_moments(*moments, *tile_moments_))
            carry = scan.leftmost(group_carry)
            if not ALIGNED:  # unaligned loads need so many registers that two tiles do not fit
                next_x = load_tile(tokens, start, length, tile - 1, GROUPS)
            x = next_x
    tl.store(kl + row, row_kl, mask=row < B)
    store_moments(parts, moments)


@triton.jit(do_not_specialize=["size", "T"])
def ppo_advantages_tile_map_kernel(
    tokens, maps, size, T, kl_coef, discount,
    ESTIMATOR: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Store the map of the program's tile, unless it is the first tile of its row."""
    if ALIGNED:
        T = T // 4 * 4
    row, start, length, tile = scan.locate_tile(None, 0, T, 4 * GROUPS, 1, 0)
    if tile > 0:
        zero = tl.zeros((1,), tl.int64)
        x = load_tile(tokens, start + zero, length + zero, tile, GROUPS)
        gamma, decay = scan.row_discount(discount, row, None)
        _, reward = kl_and_reward(x, kl_coef, ESTIMATOR)
        valid, value = scan.unpack4(x.valid), scan.unpack4(x.value)
        factor, total = scan.tile_map(valid, reward, value, gamma, decay)
        index = maps + tl.program_id(0) + zero
        tl.store(index, factor)
        tl.store(index + size, total)


@triton.jit(do_not_specialize=["size", "T"])
def ppo_advantages_apply_kernel(
    tokens, scores, maps, bootstrap, advantages, returns, kl_parts, parts, size, T, kl_coef, discount, score_clip,
    ESTIMATOR: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Store the outputs of the program's tile, whose carry comes from the maps of the tiles right of it."""
    if ALIGNED:
        T = T // 4 * 4
    row, start, length, tile = scan.locate_tile(None, 0, T, 4 * GROUPS, 1, 0)
    zero = tl.zeros((1,), tl.int64)
    start, length = start + zero, length + zero
    # The carry is computed before the tile is loaded: both at once need too many registers.
    carry = first_carry(scores, bootstrap, row, row >= 0, discount, score_clip)
    gamma, decay = scan.row_discount(discount, row, None)
    first = tl.program_id(0).to(tl.int64) - tile
    carry = scan.carry_into(maps, size, first, tile, tl.cdiv(T, 4 * GROUPS), carry) + tl.zeros((1,), tl.float32)
    x = load_tile(tokens, start, length, tile, GROUPS)
    _, tile_kl, moments = scan_and_store(
        advantages, returns, x, carry, start, length, tile, kl_coef, gamma, decay, ESTIMATOR
    )
    tl.store(kl_parts + tl.program_id(0) + zero, tile_kl)
    store_moments(parts, moments)


@triton.jit(do_not_specialize=["tiles"])
def ppo_advantages_merge_kernel(parts, stats, size, kl_parts, kl, tiles, BLOCK: tl.constexpr):
    """Merge the programs' moments in the first program. Where rows are split, each program adds the KL of one row's
    tiles in the order of a walk."""
    if tl.program_id(0) == 0:
        index = tl.arange(0, BLOCK)
        zero = tl.zeros((BLOCK,), tl.float64)
        moments = (zero, zero, zero, zero, zero)
        for start in range(0, size, BLOCK):
            inside = start + index < size
            loaded = ()
            for i in tl.static_range(5):
                loaded = loaded + (tl.load(parts + i * size + start + index, mask=inside, other=0.0),)
            moments = merge_moments(*moments, *loaded)
        merged = tl.reduce(moments, 0, merge_moments)
        for i in tl.static_range(5):
            tl.store(stats + i, merged[i].to(tl.float32))
    if kl_parts is not None:
        total = tl.zeros((), tl.float32)
        last = (tl.program_id(0).to(tl.int64) + 1) * tiles - 1
        for batch in range(0, tl.cdiv(tiles, scan.MAPS_AT_ONCE)):
            for i in tl.static_range(scan.MAPS_AT_ONCE):
                tile = batch * scan.MAPS_AT_ONCE + i
                total += tl.load(kl_parts + last - tile, mask=tile < tiles, other=0.0)
        tl.store(kl + tl.program_id(0), total)


def ppo_advantages(
    logprobs, ref_logprobs, values, scores, mask, kl_coef, kl_estimator, gamma, lam, score_clip, bootstrap
):
    launch.require_dtypes(logprobs, ref_logprobs, values, scores, bootstrap)
    B, T = logprobs.shape
    tokens = Tokens(*contiguous(logprobs, ref_logprobs, values, mask))
    scores, bootstrap = contiguous(scores, bootstrap)
    groups, rows, is_split = scan.tile_shape(logprobs, B, T)
    tiles = triton.cdiv(T, scan.GROUP_SIZE * groups)
    size = B * tiles if is_split else triton.cdiv(B, rows)
    outputs = (empty_float32(logprobs, B, T), empty_float32(logprobs, B, T))
    stats = empty_float32(logprobs, len(STATS))
    kl = empty_float32(logprobs, B)
    parts = torch.empty((len(STATS), size), dtype=torch.float64, device=logprobs.device)
    kl_parts = empty_float32(logprobs, size) if is_split else None
    factors = (kl_coef, scan.discount_of("ppo_advantages", gamma, lam))
    meta = {"ESTIMATOR": kl_estimator, "ALIGNED": T % 4 == 0, "GROUPS": groups, "num_warps": 1}
    if is_split:
        maps = empty_float32(logprobs, 2, size)
        launch.run(ppo_advantages_tile_map_kernel, (size,), tokens, maps, size, T, *factors, **meta)
        inputs = (tokens, scores, maps, bootstrap)
        options = (size, T, *factors, score_clip)
        launch.run(ppo_advantages_apply_kernel, (size,), *inputs, *outputs, kl_parts, parts, *options, **meta)
    else:
        meta |= {"SINGLE_TILE": tiles == 1, "ROWS": rows}
        inputs = (tokens, scores, bootstrap)
        options = (B, T, *factors, score_clip)
        launch.run(ppo_advantages_kernel, (size,), *inputs, *outputs, kl, parts, *options, **meta)
    block = launch.block_size(size, 1024)
    grid = (B if is_split else 1,)
    meta = {"BLOCK": block, "num_warps": launch.num_warps_for(block, 4)}
    launch.run(ppo_advantages_merge_kernel, grid, parts, stats, size, kl_parts, kl, tiles, **meta)
    return *outputs, stats, kl
