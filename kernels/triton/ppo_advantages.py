"""ppo_advantages on a GPU: rewards, their scan and the statistics in one visit of memory, two launches; _scan.py has
the scan.

Per token 13 bytes in and 8 out, and tokens outside the mask cost their mask alone. A row's score comes to its last
token as a part of its future, so nobody looks for that token. Moments are taken in two steps while a tile is in
registers: its mean, then distances from that, which keep their digits where the mean is large beside the spread. Tiles,
rows and programs join by Chan's rule in double, in an order that hangs on the shape and the GPU's size alone. Few long
rows are split: a third launch, the first, folds their tiles, and the last one sums their KL.
"""

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels.ppo_advantages import STATS
from rlhf_fast.kernels.triton import _scan as scan
from rlhf_fast.kernels.triton import launch


@triton.jit
def _kl(logprob, ref_logprob, ESTIMATOR: tl.constexpr):
    d = logprob - ref_logprob
    if ESTIMATOR == "k1":
        kl = d
    elif ESTIMATOR == "k2":
        kl = 0.5 * d * d
    elif ESTIMATOR == "k3":
        kl = tl.exp(tl.where(d < -20.0, 20.0, -d)) - 1.0 + d
    else:
        kl = tl.abs(d)
    return kl


@triton.jit
def _read(logprobs, ref_logprobs, values, mask, start, length, tile, LANES: tl.constexpr):
    """Of a tile (ROWS, LANES, 4): where tokens exist, and what is stored there."""
    t = scan.columns(tile, LANES)
    inside = (t >= 0) & (t < length[:, None, None])
    at = start[:, None, None] + t
    here, read = scan.look(mask, at, inside)
    return here, scan.get(logprobs, at, read), scan.get(ref_logprobs, at, read), scan.get(values, at, read)


@triton.jit
def _earned(logprob, ref_logprob, coef, ESTIMATOR: tl.constexpr):
    """What `four` gives, of the KL of the tokens, and of their rewards."""
    kl = _kl(logprob, ref_logprob, ESTIMATOR)
    return scan.four(kl), scan.four(-coef * kl)


@triton.jit
def _from_behind(scores, bootstrap, row, exists, gamma, clip):
    """What comes to a row's last token: its score, and the value after it."""
    future = tl.load(scores + row, mask=exists, other=0.0).to(tl.float32)
    future = tl.where(clip > 0, tl.where(future > clip, clip, tl.where(future < -clip, -clip, future)), future)
    if bootstrap is not None:
        future = gamma * tl.load(bootstrap + row, mask=exists, other=0.0).to(tl.float32) + future
    return future


@triton.jit
def _joined(n, mean, m2, return_mean, return_m2, n_b, mean_b, m2_b, return_mean_b, return_m2_b):
    """Chan's rule, in double; the share alone is a quotient of float32."""
    total = n + n_b
    share = tl.div_rn(n_b.to(tl.float32), tl.where(total > 0, total, 1.0).to(tl.float32)).to(tl.float64)
    gap, return_gap, weight = mean_b - mean, return_mean_b - return_mean, n * share
    m2, return_m2 = m2 + m2_b + gap * gap * weight, return_m2 + return_m2_b + return_gap * return_gap * weight
    return total, mean + gap * share, m2, return_mean + return_gap * share, return_m2


@triton.jit
def _over_lane(here, x):
    """Sum over a lane's tokens."""
    return (tl.where(here[0], x[0], 0.0) + tl.where(here[1], x[1], 0.0)) + (
        tl.where(here[2], x[2], 0.0) + tl.where(here[3], x[3], 0.0)
    )


@triton.jit
def _apart(here, x, mean):
    """Sums over a lane's tokens of the distance from the mean, and of its square."""
    distances, squares = (), ()
    for i in tl.static_range(4):
        distance = x[i] - mean[:, None]
        distances, squares = distances + (distance,), squares + (distance * distance,)
    return _over_lane(here, distances), _over_lane(here, squares)


