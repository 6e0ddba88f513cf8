"""Drawing a token on a GPU: of a tile of a row's logits, and then of all tiles of the row. Not an op.

kernels/_sampling.py says how the noise is keyed. Four tokens share a call of Philox: some 12 operations a token, beside
20 for the two logarithms of the noise and some 15 for e^z and the sums. A tile is visited while it is in registers: its
sums are around its own largest logit, and its best token is one score, z + noise, relative to that logit too, so that
float32 holds it however large logits are. A tile leaves FIELDS numbers and a token; `finish` joins the tiles of a row
in their order, in float64, and writes the outputs. The bits of a row are its own.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._sampling import empty_outputs
from rlhf_fast.kernels.triton import launch

FIELDS = 8
# Of a tile: the largest logit, and around it the sums of e^(x - largest), of p = e^z and of p z, z = (x - largest) / T;
# the largest logit that may be drawn, and around it the sum of p of those; the best score, and its logit.
LARGEST, RAW, MASS, MOMENT, TOP, KEPT, SCORE, LOGIT = (tl.constexpr(i) for i in range(FIELDS))
LN2 = tl.constexpr(math.log(2.0))
FAR = tl.constexpr(-1000.0)  # below it e^z is 0


@triton.jit
def tempering(temperature, row, on):
    """Of rows: what z is multiplied by, and whether the largest logit is taken."""
    T = tl.where(on, 1.0, 1.0)
    if temperature is not None:
        T = tl.load(temperature + row, mask=on, other=1.0)
    greedy = T == 0
    return tl.where(greedy, 1.0, tl.minimum(tl.div_rn(1.0, T), 3e38)), greedy


@triton.jit
def share(word):
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def waiting(u, rest):
    """-log(rest) of rest = 1 - u, to 2e-7 of itself also where u is small: the time until an event of rate 1."""
    bits = rest.to(tl.int32, bitcast=True)
    power = (bits - 0x3F3504F3) >> 23
    m = (bits - (power << 23)).to(tl.float32, bitcast=True)  # rest = m 2^power, m^2 between 1/2 and 2
    f = tl.where(power == 0, u, 1.0 - m)
    series = 0.14952662587165833 + f * (0.143686905503273 + f * 0.08723572641611099)
    series = 0.2500208020210266 + f * (0.1995677649974823 + f * (0.16562174260616302 + f * series))
    series = f * (1.0 + f * (0.49999988079071045 + f * (0.3333418667316437 + f * series)))
    return series - LN2 * power.to(tl.float32)


@triton.jit
def words(seed, row_id, step, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The integers behind the noise, (ROWS, COLUMNS) of the tokens from `first` on, a multiple of 4."""
    key = tl.core.to_tensor(seed).to(tl.uint64)
    k0, k1 = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    a = (first // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)[None, :]
    b, c, d = step.to(tl.uint32)[:, None], row_id.to(tl.uint32)[:, None], (row_id >> 32).to(tl.uint32)[:, None]
    for _ in tl.static_range(10):
        left, right = a.to(tl.uint64) * 0xD2511F53, c.to(tl.uint64) * 0xCD9E8D57
        a, c = (right >> 32).to(tl.uint32) ^ b ^ k0, (left >> 32).to(tl.uint32) ^ d ^ k1
        b, d = right.to(tl.uint32), left.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    word = tl.join(tl.join(a, c), tl.join(b, d))  # the last dimension is the fastest: a, b, c, d
    return tl.reshape(word, (ROWS, COLUMNS))


@triton.jit
def race(x, base, inverse, greedy, word, FEW: tl.constexpr):
    """Of each row of x the best score z + gumbel, z = (x - base) inverse, and its column, the lowest among equals.

    Token v waits w e^-z, w = -log1p(-u), and the first one wins. FEW: as w is hardly more than u, u e^-z mostly says
    which one that is; the logarithms are taken only where it does not."""
    below, u = (base[:, None] - x) * inverse[:, None], share(word)
    scale = tl.exp(below)
    least, by_u, crowded = tl.full(greedy.shape, 0.0, tl.float32), tl.where(greedy, 1.0, 1.0), True
    wait = u
    if FEW:
        wait = tl.where(greedy[:, None], below, u * scale)
        least = tl.min(wait, axis=1)
        first = tl.max(tl.where(wait == least[:, None], u, 0.0), axis=1)
        by_u = tl.where(greedy, 1.0, waiting(first, 1.0 - first) / first)
        others = tl.sum((wait <= (least * by_u * 1.00001)[:, None]).to(tl.int32), axis=1) - 1
        crowded = tl.max(others + (first > 0.5).to(tl.int32), axis=0) > 0
    if crowded:
        wait = tl.where(greedy[:, None], below, waiting(u, share(word ^ 0xFFFFFFFF)) * scale)
        least, by_u = tl.min(wait, axis=1), tl.where(greedy, 1.0, 1.0)
    return tl.where(greedy, -least, -tl.log(least * by_u)), first_column(wait, least)


@triton.jit
def first_column(x, value):
    """The first column of each row of x where `value` is; the last one if it is in none."""
    columns = tl.arange(0, x.shape[1])[None, :]
    return tl.min(tl.where(x == value[:, None], columns, x.shape[1] - 1), axis=1)


@triton.jit
def masses(x, inverse):
    """The largest of each row of x, what to measure from (it, or 0 if it is -inf), z and p = e^z, and the sum of p."""
    largest = tl.max(x, axis=1)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    z = (x - base[:, None]) * inverse[:, None]
    p = tl.exp(z)
    return largest, base, z, p, tl.sum(p, axis=1)


@triton.jit
def put_statistics(part, stride, x, inverse, on, TEMPERED: tl.constexpr):
    """Of a tile of all tokens; returns what z is measured from. A NaN or +inf shows in RAW."""
    largest, base, z, p, mass = masses(x, inverse)
    raw = mass
    if TEMPERED:
        raw = tl.sum(tl.exp(x - base[:, None]), axis=1)
    tl.store(part + LARGEST * stride, largest, mask=on)
    tl.store(part + RAW * stride, raw, mask=on)
    tl.store(part + MASS * stride, mass, mask=on)
    tl.store(part + MOMENT * stride, tl.sum(p * tl.maximum(z, FAR), axis=1), mask=on)
    return base


@triton.jit
def put_masses(part, stride, x, inverse, on):
    """Of a tile of the tokens that may be drawn, others are -inf; returns what z is measured from."""
    largest, base, _, _, mass = masses(x, inverse)
    tl.store(part + TOP * stride, largest, mask=on)
    tl.store(part + KEPT * stride, mass, mask=on)
    return base


@triton.jit
def put_draw(part, token, stride, score, place, logit, on):
    """A tile's best token."""
    tl.store(part + SCORE * stride, score, mask=on)
    tl.store(part + LOGIT * stride, logit, mask=on)
    tl.store(token, place, mask=on)


@triton.jit
def largest_of(field, tiles, BLOCK: tl.constexpr):
    most = float("-inf")
    for start in range(0, tiles, BLOCK):
        at = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.max(tl.load(field + at, mask=at < tiles, other=float("-inf")), axis=0))
    return most


