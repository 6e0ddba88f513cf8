"""linear_sample_tokens on a GPU: the head's product and the draw in one; without a filter no logit reaches memory.

A program multiplies a block of rows by a tile of the weight's rows, on tensor cores, copies of both tiles ahead of it,
and leaves of the tile's logits, straight from the float32 accumulator, their sums and their draw: 28 bytes a row and
tile, 36 with a ban. `_draw.py` joins the tiles. Programs that run together share their tile of the weight, so that
memory reads it once: V D numbers, the floor of a decode step.

Filters look at a row more than once: then the product writes the logits, in float32, of as many rows at a time as
BYTES hold, and sample_tokens' kernels draw from them. Blocks and tiles do not follow from the number of rows: a row has
the same bits in any batch.
"""

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.kernels._sampling import empty_outputs
from rlhf_fast.kernels.triton import _filters as cut
from rlhf_fast.kernels.triton import _gumbel as draw
from rlhf_fast.kernels.triton import launch
from rlhf_fast.kernels.triton.sample_tokens import sample

BYTES = 256 << 20  # of logits at a time, with filters
ROWS, COLUMNS, DEPTH = 64, 128, 64  # 64 rows are the fewest that the tensor cores of sm_90 take at their full rate
FEW_ROWS = 16  # of float32, without tensor cores


@triton.jit
def _product(
    hidden, weight, bias, row, column, B, V, D, hidden_stride, weight_stride, softcap, inverse_softcap,
    CAP: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Logits of a tile, float32; -inf in columns that do not exist. Rows beyond the last repeat it."""
    depth = tl.arange(0, DEPTH)
    a = hidden + tl.minimum(row, B - 1).to(tl.int64)[:, None] * hidden_stride + depth[None, :]
    b = weight + tl.minimum(column, V - 1).to(tl.int64)[None, :] * weight_stride + depth[:, None]
    x = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(0, D, DEPTH):
        if EVEN:
            left, right = tl.load(a + start), tl.load(b + start)
        else:
            inside = start + depth < D
            left = tl.load(a + start, mask=inside[None, :], other=0.0)
            right = tl.load(b + start, mask=inside[:, None], other=0.0)
        if WIDE:
            left, right = left.to(tl.float32), right.to(tl.float32)
        x = launch.dot(left, right, x)
    inside = column < V
    if bias is not None:
        x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if CAP:
        x = softcap * launch.tanh(x * inverse_softcap)
    return tl.where(inside[None, :], x, float("-inf"))


@triton.jit
def _block(blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows, the tile, its columns: blocks of rows run side by side on one tile."""
    program = tl.program_id(0)
    tile = program // blocks
    row = (program % blocks) * ROWS + tl.arange(0, ROWS)
    return row, tile, tile * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _logits(
    hidden, weight, bias, out, B, V, D, hidden_stride, weight_stride, out_stride, blocks, softcap, inverse_softcap,
    CAP: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    row, _, column = _block(blocks, ROWS, COLUMNS)
    x = _product(
        hidden, weight, bias, row, column, B, V, D, hidden_stride, weight_stride, softcap, inverse_softcap, CAP, WIDE,
        EVEN, DEPTH,
    )  # fmt: skip
    at = row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out + at, x, mask=(row < B)[:, None] & (column < V)[None, :])


@triton.jit
def _draws(
    hidden, weight, bias, banned, ban_rows, temperature, row_ids, steps, parts, tokens, seed, B, V, D, hidden_stride,
    weight_stride, stride, blocks, tiles, softcap, inverse_softcap,
    CAP: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    row, tile, column = _block(blocks, ROWS, COLUMNS)
    x = _product(
        hidden, weight, bias, row, column, B, V, D, hidden_stride, weight_stride, softcap, inverse_softcap, CAP, WIDE,
        EVEN, DEPTH,
    )  # fmt: skip
    on, known = row < B, tl.minimum(row, B - 1)
    inverse, greedy = draw.tempering(temperature, known, on)
    part = parts + row.to(tl.int64) * tiles + tile
    base = draw.put_statistics(part, stride, x, inverse, on, temperature is not None)
    if banned is not None:
        x = cut.without_banned(x, banned, ban_rows, known, column, column < V)
        base = draw.put_masses(part, stride, x, inverse, on)
    word = draw.words(seed, tl.load(row_ids + known), tl.load(steps + known), tile * COLUMNS, ROWS, COLUMNS)
    score, place = draw.race(x, base, inverse, greedy, word, False)
    logit = tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == place[:, None], x, 0.0), axis=1)
    draw.put_draw(part, tokens + row.to(tl.int64) * tiles + tile, stride, score, tile * COLUMNS + place, logit, on)


