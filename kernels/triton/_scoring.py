"""A linear head scored on a GPU, without gradient: the logits never reach memory.

A program takes a block of rows and a split of the vocabulary, and walks the split's tiles of columns: a matrix product
over D on tensor cores, its tiles of hidden and weight copied ahead; then, of the float32 accumulators, the rows' online
sums, which stay in registers. A split leaves 16 bytes a row (32 with a reference), a second kernel merges the splits.

    x = softcap(hidden . weight' + bias), z = x / temperature; all sums around the largest x
    s = sum exp(z - m)      A = sum (z - m) exp(z - m)      C = sum ((z - m) - (z_ref - m_ref)) exp(z - m)
    log p = (z - m) - log s      entropy = log s - A / s      KL = C / s - (log s - log s_ref)

Floor: 2 N D V operations, and one visit of hidden and weight. Partial sums are at most 128 splits a row, 4 KiB written
and read, where logits in float32 would be 8 V bytes. Programs that run together share a split's rows of the weight and
a group of hidden rows that the second-level cache holds.

Ignored rows cost no product: one program lists the others first. Their count stays on the device; programs of blocks
beyond it find nothing to do. Tiles and splits follow from the dtypes, D and V, never from the number of rows: a row
has the same bits in any batch.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.triton import launch

SPLITS = 128  # of the vocabulary, at most
SHARED_ROWS = 16 << 20  # bytes of hidden that a group of programs reads again and again, from the second-level cache
LISTED, MERGED = 2048, 16  # rows that a step of the list takes, and a program of the merger
IGNORED = tl.constexpr(-100)
LN2 = tl.constexpr(math.log(2.0))
FAR = tl.constexpr(-1000.0)  # below it 2^x is 0


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int  # of D, a step of the product
    warps: int
    stages: int


@triton.jit
def _list(targets, rows, places, count, N, BLOCK: tl.constexpr):
    """rows: those not ignored, in their order; places: where in it a row stands, -1 if ignored."""
    total = 0
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        here = tl.load(targets + at, mask=at < N, other=IGNORED) != IGNORED
        place = total + tl.cumsum(here.to(tl.int32), 0) - 1
        tl.store(places + at, tl.where(here, place, -1), mask=at < N)
        tl.store(rows + place, at, mask=here)
        total += tl.sum(here.to(tl.int32), 0)
    tl.store(count, total)


@triton.jit
def _block(count, row_blocks, splits, tiles, each, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """This program's first row, its split, and its tiles [first, end): none where no rows are left."""
    program = tl.program_id(0).to(tl.int64)
    group, place = program // (GROUP * splits), program % (GROUP * splits)
    size = tl.minimum(row_blocks - group * GROUP, GROUP)
    row, split = (group * GROUP + place % size) * ROWS, place // size
    first = split * each
    end = tl.minimum(first + each, tiles)
    return row, split, first, tl.where(row < tl.load(count), end, first)


@triton.jit
def _product(
    hidden, row_at, weight, stride, column, D,
    EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """hidden's rows at `row_at` by the weight's rows at `column`: (ROWS, COLUMNS), float32."""
    k = tl.arange(0, DEPTH)
    a_at, b_at = row_at[:, None] + k[None, :], column[None, :] * stride + k[:, None]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        if EVEN:
            a, b = tl.load(hidden + start + a_at), tl.load(weight + start + b_at)
        else:
            inside = k < D - start
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
    """The largest x so far, what to measure from (it, or 0 if it is -inf), and by how much that moved, in powers of 2."""
    top = tl.maximum(largest, tl.max(x, axis=1))
    base = tl.where(top > float("-inf"), top, 0.0)
    return top, base, tl.where(total > 0, tl.maximum((largest - top) * scale, FAR), 0.0)


@triton.jit
def _pick(x, wanted, picked, place, first, COLUMNS: tl.constexpr):
    """Write x of the target where this tile has it; no other tile does."""
    target = tl.load(wanted + place) - first
    here = tl.arange(0, COLUMNS)[None, :] == target[:, None]
    found = tl.max(tl.where(here, x, float("-inf")), axis=1)
    tl.store(picked + place, found, mask=(target >= 0) & (target < COLUMNS))


@triton.jit
def _score(
    hidden, weight, bias, wanted, rows, count, parts, picked, N, V, D, hidden_stride, weight_stride, row_blocks, splits, tiles,
    each, scale, softcap, inverse_softcap,
    UNIT: tl.constexpr, EVEN: tl.constexpr, CAP: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    first_row, split, first_tile, end = _block(count, row_blocks, splits, tiles, each, GROUP, ROWS)
    place = first_row + tl.arange(0, ROWS)
    row_at = tl.load(rows + place).to(tl.int64) * (hidden_stride * UNIT)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    moment = total
    for tile in range(first_tile, end):
        first = (tile * COLUMNS).to(tl.int32)
        column = tl.minimum(tl.arange(0, COLUMNS), V - 1 - first)
        acc = _product(
            hidden, row_at, weight + tile * COLUMNS * (weight_stride * UNIT), weight_stride * UNIT, column, D * UNIT,
            EVEN, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        x = _raw(acc, bias, first, V, softcap, inverse_softcap, CAP, COLUMNS)
        _pick(x, wanted, picked, place, first, COLUMNS)
        largest, base, moved = _moved(x, largest, total, scale)
        factor = tl.exp2(moved)
        d = (x - base[:, None]) * scale
        e = tl.exp2(d)
        moment = (moment + moved * total) * factor + tl.sum(tl.maximum(d, FAR) * e, axis=1)
        total = total * factor + tl.sum(e, axis=1)
    part = parts + split * 3 * N + place
    tl.store(part, largest)
    tl.store(part + N, total)
    tl.store(part + 2 * N, moment)
