"""A linear head scored on a GPU, without gradient: the logits never reach memory.

A program takes a block of rows and a split of the vocabulary, and walks the split's tiles of columns: a matrix product
over D on tensor cores, its tiles of hidden and weight copied ahead; then, from the float32 accumulators, the rows'
online sums, which stay in registers. A split leaves 12 bytes a row (24 with a reference); a second kernel merges them.

    x = softcap(hidden . weight' + bias)    z = x / temperature    m = the largest z
    s = sum exp(z - m)    A = sum (z - m) exp(z - m)    C = sum ((z - m) - (z_ref - m_ref)) exp(z - m)
    log p = (z - m) - log s        entropy = log s - A / s        KL = C / s - (log s - log s_ref)

Floor: 2 N D V operations, one visit of hidden and weight. There are at most 128 splits: up to 3 KiB a row are written
and read, where float32 logits would be 8 V bytes. Programs that run together share their tiles of the weight, and a
group of rows that the second-level cache holds.

Ignored rows cost no product: one program lists the others first. Their count stays on the device; programs of blocks
beyond it find nothing to do. Tiles and splits follow from D, V, dtypes and device, never from the number of rows: a
row has the same bits in any batch.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.kernels.triton import launch

SPLITS = 128  # of the vocabulary, at most
SHARED_ROWS = 16 << 20  # bytes of hidden that programs share through the second-level cache
LISTED, MERGED = 2048, 16  # rows that a step of the list takes, and a program of the merger
IGNORED = tl.constexpr(-100)
LN2 = tl.constexpr(math.log(2.0))
FAR = tl.constexpr(-1000.0)  # 2^FAR is 0


@triton.jit
def _list(targets, rows, wanted, places, picked, count, N, ROOM, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """rows, wanted: those not ignored and their targets, filled up to ROOM; places: where a row stands there, or -1."""
    total = 0
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        target = tl.load(targets + at, mask=at < N, other=IGNORED)
        here = target != IGNORED
        place = total + tl.cumsum(here.to(tl.int32), 0) - 1
        tl.store(places + at, tl.where(here, place, -1), mask=at < N)
        tl.store(rows + place, at, mask=here)
        tl.store(wanted + place, target.to(tl.int32), mask=here)
        total += tl.sum(here.to(tl.int32), 0)
    tl.store(count, total)
    for start in range(0, ROOM, BLOCK):
        at = start + tl.arange(0, BLOCK)
        for head in tl.static_range(HEADS):  # a target that no column has shows
            tl.store(picked + head * ROOM + at, tl.full((BLOCK,), float("nan"), tl.float32), mask=at < ROOM)
        tl.store(rows + at, 0, mask=(at >= total) & (at < ROOM))
        tl.store(wanted + at, -1, mask=(at >= total) & (at < ROOM))


@triton.jit
def _block(count, row_blocks, splits, tiles, each, group, ROWS: tl.constexpr):
    """This program's first row, its split, and its tiles [first, end): none where no rows are left."""
    program = tl.program_id(0)
    around, place = program // (group * splits), program % (group * splits)
    size = tl.minimum(row_blocks - around * group, group)
    row, split = (around * group + place % size) * ROWS, place // size
    first = split * each
    end = tl.minimum(first + each, tiles)
    return row, split, first, tl.where(row < tl.load(count), end, first)


@triton.jit
def _product(
    hidden, row_at, weight, stride, first, V, D,
    UNIT: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """hidden's rows at `row_at` by the weight's rows from `first` on, the last in place of those beyond: float32."""
    k = tl.arange(0, DEPTH)
    column = tl.minimum(tl.arange(0, COLUMNS), V - 1 - first)
    weight += first.to(tl.int64) * (stride * UNIT)
    a_at, b_at = row_at[:, None] + k[None, :], column[None, :] * (stride * UNIT) + k[:, None]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D * UNIT, DEPTH):
        if EVEN:
            a, b = tl.load(hidden + start + a_at), tl.load(weight + start + b_at)
        else:
            inside = k < D * UNIT - start
            a = tl.load(hidden + start + a_at, mask=inside[None, :], other=0.0)
            b = tl.load(weight + start + b_at, mask=inside[:, None], other=0.0)
        acc = launch.dot(a, b, acc)
    return acc


