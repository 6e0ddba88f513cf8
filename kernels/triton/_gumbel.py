"""Sampling a token on a GPU: from a tile of a row's logits, and then from all tiles of the row. Not an op.

kernels/_sampling.py defines the noise. Four tokens share one call of Philox: about 12 operations per token, with 20 for
the two logarithms of the noise and 15 for e^z and the sums.

    row      | tile 0 | tile 1 | ... |        a program leaves NUM_FIELDS numbers and a token of each tile
                 \\        |       /
              `merge_tiles_kernel`             one program per row merges the tiles in their order, in float64

A tile is read once. Its sums leave one token with the largest logit out and are relative to the second: beside the
first, those of a row whose best token is far ahead would be lost, and with them its log-probability. The tile's best
token is one score, z + noise, relative to the largest logit, so float32 holds it however large the logits are. A row's
result depends on its own logits and noise alone, and is the same in any batch.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._sampling import empty_outputs
from rlhf_fast.kernels._tensors import empty_float32
from rlhf_fast.kernels.triton import launch

NUM_FIELDS = 10
# Fields of a tile. Of all tokens: the largest logit, the largest of the others (equal to it in a tie), and relative to
# this the sums of the others' e^(x - second), p = e^z and p z, where z = (x - second) / temperature. Of the kept
# tokens, which are neither banned nor filtered out: the same two logits, and the others' sum of p. Then the best score,
# and the logit of its token.
LARGEST, SECOND, RAW_OTHERS, OTHERS, MOMENT, KEPT_LARGEST, KEPT_SECOND, KEPT_OTHERS, SCORE, LOGIT = (
    tl.constexpr(i) for i in range(NUM_FIELDS)
)
LN2 = tl.constexpr(math.log(2.0))


class RowOptions(NamedTuple):
    """Options of the rows (B,); None where an option changes nothing."""

    temperature: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None

    @property
    def filters(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.top_k, self.top_p, self.min_p


class Outputs(NamedTuple):
    """The outputs (B,) of sample_tokens, in its order."""

    tokens: Tensor
    logprobs: Tensor
    raw_logprobs: Tensor
    kept_logprobs: Tensor
    log_kept_mass: Tensor
    entropy: Tensor


@triton.jit
def inverse_temperature(temperature, row, exists):
    """Return the factor of z (1 for greedy rows) and which rows are greedy."""
    T = tl.where(exists, 1.0, 1.0)
    if temperature is not None:
        T = tl.load(temperature + row, mask=exists, other=1.0)
    is_greedy = T == 0
    return tl.where(is_greedy, 1.0, tl.minimum(tl.div_rn(1.0, T), 3e38)), is_greedy


@triton.jit
def uniform(word):
    """Return (word + 1/2) 2^-32."""
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def neg_log1m(u, one_minus_u):
    """Return -log(1 - u) with a relative error of 2e-7, also for small u."""
    bits = one_minus_u.to(tl.int32, bitcast=True)
    power = (bits - 0x3F3504F3) >> 23
    m = (bits - (power << 23)).to(tl.float32, bitcast=True)  # 1 - u = m 2^power, with m^2 between 1/2 and 2
    f = tl.where(power == 0, u, 1.0 - m)
    series = 0.14952662587165833 + f * (0.143686905503273 + f * 0.08723572641611099)
    series = 0.2500208020210266 + f * (0.1995677649974823 + f * (0.16562174260616302 + f * series))
    series = f * (1.0 + f * (0.49999988079071045 + f * (0.3333418667316437 + f * series)))
    return series - LN2 * power.to(tl.float32)


@triton.jit
def load_seed(seed, noise):
    """Return `seed`, or what the device has in its place."""
    if noise.device_seed is not None:
        seed = tl.load(noise.device_seed)
    return seed


@triton.jit
def philox_words(seed, row_id, step, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the integers behind the noise (ROWS, COLUMNS) of the tokens from `first` on, a multiple of 4."""
    key = tl.core.to_tensor(seed).to(tl.uint64)
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    a = (first // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)[None, :]
    b = step.to(tl.uint32)[:, None]
    c = row_id.to(tl.uint32)[:, None]
    d = (row_id >> 32).to(tl.uint32)[:, None]
    for _ in tl.static_range(10):
        left = a.to(tl.uint64) * 0xD2511F53
        right = c.to(tl.uint64) * 0xCD9E8D57
        a, c = (right >> 32).to(tl.uint32) ^ b ^ k0, (left >> 32).to(tl.uint32) ^ d ^ k1
        b, d = right.to(tl.uint32), left.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    word = tl.join(tl.join(a, c), tl.join(b, d))  # the last dimension is the fastest: a, b, c, d
    return tl.reshape(word, (ROWS, COLUMNS))


@triton.jit
def gumbel_argmax(x, base, inverse, is_greedy, word, SKIP_LOGARITHMS: tl.constexpr):
    """Return the best score z + gumbel of each row of x, z = (x - base) inverse, and its column, the lowest of a tie.

    The token with the smallest w e^-z, w = -log(1 - u), has the best score. SKIP_LOGARITHMS: w is hardly more than a
    small u, so u e^-z mostly decides; the logarithms are computed only where it does not."""
    neg_z = (base[:, None] - x) * inverse[:, None]
    u = uniform(word)
    scale = tl.exp(neg_z)
    smallest = tl.full(is_greedy.shape, 0.0, tl.float32)
    w_per_u = tl.where(is_greedy, 1.0, 1.0)
    needs_logarithms = True
    time = u
    if SKIP_LOGARITHMS:
        time = tl.where(is_greedy[:, None], neg_z, u * scale)
        smallest = tl.min(time, axis=1)
        u_of_smallest = tl.max(tl.where(time == smallest[:, None], u, 0.0), axis=1)
        w_per_u = tl.where(is_greedy, 1.0, neg_log1m(u_of_smallest, 1.0 - u_of_smallest) / u_of_smallest)
        is_close = time <= (smallest * w_per_u * 1.00001)[:, None]
        others = tl.sum(is_close.to(tl.int32), axis=1) - 1
        needs_logarithms = tl.max(others + (u_of_smallest > 0.5).to(tl.int32), axis=0) > 0
    if needs_logarithms:
        w = neg_log1m(u, uniform(word ^ 0xFFFFFFFF))
        time = tl.where(is_greedy[:, None], neg_z, w * scale)
        smallest = tl.min(time, axis=1)
        w_per_u = tl.where(is_greedy, 1.0, 1.0)
    score = tl.where(is_greedy, -smallest, -tl.log(smallest * w_per_u))
    return score, first_column(time, smallest)


@triton.jit
def first_column(x, value):
    """Return the first column of each row of x that equals `value`, or the last column if none does."""
    columns = tl.arange(0, x.shape[1])[None, :]
    return tl.min(tl.where(x == value[:, None], columns, x.shape[1] - 1), axis=1)


@triton.jit
def finite_or_0(x):
    """Return x, 0 if it is -inf: (-inf) - (-inf) would be NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def split_largest(x):
    """Return the largest of each row of x, how many tokens have it besides the first, x with -inf in place of the
    largest, and the largest of all but the first."""
    largest = tl.max(x, axis=1)
    is_largest = x == largest[:, None]
    ties = (tl.sum(is_largest.to(tl.int32), axis=1) - 1).to(tl.float32)
    lesser = tl.where(is_largest, float("-inf"), x)
    return largest, ties, lesser, tl.where(ties > 0, largest, tl.max(lesser, axis=1))


@triton.jit
def exp_of_others(lesser, second, inverse):
    """Return z and e^z of the tokens of `split_largest` relative to `second`; z <= 0."""
    z = (lesser - finite_or_0(second)[:, None]) * inverse[:, None]
    return z, tl.exp(z)


@triton.jit
def store_statistics(part, stride, x, inverse, exists, HAS_TEMPERATURE: tl.constexpr):
    """Store the fields of all tokens of a tile, and return the value that scores are relative to. NaN or +inf shows in
    LARGEST or RAW_OTHERS."""
    largest, ties, lesser, second = split_largest(x)
    z, p = exp_of_others(lesser, second, inverse)
    others = tl.sum(p, axis=1) + ties
    raw_others = others
    if HAS_TEMPERATURE:
        _, raw_p = exp_of_others(lesser, second, tl.where(exists, 1.0, 1.0))
        raw_others = tl.sum(raw_p, axis=1) + ties
    tl.store(part + LARGEST * stride, largest, mask=exists)
    tl.store(part + SECOND * stride, second, mask=exists)
    tl.store(part + RAW_OTHERS * stride, raw_others, mask=exists)
    tl.store(part + OTHERS * stride, others, mask=exists)
    tl.store(part + MOMENT * stride, tl.sum(p * tl.maximum(z, launch.MIN_EXPONENT), axis=1), mask=exists)
    return finite_or_0(largest)


@triton.jit
def store_kept_mass(part, stride, x, inverse, exists):
    """Store the fields of the kept tokens of a tile, the others being -inf, and return the value that scores are
    relative to."""
    largest, ties, lesser, second = split_largest(x)
    _, p = exp_of_others(lesser, second, inverse)
    tl.store(part + KEPT_LARGEST * stride, largest, mask=exists)
    tl.store(part + KEPT_SECOND * stride, second, mask=exists)
    tl.store(part + KEPT_OTHERS * stride, tl.sum(p, axis=1) + ties, mask=exists)
    return finite_or_0(largest)


@triton.jit
def store_best(part, tile_token, stride, score, token, logit, exists):
    """Store a tile's best token, its score and its logit."""
    tl.store(part + SCORE * stride, score, mask=exists)
    tl.store(part + LOGIT * stride, logit, mask=exists)
    tl.store(tile_token, token, mask=exists)


@triton.jit
def merge_largest(field, tiles, BLOCK: tl.constexpr):
    """Return the largest of a field over all tiles."""
    largest = float("-inf")
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.max(tl.load(field + tile, mask=tile < tiles, other=float("-inf")), axis=0))
    return largest


