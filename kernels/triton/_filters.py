"""The cutoff of sample_tokens' filters in a row of logits on a GPU, found without a sort. Not an op.

Top-k, top-p and min-p each keep a prefix of the order (logit falling, index rising). So a row has one cutoff: the last
kept logit and, among the tokens with that logit, the last kept index.

    order    | token token token token | token token ...
             |         kept            ^ cutoff

One program per row searches it. It computes the weight (number of tokens, or their mass) at or above THRESHOLDS
logits, keeps the bracket between two of them in which the weight reaches its target, and repeats until the bracket is
one logit. Thresholds are integers in the order of floats, the 16 bits of a bfloat16, so ties are those of the input,
whatever the temperature. Then the search finds the token of that logit with which the weight is reached.

The program does not walk a long row again and again. SAMPLE tokens in chunks spread over the row give a bracket that
almost surely has the cutoff. One walk collects the tokens in the bracket and sums the weight above it; then only those
candidates are searched. If the sample was misleading, or there are too many candidates, the row itself is searched.

Floor: with a sample, one read of the row. Sums over a tile are float32, sums of tiles float64, both in the order of the
tokens: a row's cutoff depends on the row alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._tensors import empty_float32
from rlhf_fast.kernels.triton import _gumbel as gumbel
from rlhf_fast.kernels.triton import launch

THRESHOLDS = 8
TILE = 2048  # tokens of a step of a walk
SAMPLE = 4096  # tokens
CHUNK = 16  # consecutive tokens of the sample
MAX_CANDIDATE_SHARE = 8  # at most 1 / 8 of a row can be candidates
SHIFTS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # low bits of a float32 that are 0 in the dtype
ALL = tl.constexpr(2**31 - 1)  # as an index: every token with the cutoff's logit
BELOW_MIN_KEY = tl.constexpr(-0x7F800001)  # the key of -inf


class LogitsRow(NamedTuple):
    """One row of the logits. Tokens in `banned` (V,) are -inf if the row's flag in `ban_rows` (B,) is set."""

    logits: Tensor
    banned: Tensor | None
    ban_rows: Tensor | None
    row: Tensor
    row_stride: int


class Source(NamedTuple):
    """The tokens that a search walks: the row's, or its candidates if `is_collected`."""

    row: LogitsRow
    candidate_logits: Tensor | None
    candidate_tokens: Tensor | None
    is_collected: Tensor


class Bracket(NamedTuple):
    """Keys [low, high) that have the cutoff's, and the weight at or above high."""

    low: Tensor
    high: Tensor
    weight_above: Tensor


@triton.jit
def mask_banned(x, banned, ban_rows, row, column, inside):
    """Return x (rows, columns) with -inf for banned tokens. +inf and NaN stay, so that the row is still rejected."""
    is_banned = tl.load(banned + column, mask=inside, other=0)[None, :] != 0
    return tl.where(is_banned & tl.load(ban_rows + row)[:, None] & (x < float("inf")), float("-inf"), x)