@triton.jit
def _raw(acc, bias, first, V, softcap, inverse_softcap, CAP: tl.constexpr, COLUMNS: tl.constexpr):
    """x of a tile; -inf in columns beyond the vocabulary."""
    column = first + tl.arange(0, COLUMNS)
    inside = column < V
    if bias is not None:
        acc += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if CAP:
        acc = softcap * launch.tanh(acc * inverse_softcap)
    return acc + tl.where(inside, 0.0, float("-inf"))[None, :]


@triton.jit
def _moved(x, largest, total, scale):
    """The largest x so far, what to measure from (0 if that is -inf), and how far that moved, in powers of 2."""
    top = tl.maximum(largest, tl.max(x, axis=1))
    base = tl.where(top > float("-inf"), top, 0.0)
    return top, base, tl.where(total > 0, (largest - top) * scale, 0.0)


@triton.jit
def _pick(x, wanted, picked, place, first, COLUMNS: tl.constexpr):
    """Write x of the target where this tile has it; no other tile does."""
    target = tl.load(wanted + place) - first
    here = tl.arange(0, COLUMNS)[None, :] == target[:, None]
    found = tl.max(tl.where(here, x, float("-inf")), axis=1)
    tl.store(picked + place, found, mask=(target >= 0) & (target < COLUMNS))


