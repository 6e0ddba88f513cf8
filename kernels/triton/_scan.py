"""The scan of gae, gae_packed and ppo_advantages on a GPU. Not an op.

A token t receives from its right neighbour the carry F = gamma V_next + gamma lambda A_next. Then

    A_t = r_t + F - V_t        and its left neighbour receives        gamma V_t + gamma lambda A_t

Each token is thus an affine map of the carry, F -> decay F + b: decay = gamma lambda inside the mask, and the identity
outside it, which carries F over a gap. The first carry of a row is gamma bootstrap (plus, in ppo_advantages, its
score). We scan maps, two floats a token, so no thread needs its right neighbour's value.

A program is one warp, so that nothing waits at a barrier. A tile is up to 512 tokens of a row, in groups of 4,
which a thread loads at once:

    row       | tile 0 | tile 1 | ... | last tile |          programs walk from the last tile to tile 0
    tile      | group GROUPS-1 | ... | group 1 | group 0 |       group 0 has the rightmost tokens
    group     | first | second | third | fourth |            scanned from the fourth to the first

The 4 tokens of a group are composed to one map in registers. One associative scan composes the maps of the groups. Then
each group's 4 tokens are walked again, now with their carry.

A walk of few rows would not fill the GPU. Such rows are split: one launch computes the map of every tile but a row's
first, and in a second one each program composes the maps right of its tile in the order in which a walk would, to the
same bits. Packed segments, whose lengths only the device knows, are always split; `locate_tile` finds a program's tile.

Tiles start at multiples of their size from the row's start, and tokens behind the row's end are identities. A row's
result therefore depends only on its own tokens, not on the batch or the padding.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._gae import row_discounts
from rlhf_fast.kernels.triton import launch

TILE = 512  # tokens at most
GROUP_SIZE = 4
MAPS_AT_ONCE = tl.constexpr(16)  # maps of tiles that are loaded before the first of them is composed
PROBES = 128  # offsets that one step of a search loads


class Discount(NamedTuple):
    """gamma and decay = gamma lambda of all rows; gammas and lams: None, or one number for each row, in place of gamma
    or lam, which is None where it is not needed."""

    gamma: float
    decay: float
    lam: float | None
    gammas: Tensor | None
    lams: Tensor | None


def discount_of(op: str, gamma, lam) -> Discount:
    """Return a launcher's gamma and lam as kernels take them."""
    gamma, lam, gammas, lams = row_discounts(op, gamma, lam)
    return Discount(gamma, gamma * lam, None if gammas is None or lams is not None else lam, gammas, lams)


@triton.jit
def load_row(x, row, exists):
    """Return the numbers of rows in float32; `exists` is None where all of them exist."""
    if exists is None:
        value = tl.load(x + row)
    else:
        value = tl.load(x + row, mask=exists, other=0.0)
    return value.to(tl.float32)


@triton.jit
def row_discount(discount, row, exists):
    """Return gamma and decay of the rows: scalars, or of the shape of `row`."""
    gamma = discount.gamma
    decay = discount.decay
    if discount.gammas is not None:
        gamma = load_row(discount.gammas, row, exists)
        if discount.lams is None:
            decay = gamma * discount.lam
    if discount.lams is not None:
        decay = gamma * load_row(discount.lams, row, exists)
    return gamma, decay


@triton.jit
def reached_by_nan(carry, discount, decay):
    """Return the first carry of rows. A row whose own decay is NaN starts with it: the last token does not read it
    elsewhere."""
    if discount.gammas is not None:
        carry = tl.where(decay == decay, carry, decay)
    if discount.lams is not None:
        carry = tl.where(decay == decay, carry, decay)
    return carry