@triton.jit
def _moments(here, advantage, earned, kl):
    """Of the rows (ROWS,) of a tile: the sum of KL, and what `_joined` joins."""
    ones = (1.0, 1.0, 1.0, 1.0)
    n, total, return_total, kl = scan.sums(
        _over_lane(here, ones), _over_lane(here, advantage), _over_lane(here, earned), _over_lane(here, kl)
    )
    some = tl.where(n > 0, n, 1.0)
    mean, return_mean = tl.div_rn(total, some), tl.div_rn(return_total, some)
    left, square = _apart(here, advantage, mean)
    return_left, return_square = _apart(here, earned, return_mean)
    left, square, return_left, return_square = scan.sums(left, square, return_left, return_square)
    # What the rounding of a mean leaves of the distances' sum corrects both.
    left, return_left, count = left.to(tl.float64), return_left.to(tl.float64), some.to(tl.float64)
    rest, return_rest = left / count, return_left / count
    m2, return_m2 = square.to(tl.float64) - left * rest, return_square.to(tl.float64) - return_left * return_rest
    mean, return_mean = mean.to(tl.float64) + rest, return_mean.to(tl.float64) + return_rest
    return kl, (n.to(tl.float64), mean, m2, return_mean, return_m2)


@triton.jit
def _tile(
    advantages, returns, here, logprob, ref_logprob, value, future, start, length, tile, coef, gamma, decay,
    ESTIMATOR: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A tile's outputs; what its lanes pass on, the rows' sums of KL, and their moments."""
    here, value = scan.four(here), scan.four(value)
    kl, reward = _earned(logprob, ref_logprob, coef, ESTIMATOR)
    made, passed = scan.scanned(here, reward, value, future, gamma, decay)
    earned = scan.write(advantages, returns, here, made, value, start, length, tile)
    kl, moments = _moments(here, made, earned, kl)
    return passed, kl, moments


@triton.jit
def _keep(parts, moments):
    """The rows' moments, joined, in the program's slot."""
    joined = tl.reduce(moments, 0, _joined)
    at = parts + tl.program_id(0)
    for i in tl.static_range(5):
        tl.store(at + i * tl.num_programs(0), joined[i])


@triton.jit
def _walk(
    logprobs, ref_logprobs, values, scores, mask, bootstrap, advantages, returns, kl, parts,
    B, T, coef, gamma, decay, clip,
    ESTIMATOR: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """ROWS rows, from right to left; the next tile is on its way while one is scanned."""
    if ALIGNED:
        T = T // 4 * 4
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start, length = row * T, tl.where(row < B, T, 0)
    future = _from_behind(scores, bootstrap, row, row < B, gamma, clip)
    last = tl.cdiv(T, 4 * LANES) - 1
    raw = _read(logprobs, ref_logprobs, values, mask, start, length, last, LANES)
    if WHOLE:
        _, total, moments = _tile(
            advantages, returns, raw[0], raw[1], raw[2], raw[3], future, start, length, last, coef, gamma, decay,
            ESTIMATOR, LANES,
        )  # fmt: skip
    else:
        total, zero = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float64)
        moments = (zero, zero, zero, zero, zero)
        for i in range(0, last + 1):
            tile = last - i
            if ALIGNED:
                ahead = _read(logprobs, ref_logprobs, values, mask, start, length, tile - 1, LANES)
            passed, more, m = _tile(
                advantages, returns, raw[0], raw[1], raw[2], raw[3], future, start, length, tile, coef, gamma, decay,
                ESTIMATOR, LANES,
            )  # fmt: skip
            total += more
            moments = _joined(
                moments[0], moments[1], moments[2], moments[3], moments[4], m[0], m[1], m[2], m[3], m[4]
            )  # fmt: skip
            future = scan.at_the_left(passed)
            if not ALIGNED:  # single loads take so many registers that two tiles do not fit
                ahead = _read(logprobs, ref_logprobs, values, mask, start, length, tile - 1, LANES)
            raw = ahead
    tl.store(kl + row, total, mask=row < B)
    _keep(parts, moments)


@triton.jit
def _fold(
    logprobs, ref_logprobs, values, mask, folds, size, T, coef, gamma, decay,
    ESTIMATOR: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What a tile does to the future, for the tiles left of it."""
    if ALIGNED:
        T = T // 4 * 4
    row, start, length, tile = scan.place(None, 0, T, 4 * LANES, 1, 0)
    if tile > 0:
        one = tl.zeros((1,), tl.int64)
        raw = _read(logprobs, ref_logprobs, values, mask, start + one, length + one, tile, LANES)
        _, reward = _earned(raw[1], raw[2], coef, ESTIMATOR)
        keep, total = scan.folded(scan.four(raw[0]), reward, scan.four(raw[3]), gamma, decay)
        tl.store(folds + tl.program_id(0) + one, keep)
        tl.store(folds + size + tl.program_id(0) + one, total)


@triton.jit
def _apply(
    logprobs, ref_logprobs, values, scores, mask, folds, bootstrap, advantages, returns, kl, parts,
    size, T, coef, gamma, decay, clip,
    ESTIMATOR: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A tile's outputs, from the folds of the tiles right of it."""
    if ALIGNED:
        T = T // 4 * 4
    row, start, length, tile = scan.place(None, 0, T, 4 * LANES, 1, 0)
    one = tl.zeros((1,), tl.int64)
    start, length = start + one, length + one
    future = _from_behind(scores, bootstrap, row, row >= 0, gamma, clip)  # before the tile: both at once spill
    first = tl.program_id(0).to(tl.int64) - tile
    future = scan.arrived(folds, size, first, tile, tl.cdiv(T, 4 * LANES), future) + tl.zeros((1,), tl.float32)
    raw = _read(logprobs, ref_logprobs, values, mask, start, length, tile, LANES)
    _, total, moments = _tile(
        advantages, returns, raw[0], raw[1], raw[2], raw[3], future, start, length, tile, coef, gamma, decay,
        ESTIMATOR, LANES,
    )  # fmt: skip
    tl.store(kl + tl.program_id(0) + one, total)
    _keep(parts, moments)


@triton.jit
def _join(parts, stats, size, kl_parts, kl, tiles, BLOCK: tl.constexpr):
    """The first program joins the moments of all, each the KL of its split row: tile by tile, as a walk would."""
    if tl.program_id(0) == 0:
        at, zero = tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float64)
        moments = (zero, zero, zero, zero, zero)
        for start in range(0, size, BLOCK):
            inside = start + at < size
            m = ()
            for i in tl.static_range(5):
                m = m + (tl.load(parts + i * size + start + at, mask=inside, other=0.0),)
            moments = _joined(
                moments[0], moments[1], moments[2], moments[3], moments[4], m[0], m[1], m[2], m[3], m[4]
            )  # fmt: skip
        joined = tl.reduce(moments, 0, _joined)
        for i in tl.static_range(5):
            tl.store(stats + i, joined[i].to(tl.float32))
    if kl_parts is not None:
        total = tl.zeros((), tl.float32)
        behind = (tl.program_id(0).to(tl.int64) + 1) * tiles - 1
        for group in range(0, tl.cdiv(tiles, scan.AHEAD)):
            for i in tl.static_range(scan.AHEAD):
                on = group * scan.AHEAD + i
                total += tl.load(kl_parts + behind - on, mask=on < tiles, other=0.0)
        tl.store(kl + tl.program_id(0), total)


def ppo_advantages(
    logprobs, ref_logprobs, values, scores, mask, kl_coef, kl_estimator, gamma, lam, score_clip, bootstrap
):
    launch.serves(logprobs, ref_logprobs, values, scores, bootstrap)
    (B, T), device = logprobs.shape, logprobs.device
    logprobs, ref_logprobs, values = logprobs.contiguous(), ref_logprobs.contiguous(), values.contiguous()
    scores, mask = scores.contiguous(), mask.contiguous()
    bootstrap = bootstrap if bootstrap is None else bootstrap.contiguous()

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=device)

    lanes, rows, split = scan.shape(logprobs, B, T)
    tiles = triton.cdiv(T, 4 * lanes)
    size = B * tiles if split else triton.cdiv(B, rows)
    advantages, returns, stats, kl = empty(B, T), empty(B, T), empty(len(STATS)), empty(B)
    parts = empty(len(STATS), size, dtype=torch.float64)
    tokens = logprobs, ref_logprobs, values
    numbers = kl_coef, gamma, gamma * lam
    options = {"ESTIMATOR": kl_estimator, "ALIGNED": T % 4 == 0, "LANES": lanes, "num_warps": 1}
    kl_parts = empty(size) if split else None
    if split:
        folds = empty(2, size)
        launch.run(_fold, (size,), *tokens, mask, folds, size, T, *numbers, **options)
        launch.run(
            _apply, (size,), *tokens, scores, mask, folds, bootstrap, advantages, returns, kl_parts, parts,
            size, T, *numbers, score_clip, **options,
        )  # fmt: skip
    else:
        launch.run(
            _walk, (size,), *tokens, scores, mask, bootstrap, advantages, returns, kl, parts,
            B, T, *numbers, score_clip, WHOLE=tiles == 1, ROWS=rows, **options,
        )  # fmt: skip
    block = launch.block(size, 1024)
    launch.run(
        _join, (B if split else 1,), parts, stats, size, kl_parts, kl, tiles, BLOCK=block,
        num_warps=launch.warps(block, 4),
    )  # fmt: skip
    return advantages, returns, stats, kl