@triton.jit
def _tile(
    hidden, row_at, weight, bias, weight_stride, wanted, picked, place, tile, V, D, largest, total, scale, softcap,
    inverse_softcap, UNIT: tl.constexpr, EVEN: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """z of a tile around the largest so far, in powers of 2; the largest, and how far it moved."""
    first = tile * COLUMNS
    acc = _product(hidden, row_at, weight, weight_stride, first, V, D, UNIT, EVEN, ROWS, COLUMNS, DEPTH)
    x = _raw(acc, bias, first, V, softcap, inverse_softcap, CAP, COLUMNS)
    _pick(x, wanted, picked, place, first, COLUMNS)
    largest, base, moved = _moved(x, largest, total, scale)
    return (x - base[:, None]) * scale, largest, moved


@triton.jit
def _score(
    hidden, weight, bias, rows, wanted, count, picked, parts, V, D, hidden_stride, weight_stride,
    ROOM, row_blocks, splits, tiles, each, group, scale, softcap, inverse_softcap,
    UNIT: tl.constexpr, EVEN: tl.constexpr, CAP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    first_row, split, first_tile, end = _block(count, row_blocks, splits, tiles, each, group, ROWS)
    place = first_row + tl.arange(0, ROWS)
    row_at = tl.load(rows + place).to(tl.int64) * (hidden_stride * UNIT)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    moment = total
    for tile in range(first_tile, end):
        d, largest, moved = _tile(
            hidden, row_at, weight, bias, weight_stride, wanted, picked, place, tile, V, D, largest, total,
            scale, softcap, inverse_softcap, UNIT, EVEN, CAP, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        moved = tl.maximum(moved, FAR)
        factor = tl.exp2(moved)
        e = tl.exp2(d)
        moment = (moment + moved * total) * factor + tl.sum(tl.maximum(d, FAR) * e, axis=1)
        total = total * factor + tl.sum(e, axis=1)
    part = parts + split.to(tl.int64) * 3 * ROOM + place
    tl.store(part, largest)
    tl.store(part + ROOM, total)
    tl.store(part + 2 * ROOM, moment)


@triton.jit
def _score_pair(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, wanted, count, picked, parts, V, D, E,
    hidden_stride, weight_stride, ref_hidden_stride, ref_weight_stride,
    ROOM, row_blocks, splits, tiles, each, group, scale, softcap, inverse_softcap,
    UNIT: tl.constexpr, EVEN: tl.constexpr, CAP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    first_row, split, first_tile, end = _block(count, row_blocks, splits, tiles, each, group, ROWS)
    place = first_row + tl.arange(0, ROWS)
    row = tl.load(rows + place).to(tl.int64)
    row_at, ref_row_at = row * (hidden_stride * UNIT), row * (ref_hidden_stride * UNIT)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    moment, cross, ref_largest, ref_total = total, total, largest, total
    for tile in range(first_tile, end):
        y, ref_largest, ref_moved = _tile(
            ref_hidden, ref_row_at, ref_weight, ref_bias, ref_weight_stride, wanted, picked + ROOM, place,
            tile, V, E, ref_largest, ref_total, scale, softcap, inverse_softcap, UNIT, EVEN, CAP, ROWS,
            COLUMNS, DEPTH,
        )  # fmt: skip
        ref_total = ref_total * tl.exp2(ref_moved) + tl.sum(tl.exp2(y), axis=1)
        d, largest, moved = _tile(
            hidden, row_at, weight, bias, weight_stride, wanted, picked, place, tile, V, D, largest, total,
            scale, softcap, inverse_softcap, UNIT, EVEN, CAP, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        moved = tl.maximum(moved, FAR)
        factor = tl.exp2(moved)
        e = tl.exp2(d)
        cross = tl.where(total * factor > 0, (cross + (moved - ref_moved) * total) * factor, 0.0)
        cross += tl.sum(tl.where(e > 0, (d - y) * e, 0.0), axis=1)
        moment = (moment + moved * total) * factor + tl.sum(tl.maximum(d, FAR) * e, axis=1)
        total = total * factor + tl.sum(e, axis=1)
    part = parts + split.to(tl.int64) * 6 * ROOM + place
    tl.store(part, largest)
    tl.store(part + ROOM, total)
    tl.store(part + 2 * ROOM, moment)
    tl.store(part + 3 * ROOM, ref_largest)
    tl.store(part + 4 * ROOM, ref_total)
    tl.store(part + 5 * ROOM, cross)


@triton.jit
def _results(largest, total, moved, picked, inverse_temperature):
    """Of all splits: log p, m, log s, and s. NaN shows; a row without a logit above -inf is NaN."""
    total = tl.sum(total * tl.exp2(moved), axis=0)
    log_sum = tl.where(total >= 1.0, tl.maximum(tl.log(total), 0.0), float("nan"))
    m = tl.where(total == total, largest * inverse_temperature, total)
    return (picked - largest) * inverse_temperature - log_sum, m, log_sum, total


@triton.jit
def _merge(
    places, picked, parts, logprobs, entropy, m_out, log_sum_out, ref_logprobs, kl_out, ref_m_out, ref_log_sum_out,
    N, ROOM, splits, scale, inverse_temperature,
    PAIR: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.load(places + row, mask=row < N, other=-1)
    listed = place >= 0
    fields: tl.constexpr = 6 if PAIR else 3
    split = tl.arange(0, SPLITS)[:, None]
    inside = (split < splits) & listed[None, :]
    part = parts + split.to(tl.int64) * fields * ROOM + place[None, :]
    largest = tl.load(part, mask=inside, other=float("-inf"))
    total = tl.load(part + ROOM, mask=inside, other=0.0)
    moment = tl.load(part + 2 * ROOM, mask=inside, other=0.0)
    top = tl.max(largest, axis=0)
    moved = tl.where(total > 0, tl.maximum((largest - top[None, :]) * scale, FAR), 0.0)
    z = tl.load(picked + place, mask=listed, other=0.0)
    log_p, m, log_sum, whole = _results(top, total, moved, z, inverse_temperature)
    mean = LN2 * tl.sum((moment + moved * total) * tl.exp2(moved), axis=0) / whole
    inside_out = row < N
    tl.store(logprobs + row, tl.where(listed, log_p, 0.0), mask=inside_out)
    tl.store(entropy + row, tl.where(listed, log_sum - mean, 0.0), mask=inside_out)
    tl.store(m_out + row, tl.where(listed, m, 0.0), mask=inside_out)
    tl.store(log_sum_out + row, tl.where(listed, log_sum, 0.0), mask=inside_out)
    if PAIR:
        ref_largest = tl.load(part + 3 * ROOM, mask=inside, other=float("-inf"))
        ref_total = tl.load(part + 4 * ROOM, mask=inside, other=0.0)
        cross = tl.load(part + 5 * ROOM, mask=inside, other=0.0)
        ref_top = tl.max(ref_largest, axis=0)
        ref_moved = tl.where(ref_total > 0, (ref_largest - ref_top[None, :]) * scale, 0.0)
        ref_z = tl.load(picked + ROOM + place, mask=listed, other=0.0)
        ref_log_p, ref_m, ref_log_sum, _ = _results(ref_top, ref_total, ref_moved, ref_z, inverse_temperature)
        factor = tl.exp2(moved)
        cross = tl.where(total * factor > 0, (cross + (moved - ref_moved) * total) * factor, 0.0)
        kl = LN2 * tl.sum(cross, axis=0) / whole - (log_sum - ref_log_sum)
        tl.store(ref_logprobs + row, tl.where(listed, ref_log_p, 0.0), mask=inside_out)
        tl.store(kl_out + row, tl.where(listed, kl, 0.0), mask=inside_out)
        tl.store(ref_m_out + row, tl.where(listed, ref_m, 0.0), mask=inside_out)
        tl.store(ref_log_sum_out + row, tl.where(listed, ref_log_sum, 0.0), mask=inside_out)


class Tile(NamedTuple):
    """What a program multiplies at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tile(hidden: Tensor, unit: int, pair: bool, plain: bool) -> Tile:
    """By what fits a multiprocessor, no register of an inner loop in memory. 256 columns take Hopper's products, which
    read both factors from shared memory, and nothing beside them; `plain`: no softcap, nor, with a second head, a bias
    or a D that steps do not divide."""
    capability = launch.capability(hidden)
    if hidden.dtype == torch.float32:
        return Tile(32, 64, 16, 4, 2) if pair else Tile(64, 64, 32, 4, 2)
    if unit == 1 or capability < 80:
        return Tile(64, 32 if pair else 64, 32, 4, 2)
    if not 90 <= capability < 120:
        return Tile(64, 128, 32, 8, 5) if pair else Tile(128, 128, 64, 8, 4)
    if pair:
        return Tile(128, 128, 64, 8, 3) if plain else Tile(64, 128, 64, 8, 4)
    return Tile(128, 256 if plain else 128, 64, 8, 3)


def _dense(x: Tensor) -> Tensor:
    """Rows without gaps; a tile's rows lie within 2^31 elements."""
    return x if x.stride(1) == 1 and x.stride(0) < 1 << 22 else x.contiguous()


def _unit(*matrices: Tensor) -> int:
    """8 where sizes and strides are multiples of 8 elements, so that rows are read 16 bytes at a time; else 1."""
    sizes = [n for x in matrices for n in (x.shape[1], x.stride(0), x.storage_offset())]
    return 1 if any(n % 8 for n in sizes) else 8


def _listed(targets: Tensor, room: int, heads: int) -> tuple[Tensor, ...]:
    """rows, wanted, places, picked and count, as `_list` leaves them."""
    rows, wanted, places, count = (
        torch.empty(n, dtype=torch.int32, device=targets.device) for n in (room, room, len(targets), 1)
    )
    picked = torch.empty(heads, room, dtype=torch.float32, device=targets.device)
    launch.run(
        _list, (1,), targets.contiguous(), rows, wanted, places, picked, count, len(targets), room,
        HEADS=heads, BLOCK=LISTED, num_warps=8,
    )  # fmt: skip
    return rows, wanted, places, picked, count


def _split(N: int, V: int, of: Tile, bytes_a_row: int) -> tuple[int, int, int, int, int, int]:
    """room, row blocks, splits, tiles, tiles a split, and row blocks in a group of programs."""
    row_blocks, tiles = triton.cdiv(N, of.rows), triton.cdiv(V, of.columns)
    each = triton.cdiv(tiles, SPLITS)
    group = min(row_blocks, max(8, SHARED_ROWS // (of.rows * bytes_a_row)))
    return row_blocks * of.rows, row_blocks, triton.cdiv(tiles, each), tiles, each, group


def _run(run, heads: list[tuple], targets: Tensor, temperature: float, softcap: float, out: tuple[Tensor, ...]) -> None:
    """The results of one head, or of the policy's and the reference's, (hidden, weight, bias) each, to the rows of
    `out`; `run` launches the kernel of so many heads."""
    heads = [(_dense(x), _dense(w), b if b is None else b.contiguous()) for x, w, b in heads]
    matrices = [x for head in heads for x in head[:2]]
    launch.serves(*matrices, *(head[2] for head in heads))
    if any(x.dtype != matrices[0].dtype for x in matrices):
        raise Unsupported("no Triton kernel for a product of two dtypes")
    N, pair, depths = len(targets), len(heads) == 2, [x.shape[1] for x in matrices[::2]]
    if not N:
        return
    unit, bare = _unit(*matrices), all(head[2] is None for head in heads) and not any(depth % 64 for depth in depths)
    of = tile(matrices[0], unit, pair, not softcap and (bare or not pair))
    room, *counts = _split(N, len(matrices[1]), of, sum(depths) * matrices[0].element_size())
    rows, wanted, places, picked, count = _listed(targets, room, len(heads))
    splits, scale = counts[1], 1 / (math.log(2) * temperature)
    parts = torch.empty(splits, 6 if pair else 3, room, dtype=torch.float32, device=targets.device)
    run(
        (counts[0] * splits,), *(x for head in heads for x in head), rows, wanted, count, picked, parts,
        len(matrices[1]), *(n // unit for n in depths), *(x.stride(0) // unit for x in matrices), room, *counts,
        scale, softcap, 1 / softcap if softcap else 0.0,
        UNIT=unit, EVEN=not any(n % of.depth for n in depths), CAP=softcap > 0,
        ROWS=of.rows, COLUMNS=of.columns, DEPTH=of.depth, num_warps=of.warps, num_stages=of.stages,
    )  # fmt: skip
    launch.run(
        _merge, (triton.cdiv(N, MERGED),), places, picked, parts, *out, *(None,) * (8 - len(out)), N, room, splits,
        scale, 1 / temperature, PAIR=pair, SPLITS=max(2, triton.next_power_of_2(splits)), ROWS=MERGED,
        num_warps=8,
    )  # fmt: skip


def score(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """log p, entropy, m and log s, of hidden (N, D), weight (V, D), targets (N,), to out, (N,) float32 each; 0 where
    ignored."""

    def run(grid, *args, **options):
        launch.run(_score, grid, *args, **options)

    _run(run, [(hidden, weight, bias)], targets, temperature, softcap, out)


def score_pair(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    out: tuple[Tensor, ...],
) -> None:
    """log p, entropy, m, log s, and of the reference log p, KL, m, log s, to out, (N,) float32 each; 0 where
    ignored."""

    def run(grid, *args, **options):
        launch.run(_score_pair, grid, *args, **options)

    heads = [(hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)]
    _run(run, heads, targets, temperature, softcap, out)
