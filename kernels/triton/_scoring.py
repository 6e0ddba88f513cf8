"""A linear head scored on a GPU, without gradient: the logits never reach memory. Not an op.

    x = hidden . weight' + bias    s = sum 2^d    A = sum d 2^d    C = sum (d - d_ref) 2^d

of all columns but the target's; _softmax.py has the distance d of an x to the largest, _target.py makes log p and the
entropy of the sums, and C, the A - B of _softmax.py, makes the KL.

A program takes a block of rows and a split of the vocabulary, and walks the split's tiles of columns:

                      | split 0         | split 1         | ...
    block of rows 0   | tile tile tile  | tile tile tile  |         one program per block and split
    block of rows 1   | tile tile tile  | tile tile tile  |

For each tile it multiplies over D on tensor cores, while the next parts of hidden and weight are loaded, and updates
the rows' online sums from the float32 accumulators; the sums stay in registers. A split leaves 12 bytes per row (24
with a reference), and a second kernel merges the splits in their order.

Floor: 2 N D V operations and one read of hidden and weight. With at most 128 splits, up to 3 KiB per row are written
and read, where float32 logits would take 8 V bytes. Programs that run at the same time share their tiles of the weight
and a group of rows, which fit the L2 cache.

Ignored rows cost no product: a first kernel lists the valid ones. Their number stays on the device, and programs of
blocks beyond it have nothing to do. Tiles and splits depend on D, V, dtypes and device, never on the number of rows, so
a row has the same bits in any batch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.kernels._tensors import empty_float32
from rlhf_fast.kernels.triton import _softmax as softmax
from rlhf_fast.kernels.triton import _target, launch
from rlhf_fast.kernels.triton._target import LN2, MIN_FLOAT

MAX_SPLITS = 128  # of the vocabulary
GROUP_BYTES = 16 << 20  # of hidden that programs share through the L2 cache
LIST_BLOCK = 2048  # rows of a step of `list_valid_kernel`
MERGE_ROWS = 16  # rows of a program of `merge_splits_kernel`


class Operands(NamedTuple):
    """Operands of a head's product. D and strides are in units of UNIT elements."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    D: int
    hidden_stride: int
    weight_stride: int


class ValidRows(NamedTuple):
    """The rows whose target is not ignored, in order: `count` of them, in memory for all rows rounded up to blocks."""

    rows: Tensor  # the row at each place, 0 behind the last valid row
    targets: Tensor  # its target, -1 behind the last valid row
    places: Tensor  # the place of each row, or -1
    target_logits: Tensor  # (heads, capacity): NaN until a tile has the target
    count: Tensor
    capacity: int


class Splits(NamedTuple):
    """The vocabulary's tiles, and the splits that have them."""

    splits: int
    tiles: int
    tiles_per_split: int


class Outputs(NamedTuple):
    """Results (N,) float32; the reference's and those of the KL, or None; and top1 (N,) uint8 and log_z, or None."""

    logprobs: Tensor
    entropy: Tensor
    largest: Tensor  # of the raw logits but the target's
    sums: Tensor  # s
    ref_logprobs: Tensor | None = None
    kl: Tensor | None = None
    ref_largest: Tensor | None = None
    ref_sums: Tensor | None = None
    kl_of_others: Tensor | None = None
    log_z: Tensor | None = None
    top1: Tensor | None = None


