"""linear_sample_tokens on a GPU: the head's product and the sampling in one kernel; without a filter no logit reaches
memory.

    weight (V, D)       | tile 0 | tile 1 | ... |        one program per block of rows and tile of the weight; programs
    block of rows 0     | (0, 0) | (0, 1) |              of one tile run at the same time and share it in the L2 cache
    block of rows 1     | (1, 0) | (1, 1) |

A program multiplies on tensor cores, with copies of both tiles ahead of it. From the float32 accumulators it stores the
sums of the tile's logits and its best token: 32 bytes per row and tile, 44 with a ban. _gumbel.py merges the tiles.

Floor: one read of the weight, V D elements, for a decode step.

Filters read a row more than once. Then the product stores float32 logits, of as many rows at a time as LOGITS_BYTES
hold, and sample_tokens' kernels sample from them. Blocks and tiles do not depend on the number of rows: a row has the
same bits in any batch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.kernels._sampling import empty_outputs
from rlhf_fast.kernels._tensors import contiguous, empty_float32
from rlhf_fast.kernels.triton import _filters as filters
from rlhf_fast.kernels.triton import _gumbel as gumbel
from rlhf_fast.kernels.triton import launch
from rlhf_fast.kernels.triton.sample_tokens import MAX_VOCAB, Noise, sample_rows

LOGITS_BYTES = 256 << 20  # of logits at a time, with filters
ROWS = 64  # the fewest rows that the tensor cores of sm_90 take at their full rate
ROWS_FLOAT32 = 16  # without tensor cores
COLUMNS = 128
DEPTH = 64


class Operands(NamedTuple):
    """The head: hidden, rows of D, weight (V, D), bias (V,) or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    V: int
    D: int
    hidden_stride: int
    weight_stride: int
    softcap: float
    inverse_softcap: float


@triton.jit
def multiply(head, B, row, column, CAP: tl.constexpr, UPCAST: tl.constexpr, EVEN: tl.constexpr, DEPTH: tl.constexpr):
    """Return the logits of a tile in float32, -inf in columns that do not exist. Rows behind the last one repeat it."""
    D = head.D
    depth = tl.arange(0, DEPTH)
    a = head.hidden + tl.minimum(row, B - 1).to(tl.int64)[:, None] * head.hidden_stride + depth[None, :]
    b = head.weight + tl.minimum(column, head.V - 1).to(tl.int64)[None, :] * head.weight_stride + depth[:, None]
    x = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(0, D, DEPTH):
        if EVEN:
            left = tl.load(a + start)
            right = tl.load(b + start)
        else:
            inside = start + depth < D
            left = tl.load(a + start, mask=inside[None, :], other=0.0)
            right = tl.load(b + start, mask=inside[:, None], other=0.0)
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        x = launch.dot(left, right, x)
    inside = column < head.V
    if head.bias is not None:
        x += tl.load(head.bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if CAP:
        x = head.softcap * launch.tanh(x * head.inverse_softcap)
    return tl.where(inside[None, :], x, float("-inf"))


@triton.jit
def locate_tile(row_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the program's rows, its tile, and the tile's columns. Consecutive programs have the same tile."""
    program = tl.program_id(0)
    tile = program // row_blocks
    row = (program % row_blocks) * ROWS + tl.arange(0, ROWS)
    return row, tile, tile * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit(do_not_specialize=["B", "row_blocks"])
def linear_sample_tokens_logits_kernel(
    head, out, out_stride, B, row_blocks,
    CAP: tl.constexpr, UPCAST: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Store the logits of the program's tile."""
    row, _, column = locate_tile(row_blocks, ROWS, COLUMNS)
    x = multiply(head, B, row, column, CAP, UPCAST, EVEN, DEPTH)
    index = row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out + index, x, mask=(row < B)[:, None] & (column < head.V)[None, :])


@triton.jit(do_not_specialize=["B", "seed", "stride", "row_blocks"])
def linear_sample_tokens_kernel(
    head, banned, ban_rows, temperature, seed, noise, parts, tile_tokens, B, stride, row_blocks, tiles,
    CAP: tl.constexpr, UPCAST: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Store the statistics of the program's tile and its best token, for each of its rows."""
    row, tile, column = locate_tile(row_blocks, ROWS, COLUMNS)
    x = multiply(head, B, row, column, CAP, UPCAST, EVEN, DEPTH)
    exists = row < B
    source_row = tl.minimum(row, B - 1)
    inverse, is_greedy = gumbel.inverse_temperature(temperature, source_row, exists)
    offset = row.to(tl.int64) * tiles + tile
    part = parts + offset
    base = gumbel.store_statistics(part, stride, x, inverse, exists, temperature is not None)
    if banned is not None:
        x = filters.mask_banned(x, banned, ban_rows, source_row, column, column < head.V)
        base = gumbel.store_kept_mass(part, stride, x, inverse, exists)
    row_id = tl.load(noise.row_ids + source_row)
    step = tl.load(noise.steps + source_row)
    word = gumbel.philox_words(gumbel.load_seed(seed, noise), row_id, step, tile * COLUMNS, ROWS, COLUMNS)
    score, token = gumbel.gumbel_argmax(x, base, inverse, is_greedy, word, False)
    logit = tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == token[:, None], x, 0.0), axis=1)
    gumbel.store_best(part, tile_tokens + offset, stride, score, tile * COLUMNS + token, logit, exists)