@triton.jit
def mass_of(largest, mass, top, inverse, tiles, BLOCK: tl.constexpr):
    """The sum of `mass` of all tiles around `top`, float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tiles, BLOCK):
        at = start + tl.arange(0, BLOCK)
        m = tl.load(largest + at, mask=at < tiles, other=float("-inf")).to(tl.float64)
        total += tl.load(mass + at, mask=at < tiles, other=0.0).to(tl.float64) * tl.exp((m - top) * inverse)
    return tl.sum(total, axis=0)


@triton.jit
def moment_of(largest, mass, moment, top, inverse, tiles, BLOCK: tl.constexpr):
    """The sum of p z of all tiles around `top`, float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tiles, BLOCK):
        at = start + tl.arange(0, BLOCK)
        m = tl.load(largest + at, mask=at < tiles, other=float("-inf")).to(tl.float64)
        here = tl.load(moment + at, mask=at < tiles, other=0.0).to(tl.float64)
        z = tl.maximum((m - top) * inverse, FAR)
        total += tl.exp(z) * (here + z * tl.load(mass + at, mask=at < tiles, other=0.0))
    return tl.sum(total, axis=0)


@triton.jit
def best_of(part, tokens, stride, top, inverse, tiles, BLOCK: tl.constexpr, TOP: tl.constexpr):
    """The best score of all tiles around `top`, its token and its logit; the first among equals."""
    best, token, logit = tl.full((), float("-inf"), tl.float64), -1, 0.0
    for start in range(0, tiles, BLOCK):
        at = start + tl.arange(0, BLOCK)
        m = tl.load(part + TOP * stride + at, mask=at < tiles, other=float("-inf")).to(tl.float64)
        score = tl.load(part + SCORE * stride + at, mask=m > float("-inf"), other=float("-inf")).to(tl.float64)
        score += (m - top) * inverse
        here, index = tl.max(score, axis=0, return_indices=True)
        better = here > best
        best = tl.where(better, here, best)
        token = tl.where(better, tl.load(tokens + start + index, mask=better, other=-1), token)
        logit = tl.where(better, tl.load(part + LOGIT * stride + start + index, mask=better, other=0.0), logit)
    return best, token, logit