@triton.jit
def list_valid_kernel(targets, valid_rows, N, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Fill `valid_rows`, in one program."""
    capacity = valid_rows.capacity
    total = 0
    for start in range(0, N, BLOCK):
        row = start + tl.arange(0, BLOCK)
        target = tl.load(targets + row, mask=row < N, other=launch.IGNORE_INDEX)
        valid = target != launch.IGNORE_INDEX
        place = total + tl.cumsum(valid.to(tl.int32), 0) - 1
        tl.store(valid_rows.places + row, tl.where(valid, place, -1), mask=row < N)
        tl.store(valid_rows.rows + place, row, mask=valid)
        tl.store(valid_rows.targets + place, target.to(tl.int32), mask=valid)
        total += tl.sum(valid.to(tl.int32), 0)
    tl.store(valid_rows.count, total)
    for start in range(0, capacity, BLOCK):
        place = start + tl.arange(0, BLOCK)
        for head in tl.static_range(HEADS):  # NaN stays, and shows, where no column is the target
            nan = tl.full((BLOCK,), float("nan"), tl.float32)
            tl.store(valid_rows.target_logits + head * capacity + place, nan, mask=place < capacity)
        is_behind = (place >= total) & (place < capacity)
        tl.store(valid_rows.rows + place, 0, mask=is_behind)
        tl.store(valid_rows.targets + place, -1, mask=is_behind)


@triton.jit
def locate_block(count, splits, row_blocks, blocks_per_group, ROWS: tl.constexpr):
    """Return the program's first row, its split, and its tiles [first, end), of which a block beyond the rows has none.

    Programs that run at the same time have the same group of row blocks."""
    program = tl.program_id(0)
    group = program // (blocks_per_group * splits.splits)
    within = program % (blocks_per_group * splits.splits)
    size = tl.minimum(row_blocks - group * blocks_per_group, blocks_per_group)
    row = (group * blocks_per_group + within % size) * ROWS
    split = within // size
    first = split * splits.tiles_per_split
    end = tl.minimum(first + splits.tiles_per_split, splits.tiles)
    return row, split, first, tl.where(row < tl.load(count), end, first)


@triton.jit
def multiply(
    operands, row_offset, first, V,
    UNIT: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Return the float32 product of hidden's rows at `row_offset` with weight's rows from `first` on. The last row of
    weight takes the place of rows beyond it."""
    D = operands.D * UNIT
    stride = operands.weight_stride * UNIT
    k = tl.arange(0, DEPTH)
    column = tl.minimum(tl.arange(0, COLUMNS), V - 1 - first)
    weight = operands.weight + first.to(tl.int64) * stride
    a_offset = row_offset[:, None] + k[None, :]
    b_offset = column[None, :] * stride + k[:, None]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, DEPTH):
        if EVEN:
            a = tl.load(operands.hidden + start + a_offset)
            b = tl.load(weight + start + b_offset)
        else:
            inside = k < D - start
            a = tl.load(operands.hidden + start + a_offset, mask=inside[None, :], other=0.0)
            b = tl.load(weight + start + b_offset, mask=inside[:, None], other=0.0)
        acc = launch.dot(a, b, acc)
    return acc