def product_meta(hidden: Tensor, weight: Tensor, softcap: float) -> dict:
    """Return the constants of the product."""
    D = hidden.shape[1]
    upcast = hidden.dtype != weight.dtype or hidden.dtype == torch.float32
    depth = min(16 if upcast else DEPTH, max(16, triton.next_power_of_2(D)))
    return {
        "CAP": softcap > 0,
        "UPCAST": upcast,
        "EVEN": D % depth == 0,
        "ROWS": ROWS_FLOAT32 if upcast else ROWS,
        "COLUMNS": COLUMNS,
        "DEPTH": depth,
        "num_warps": 4 if upcast else 8,
        "num_stages": 2 if upcast else launch.num_stages_for(4),
    }


def sample_from_logits(
    head: Operands, options: gumbel.RowOptions, seed: int, noise: Noise, banned: Tensor | None,
    ban_rows: Tensor | None, meta: dict,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the outputs with filters: a chunk of rows at a time, the logits first."""
    B = len(head.hidden)
    outputs = empty_outputs((B,), head.hidden)
    tiles = triton.cdiv(head.V, COLUMNS)
    stride = triton.cdiv(head.V, 64) * 64
    max_rows = max(1, min(B, LOGITS_BYTES // (4 * stride)))
    buffer = empty_float32(head.hidden, max_rows, stride)
    for begin in range(0, B, max_rows):
        n = min(max_rows, B - begin)

        def rows(x: Tensor | None, begin: int = begin, n: int = n) -> Tensor | None:
            return x if x is None else x.narrow(0, begin, n)

        logits = buffer.narrow(0, 0, n).narrow(1, 0, head.V)
        chunk = head._replace(hidden=rows(head.hidden))
        row_blocks = triton.cdiv(n, meta["ROWS"])
        grid = (row_blocks * tiles,)
        launch.run(linear_sample_tokens_logits_kernel, grid, chunk, logits, stride, n, row_blocks, **meta)
        chunk_options = gumbel.RowOptions(*map(rows, options))
        chunk_noise = noise._replace(row_ids=rows(noise.row_ids), steps=rows(noise.steps))
        chunk_outputs = tuple(map(rows, outputs))
        sample_rows(logits, chunk_options, seed, chunk_noise, banned, rows(ban_rows), chunk_outputs)
    return outputs


def linear_sample_tokens(
    hidden, weight, temperature, top_k, top_p, min_p, seed, row_ids, steps, bias, softcap, banned, ban_rows, device_seed
):
    launch.require_dtypes(hidden, weight, bias)
    (B, D), V = hidden.shape, weight.shape[0]
    if V > MAX_VOCAB:
        raise Unsupported(f"no Triton kernel for a vocabulary of {V}")
    hidden, weight = (x if x.stride(1) == 1 or D == 1 else x.contiguous() for x in (hidden, weight))
    options = gumbel.RowOptions(*contiguous(temperature, top_k, top_p, min_p))
    row_ids, steps, bias, ban_rows = contiguous(row_ids, steps, bias, ban_rows)
    noise = Noise(row_ids, steps, None, 0, device_seed)
    if banned is not None:
        banned = torch.zeros(V, dtype=torch.uint8, device=hidden.device).index_fill_(0, banned, 1)
    strides = (hidden.stride(0), weight.stride(0))
    head = Operands(hidden, weight, bias, V, D, *strides, softcap, 1 / softcap if softcap else 0.0)
    meta = product_meta(hidden, weight, softcap)
    if any(x is not None for x in options.filters):
        return sample_from_logits(head, options, seed, noise, banned, ban_rows, meta)
    tiles = triton.cdiv(V, COLUMNS)
    parts, tile_tokens = gumbel.empty_parts(hidden, tiles)
    row_blocks = triton.cdiv(B, meta["ROWS"])
    inputs = (head, banned, ban_rows, options.temperature, seed, noise)
    sizes = (B, parts.stride(0), row_blocks, tiles)
    launch.run(linear_sample_tokens_kernel, (row_blocks * tiles,), *inputs, parts, tile_tokens, *sizes, **meta)
    return gumbel.merge_tiles(parts, tile_tokens, ban_rows, options, V, banned is not None)