@triton.jit
def unpack4(x):
    """Return the first to the fourth tokens of the groups of a tile (ROWS, GROUPS, 4), each (ROWS, GROUPS)."""
    even, odd = tl.split(x.reshape(x.shape[0], x.shape[1], 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def pack4(first, second, third, fourth):
    """Return the tile (ROWS, GROUPS, 4) of the four tensors that `unpack4` returns."""
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    return pairs.reshape(first.shape[0], first.shape[1], 4)


@triton.jit
def sum4(a, b, c, d):
    """Return the sums over the groups of four tensors (ROWS, GROUPS), each (ROWS,), in one reduction."""
    even, odd = tl.split(tl.sum(tl.join(tl.join(a, c), tl.join(b, d)), axis=1))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def tile_columns(tile, GROUPS: tl.constexpr):
    """Return the positions (1, GROUPS, 4) in their row of the tokens of tile number `tile`."""
    groups = GROUPS - 1 - tl.arange(0, GROUPS)
    return tile * (4 * GROUPS) + groups[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]


@triton.jit
def load_mask(mask, index, inside):
    """Return which tokens are valid, and which to load: a group loads all of its 4 tokens if any of them is valid."""
    valid = tl.load(mask + index, mask=inside, other=0) != 0
    any_valid = tl.max(valid.to(tl.int32), axis=2)[:, :, None] > 0
    return valid, any_valid & inside


@triton.jit
def load(x, index, mask):
    return tl.load(x + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_outputs(advantages, returns, valid, advantage, value, start, length, tile):
    """Store the advantages and returns of a tile, given in `unpack4`'s form, and return its returns."""
    token_returns = ()
    for i in tl.static_range(4):
        token_returns = token_returns + (tl.where(valid[i], advantage[i] + value[i], 0.0),)
    column = tile_columns(tile, value[0].shape[1])
    index = start[:, None, None] + column
    inside = column < length[:, None, None]
    tl.store(advantages + index, pack4(*advantage), mask=inside)
    tl.store(returns + index, pack4(*token_returns), mask=inside)
    return token_returns


@triton.jit
def scan_groups(valid, reward, value, carry, gamma, decay):
    """Walk through each group's tokens from the fourth to the first. Return their advantages and the carry that leaves.

    The two terms of the carry are added once per group, not at every token: where values are far larger than the
    differences between them, that sum is what rounds.
    """
    value_term = carry
    advantage_term = tl.zeros_like(carry)
    advantages = ()
    for i in tl.static_range(3, -1, -1):
        advantage = ((reward[i] + value_term) - value[i]) + advantage_term
        value_term = tl.where(valid[i], gamma * value[i], value_term)
        advantage_term = tl.where(valid[i], decay * advantage, advantage_term)
        advantages = (tl.where(valid[i], advantage, 0.0),) + advantages
    return advantages, value_term + advantage_term


@triton.jit
def group_map(valid, reward, value, gamma, decay):
    """Return the affine map of each group's 4 tokens, given in `unpack4`'s form: (factor, sum), each (ROWS, GROUPS)."""
    _, total = scan_groups(valid, reward, value, tl.zeros_like(value[0]), gamma, decay)
    factor = tl.where(valid[0], decay, 1.0) * tl.where(valid[1], decay, 1.0)
    factor *= tl.where(valid[2], decay, 1.0) * tl.where(valid[3], decay, 1.0)
    return factor, total


@triton.jit
def compose(right_factor, right_sum, left_factor, left_sum):
    """Return the map that applies the right one and then the left one."""
    return left_factor * right_factor, tl.fma(left_factor, right_sum, left_sum)


@triton.jit
def compose_exclusive(
    right_factor, right_sum, _right_factor_before, _right_sum_before,
    left_factor, left_sum, left_factor_before, left_sum_before,
):  # fmt: skip
    """Return the map of `compose`, and the same map without the leftmost group: it gives that group's carry."""
    return (
        left_factor * right_factor,
        tl.fma(left_factor, right_sum, left_sum),
        left_factor_before * right_factor,
        tl.fma(left_factor_before, right_sum, left_sum_before),
    )


@triton.jit
def tile_map(valid, reward, value, gamma, decay):
    """Return the affine map of a whole tile: (factor, sum), each (ROWS,)."""
    factor, total = tl.associative_scan(group_map(valid, reward, value, gamma, decay), 1, compose)
    return leftmost(factor), leftmost(total)


@triton.jit
def leftmost(x):
    """Return the leftmost group's element of each row of x (ROWS, GROUPS)."""
    return tl.sum(tl.where(tl.arange(0, x.shape[1])[None, :] == x.shape[1] - 1, x, 0.0), axis=1)


@triton.jit
def scan_tile(valid, reward, value, carry, gamma, decay):
    """Return the advantages of a tile, in `unpack4`'s form, and the carry (ROWS, GROUPS) that leaves each group.

    carry (ROWS,): what the tile receives from its right."""
    factor, total = group_map(valid, reward, value, gamma, decay)
    one = tl.full(factor.shape, 1.0, tl.float32)
    zero = tl.zeros_like(total)
    scanned = tl.associative_scan((factor, total, one, zero), 1, compose_exclusive)
    carry = carry[:, None] + zero
    group_carry = tl.fma(scanned[2], carry, scanned[3])
    advantages, _ = scan_groups(valid, reward, value, group_carry, gamma, decay)
    return advantages, tl.fma(scanned[0], carry, scanned[1])


@triton.jit
def carry_into(maps, size, first, tile, tiles, carry):
    """Return the carry that tile number `tile` of a row receives: `carry` through the maps of all tiles right of it.

    maps (2, size): factor and sum of each tile; those of the row begin at `first`."""
    for batch in range(0, tl.cdiv(tiles - 1 - tile, MAPS_AT_ONCE)):
        for i in tl.static_range(MAPS_AT_ONCE):
            other = tiles - 1 - batch * MAPS_AT_ONCE - i
            exists = other > tile
            factor = tl.load(maps + first + other, mask=exists, other=1.0)
            carry = tl.fma(factor, carry, tl.load(maps + size + first + other, mask=exists, other=0.0))
    return carry


@triton.jit
def find_segment(offsets, S, program, TOKENS: tl.constexpr, PROBES: tl.constexpr, STEPS: tl.constexpr):
    """Return the last segment s with s + offsets[s] // TOKENS <= program. Those numbers increase with s."""
    low = tl.zeros((), tl.int64)
    span = S
    for _ in tl.static_range(STEPS):
        width = tl.cdiv(span, PROBES)
        s = low + tl.arange(0, PROBES).to(tl.int64) * width
        starts_before = s + tl.load(offsets + s, mask=s < S, other=0).to(tl.int64) // TOKENS <= program
        low += width * (tl.sum(((s < S) & starts_before).to(tl.int64), axis=0) - 1)
        span = width
    return low


@triton.jit
def locate_tile(offsets, S, T, TOKENS: tl.constexpr, PROBES: tl.constexpr, STEPS: tl.constexpr):
    """Return a program's row or segment, where that starts, its length, and the number of the program's tile in it.

    A segment's tiles have one program each, from number s + start // TOKENS on. The next segment's first number is
    higher by at least its number of tiles. Programs between have a tile behind the segment's end.
    """
    program = tl.program_id(0).to(tl.int64)
    if offsets is None:
        tiles = tl.cdiv(T, TOKENS)
        row = program // tiles
        start = row * T
        length = T
        tile = (program % tiles).to(tl.int32)
    else:
        row = find_segment(offsets, S, program, TOKENS, PROBES, STEPS)
        start = tl.load(offsets + row).to(tl.int64)
        length = tl.load(offsets + row + 1).to(tl.int64) - start
        tile = (program - row - start // TOKENS).to(tl.int32)
    return row, start, length, tile


def search_steps(S: int) -> int:
    """Return the number of steps of a search among S segments."""
    n = 0
    while S > 1:
        S = triton.cdiv(S, PROBES)
        n += 1
    return n


def tile_shape(x: Tensor, B: int, T: int) -> tuple[int, int, bool]:
    """Return, for rows (B, T): the groups of a tile, the rows of a program, and whether the rows are split."""
    tokens = launch.block_size(T, TILE)
    num_sms = launch.num_sms(x)
    rows = max(1, 128 // tokens)
    max_rows = max(1, TILE // tokens)
    while rows < max_rows and 8 * num_sms * rows <= B:
        rows *= 2
    is_split = 4 * tokens < T and 2 * num_sms > B
    return tokens // GROUP_SIZE, rows, is_split