@triton.jit
def to_key(x, SHIFT: tl.constexpr):
    """Return integers with the order of the floats x, without the SHIFT low bits that are 0 in the logits' dtype."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def from_key(key, SHIFT: tl.constexpr):
    """Return the float of a key."""
    key = key.to(tl.int32)
    key = (key << SHIFT) | tl.where(key < 0, (1 << SHIFT) - 1, 0)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_row(row, column, inside):
    """Return the logits of columns (BLOCK,) of a `LogitsRow`, -inf if they are banned or not inside."""
    x = tl.load(row.logits + row.row * row.row_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    if row.banned is not None:
        is_banned = tl.load(row.banned + column, mask=inside, other=0) != 0
        x = tl.where(is_banned & tl.load(row.ban_rows + row.row) & (x < float("inf")), float("-inf"), x)
    return x


@triton.jit
def load_source(source, index, n):
    """Return the logits and tokens at `index` of the n that a search walks."""
    inside = index < n
    if source.candidate_logits is None:
        x = load_row(source.row, index, inside)
        token = index
    elif source.is_collected:
        x = tl.load(source.candidate_logits + index, mask=inside, other=float("-inf"))
        token = tl.load(source.candidate_tokens + index, mask=inside, other=0)
    else:
        x = load_row(source.row, index, inside)
        token = index
    return x, token


@triton.jit
def weight_at_or_above(
    source, n, thresholds, largest, inverse,
    BY_MASS: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr, THRESHOLDS: tl.constexpr,
):  # fmt: skip
    """Return the weight at or above each threshold, float64. Thresholds are above BELOW_MIN_KEY."""
    total = tl.zeros((THRESHOLDS,), tl.float64)
    for start in range(0, n, TILE):
        x, _ = load_source(source, start + tl.arange(0, TILE), n)
        weight = tl.exp((x - largest) * inverse) if BY_MASS else tl.full((TILE,), 1.0, tl.float32)
        is_above = to_key(x, SHIFT)[None, :] >= thresholds[:, None]
        total += tl.sum(tl.where(is_above, weight[None, :], 0.0), axis=1).to(tl.float64)
    return total


@triton.jit
def find_token(source, n, key, rank_of_last, SHIFT: tl.constexpr, TILE: tl.constexpr):
    """Return the index of the `rank_of_last`th token with that key, or ALL if there are fewer."""
    num_before = 0
    token_of_last = ALL
    for start in range(0, n, TILE):
        index = start + tl.arange(0, TILE)
        x, token = load_source(source, index, n)
        is_equal = (to_key(x, SHIFT) == key) & (index < n)
        rank = num_before + tl.cumsum(is_equal.to(tl.int32), 0)
        is_last = is_equal & (rank == rank_of_last)
        token_of_last = tl.minimum(token_of_last, tl.min(tl.where(is_last, token, ALL), axis=0))
        num_before += tl.sum(is_equal.to(tl.int32), axis=0)
    return token_of_last


@triton.jit
def search_threshold(
    source, n, bracket, target, largest, inverse,
    BY_MASS: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr, THRESHOLDS: tl.constexpr,
):  # fmt: skip
    """Return the key and the index of the token with which the weight, in falling order, reaches `target`, and the
    number of kept tokens with that key."""
    low = bracket.low.to(tl.int64)
    high = bracket.high.to(tl.int64)
    weight_before = bracket.weight_above
    high = tl.where(n > 0, high, low)
    while high - low > 1:
        step = (high - low + THRESHOLDS) // (THRESHOLDS + 1)
        threshold = tl.minimum(low + step * (1 + tl.arange(0, THRESHOLDS)), high)
        weight = bracket.weight_above + weight_at_or_above(
            source, n, threshold.to(tl.int32), largest, inverse, BY_MASS, SHIFT, TILE, THRESHOLDS
        )
        is_reached = (weight >= target) & (threshold < high)
        weight_before = tl.maximum(weight_before, tl.max(tl.where(is_reached, 0.0, weight), axis=0))
        high = tl.min(tl.where(is_reached, high, threshold), axis=0)
        low = tl.max(tl.where(is_reached, threshold, low), axis=0)
    num_kept = target - weight_before
    if BY_MASS:
        token_mass = tl.exp((from_key(low, SHIFT) - largest) * inverse).to(tl.float64)
        num_kept = tl.ceil(num_kept / tl.maximum(token_mass, 1e-300))
    num_kept = tl.minimum(tl.maximum(num_kept, 1.0), 2147483647.0).to(tl.int32)
    return low.to(tl.int32), find_token(source, n, low, num_kept, SHIFT, TILE), num_kept


@triton.jit
def bracket_from_sample(
    row, V, step, largest, inverse, k, p, uses_top_k, total,
    SHIFT: tl.constexpr, SAMPLE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Return keys [low, high) that almost surely have the cutoff's: three standard deviations around the estimate.

    For top-k we count the sampled tokens above. For top-p we estimate the tail mass: it is a sum of many small terms,
    whereas the head may be a few tokens that the sample misses."""
    COARSE: tl.constexpr = SHIFT if SHIFT > 12 else 12
    index = tl.arange(0, SAMPLE)
    x = load_row(row, (index // CHUNK) * step + index % CHUNK, index < SAMPLE)
    key = to_key(x, COARSE)[None, :]
    mass = tl.exp((x - largest) * inverse)[None, :]
    sample_share = SAMPLE / V.to(tl.float32)
    rank = k.to(tl.float32) * sample_share
    tail_mass = (1.0 - p) * total.to(tl.float32) * sample_share
    rank_slack = 3.0 * tl.sqrt(rank) + 8.0
    is_high = tl.arange(0, 2) > 0  # the two ends of the bracket are searched side by side
    low = tl.where(is_high, BELOW_MIN_KEY >> COARSE, BELOW_MIN_KEY >> COARSE)
    high = tl.where(is_high, 1, 1) + to_key(largest, COARSE)
    for _ in range(33 - COARSE):
        middle = (low + high) >> 1
        is_above = key >= middle[:, None]
        count = tl.sum(is_above.to(tl.float32), axis=1)
        mass_below = tl.where(is_above, 0.0, mass)
        weight = tl.sum(mass_below, axis=1)
        mass_slack = 3.0 * tl.sqrt(tl.sum(mass_below * mass_below, axis=1))
        is_low_enough = tl.where(
            uses_top_k, count >= rank + rank_slack, (weight + mass_slack <= tail_mass) & (count >= 8)
        )
        is_not_high = tl.where(uses_top_k, count > rank - rank_slack, weight - mass_slack < tail_mass)
        goes_up = tl.where(is_high, is_not_high, is_low_enough)
        moves = high - low > 1
        low, high = tl.where(moves & goes_up, middle, low), tl.where(moves & (goes_up == 0), middle, high)
    FINE: tl.constexpr = COARSE - SHIFT
    bracket_low = tl.sum(tl.where(is_high, 0, low), axis=0) << FINE
    bracket_high = tl.sum(tl.where(is_high, high, 0), axis=0) << FINE
    return tl.maximum(bracket_low, BELOW_MIN_KEY >> SHIFT), bracket_high


@triton.jit
def collect_candidates(
    row, V, low, high, largest, inverse, uses_top_k, candidate_logits, candidate_tokens, capacity,
    SHIFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store the tokens with keys in [low, high) by rising index. Return their number, their weight, and the weight of
    those at or above high. Weight is number if uses_top_k, otherwise mass."""
    count = tl.full((), 0, tl.int32)
    inner_weight = tl.zeros((TILE // 2,), tl.float32)  # sums of pairs: half the registers
    weight_above = inner_weight
    for start in range(0, V, TILE):
        index = start + tl.arange(0, TILE)
        x = load_row(row, index, index < V)
        key = to_key(x, SHIFT)
        is_above = key >= high
        is_candidate = (key >= low) & (key < high) & (index < V)
        weight = tl.where(uses_top_k, 1.0, tl.exp((x - largest) * inverse))
        inner_weight += tl.sum(tl.reshape(tl.where(is_candidate, weight, 0.0), (TILE // 2, 2)), axis=1)
        weight_above += tl.sum(tl.reshape(tl.where(is_above, weight, 0.0), (TILE // 2, 2)), axis=1)
        num_candidates = tl.sum(is_candidate.to(tl.int32), axis=0)
        if num_candidates > 0:
            place = count + tl.cumsum(is_candidate.to(tl.int32), 0) - 1
            fits = is_candidate & (place < capacity)
            tl.store(candidate_logits + place, x, mask=fits)
            tl.store(candidate_tokens + place, index, mask=fits)
        count += num_candidates
    return count, tl.sum(inner_weight, axis=0).to(tl.float64), tl.sum(weight_above, axis=0).to(tl.float64)


@triton.jit
def tighter(logit, token, other_logit, other_token):
    """Return the cutoff that keeps less."""
    smaller_token = tl.minimum(token, other_token)
    new_token = tl.where(logit > other_logit, token, other_token)
    new_token = tl.where(logit == other_logit, smaller_token, new_token)
    return tl.maximum(logit, other_logit), new_token


@triton.jit
def min_p_threshold(largest, temperature, min_p, SHIFT: tl.constexpr):
    """Return the smallest logit that passes min_p, compared in float64 exactly as the reference does."""
    min_z = tl.log(min_p.to(tl.float64))
    high = to_key(largest, SHIFT).to(tl.int64)
    low = tl.full((), BELOW_MIN_KEY >> SHIFT, tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        z = (from_key(middle, SHIFT).to(tl.float64) - largest.to(tl.float64)) / temperature
        low, high = tl.where(z >= min_z, low, middle), tl.where(z >= min_z, middle, high)
    return from_key(high, SHIFT)


@triton.jit(do_not_specialize=["stride"])
def cutoff_kernel(
    logits, banned, ban_rows, row_options, parts, candidate_logits, candidate_tokens, cutoff_logits, cutoff_tokens,
    row_stride, stride, V, tiles, capacity, step,
    LARGEST: tl.constexpr, SECOND: tl.constexpr, OTHERS: tl.constexpr, SHIFT: tl.constexpr, SAMPLE: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, THRESHOLDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the cutoff of the program's row. LARGEST, SECOND, OTHERS: the fields of `parts` that the filters see."""
    row_index = tl.program_id(0).to(tl.int64)
    T, k, p, min_p, in_range = gumbel.load_options(row_options, row_index, V)
    inverse, is_greedy = gumbel.inverse_temperature(row_options.temperature, row_index, True)
    temperature = tl.where(is_greedy, 1.0, T).to(tl.float64)
    largest_field = parts + row_index * tiles + LARGEST * stride
    second_field = parts + row_index * tiles + SECOND * stride
    others_field = parts + row_index * tiles + OTHERS * stride
    largest = gumbel.merge_largest(largest_field, tiles, BLOCK)
    top = largest.to(tl.float64)
    others, _ = gumbel.merge_others(
        largest_field, second_field, others_field, None, top, 1.0 / temperature, tiles, BLOCK
    )
    total = 1.0 + others
    is_filtered = in_range & (is_greedy == 0) & (tl.abs(largest) < float("inf")) & (total < float("inf"))
    uses_top_k = is_filtered & (k > 0)
    uses_top_p = is_filtered & (p < 1)
    cutoff_logit = float("-inf")
    cutoff_token = ALL
    if row_options.top_k is not None or row_options.top_p is not None:
        row = LogitsRow(logits, banned, ban_rows, row_index, row_stride)
        low = tl.full((), BELOW_MIN_KEY >> SHIFT, tl.int32)
        high = to_key(largest, SHIFT) + 1
        n = tl.where(uses_top_k | uses_top_p, V, 0)
        is_collected = row_index < 0
        weight_above = tl.full((), 0.0, tl.float64)
        if candidate_logits is not None:
            candidate_logits += row_index * capacity
            candidate_tokens += row_index * capacity
            sample_low, sample_high = bracket_from_sample(
                row, V, step, largest, inverse, k, p, uses_top_k, total, SHIFT, SAMPLE, CHUNK
            )
            # With both filters top-k comes first, and top-p may cut within it: nothing bounds the bracket from above.
            sample_high = tl.where(uses_top_k & uses_top_p, high, tl.minimum(sample_high, high))
            COLLECT_TILE: tl.constexpr = TILE if SHIFT == 0 else 2 * TILE  # 16 bytes per thread
            count, inner_weight, sample_weight_above = collect_candidates(
                row, n, sample_low, sample_high, largest, inverse, uses_top_k, candidate_logits, candidate_tokens,
                capacity, SHIFT, COLLECT_TILE,
            )  # fmt: skip
            tl.debug_barrier()  # threads read candidates that other threads have stored
            target = tl.where(uses_top_k, k.to(tl.float64), p.to(tl.float64) * total)
            has_target = (sample_weight_above < target) & (sample_weight_above + inner_weight >= target)
            is_collected = (n > 0) & (count <= capacity) & has_target
            n = tl.where(is_collected, count, n)
            weight_above = tl.where(is_collected, sample_weight_above, weight_above)
            low = tl.where(is_collected, sample_low, low)
            high = tl.where(is_collected, sample_high, high)
        source = Source(row, candidate_logits, candidate_tokens, is_collected)
        bracket = Bracket(low, high, weight_above)
        kept_mass = total
        if row_options.top_k is not None:
            key, token, num_kept = search_threshold(
                source, tl.where(uses_top_k, n, 0), bracket, k.to(tl.float64), largest, inverse,
                False, SHIFT, TILE, THRESHOLDS,
            )  # fmt: skip
            cutoff_logit = tl.where(uses_top_k, from_key(key, SHIFT), cutoff_logit)
            cutoff_token = tl.where(uses_top_k, token, cutoff_token)
            if row_options.top_p is not None:  # top-p refers to the mass of the top-k tokens
                above_key = tl.zeros((THRESHOLDS,), tl.int32) + key + 1
                mass = weight_at_or_above(
                    source, tl.where(uses_top_k & uses_top_p, n, 0), above_key, largest, inverse,
                    True, SHIFT, TILE, THRESHOLDS,
                )  # fmt: skip
                token_mass = tl.exp((from_key(key, SHIFT) - largest) * inverse).to(tl.float64)
                kept_mass = tl.where(uses_top_k, tl.max(mass, axis=0) + num_kept.to(tl.float64) * token_mass, total)
        if row_options.top_p is not None:
            target = p.to(tl.float64) * kept_mass
            key, token, _ = search_threshold(
                source, tl.where(uses_top_p, n, 0), bracket, target, largest, inverse,
                True, SHIFT, TILE, THRESHOLDS,
            )  # fmt: skip
            top_p_logit = tl.where(uses_top_p, from_key(key, SHIFT), float("-inf"))
            cutoff_logit, cutoff_token = tighter(cutoff_logit, cutoff_token, top_p_logit, token)
    if row_options.min_p is not None:
        min_p_logit = min_p_threshold(largest, temperature, min_p, SHIFT)
        min_p_logit = tl.where(is_filtered & (min_p > 0), min_p_logit, float("-inf"))
        cutoff_logit, cutoff_token = tighter(cutoff_logit, cutoff_token, min_p_logit, ALL)
    tl.store(cutoff_logits + row_index, cutoff_logit)
    tl.store(cutoff_tokens + row_index, cutoff_token)


def find_cutoffs(
    logits: Tensor, options: gumbel.RowOptions, banned: Tensor | None, ban_rows: Tensor | None, parts: Tensor
) -> tuple[Tensor, Tensor]:
    """Return each row's last kept logit and the last kept index among its ties. parts: the statistics of the tiles."""
    B, V = logits.shape
    candidates = (None, None)
    capacity = 0
    if V > SAMPLE:
        capacity = V // MAX_CANDIDATE_SHARE
        tokens = torch.empty((B, capacity), dtype=torch.int32, device=logits.device)
        candidates = (empty_float32(logits, B, capacity), tokens)
    cutoffs = (empty_float32(logits, B), torch.empty(B, dtype=torch.int32, device=logits.device))
    tiles = parts.shape[2]
    tile = launch.block_size(V, TILE)
    meta = {
        "LARGEST": (gumbel.LARGEST if banned is None else gumbel.KEPT_LARGEST).value,
        "SECOND": (gumbel.SECOND if banned is None else gumbel.KEPT_SECOND).value,
        "OTHERS": (gumbel.OTHERS if banned is None else gumbel.KEPT_OTHERS).value,
        "SHIFT": SHIFTS[logits.dtype],
        "SAMPLE": SAMPLE,
        "CHUNK": CHUNK,
        "TILE": tile,
        "THRESHOLDS": THRESHOLDS,
        "BLOCK": launch.block_size(tiles, 1024),
        "num_warps": launch.num_warps_for(tile, 4),
    }
    inputs = (logits, banned, ban_rows, options, parts)
    sizes = (logits.stride(0), parts.stride(0), V, tiles, capacity, V // (SAMPLE // CHUNK))
    launch.run(cutoff_kernel, (B,), *inputs, *candidates, *cutoffs, *sizes, **meta)
    return cutoffs