@triton.jit
def add_bias(acc, bias, first, V, COLUMNS: tl.constexpr):
    """Return x of a tile from its product."""
    column = first + tl.arange(0, COLUMNS)
    if bias is not None:
        acc += tl.load(bias + column, mask=column < V, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def base_of(largest, scaling, CAP: tl.constexpr):
    """Return y of the largest x, finite."""
    return softmax.apply_softcap(tl.maximum(largest, MIN_FLOAT), scaling, CAP)


@triton.jit
def take_target(x, targets, target_logits, place, first, V, COLUMNS: tl.constexpr):
    """Store x of each row's target if this tile has it. No other tile does. Return which columns are in the sums: all
    of the vocabulary but the target."""
    column = tl.arange(0, COLUMNS)
    target = tl.load(targets + place) - first
    is_target = column[None, :] == target[:, None]
    logit = tl.sum(tl.where(is_target, x, 0.0), axis=1)  # NaN stays, which a maximum would drop
    tl.store(target_logits + place, logit, mask=(target >= 0) & (target < COLUMNS))
    return (column < V - first)[None, :] & (is_target == 0)


@triton.jit
def score_tile(
    operands, row_offset, targets, target_logits, place, tile, V, largest, total, scaling,
    UNIT: tl.constexpr, EVEN: tl.constexpr, CAP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Return d of a tile relative to the largest so far, that largest x, and how far it moved, as a power of 2."""
    first = tile * COLUMNS
    acc = multiply(operands, row_offset, first, V, UNIT, EVEN, ROWS, COLUMNS, DEPTH)
    x = add_bias(acc, operands.bias, first, V, COLUMNS)
    counts = take_target(x, targets, target_logits, place, first, V, COLUMNS)
    x = tl.where(counts, x, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(x, axis=1))
    base = base_of(new_largest, scaling, CAP)
    shift = tl.where(total > 0, (base_of(largest, scaling, CAP) - base) * scaling.exp2_factor, 0.0)
    d = (softmax.apply_softcap(x, scaling, CAP) - base[:, None]) * scaling.exp2_factor
    if CAP:  # softcap made -inf finite
        d = tl.where(counts, d, float("-inf"))
    return d, new_largest, shift


@triton.jit(do_not_specialize=["row_blocks", "blocks_per_group"])
def score_kernel(
    operands, valid_rows, parts, V, splits, row_blocks, blocks_per_group, scaling,
    UNIT: tl.constexpr, EVEN: tl.constexpr, CAP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """parts (splits, 3, capacity): the largest x, s and A of the program's rows in its split, in powers of 2."""
    capacity = valid_rows.capacity
    first_row, split, first_tile, end = locate_block(valid_rows.count, splits, row_blocks, blocks_per_group, ROWS)
    place = first_row + tl.arange(0, ROWS)
    row_offset = tl.load(valid_rows.rows + place).to(tl.int64) * (operands.hidden_stride * UNIT)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    moment = total
    for tile in range(first_tile, end):
        d, largest, shift = score_tile(
            operands, row_offset, valid_rows.targets, valid_rows.target_logits, place, tile, V, largest, total, scaling,
            UNIT, EVEN, CAP, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        shift = tl.maximum(shift, launch.MIN_EXPONENT)
        factor = tl.exp2(shift)
        e = tl.exp2(d)
        moment = (moment + shift * total) * factor + tl.sum(tl.maximum(d, launch.MIN_EXPONENT) * e, axis=1)
        total = total * factor + tl.sum(e, axis=1)
    part = parts + split.to(tl.int64) * 3 * capacity + place
    tl.store(part, largest)
    tl.store(part + capacity, total)
    tl.store(part + 2 * capacity, moment)


@triton.jit(do_not_specialize=["row_blocks", "blocks_per_group"])
def score_pair_kernel(
    operands, ref_operands, valid_rows, parts, V, splits, row_blocks, blocks_per_group, scaling,
    UNIT: tl.constexpr, EVEN: tl.constexpr, CAP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """parts (splits, 6, capacity): the three of `score_kernel`, the reference's largest x and s, and C."""
    capacity = valid_rows.capacity
    first_row, split, first_tile, end = locate_block(valid_rows.count, splits, row_blocks, blocks_per_group, ROWS)
    place = first_row + tl.arange(0, ROWS)
    row = tl.load(valid_rows.rows + place).to(tl.int64)
    row_offset = row * (operands.hidden_stride * UNIT)
    ref_row_offset = row * (ref_operands.hidden_stride * UNIT)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    moment, cross = total, total
    ref_largest, ref_total = largest, total
    for tile in range(first_tile, end):
        ref_d, ref_largest, ref_shift = score_tile(
            ref_operands, ref_row_offset, valid_rows.targets, valid_rows.target_logits + capacity, place, tile, V,
            ref_largest, ref_total, scaling, UNIT, EVEN, CAP, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        ref_total = ref_total * tl.exp2(ref_shift) + tl.sum(tl.exp2(ref_d), axis=1)
        d, largest, shift = score_tile(
            operands, row_offset, valid_rows.targets, valid_rows.target_logits, place, tile, V, largest, total, scaling,
            UNIT, EVEN, CAP, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        shift = tl.maximum(shift, launch.MIN_EXPONENT)
        factor = tl.exp2(shift)
        e = tl.exp2(d)
        cross = tl.where(total * factor > 0, (cross + (shift - ref_shift) * total) * factor, 0.0)
        cross += tl.sum(tl.where(e > 0, (d - ref_d) * e, 0.0), axis=1)
        moment = (moment + shift * total) * factor + tl.sum(tl.maximum(d, launch.MIN_EXPONENT) * e, axis=1)
        total = total * factor + tl.sum(e, axis=1)
    part = parts + split.to(tl.int64) * 6 * capacity + place
    tl.store(part, largest)
    tl.store(part + capacity, total)
    tl.store(part + 2 * capacity, moment)
    tl.store(part + 3 * capacity, ref_largest)
    tl.store(part + 4 * capacity, ref_total)
    tl.store(part + 5 * capacity, cross)


@triton.jit
def largest_and_shifts(split_largest, split_total, scaling, CAP: tl.constexpr):
    """Return the largest x of all splits, and how far each split's is below it, as a power of 2."""
    largest = tl.max(split_largest, axis=0)
    distance = base_of(split_largest, scaling, CAP) - base_of(largest, scaling, CAP)[None, :]
    return largest, tl.where(split_total > 0, distance * scaling.exp2_factor, 0.0)


@triton.jit(do_not_specialize=["N"])
def merge_splits_kernel(
    valid_rows, parts, out, N, splits, scaling,
    CAP: tl.constexpr, PAIR: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store the results of ROWS rows; 0 for ignored ones."""
    capacity = valid_rows.capacity
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < N
    place = tl.load(valid_rows.places + row, mask=exists, other=-1)
    valid = place >= 0
    fields: tl.constexpr = 6 if PAIR else 3
    split = tl.arange(0, SPLITS)[:, None]
    inside = (split < splits) & valid[None, :]
    part = parts + split.to(tl.int64) * fields * capacity + place[None, :]
    split_largest = tl.load(part, mask=inside, other=float("-inf"))
    split_total = tl.load(part + capacity, mask=inside, other=0.0)
    split_moment = tl.load(part + 2 * capacity, mask=inside, other=0.0)
    largest, shift = largest_and_shifts(split_largest, split_total, scaling, CAP)
    shift = tl.maximum(shift, launch.MIN_EXPONENT)
    factor = tl.exp2(shift)
    total = tl.sum(split_total * factor, axis=0)
    moment = LN2 * tl.sum((split_moment + shift * split_total) * factor, axis=0)
    logit = tl.load(valid_rows.target_logits + place, mask=valid, other=0.0)
    lead, error = _target.lead_over(logit, tl.maximum(largest, MIN_FLOAT), scaling, CAP)
    target = _target.join(lead, error, total, moment)
    tl.store(out.logprobs + row, tl.where(valid, target.logp, 0.0), mask=exists)
    tl.store(out.entropy + row, tl.where(valid, target.entropy, 0.0), mask=exists)
    tl.store(out.largest + row, tl.where(valid, largest, 0.0), mask=exists)
    tl.store(out.sums + row, tl.where(valid, total, 0.0), mask=exists)
    if out.log_z is not None:
        log_z, is_top1 = _target.log_z_and_top1(target, logit, tl.maximum(largest, MIN_FLOAT), scaling, CAP)
        tl.store(out.log_z + row, tl.where(valid, log_z, 0.0), mask=exists)
        tl.store(out.top1 + row, (valid & is_top1).to(tl.uint8), mask=exists)
    if PAIR:
        split_ref_largest = tl.load(part + 3 * capacity, mask=inside, other=float("-inf"))
        split_ref_total = tl.load(part + 4 * capacity, mask=inside, other=0.0)
        cross = tl.load(part + 5 * capacity, mask=inside, other=0.0)
        ref_largest, ref_shift = largest_and_shifts(split_ref_largest, split_ref_total, scaling, CAP)
        ref_total = tl.sum(split_ref_total * tl.exp2(ref_shift), axis=0)
        ref_logit = tl.load(valid_rows.target_logits + capacity + place, mask=valid, other=0.0)
        ref_lead, ref_error = _target.lead_over(ref_logit, tl.maximum(ref_largest, MIN_FLOAT), scaling, CAP)
        ref_target = _target.join(ref_lead, ref_error, ref_total, 0.0)
        cross = tl.where(split_total * factor > 0, (cross + (shift - ref_shift) * split_total) * factor, 0.0)
        kl, kl_of_others = softmax.row_kl(tl.sum(cross, axis=0), target, ref_target)
        tl.store(out.ref_logprobs + row, tl.where(valid, ref_target.logp, 0.0), mask=exists)
        tl.store(out.kl + row, tl.where(valid, kl, 0.0), mask=exists)
        tl.store(out.ref_largest + row, tl.where(valid, ref_largest, 0.0), mask=exists)
        tl.store(out.ref_sums + row, tl.where(valid, ref_total, 0.0), mask=exists)
        tl.store(out.kl_of_others + row, tl.where(valid, kl_of_others, 0.0), mask=exists)


class Tile(NamedTuple):
    """Shape of a product, and how a program runs it."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def choose_tile(hidden: Tensor, unit: int, is_pair: bool, is_plain: bool, has_softcap: bool) -> Tile:
    """Return the largest tile that fits an SM without a spill in the inner loop.

    256 columns suit Hopper's products, which read both operands from shared memory, but leave no registers for more.
    is_plain: there is no softcap, no D that DEPTH does not divide and, for a pair, no bias. has_softcap: its tanh takes
    registers that sm_80, whose accumulators are there too, does not have for a larger tile."""
    arch = launch.sm_arch(hidden)
    if hidden.dtype == torch.float32:
        return Tile(32, 64, 16, 4, 2) if is_pair else Tile(64, 64, 32, 4, 2)
    if unit == 1 or arch < 80:
        return Tile(64, 32 if is_pair else 64, 32, 4, 2)
    if not 90 <= arch < 120 and has_softcap:
        return Tile(64, 64, 32, 8, 5) if is_pair else Tile(64, 128, 64, 8, 4)
    if not 90 <= arch < 120:
        return Tile(64, 128, 32, 8, 5) if is_pair else Tile(128, 128, 64, 8, 4)
    if is_pair:
        return Tile(128, 128, 64, 8, 3) if is_plain else Tile(64, 128, 64, 8, 4)
    return Tile(128, 256 if is_plain else 128, 64, 8, 3)


def with_dense_rows(x: Tensor) -> Tensor:
    """Return x with rows without gaps. A tile's rows must lie within 2^31 elements."""
    return x if x.stride(1) == 1 and x.stride(0) < 1 << 22 else x.contiguous()


def vector_unit(*matrices: Tensor) -> int:
    """Return 8 if sizes, strides and offsets are multiples of 8 elements, so that rows are read 16 bytes at a time,
    otherwise 1."""
    sizes = [n for x in matrices for n in (x.shape[1], x.stride(0), x.storage_offset())]
    return 1 if any(n % 8 for n in sizes) else 8


def list_valid(targets: Tensor, capacity: int, num_heads: int) -> ValidRows:
    """Return the rows whose target is not ignored."""
    rows, valid_targets, places, count = (
        torch.empty(n, dtype=torch.int32, device=targets.device) for n in (capacity, capacity, len(targets), 1)
    )
    target_logits = empty_float32(targets, num_heads, capacity)
    valid_rows = ValidRows(rows, valid_targets, places, target_logits, count, capacity)
    meta = {"HEADS": num_heads, "BLOCK": LIST_BLOCK, "num_warps": 8}
    launch.run(list_valid_kernel, (1,), targets.contiguous(), valid_rows, len(targets), **meta)
    return valid_rows


def split_vocabulary(V: int, tile: Tile) -> Splits:
    tiles = triton.cdiv(V, tile.columns)
    tiles_per_split = triton.cdiv(tiles, MAX_SPLITS)
    return Splits(triton.cdiv(tiles, tiles_per_split), tiles, tiles_per_split)


def run_kernels(kernel, heads: list[tuple], targets: Tensor, temperature: float, softcap: float, out: Outputs) -> None:
    """Score one head by `score_kernel`, or the policy's and the reference's by `score_pair_kernel`.

    heads: (hidden (N, D), weight (V, D), bias or None) each."""
    heads = [(with_dense_rows(x), with_dense_rows(w), b if b is None else b.contiguous()) for x, w, b in heads]
    matrices = [x for head in heads for x in head[:2]]
    hidden, weight = matrices[:2]
    launch.require_dtypes(*matrices, *(head[2] for head in heads))
    if any(x.dtype != hidden.dtype for x in matrices):
        raise Unsupported("no Triton kernel for a product of two dtypes")
    N = len(targets)
    if not N:
        return
    is_pair = len(heads) == 2
    depths = [x.shape[1] for x in matrices[::2]]
    unit = vector_unit(*matrices)
    has_bias = any(head[2] is not None for head in heads)
    is_plain = not softcap and not any(depth % 64 for depth in depths) and not (is_pair and has_bias)
    tile = choose_tile(hidden, unit, is_pair, is_plain, softcap > 0)
    splits = split_vocabulary(len(weight), tile)
    row_blocks = triton.cdiv(N, tile.rows)
    bytes_per_block = tile.rows * sum(depths) * hidden.element_size()
    blocks_per_group = min(row_blocks, max(8, GROUP_BYTES // bytes_per_block))
    valid_rows = list_valid(targets, row_blocks * tile.rows, len(heads))
    operands = [Operands(x, w, b, x.shape[1] // unit, x.stride(0) // unit, w.stride(0) // unit) for x, w, b in heads]
    parts = empty_float32(targets, splits.splits, 6 if is_pair else 3, valid_rows.capacity)
    scaling = _target.Scaling.of(temperature, softcap)
    meta = {
        "UNIT": unit,
        "EVEN": not any(depth % tile.depth for depth in depths),
        "CAP": softcap > 0,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    num_programs = row_blocks * splits.splits
    sizes = (len(weight), splits, row_blocks, blocks_per_group)
    launch.run(kernel, (num_programs,), *operands, valid_rows, parts, *sizes, scaling, **meta)
    options = (N, splits.splits, scaling)
    merged_splits = max(2, triton.next_power_of_2(splits.splits))
    meta = {"CAP": softcap > 0, "PAIR": is_pair, "SPLITS": merged_splits, "ROWS": MERGE_ROWS, "num_warps": 8}
    launch.run(merge_splits_kernel, (triton.cdiv(N, MERGE_ROWS),), valid_rows, parts, out, *options, **meta)


def score(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float,
    out: Outputs,
) -> None:  # fmt: skip
    """Store the first four `Outputs` of hidden (N, D), weight (V, D) and targets (N,) in `out`; 0 for ignored."""
    run_kernels(score_kernel, [(hidden, weight, bias)], targets, temperature, softcap, out)


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
    out: Outputs,
) -> None:
    """Store all `Outputs` of the policy and the reference in `out`; 0 for ignored rows."""
    heads = [(hidden, weight, bias), (ref_hidden, ref_weight, ref_bias)]
    run_kernels(score_pair_kernel, heads, targets, temperature, softcap, out)
