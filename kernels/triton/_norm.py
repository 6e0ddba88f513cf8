"""RMSNorm and LayerNorm of rows on a GPU, with an optional residual stream: one kernel. Not an op.

    D up to 32 KiB    | row 0 |                        a program holds its rows in registers and reads memory once;
                      | row 1 |                        ROWS narrow rows share a program
    wider             | tile 0 | tile 1 | ... |        a program walks its row's tiles once for each statistic and
                                                       once more to store them; later walks find them in the caches

Floor: one read of x and the residual and one write of out, 2 bytes per element each in bfloat16, and one more write of
the residual; the weight comes from the L2 cache. ROWS and the tiles depend on D alone, so a row has the same bits in
any batch.
"""

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._tensors import as_matrix, contiguous, copy_back, matrix_shape
from rlhf_fast.kernels.triton import launch

MAX_ROW_BYTES = 32768  # of a row that is held in registers


@triton.jit
def load_tile(x, residual, x_index, index, inside):
    """Return x in float32; with a residual their sum, rounded to the residual's dtype as it is stored."""
    y = tl.load(x + x_index, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + index, mask=inside, other=0.0).to(tl.float32)
        y = launch.cast(y, residual.dtype.element_ty).to(tl.float32)
    return y


@triton.jit
def load_scale_shift(weight, bias, offset, column, inside):
    """Return the factor of each column, weight + offset, and what is added to it."""
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    shift = tl.zeros_like(scale)
    if bias is not None:
        shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return scale[None, :], shift[None, :]


@triton.jit
def store_tile(y, mean, inverse_std, scale, shift, residual, out, index, inside):
    """Store y in the residual stream and normalized y in out."""
    if residual is not None:
        tl.store(residual + index, launch.cast(y, residual.dtype.element_ty), mask=inside)
    y = (y - mean) * inverse_std * scale + shift
    tl.store(out + index, launch.cast(y, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def norm_kernel(
    x, residual, weight, bias, out, N, D, x_stride, eps, offset,
    CENTERED: tl.constexpr, IN_REGISTERS: tl.constexpr, EARLY_WEIGHT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalize ROWS rows. CENTERED: LayerNorm."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK)
    mean = tl.zeros((ROWS, 1), tl.float32)
    if IN_REGISTERS:
        in_row = columns < D
        inside = (row < N) & in_row[None, :]
        index = row * D + columns[None, :]
        y = load_tile(x, residual, row * x_stride + columns[None, :], index, inside)
        if EARLY_WEIGHT:  # it is loaded while the row is summed, if registers suffice
            scale, shift = load_scale_shift(weight, bias, offset, columns, in_row)
        if CENTERED:
            mean = (tl.sum(y, axis=1) / D)[:, None]
        centered = tl.where(in_row[None, :], y - mean, 0.0)
        inverse_std = tl.rsqrt(tl.sum(centered * centered, axis=1) / D + eps)[:, None]
        if not EARLY_WEIGHT:
            scale, shift = load_scale_shift(weight, bias, offset, columns, in_row)
        store_tile(y, mean, inverse_std, scale, shift, residual, out, index, inside)
    else:
        if CENTERED:
            total = tl.zeros((ROWS, BLOCK), tl.float32)
            for start in range(0, D, BLOCK):
                column = start + columns
                inside = (row < N) & (column < D)[None, :]
                total += load_tile(x, residual, row * x_stride + column[None, :], row * D + column[None, :], inside)
            mean = (tl.sum(total, axis=1) / D)[:, None]
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, D, BLOCK):
            column = start + columns
            inside = (row < N) & (column < D)[None, :]
            y = load_tile(x, residual, row * x_stride + column[None, :], row * D + column[None, :], inside)
            centered = tl.where(inside, y - mean, 0.0)
            squares += centered * centered
        inverse_std = tl.rsqrt(tl.sum(squares, axis=1) / D + eps)[:, None]
        for start in range(0, D, BLOCK):
            column = start + columns
            inside = (row < N) & (column < D)[None, :]
            index = row * D + column[None, :]
            y = load_tile(x, residual, row * x_stride + column[None, :], index, inside)
            scale, shift = load_scale_shift(weight, bias, offset, column, column < D)
            store_tile(y, mean, inverse_std, scale, shift, residual, out, index, inside)


def normalize(x, weight, bias, residual, eps, offset, is_centered):
    """Return the normalized rows of x (..., D). With a residual, x is added to it in place and the sum is normalized.

    is_centered: LayerNorm, otherwise RMSNorm."""
    launch.require_dtypes(x, weight, bias)
    N, D = matrix_shape(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = as_matrix(x)
    stream, weight, bias = contiguous(residual, weight, bias)
    max_columns = MAX_ROW_BYTES // x.element_size()
    in_registers = D <= max_columns
    block = launch.block_size(D, max_columns if in_registers else min(max_columns, 4096))
    rows_per_program = max(1, 1024 // block)
    meta = {
        "CENTERED": is_centered,
        "IN_REGISTERS": in_registers,
        "EARLY_WEIGHT": block <= 8192,
        "ROWS": rows_per_program,
        "BLOCK": block,
        "num_warps": launch.num_warps_for(rows_per_program * block),
    }
    options = (N, D, rows.stride(0), eps, offset)
    launch.run(norm_kernel, (triton.cdiv(N, rows_per_program),), rows, stream, weight, bias, out, *options, **meta)
    copy_back(stream, residual)
    return out
