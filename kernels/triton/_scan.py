"""The scan of gae, gae_packed and ppo_advantages on a GPU.

Let the future of a token be what its right neighbour passes on, F = gamma V_next + gamma lambda A_next. Then

    A_t = r_t + F - V_t        and it passes on        gamma V_t + gamma lambda A_t

so a token maps one number to one number, F -> keep F + sum: keep = gamma lambda inside the mask, and outside it the
identity, which carries F over a gap. A row starts with F = gamma bootstrap (and, in ppo_advantages, its score). Two
floats a map are scanned whether or not there are gaps; no value is read twice to be somebody's next.

A program is one warp, so that nothing waits at a barrier. A lane has 4 tokens, which it reads at once. It folds them
to a map in registers, one associative scan joins the lanes, and it walks its 4 tokens again with the future that came.
Lane 0 stands at a tile's right end. Tiles start at multiples of their size from the row's start, and tokens behind the
row's end are identities: what a row gives is its own tokens' doing, whatever else is in the batch and however long the
longest row is.

Rows are walked from right to left, tile by tile. Too few of them to fill the GPU are split instead: one launch folds
all tiles but a row's first, and in the next one every program joins the folds right of its tile, in the order in which
a walk would, to the same bits. Packed segments, whose lengths only the device knows, are always split; `place` finds a
program's tile.
"""

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.triton import launch

TILE = 512  # tokens at most
AHEAD = tl.constexpr(16)  # folds that are read before the first of them is needed
PROBES = 128  # offsets that a search looks at in one step


