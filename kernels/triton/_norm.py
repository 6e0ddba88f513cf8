"""RMSNorm and LayerNorm of rows on a GPU, with the residual stream that they read: one kernel.

A row of up to 32 KiB is held in registers, so that memory is visited once: x, the residual and out, 2 bytes an
element each in bfloat16 (and 2 more where the residual is written), and the weight, of the second-level cache. Narrow
rows share a program, by a rule from D alone: the bits of a row are its own. A wider row is walked tile by tile, once
for each of its statistics and once more to be written; later walks find it in the caches.
"""

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._tensors import as_matrix, copy_back, matrix_shape
from rlhf_fast.kernels.triton import launch

WIDEST = 32768  # bytes of a row that are held in registers


@triton.jit
def _tile(x, residual, x_at, at, inside):
    """x in float32; with a residual, their sum as the stream keeps it: rounded to its dtype."""
    y = tl.load(x + x_at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        y = launch.cast(y, residual.dtype.element_ty).to(tl.float32)
    return y


@triton.jit
def _factors(weight, bias, offset, column, across):
    """What a column is multiplied by, and what is added to it then."""
    scale = tl.load(weight + column, mask=across, other=0.0).to(tl.float32) + offset
    shift = tl.zeros_like(scale)
    if bias is not None:
        shift = tl.load(bias + column, mask=across, other=0.0).to(tl.float32)
    return scale[None, :], shift[None, :]


@triton.jit
def _write(y, mean, inverse, scale, shift, residual, out, at, inside):
    """The row's numbers y to the stream, and normalised to out."""
    if residual is not None:
        tl.store(residual + at, launch.cast(y, residual.dtype.element_ty), mask=inside)
    y = (y - mean) * inverse * scale + shift
    tl.store(out + at, launch.cast(y, out.dtype.element_ty), mask=inside)


@triton.jit
def _norm(
    x, residual, weight, bias, out, N, D, x_stride, eps, offset,
    CENTERED: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, BLOCK)
    mean = tl.zeros((ROWS, 1), tl.float32)
    if WHOLE:
        across = columns < D
        inside = (row < N) & across[None, :]
        at = row * D + columns[None, :]
        y = _tile(x, residual, row * x_stride + columns[None, :], at, inside)
        if EARLY:  # on their way while the row is summed, where there are registers for them
            scale, shift = _factors(weight, bias, offset, columns, across)
        if CENTERED:
            mean = (tl.sum(y, axis=1) / D)[:, None]
        centered = tl.where(across[None, :], y - mean, 0.0)
        inverse = tl.rsqrt(tl.sum(centered * centered, axis=1) / D + eps)[:, None]
        if not EARLY:
            scale, shift = _factors(weight, bias, offset, columns, across)
        _write(y, mean, inverse, scale, shift, residual, out, at, inside)
    else:
        if CENTERED:
            total = tl.zeros((ROWS, BLOCK), tl.float32)
            for start in range(0, D, BLOCK):
                column = start + columns
                inside = (row < N) & (column < D)[None, :]
                total += _tile(x, residual, row * x_stride + column[None, :], row * D + column[None, :], inside)
            mean = (tl.sum(total, axis=1) / D)[:, None]
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, D, BLOCK):
            column = start + columns
            inside = (row < N) & (column < D)[None, :]
            y = _tile(x, residual, row * x_stride + column[None, :], row * D + column[None, :], inside)
            centered = tl.where(inside, y - mean, 0.0)
            squares += centered * centered
        inverse = tl.rsqrt(tl.sum(squares, axis=1) / D + eps)[:, None]
        for start in range(0, D, BLOCK):
            column = start + columns
            inside = (row < N) & (column < D)[None, :]
            at = row * D + column[None, :]
            y = _tile(x, residual, row * x_stride + column[None, :], at, inside)
            scale, shift = _factors(weight, bias, offset, column, column < D)
            _write(y, mean, inverse, scale, shift, residual, out, at, inside)


def norm(x, weight, bias, residual, eps, offset, centered):
    """The rows of x, to which the residual was added in place, normalised; `centered` is LayerNorm."""
    launch.require_dtypes(x, weight, bias)
    (N, D), y = matrix_shape(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    a, stream = as_matrix(x), residual if residual is None else residual.contiguous()
    widest = WIDEST // x.element_size()
    whole = widest >= D
    block = launch.block_size(D, widest if whole else min(widest, 4096))
    together = max(1, 1024 // block)  # rows a program
    launch.run(
        _norm,
        (triton.cdiv(N, together),),
        a,
        stream,
        weight.contiguous(),
        bias if bias is None else bias.contiguous(),
        y,
        N,
        D,
        a.stride(0),
        eps,
        offset,
        CENTERED=centered,
        WHOLE=whole,
        EARLY=block <= 8192,
        ROWS=together,
        BLOCK=block,
        num_warps=launch.num_warps_for(together * block),
    )
    copy_back(stream, residual)
    return y
