"""The gradients of RMSNorm and LayerNorm on a GPU: one kernel for the rows, and one that adds up their sums. Not an op.

    rows | program 0: rows_per_program rows | program 1 | ...     a program keeps its sums of grad * n and of grad in
    sums | (D,) of program 0                | program 1 | ...     registers, or for wide rows in its own memory

With n = (x - mean) / std and a = grad (weight + offset), for RMSNorm with mean = 0 and no mean of a:

    x      (a - mean of a - n mean of (a n)) / std        weight    the sum of grad n        bias    the sum of grad

and to that of x a residual stream's gradient is added, if there is one.

The statistics are computed again. There are no atomics: the second kernel adds up the programs in their order. Their
number follows from N and the GPU, so the bits of the sums repeat on one kind of GPU. Floor: two reads and one write of
x's bytes, and one read of a residual gradient; wide rows are read again from the caches.
"""

import triton
import triton.language as tl

from rlhf_fast.kernels._tensors import contiguous, empty_float32, matrix_shape
from rlhf_fast.kernels.triton import launch

MAX_COLUMNS = 8192  # of a row that is held in registers, with its sums
PROGRAMS_PER_SM = 8
SUM_ROWS = 128
SUM_COLUMNS = 16


@triton.jit
def load_rows(x, grad, index, inside):
    """Return x and the gradient of the output, in float32."""
    v = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    return v, tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def add_residual(y, residual_grad, index, inside):
    """Return y plus the gradient of the residual stream, if there is one."""
    if residual_grad is not None:
        y += tl.load(residual_grad + index, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def load_scale(weight, offset, column, D):
    """Return the factor of each column, weight + offset."""
    return (tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32) + offset)[None, :]


@triton.jit
def add_in_memory(sums, column, inside, part):
    """Add the sum over the rows of `part` to the program's own sums in memory."""
    total = tl.load(sums + column, mask=inside, other=0.0) + tl.sum(part, axis=0)
    tl.store(sums + column, total, mask=inside)


@triton.jit(do_not_specialize=["N", "rows_per_program"])
def norm_backward_kernel(
    x, grad, residual_grad, weight, x_grad, weight_sums, bias_sums, N, rows_per_program, D, eps, offset,
    CENTERED: tl.constexpr, IN_REGISTERS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the gradients of the program's rows, ROWS of them at a time, and its sums. CENTERED: LayerNorm."""
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, N)
    columns = tl.arange(0, BLOCK)
    if IN_REGISTERS:
        in_row = columns < D
        scale = load_scale(weight, offset, columns, D)
        weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
        bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
        for step in range(0, rows_per_program, ROWS):
            row = (first + step + tl.arange(0, ROWS))[:, None]
            inside = (row < last) & in_row[None, :]
            index = row * D + columns[None, :]
            v, g = load_rows(x, grad, index, inside)
            scaled = g * scale
            mean = tl.zeros((ROWS, 1), tl.float32)
            mean_scaled = mean
            if CENTERED:
                mean = (tl.sum(v, axis=1) / D)[:, None]
                mean_scaled = (tl.sum(scaled, axis=1) / D)[:, None]
            centered = tl.where(inside, v - mean, 0.0)
            inverse_std = tl.rsqrt(tl.sum(centered * centered, axis=1) / D + eps)[:, None]
            normalized = tl.where(inside, centered * inverse_std, 0.0)
            projection = (tl.sum(scaled * normalized, axis=1) / D)[:, None]
            factor = tl.where(CENTERED & (D == 1), 0.0, inverse_std)
            y = factor * (scaled - mean_scaled - normalized * projection)
            y = add_residual(y, residual_grad, index, inside)
            tl.store(x_grad + index, launch.cast(y, x_grad.dtype.element_ty), mask=inside)
            if weight_sums is not None:
                weight_sum += g * normalized
            if bias_sums is not None:
                bias_sum += g
        if weight_sums is not None:
            tl.store(weight_sums + program * D + columns, tl.sum(weight_sum, axis=0), mask=in_row)
        if bias_sums is not None:
            tl.store(bias_sums + program * D + columns, tl.sum(bias_sum, axis=0), mask=in_row)
    else:
        weight_row = weight_sums
        bias_row = bias_sums
        if weight_sums is not None:
            weight_row += program * D
        if bias_sums is not None:
            bias_row += program * D
        for start in range(0, D, BLOCK):
            column = start + columns
            if weight_sums is not None:
                tl.store(weight_row + column, tl.zeros((BLOCK,), tl.float32), mask=column < D)
            if bias_sums is not None:
                tl.store(bias_row + column, tl.zeros((BLOCK,), tl.float32), mask=column < D)
        for step in range(0, rows_per_program, ROWS):
            row = (first + step + tl.arange(0, ROWS))[:, None]
            mean = tl.zeros((ROWS, 1), tl.float32)
            mean_scaled = mean
            if CENTERED:
                total = tl.zeros((ROWS, BLOCK), tl.float32)
                total_scaled = tl.zeros((ROWS, BLOCK), tl.float32)
                for start in range(0, D, BLOCK):
                    column = start + columns
                    inside = (row < last) & (column < D)[None, :]
                    v, g = load_rows(x, grad, row * D + column[None, :], inside)
                    total += v
                    total_scaled += g * load_scale(weight, offset, column, D)
                mean = (tl.sum(total, axis=1) / D)[:, None]
                mean_scaled = (tl.sum(total_scaled, axis=1) / D)[:, None]
            squares = tl.zeros((ROWS, BLOCK), tl.float32)
            products = tl.zeros((ROWS, BLOCK), tl.float32)
            for start in range(0, D, BLOCK):
                column = start + columns
                inside = (row < last) & (column < D)[None, :]
                v, g = load_rows(x, grad, row * D + column[None, :], inside)
                centered = tl.where(inside, v - mean, 0.0)
                squares += centered * centered
                products += centered * (g * load_scale(weight, offset, column, D))
            inverse_std = tl.rsqrt(tl.sum(squares, axis=1) / D + eps)[:, None]
            projection = inverse_std * (tl.sum(products, axis=1) / D)[:, None]
            for start in range(0, D, BLOCK):
                column = start + columns
                inside = (row < last) & (column < D)[None, :]
                index = row * D + column[None, :]
                v, g = load_rows(x, grad, index, inside)
                normalized = tl.where(inside, (v - mean) * inverse_std, 0.0)
                y = inverse_std * (g * load_scale(weight, offset, column, D) - mean_scaled - normalized * projection)
                y = add_residual(y, residual_grad, index, inside)
                tl.store(x_grad + index, launch.cast(y, x_grad.dtype.element_ty), mask=inside)
                if weight_sums is not None:
                    add_in_memory(weight_row, column, column < D, g * normalized)
                if bias_sums is not None:
                    add_in_memory(bias_row, column, column < D, g)