@triton.jit
def four(x):
    """The first to the fourth tokens of the lanes of a tile (ROWS, LANES, 4)."""
    even, odd = tl.split(x.reshape(x.shape[0], x.shape[1], 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def side_by_side(first, second, third, fourth):
    """The tile (ROWS, LANES, 4) of what `four` gives."""
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    return pairs.reshape(first.shape[0], first.shape[1], 4)


@triton.jit
def sums(a, b, c, d):
    """Over the lanes of a tile, each (ROWS,): four sums in one reduction."""
    even, odd = tl.split(tl.sum(tl.join(tl.join(a, c), tl.join(b, d)), axis=1))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def columns(tile, LANES: tl.constexpr):
    """The tokens (1, LANES, 4) of a row that lie in its tile of that number."""
    lanes = LANES - 1 - tl.arange(0, LANES)
    return tile * (4 * LANES) + lanes[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]


@triton.jit
def look(mask, at, inside):
    """Where tokens exist, and the mask of what is read: a lane reads its 4 tokens at once, or none of them."""
    here = tl.load(mask + at, mask=inside, other=0) != 0
    some = tl.max(here.to(tl.int32), axis=2)[:, :, None] > 0
    return here, some & inside


@triton.jit
def get(x, at, read):
    return tl.load(x + at, mask=read, other=0.0).to(tl.float32)


@triton.jit
def write(advantages, returns, here, advantage, value, start, length, tile):
    """Both outputs of what `four` gives; the returns."""
    earned = ()
    for i in tl.static_range(4):
        earned = earned + (tl.where(here[i], advantage[i] + value[i], 0.0),)
    t = columns(tile, value[0].shape[1])
    at, inside = start[:, None, None] + t, t < length[:, None, None]
    tl.store(advantages + at, side_by_side(advantage[0], advantage[1], advantage[2], advantage[3]), mask=inside)
    tl.store(returns + at, side_by_side(earned[0], earned[1], earned[2], earned[3]), mask=inside)
    return earned


@triton.jit
def _walk(here, reward, value, future, gamma, decay):
    """Through the lanes' tokens from the fourth to the first: the advantages, and what the lanes pass on.

    A value and an advantage are added where lanes meet, not at every token: where values are far larger than the
    differences between them, that sum is what rounds.
    """
    near, far, advantages = future, tl.zeros_like(future), ()
    for on in tl.static_range(3, -1, -1):
        advantage = ((reward[on] + near) - value[on]) + far
        near, far = tl.where(here[on], gamma * value[on], near), tl.where(here[on], decay * advantage, far)
        advantages = (tl.where(here[on], advantage, 0.0),) + advantages
    return advantages, near + far


@triton.jit
def _map(here, reward, value, gamma, decay):
    """What `four` gives, as one map of each lane."""
    _, total = _walk(here, reward, value, tl.zeros_like(value[0]), gamma, decay)
    keep = tl.where(here[0], decay, 1.0) * tl.where(here[1], decay, 1.0)
    keep *= tl.where(here[2], decay, 1.0) * tl.where(here[3], decay, 1.0)
    return keep, total


@triton.jit
def _then(right_keep, right_sum, left_keep, left_sum):
    return left_keep * right_keep, tl.fma(left_keep, right_sum, left_sum)


@triton.jit
def _then_before(
    right_keep, right_sum, _right_keep_before, _right_sum_before,
    left_keep, left_sum, left_keep_before, left_sum_before,
):  # fmt: skip
    """`_then`, and the same without the leftmost lane: what comes to that lane."""
    return (
        left_keep * right_keep,
        tl.fma(left_keep, right_sum, left_sum),
        left_keep_before * right_keep,
        tl.fma(left_keep_before, right_sum, left_sum_before),
    )


@triton.jit
def folded(here, reward, value, gamma, decay):
    """The map of a whole tile, (ROWS,) each."""
    keep, total = tl.associative_scan(_map(here, reward, value, gamma, decay), 1, _then)
    return at_the_left(keep), at_the_left(total)


@triton.jit
def at_the_left(x):
    """Of each row, what its leftmost lane has."""
    return tl.sum(tl.where(tl.arange(0, x.shape[1])[None, :] == x.shape[1] - 1, x, 0.0), axis=1)


@triton.jit
def scanned(here, reward, value, future, gamma, decay):
    """The advantages of what `four` gives, from the future (ROWS,) right of the tile; and what the lanes pass on."""
    keep, total = _map(here, reward, value, gamma, decay)
    one, zero = tl.full(keep.shape, 1.0, tl.float32), tl.zeros_like(total)
    keep, total, keep_before, total_before = tl.associative_scan((keep, total, one, zero), 1, _then_before)
    future = future[:, None] + zero
    came = tl.fma(keep_before, future, total_before)
    advantages, _ = _walk(here, reward, value, came, gamma, decay)
    return advantages, tl.fma(keep, future, total)


@triton.jit
def arrived(folds, size, first, tile, tiles, future):
    """The future right of a tile: through the folds of the tiles right of it, from a row's end to its start."""
    for group in range(0, tl.cdiv(tiles - 1 - tile, AHEAD)):
        for i in tl.static_range(AHEAD):
            on = tiles - 1 - group * AHEAD - i
            exists = on > tile
            keep = tl.load(folds + first + on, mask=exists, other=1.0)
            future = tl.fma(keep, future, tl.load(folds + size + first + on, mask=exists, other=0.0))
    return future


@triton.jit
def _segment(offsets, S, program, TOKENS: tl.constexpr, PROBES: tl.constexpr, STEPS: tl.constexpr):
    """The last segment s with s + offsets[s] // TOKENS <= program: those numbers rise with s."""
    low, span = tl.zeros((), tl.int64), S
    for _ in tl.static_range(STEPS):
        width = tl.cdiv(span, PROBES)
        s = low + tl.arange(0, PROBES).to(tl.int64) * width
        before = s + tl.load(offsets + s, mask=s < S, other=0).to(tl.int64) // TOKENS <= program
        low += width * (tl.sum(((s < S) & before).to(tl.int64), axis=0) - 1)
        span = width
    return low


@triton.jit
def place(offsets, S, T, TOKENS: tl.constexpr, PROBES: tl.constexpr, STEPS: tl.constexpr):
    """Of a program with one tile: its row or segment, the start and length of that, and the number of its tile there.

    A segment's tiles have one program each, from number s + start // TOKENS on. The next segment's number is higher by
    at least its tiles; programs in between find that their tile lies behind the segment's end.
    """
    program = tl.program_id(0).to(tl.int64)
    if offsets is None:
        tiles = tl.cdiv(T, TOKENS)
        row = program // tiles
        start, length, tile = row * T, T, (program % tiles).to(tl.int32)
    else:
        row = _segment(offsets, S, program, TOKENS, PROBES, STEPS)
        start = tl.load(offsets + row).to(tl.int64)
        length = tl.load(offsets + row + 1).to(tl.int64) - start
        tile = (program - row - start // TOKENS).to(tl.int32)
    return row, start, length, tile


def steps(S: int) -> int:
    """How often a search among S segments looks."""
    n = 0
    while S > 1:
        S, n = triton.cdiv(S, PROBES), n + 1
    return n


def shape(x: Tensor, B: int, T: int) -> tuple[int, int, bool]:
    """Of rows (B, T): lanes of a tile, rows a program, and whether the rows are split."""
    tokens, processors = launch.block(T, TILE), launch.processors(x)
    together, full = max(1, 128 // tokens), max(1, TILE // tokens)
    while together < full and 8 * processors * together <= B:
        together *= 2
    return tokens // 4, together, T > 4 * tokens and B < 2 * processors