@triton.jit
def settings(temperature, top_k, top_p, min_p, row, V):
    """A row's temperature, top_k (0 where off), top_p and min_p, and whether they are in range."""
    one = tl.full((), 1.0, tl.float32)
    T, k, p, least = one, tl.full((), 0, tl.int64), one, one - 1.0
    if temperature is not None:
        T = tl.load(temperature + row)
    if top_k is not None:
        k = tl.load(top_k + row)
    if top_p is not None:
        p = tl.load(top_p + row)
    if min_p is not None:
        least = tl.load(min_p + row)
    fine = (T >= 0) & (T <= 1e6) & (k >= 0) & (p >= 1e-30) & (p <= 1) & (least >= 0) & (least <= 1)
    return T, tl.where(k >= V, 0, k), p, least, fine


@triton.jit
def _finish(
    parts, tile_tokens, ban_rows, temperature, top_k, top_p, min_p,
    tokens, logprobs, raw_logprobs, kept_logprobs, log_kept_mass, entropy, stride, V, tiles,
    SOME: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    T, k, p, least, fine = settings(temperature, top_k, top_p, min_p, row, V)
    greedy = T == 0
    inverse = 1.0 / tl.where(greedy, 1.0, T).to(tl.float64)
    part = parts + row * tiles
    largest = part + LARGEST * stride
    most = largest_of(largest, tiles, BLOCK).to(tl.float64)
    raw = mass_of(largest, part + RAW * stride, most, 1.0, tiles, BLOCK)
    total = mass_of(largest, part + MASS * stride, most, inverse, tiles, BLOCK)
    moment = moment_of(largest, part + MASS * stride, part + MOMENT * stride, most, inverse, tiles, BLOCK)
    top, kept = most, tl.full((), 0.0, tl.float64)
    if SOME:
        top = largest_of(part + TOP * stride, tiles, BLOCK).to(tl.float64)
        mass = mass_of(part + TOP * stride, part + KEPT * stride, top, inverse, tiles, BLOCK)
        filtered = (k > 0) | (p < 1) | (least > 0)
        if ban_rows is not None:
            filtered |= tl.load(ban_rows + row)
        kept = tl.where(filtered, tl.minimum(tl.log(mass / total) + (top - most) * inverse, 0.0), 0.0)
    best, token, logit = best_of(part, tile_tokens + row * tiles, stride, top, inverse, tiles, BLOCK, TOP)
    valid = fine & (tl.abs(most) < float("inf")) & (tl.abs(top) < float("inf")) & (raw < float("inf"))
    valid = valid & (best > float("-inf"))
    above = logit.to(tl.float64) - most
    logp = above * inverse - tl.log(total)
    nothing = float("nan")
    tl.store(tokens + row, tl.where(valid, token, -1).to(tl.int64))
    tl.store(raw_logprobs + row, tl.where(valid, above - tl.log(raw), nothing).to(tl.float32))
    spread = tl.log(total) - moment / total
    tl.store(logprobs + row, tl.where(valid, tl.where(greedy, 0.0, logp), nothing).to(tl.float32))
    tl.store(kept_logprobs + row, tl.where(valid, tl.where(greedy, 0.0, logp - kept), nothing).to(tl.float32))
    tl.store(log_kept_mass + row, tl.where(valid, tl.where(greedy, 0.0, kept), nothing).to(tl.float32))
    tl.store(entropy + row, tl.where(valid, tl.where(greedy, 0.0, spread), nothing).to(tl.float32))


def empty_parts(rows: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """(FIELDS, B, tiles) numbers and (B, tiles) tokens."""
    parts = torch.empty((FIELDS, len(rows), tiles), dtype=torch.float32, device=rows.device)
    return parts, torch.empty((len(rows), tiles), dtype=torch.int32, device=rows.device)


def finish(parts, tile_tokens, ban_rows, temperature, top_k, top_p, min_p, V: int, some: bool, outputs=None):
    """The six outputs; `some`: TOP and KEPT are there, not every token could be drawn."""
    B, tiles = tile_tokens.shape
    if outputs is None:
        outputs = empty_outputs(tile_tokens.shape[:1], parts)
    block = launch.block_size(tiles, 1024)
    launch.run(
        _finish,
        (B,),
        parts,
        tile_tokens,
        ban_rows,
        temperature,
        top_k,
        top_p,
        min_p,
        *outputs,
        parts.stride(0),
        V,
        tiles,
        SOME=some,
        TOP=(TOP if some else LARGEST).value,
        BLOCK=block,
        num_warps=launch.num_warps_for(block, 4),
    )
    return outputs