def _shared(hidden, weight, softcap) -> dict:
    """What both kernels are told of the product."""
    D = hidden.shape[1]
    wide = hidden.dtype != weight.dtype or hidden.dtype == torch.float32
    depth = min(16 if wide else DEPTH, max(16, triton.next_power_of_2(D)))
    warps, stages = (4, 2) if wide else (8, launch.num_stages_for(4))
    return {
        "CAP": softcap > 0, "WIDE": wide, "EVEN": D % depth == 0, "ROWS": FEW_ROWS if wide else ROWS,
        "COLUMNS": COLUMNS, "DEPTH": depth, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def linear_sample_tokens(
    hidden, weight, temperature, top_k, top_p, min_p, seed, row_ids, steps, bias, softcap, banned, ban_rows
):
    launch.require_dtypes(hidden, weight, bias)
    (B, D), V = hidden.shape, weight.shape[0]
    if V > 2**31 - 2**20:
        raise Unsupported(f"no Triton kernel for a vocabulary of {V}")
    hidden, weight = (x if x.stride(1) == 1 or D == 1 else x.contiguous() for x in (hidden, weight))
    filters = [x if x is None else x.contiguous() for x in (top_k, top_p, min_p)]
    temperature, row_ids, steps, bias, ban_rows = (
        x if x is None else x.contiguous() for x in (temperature, row_ids, steps, bias, ban_rows)
    )
    if banned is not None:
        banned = torch.zeros(V, dtype=torch.uint8, device=hidden.device).index_fill_(0, banned, 1)
    shared, tiles = _shared(hidden, weight, softcap), triton.cdiv(V, COLUMNS)
    strides, caps = (hidden.stride(0), weight.stride(0)), (softcap, 1 / softcap if softcap else 0.0)
    if all(x is None for x in filters):
        parts, tokens = draw.empty_parts(hidden, tiles)
        blocks = triton.cdiv(B, shared["ROWS"])
        launch.run(
            _draws, (blocks * tiles,), hidden, weight, bias, banned, ban_rows, temperature, row_ids, steps, parts,
            tokens, seed, B, V, D, *strides, parts.stride(0), blocks, tiles, *caps, **shared,
        )  # fmt: skip
        return draw.finish(parts, tokens, ban_rows, temperature, *filters, V, banned is not None)
    outputs, stride = empty_outputs(hidden.shape[:1], hidden), triton.cdiv(V, 64) * 64
    most = max(1, min(B, BYTES // (4 * stride)))
    buffer = torch.empty(most, stride, dtype=torch.float32, device=hidden.device)
    for begin in range(0, B, most):
        n = min(most, B - begin)
        rows, options, keys, outs = (
            [x if x is None else x.narrow(0, begin, n) for x in some]
            for some in ((hidden,), (temperature, *filters), (row_ids, steps, ban_rows), outputs)
        )
        logits, blocks = buffer.narrow(0, 0, n).narrow(1, 0, V), triton.cdiv(n, shared["ROWS"])
        launch.run(
            _logits, (blocks * tiles,), *rows, weight, bias, logits, n, V, D, *strides, stride, blocks, *caps, **shared,
        )  # fmt: skip
        sample(logits, *options, seed, *keys[:2], None, banned, keys[2], tuple(outs))
    return outputs
