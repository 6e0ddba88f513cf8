"""gae on a GPU: one scan over rows, split where they are few; _scan.py says how.

Per token 9 bytes in and 8 out, and tokens outside the mask cost their mask alone. Rows of up to 64 tokens share a
program's warp. Split rows read what they read twice, all but their first tile.
"""

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels.triton import _scan as scan
from rlhf_fast.kernels.triton import launch


@triton.jit
def _read(rewards, values, mask, start, length, tile, LANES: tl.constexpr):
    """Of a tile (ROWS, LANES, 4): where tokens exist, their rewards and values."""
    t = scan.columns(tile, LANES)
    inside = (t >= 0) & (t < length[:, None, None])
    at = start[:, None, None] + t
    here, read = scan.look(mask, at, inside)
    return here, scan.get(rewards, at, read), scan.get(values, at, read)


@triton.jit
def _write(advantages, returns, here, reward, value, future, start, length, tile, gamma, decay):
    """A tile's outputs, and what its lanes pass on."""
    here, reward, value = scan.four(here), scan.four(reward), scan.four(value)
    made, passed = scan.scanned(here, reward, value, future, gamma, decay)
    scan.write(advantages, returns, here, made, value, start, length, tile)
    return passed


@triton.jit
def _walk(
    rewards, values, mask, bootstrap, advantages, returns, B, T, gamma, decay,
    ALIGNED: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """ROWS rows, from right to left; the next tile is on its way while one is scanned."""
    if ALIGNED:
        T = T // 4 * 4
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start, length = row * T, tl.where(row < B, T, 0)
    future = tl.zeros((ROWS,), tl.float32)
    if bootstrap is not None:
        future = gamma * tl.load(bootstrap + row, mask=row < B, other=0.0).to(tl.float32)
    last = tl.cdiv(T, 4 * LANES) - 1
    here, reward, value = _read(rewards, values, mask, start, length, last, LANES)
    if WHOLE:
        _write(advantages, returns, here, reward, value, future, start, length, last, gamma, decay)
    else:
        for i in range(0, last + 1):
            tile = last - i
            ahead = _read(rewards, values, mask, start, length, tile - 1, LANES)
            passed = _write(advantages, returns, here, reward, value, future, start, length, tile, gamma, decay)
            future = scan.at_the_left(passed)
            here, reward, value = ahead


@triton.jit
def _fold(
    rewards, values, mask, offsets, folds, size, S, T, gamma, decay,
    ALIGNED: tl.constexpr, PROBES: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What a tile does to the future, for the tiles left of it."""
    if ALIGNED:
        T = T // 4 * 4
    row, start, length, tile = scan.place(offsets, S, T, 4 * LANES, PROBES, STEPS)
    if (tile > 0) & (tile * (4 * LANES) < length):
        one = tl.zeros((1,), tl.int64)
        here, reward, value = _read(rewards, values, mask, start + one, length + one, tile, LANES)
        keep, total = scan.folded(scan.four(here), scan.four(reward), scan.four(value), gamma, decay)
        at = folds + tl.program_id(0) + one
        tl.store(at, keep)
        tl.store(at + size, total)


@triton.jit
def _apply(
    rewards, values, mask, offsets, folds, bootstrap, advantages, returns, size, S, T, gamma, decay,
    ALIGNED: tl.constexpr, PROBES: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A tile's outputs, from the folds of the tiles right of it."""
    if ALIGNED:
        T = T // 4 * 4
    row, start, length, tile = scan.place(offsets, S, T, 4 * LANES, PROBES, STEPS)
    one = tl.zeros((1,), tl.int64)
    here, reward, value = _read(rewards, values, mask, start + one, length + one, tile, LANES)
    future = tl.zeros((), tl.float32)
    if bootstrap is not None:
        future = gamma * tl.load(bootstrap + row).to(tl.float32)
    if folds is not None:
        tiles = tl.cdiv(length, 4 * LANES).to(tl.int32)
        first = tl.program_id(0).to(tl.int64) - tile
        future = scan.arrived(folds, size, first, tile, tiles, future)
    future += tl.zeros((1,), tl.float32)
    _write(advantages, returns, here, reward, value, future, start + one, length + one, tile, gamma, decay)


def split(rewards, values, mask, offsets, S, T, gamma, lam, bootstrap, lanes, size, several):
    """A program a tile, `size` of them, of rows (S, T) or of the segments between `offsets`. `several`: one may have
    more tiles than one."""
    advantages, returns = (torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device) for _ in range(2))
    folds = torch.empty((2, size), dtype=torch.float32, device=rewards.device) if several else None
    numbers = size, S, T, gamma, gamma * lam
    options = {
        "ALIGNED": offsets is None and T % 4 == 0,
        "PROBES": scan.PROBES,
        "STEPS": scan.steps(S),
        "LANES": lanes,
        "num_warps": 1,
    }
    if several:
        launch.run(_fold, (size,), rewards, values, mask, offsets, folds, *numbers, **options)
    launch.run(
        _apply, (size,), rewards, values, mask, offsets, folds, bootstrap, advantages, returns, *numbers, **options
    )
    return advantages, returns


def gae(rewards, values, mask, gamma, lam, bootstrap):
    launch.serves(rewards, values, bootstrap)
    rewards, values, mask = rewards.contiguous(), values.contiguous(), mask.contiguous()
    bootstrap = bootstrap if bootstrap is None else bootstrap.contiguous()
    B, T = rewards.shape
    lanes, rows, few = scan.shape(rewards, B, T)
    tiles = triton.cdiv(T, 4 * lanes)
    if few:
        return split(rewards, values, mask, None, B, T, gamma, lam, bootstrap, lanes, B * tiles, True)
    advantages, returns = (torch.empty((B, T), dtype=torch.float32, device=rewards.device) for _ in range(2))
    launch.run(
        _walk,
        (triton.cdiv(B, rows) if T else 0,),
        rewards,
        values,
        mask,
        bootstrap,
        advantages,
        returns,
        B,
        T,
        gamma,
        gamma * lam,
        ALIGNED=T % 4 == 0,
        WHOLE=tiles == 1,
        ROWS=rows,
        LANES=lanes,
        num_warps=1,
    )
    return advantages, returns