@triton.jit
def merge_others(largest, second, others, moment, top, inverse, tiles, BLOCK: tl.constexpr):
    """Return the sums of p and of p z over all tokens but one with the logit `top`, the largest, in float64.

    z is relative to `top`. largest, second, others, moment: fields of the tiles; without moments the second is 0."""
    total = tl.zeros((BLOCK,), tl.float64)
    moments = tl.zeros((BLOCK,), tl.float64)
    num_tops = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        exists = tile < tiles
        m = tl.load(largest + tile, mask=exists, other=float("-inf")).to(tl.float64)
        m2 = tl.load(second + tile, mask=exists, other=float("-inf")).to(tl.float64)
        rest = tl.load(others + tile, mask=exists, other=0.0).to(tl.float64)
        z = tl.maximum((m - top) * inverse, launch.MIN_EXPONENT)
        z2 = tl.maximum((m2 - top) * inverse, launch.MIN_EXPONENT)
        p = tl.where(m == top, 0.0, tl.exp(z))
        p2 = tl.exp(z2)
        total += p + p2 * rest
        num_tops += (m == top).to(tl.int32)
        if moment is not None:
            tile_moment = tl.load(moment + tile, mask=exists, other=0.0).to(tl.float64)
            moments += p * z + p2 * (tile_moment + z2 * rest)
    return tl.sum(total, axis=0) + tl.maximum(tl.sum(num_tops, axis=0) - 1, 0).to(tl.float64), tl.sum(moments, axis=0)


