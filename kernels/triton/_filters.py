"""Where the filters of sample_tokens cut a row of logits on a GPU, without a sort. Not an op.

Top-k, top-p and min-p each keep a prefix of the order (logit falling, index rising), so a row has one cut: the last
logit that is kept and, among tokens of that logit, the last index. One program finds a row's. It asks how much weighs
(tokens, or their mass) at or above THRESHOLDS logits, keeps the bracket between two of them, and asks again, until the
bracket is one logit; thresholds are integers in the order of floats, of a bfloat16 its 16 bits, so that ties are those
of the input whatever the temperature. Then the index: the token of that logit with which the weight is reached.

A long row is not asked again and again. SAMPLE tokens of it, in chunks spread over the row, say between which two
logits the cut almost surely lies; one walk lists the tokens between them, and weighs those above; only the list is
searched. Where the sample was misleading, or too many tokens are listed, the row itself is. Sums over a tile of tokens
are float32, those of tiles float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.triton import _gumbel as draw
from rlhf_fast.kernels.triton import launch

THRESHOLDS = 8
TILE = 2048  # tokens of a step of a walk
SAMPLE, CHUNK = 4096, 16
LISTED = 8  # the part of a row that is listed at most: one in so many
ALL = tl.constexpr(2**31 - 1)  # as an index: every token of that logit
BOTTOM, BEYOND = tl.constexpr(-0x7F800001), tl.constexpr(0x7F800001)  # keys: of -inf, and above that of +inf


@triton.jit
def without_banned(x, banned, ban_rows, row, column, inside):
    """x (rows, columns) with -inf where a ban binds; +inf and NaN stay, for the row to be refused."""
    ban = tl.load(banned + column, mask=inside, other=0)[None, :] != 0
    return tl.where(ban & tl.load(ban_rows + row)[:, None] & (x < float("inf")), float("-inf"), x)


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """Floats as integers of the same order; SHIFT bits, which are 0 in the logits' dtype, left out."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _logit(key, SHIFT: tl.constexpr):
    key = key.to(tl.int32)
    key = (key << SHIFT) | tl.where(key < 0, (1 << SHIFT) - 1, 0)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _read(logits, banned, ban_rows, row, row_stride, column, inside):
    """Logits of one row (BLOCK,), -inf where they are banned or not inside."""
    x = tl.load(logits + row * row_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    if banned is not None:
        ban = tl.load(banned + column, mask=inside, other=0) != 0
        x = tl.where(ban & tl.load(ban_rows + row) & (x < float("inf")), float("-inf"), x)
    return x


@triton.jit
def _from_either(logits, banned, ban_rows, row, row_stride, list_logits, list_tokens, listed, at, n):
    """Logits and tokens at `at` of the list, or of the row."""
    inside = at < n
    if list_logits is None:
        x, token = _read(logits, banned, ban_rows, row, row_stride, at, inside), at
    elif listed:
        x = tl.load(list_logits + at, mask=inside, other=float("-inf"))
        token = tl.load(list_tokens + at, mask=inside, other=0)
    else:
        x, token = _read(logits, banned, ban_rows, row, row_stride, at, inside), at
    return x, token


@triton.jit
def _weights(
    source, n, thresholds, top, inverse, BY_MASS: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr,
    THRESHOLDS: tl.constexpr,
):  # fmt: skip
    """What weighs at or above each threshold, float64; thresholds are above BOTTOM."""
    total = tl.zeros((THRESHOLDS,), tl.float64)
    for start in range(0, n, TILE):
        x, _ = _from_either(*source, start + tl.arange(0, TILE), n)
        weight = tl.exp((x - top) * inverse) if BY_MASS else tl.full((TILE,), 1.0, tl.float32)
        over = _key(x, SHIFT)[None, :] >= thresholds[:, None]
        total += tl.sum(tl.where(over, weight[None, :], 0.0), axis=1).to(tl.float64)
    return total


@triton.jit
def _find(
    source, n, bracket, target, top, inverse, BY_MASS: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr,
    THRESHOLDS: tl.constexpr,
):  # fmt: skip
    """The key and the index of the token with which the weight reaches `target`, in falling order, and how
    many tokens of that key are kept. The key is in the bracket [low, high, weight at or above high)."""
    low, high, before = bracket[0].to(tl.int64), bracket[1].to(tl.int64), bracket[2]
    above = before  # the whole source
    high = tl.where(n > 0, high, low)
    while high - low > 1:
        step = (high - low + THRESHOLDS) // (THRESHOLDS + 1)
        at = tl.minimum(low + step * (1 + tl.arange(0, THRESHOLDS)), high)
        weight = above + _weights(source, n, at.to(tl.int32), top, inverse, BY_MASS, SHIFT, TILE, THRESHOLDS)
        reached = (weight >= target) & (at < high)
        before = tl.maximum(before, tl.max(tl.where(reached, 0.0, weight), axis=0))
        high = tl.min(tl.where(reached, high, at), axis=0)
        low = tl.max(tl.where(reached, at, low), axis=0)
    wanted = target - before
    if BY_MASS:
        each = tl.exp((_logit(low, SHIFT) - top) * inverse).to(tl.float64)
        wanted = tl.ceil(wanted / tl.maximum(each, 1e-300))
    wanted = tl.minimum(tl.maximum(wanted, 1.0), 2147483647.0).to(tl.int32)
    seen, index = 0, ALL
    for start in range(0, n, TILE):
        at = start + tl.arange(0, TILE)
        x, token = _from_either(*source, at, n)
        equal = (_key(x, SHIFT) == low) & (at < n)
        rank = seen + tl.cumsum(equal.to(tl.int32), 0)
        index = tl.minimum(index, tl.min(tl.where(equal & (rank == wanted), token, ALL), axis=0))
        seen += tl.sum(equal.to(tl.int32), axis=0)
    return low.to(tl.int32), index, wanted


@triton.jit
def _aim(
    row_of, V, step, top, inverse, k, p, by_rank, total, SHIFT: tl.constexpr, SAMPLE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Keys between which the cut almost surely lies, three standard deviations of the sample around where it shows it.

    Of top-k by how many of the sample are above; of top-p by the mass of those below, many small terms where the mass
    above may be a few tokens that no sample has."""
    COARSE: tl.constexpr = SHIFT if SHIFT > 12 else 12
    at = tl.arange(0, SAMPLE)
    x = _read(*row_of, (at // CHUNK) * step + at % CHUNK, at < SAMPLE)
    key = _key(x, COARSE)[None, :]
    mass = tl.exp((x - top) * inverse)[None, :]
    share = SAMPLE / V.to(tl.float32)
    rank, tail = k.to(tl.float32) * share, (1.0 - p) * total.to(tl.float32) * share
    slack = 3.0 * tl.sqrt(rank) + 8.0
    is_high = tl.arange(0, 2) > 0
    low = tl.where(is_high, BOTTOM >> COARSE, BOTTOM >> COARSE)
    high = tl.where(is_high, 1, 1) + _key(top, COARSE)
    for _ in range(33 - COARSE):
        middle = (low + high) >> 1
        over = key >= middle[:, None]
        count = tl.sum(over.to(tl.float32), axis=1)
        below = tl.where(over, 0.0, mass)
        weight, spread = tl.sum(below, axis=1), 3.0 * tl.sqrt(tl.sum(below * below, axis=1))
        low_enough = tl.where(by_rank, count >= rank + slack, (weight + spread <= tail) & (count >= 8))
        not_high = tl.where(by_rank, count > rank - slack, weight - spread < tail)
        up, moves = tl.where(is_high, not_high, low_enough), high - low > 1
        low, high = tl.where(moves & up, middle, low), tl.where(moves & (up == 0), middle, high)
    fine: tl.constexpr = COARSE - SHIFT
    least = tl.sum(tl.where(is_high, 0, low), axis=0) << fine
    most = tl.sum(tl.where(is_high, high, 0), axis=0) << fine
    return tl.maximum(least, BOTTOM >> SHIFT), most


@triton.jit
def _list(
    row_of, V, low, high, top, inverse, by_rank, list_logits, list_tokens, capacity, SHIFT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """List the tokens of [low, high) by rising index. How many there are, what they weigh, what those at or above high
    weigh: their number, or their mass."""
    count, within_weight = tl.full((), 0, tl.int32), tl.zeros((TILE,), tl.float32)
    over_weight = within_weight
    for start in range(0, V, TILE):
        at = start + tl.arange(0, TILE)
        x = _read(*row_of, at, at < V)
        key = _key(x, SHIFT)
        over, within = key >= high, (key >= low) & (key < high) & (at < V)
        weight = tl.where(by_rank, 1.0, tl.exp((x - top) * inverse))
        within_weight += tl.where(within, weight, 0.0)
        over_weight += tl.where(over, weight, 0.0)
        here = tl.sum(within.to(tl.int32), axis=0)
        if here > 0:
            place = count + tl.cumsum(within.to(tl.int32), 0) - 1
            kept = within & (place < capacity)
            tl.store(list_logits + place, x, mask=kept)
            tl.store(list_tokens + place, at, mask=kept)
        count += here
    return count, tl.sum(within_weight, axis=0).to(tl.float64), tl.sum(over_weight, axis=0).to(tl.float64)


@triton.jit
def _stricter(cut, index, other, other_index):
    """Of two cuts the one that keeps less."""
    least = tl.where(cut == other, tl.minimum(index, other_index), tl.where(cut > other, index, other_index))
    return tl.maximum(cut, other), least


@triton.jit
def _least(top, scale, least, SHIFT: tl.constexpr):
    """The least key whose logit is at least `least` times as probable as the largest, by the reference's own words."""
    bound = tl.log(least.to(tl.float64))
    high = _key(top, SHIFT).to(tl.int64)
    low = tl.full((), BOTTOM >> SHIFT, tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        kept = (_logit(middle, SHIFT).to(tl.float64) - top.to(tl.float64)) / scale >= bound
        low, high = tl.where(kept, low, middle), tl.where(kept, middle, high)
    return _logit(high, SHIFT)


@triton.jit
def _cut(
    logits, banned, ban_rows, temperature, top_k, top_p, min_p, parts, list_logits, list_tokens, cut_logits, cut_tokens,
    row_stride, stride, V, tiles, capacity, step,
    TOP: tl.constexpr, MASS: tl.constexpr, SHIFT: tl.constexpr, SAMPLE: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, THRESHOLDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    T, k, p, least, fine = draw.settings(temperature, top_k, top_p, min_p, row, V)
    inverse, greedy = draw.tempering(temperature, row, True)
    scale = tl.where(greedy, 1.0, T).to(tl.float64)
    part = parts + row * tiles
    top = draw.largest_of(part + TOP * stride, tiles, BLOCK)
    total = draw.mass_of(part + TOP * stride, part + MASS * stride, top.to(tl.float64), 1.0 / scale, tiles, BLOCK)
    asked = fine & (greedy == 0) & (tl.abs(top) < float("inf")) & (total < float("inf"))
    by_rank, by_mass = asked & (k > 0), asked & (p < 1)
    cut, index = float("-inf"), ALL
    if top_k is not None or top_p is not None:
        row_of = (logits, banned, ban_rows, row, row_stride)
        low, high = tl.full((), BOTTOM >> SHIFT, tl.int32), _key(top, SHIFT) + 1
        n, listed = tl.where(by_rank | by_mass, V, 0), row < 0
        before = tl.full((), 0.0, tl.float64)
        if list_logits is not None:
            list_logits += row * capacity
            list_tokens += row * capacity
            near, far = _aim(row_of, V, step, top, inverse, k, p, by_rank, total, SHIFT, SAMPLE, CHUNK)
            far = tl.where(by_rank & by_mass, high, tl.minimum(far, high))
            tile: tl.constexpr = TILE if SHIFT == 0 else 2 * TILE  # 16 bytes a thread
            count, within, above = _list(
                row_of, n, near, far, top, inverse, by_rank, list_logits, list_tokens, capacity, SHIFT, tile
            )
            tl.debug_barrier()  # threads read what others have listed
            target = tl.where(by_rank, k.to(tl.float64), p.to(tl.float64) * total)
            listed = (n > 0) & (count <= capacity) & (above < target) & (above + within >= target)
            n, before = tl.where(listed, count, n), tl.where(listed, above, before)
            low, high = tl.where(listed, near, low), tl.where(listed, far, high)
        source = (logits, banned, ban_rows, row, row_stride, list_logits, list_tokens, listed)
        at = (low, high, before)
        whole = total
        if top_k is not None:
            found, last, wanted = _find(
                source, tl.where(by_rank, n, 0), at, k.to(tl.float64), top, inverse, False, SHIFT, TILE, THRESHOLDS
            )
            cut, index = tl.where(by_rank, _logit(found, SHIFT), cut), tl.where(by_rank, last, index)
            if top_p is not None:  # the mass of those top_k tokens
                over = tl.zeros((THRESHOLDS,), tl.int32) + found + 1
                mass = _weights(
                    source, tl.where(by_rank & by_mass, n, 0), over, top, inverse, True, SHIFT, TILE, THRESHOLDS
                )
                each = tl.exp((_logit(found, SHIFT) - top) * inverse).to(tl.float64)
                whole = tl.where(by_rank, tl.max(mass, axis=0) + wanted.to(tl.float64) * each, total)
        if top_p is not None:
            target = p.to(tl.float64) * whole
            found, last, _ = _find(
                source, tl.where(by_mass, n, 0), at, target, top, inverse, True, SHIFT, TILE, THRESHOLDS
            )
            cut, index = _stricter(cut, index, tl.where(by_mass, _logit(found, SHIFT), float("-inf")), last)
    if min_p is not None:
        bound = _least(top, scale, least, SHIFT)
        cut, index = _stricter(cut, index, tl.where(asked & (least > 0), bound, float("-inf")), ALL)
    tl.store(cut_logits + row, cut)
    tl.store(cut_tokens + row, index)


def cuts(logits, temperature, top_k, top_p, min_p, banned, ban_rows, parts) -> tuple[Tensor, Tensor]:
    """Each row's last kept logit, and the last index among its equals; `parts` has the rows' statistics."""
    (B, V), device = logits.shape, logits.device
    aimed = V > SAMPLE
    capacity = V // LISTED if aimed else 0
    lists = [torch.empty((B, capacity), dtype=dtype, device=device) for dtype in (torch.float32, torch.int32)]
    lists = lists if aimed else (None, None)
    found = [torch.empty((B,), dtype=dtype, device=device) for dtype in (torch.float32, torch.int32)]
    tiles, tile = parts.shape[2], launch.block_size(V, TILE)
    launch.run(
        _cut,
        (B,),
        logits,
        banned,
        ban_rows,
        temperature,
        top_k,
        top_p,
        min_p,
        parts,
        *lists,
        *found,
        logits.stride(0),
        parts.stride(0),
        V,
        tiles,
        capacity,
        V // (SAMPLE // CHUNK),
        TOP=(draw.LARGEST if banned is None else draw.TOP).value,
        MASS=(draw.MASS if banned is None else draw.KEPT).value,
        SHIFT={torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}[logits.dtype],
        SAMPLE=SAMPLE,
        CHUNK=CHUNK,
        TILE=tile,
        THRESHOLDS=THRESHOLDS,
        BLOCK=launch.block_size(tiles, 1024),
        num_warps=launch.num_warps_for(tile, 4),
    )
    return found[0], found[1]