@triton.jit(do_not_specialize=["P"])
def norm_sums_kernel(sums, out, P, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Store the sum of sums (P, D) over its rows, for BLOCK columns."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, P, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < P) & (column < D)[None, :]
        total += tl.load(sums + row * D + column[None, :], mask=inside, other=0.0)
    tl.store(out + column, launch.cast(tl.sum(total, axis=0), out.dtype.element_ty), mask=column < D)


def norm_backward(grad, residual_grad, x, weight, eps, offset, grads, is_centered):
    """Store in `grads` the gradients of x (..., D), the weight and, for LayerNorm, the bias, unless they are empty.

    is_centered: LayerNorm, otherwise RMSNorm."""
    launch.require_dtypes(x, weight, *grads)
    N, D = matrix_shape(x)
    grad, residual_grad, x, weight = contiguous(grad, residual_grad, x, weight)
    in_registers = D <= MAX_COLUMNS
    block = launch.block_size(D, MAX_COLUMNS if in_registers else 2048)
    rows = max(1, 1024 // block)
    rows_per_program = max(1, triton.cdiv(N, PROGRAMS_PER_SM * launch.num_sms(x)))
    rows_per_program = triton.cdiv(rows_per_program, rows) * rows
    programs = triton.cdiv(N, rows_per_program)
    x_grad, *vectors = grads
    sums = [empty_float32(x, programs, D) if len(vector) else None for vector in vectors]
    weight_sums, bias_sums = sums if is_centered else (*sums, None)
    meta = {
        "CENTERED": is_centered,
        "IN_REGISTERS": in_registers,
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": launch.num_warps_for(rows * block, 8),
    }
    options = (N, rows_per_program, D, eps, offset)
    tensors = x, grad, residual_grad, weight, x_grad, weight_sums, bias_sums
    launch.run(norm_backward_kernel, (programs,), *tensors, *options, **meta)
    for part, vector in zip(sums, vectors, strict=True):
        if part is not None:
            grid = (triton.cdiv(D, SUM_COLUMNS),)
            launch.run(norm_sums_kernel, grid, part, vector, programs, D, ROWS=SUM_ROWS, BLOCK=SUM_COLUMNS, num_warps=4)