@triton.jit
def log1p(x):
    """Return log(1 + x) of float64 x >= 0 in full precision, also for small x."""
    u = 1.0 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1.0)))


@triton.jit
def merge_best(part, tile_tokens, stride, top, inverse, tiles, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """Return the best score of all tiles relative to `top`, its token and its logit; the first tile of a tie.

    LARGEST: the field that the scores are relative to."""
    best = tl.full((), float("-inf"), tl.float64)
    token = -1
    logit = 0.0
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        m = tl.load(part + LARGEST * stride + tile, mask=tile < tiles, other=float("-inf")).to(tl.float64)
        score = tl.load(part + SCORE * stride + tile, mask=m > float("-inf"), other=float("-inf")).to(tl.float64)
        score += (m - top) * inverse
        block_best, index = tl.max(score, axis=0, return_indices=True)
        is_better = block_best > best
        best = tl.where(is_better, block_best, best)
        token = tl.where(is_better, tl.load(tile_tokens + start + index, mask=is_better, other=-1), token)
        block_logit = tl.load(part + LOGIT * stride + start + index, mask=is_better, other=0.0)
        logit = tl.where(is_better, block_logit, logit)
    return best, token, logit


@triton.jit
def load_options(options, row, V):
    """Return a row's temperature, top_k (0 if it is off), top_p and min_p, and whether they are in range."""
    one = tl.full((), 1.0, tl.float32)
    T, k, p, min_p = one, tl.full((), 0, tl.int64), one, one - 1.0
    if options.temperature is not None:
        T = tl.load(options.temperature + row)
    if options.top_k is not None:
        k = tl.load(options.top_k + row)
    if options.top_p is not None:
        p = tl.load(options.top_p + row)
    if options.min_p is not None:
        min_p = tl.load(options.min_p + row)
    in_range = (T >= 0) & (T <= 1e6) & (k >= 0) & (p >= 1e-30) & (p <= 1) & (min_p >= 0) & (min_p <= 1)
    return T, tl.where(k >= V, 0, k), p, min_p, in_range


@triton.jit
def store_outputs(out, row, valid, is_greedy, token, logprob, raw_logprob, kept_logprob, log_kept_mass, entropy):
    """Store a row's outputs: -1 and NaN if it is not valid. A greedy token has probability 1."""
    nan = float("nan")
    tl.store(out.tokens + row, tl.where(valid, token, -1).to(tl.int64))
    tl.store(out.raw_logprobs + row, tl.where(valid, raw_logprob, nan).to(tl.float32))
    tl.store(out.logprobs + row, tl.where(valid, tl.where(is_greedy, 0.0, logprob), nan).to(tl.float32))
    tl.store(out.kept_logprobs + row, tl.where(valid, tl.where(is_greedy, 0.0, kept_logprob), nan).to(tl.float32))
    tl.store(out.log_kept_mass + row, tl.where(valid, tl.where(is_greedy, 0.0, log_kept_mass), nan).to(tl.float32))
    tl.store(out.entropy + row, tl.where(valid, tl.where(is_greedy, 0.0, entropy), nan).to(tl.float32))


@triton.jit(do_not_specialize=["stride"])
def merge_tiles_kernel(
    parts, tile_tokens, ban_rows, row_options, out, stride, V, tiles,
    HAS_KEPT: tl.constexpr, SCORES_RELATIVE_TO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the tiles of the program's row and store its outputs."""
    row = tl.program_id(0).to(tl.int64)
    T, k, p, min_p, in_range = load_options(row_options, row, V)
    is_greedy = T == 0
    inverse = 1.0 / tl.where(is_greedy, 1.0, T).to(tl.float64)
    part = parts + row * tiles
    largest_field = part + LARGEST * stride
    largest = merge_largest(largest_field, tiles, BLOCK).to(tl.float64)
    second_field = part + SECOND * stride
    raw_field = part + RAW_OTHERS * stride
    if HAS_KEPT:  # each variant in the order in which no register is spilled
        raw_others, _ = merge_others(largest_field, second_field, raw_field, None, largest, 1.0, tiles, BLOCK)
    others, moment = merge_others(
        largest_field, second_field, part + OTHERS * stride, part + MOMENT * stride, largest, inverse, tiles, BLOCK
    )
    log_total = log1p(others)
    if not HAS_KEPT:
        raw_others, _ = merge_others(largest_field, second_field, raw_field, None, largest, 1.0, tiles, BLOCK)
    kept_largest = largest
    log_kept = log_total
    log_kept_mass = tl.full((), 0.0, tl.float64)
    if HAS_KEPT:
        kept_field = part + KEPT_LARGEST * stride
        kept_largest = merge_largest(kept_field, tiles, BLOCK).to(tl.float64)
        kept_others, _ = merge_others(
            kept_field, part + KEPT_SECOND * stride, part + KEPT_OTHERS * stride, None, kept_largest, inverse, tiles,
            BLOCK,
        )  # fmt: skip
        log_kept = log1p(kept_others)
        is_filtered = (k > 0) | (p < 1) | (min_p > 0)
        if ban_rows is not None:
            is_filtered |= tl.load(ban_rows + row)
        log_kept_mass = tl.minimum((log_kept - log_total) + (kept_largest - largest) * inverse, 0.0)
        log_kept_mass = tl.where(is_filtered, log_kept_mass, 0.0)
    best, token, logit = merge_best(
        part, tile_tokens + row * tiles, stride, kept_largest, inverse, tiles, BLOCK, SCORES_RELATIVE_TO
    )
    is_finite = (tl.abs(largest) < float("inf")) & (tl.abs(kept_largest) < float("inf")) & (raw_others < float("inf"))
    valid = in_range & is_finite & (best > float("-inf"))
    distance = logit.to(tl.float64) - largest
    logprob = distance * inverse - log_total
    raw_logprob = distance - log1p(raw_others)
    kept_logprob = logprob
    if HAS_KEPT:
        kept_logprob = (logit.to(tl.float64) - kept_largest) * inverse - log_kept
        kept_logprob = tl.where(is_filtered, tl.maximum(kept_logprob, logprob), logprob)
    entropy = log_total - moment / (1.0 + others)
    store_outputs(out, row, valid, is_greedy, token, logprob, raw_logprob, kept_logprob, log_kept_mass, entropy)


def empty_parts(rows: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """Return memory for the fields (NUM_FIELDS, B, tiles) and the tokens (B, tiles) of all tiles."""
    parts = empty_float32(rows, NUM_FIELDS, len(rows), tiles)
    return parts, torch.empty((len(rows), tiles), dtype=torch.int32, device=rows.device)


def merge_tiles(
    parts: Tensor, tile_tokens: Tensor, ban_rows: Tensor | None, options: RowOptions, V: int, has_kept: bool,
    outputs: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the six outputs of sample_tokens. has_kept: the tiles have the fields of the kept tokens."""
    B, tiles = tile_tokens.shape
    if outputs is None:
        outputs = empty_outputs(tile_tokens.shape[:1], parts)
    block = launch.block_size(tiles, 1024)
    meta = {
        "HAS_KEPT": has_kept,
        "SCORES_RELATIVE_TO": (KEPT_LARGEST if has_kept else LARGEST).value,
        "BLOCK": block,
        "num_warps": launch.num_warps_for(block, 2),
    }
    inputs = (parts, tile_tokens, ban_rows, options)
    sizes = (parts.stride(0), V, tiles)
    launch.run(merge_tiles_kernel, (B,), *inputs, Outputs(*outputs), *sizes, **meta)
    return outputs
