"""swiglu and its gradients on a GPU: one program per tile of a row, in one pass. Strided rows are read in place.

    program (i, j)    row i, columns [j BLOCK, (j + 1) BLOCK)

Floor: two reads and one write per element; of the gradients three reads and two writes. Elements are independent, so
the result does not depend on the tiles.
"""

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._tensors import as_matrix
from rlhf_fast.kernels.triton import launch


@triton.jit
def swiglu_kernel(gate, up, out, D, gate_stride, up_stride, BLOCK: tl.constexpr):
    """Store gate sigmoid(gate) up of the program's tile."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    y = g / (1.0 + tl.exp(-g)) * u
    tl.store(out + row * D + column, launch.cast(y, out.dtype.element_ty), mask=inside)


def swiglu(gate, up):
    launch.require_dtypes(gate)
    gate_rows, up_rows = as_matrix(gate), as_matrix(up)
    N, D = gate_rows.shape
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    block = launch.block_size(D, 1024)
    sizes = (D, gate_rows.stride(0), up_rows.stride(0))
    meta = {"BLOCK": block, "num_warps": launch.num_warps_for(block, 8)}
    launch.run(swiglu_kernel, (N, triton.cdiv(D, block)), gate_rows, up_rows, out, *sizes, **meta)
    return out


@triton.jit
def swiglu_backward_kernel(grad, gate, up, out, D, grad_stride, gate_stride, up_stride, BLOCK: tl.constexpr):
    """Store the gradients of the program's tile of gate, and D columns further those of up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    dy = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    e = tl.exp(tl.where(g < -88.0, 88.0, -g))  # bounded: it must not become 0 times infinity
    s = 1.0 / (1.0 + e)
    out += row * (2 * D)
    gate_grad = dy * u * (s * (1.0 + g * (e * s)))
    tl.store(out + column, launch.cast(gate_grad, out.dtype.element_ty), mask=inside)
    tl.store(out + D + column, launch.cast(dy * (g * s), out.dtype.element_ty), mask=inside)


def swiglu_backward(grad, gate, up):
    launch.require_dtypes(gate)
    grad_rows, gate_rows, up_rows = as_matrix(grad), as_matrix(gate), as_matrix(up)
    N, D = gate_rows.shape
    out = torch.empty((*gate.shape[:-1], 2 * D), dtype=gate.dtype, device=gate.device)
    block = launch.block_size(D, 1024)
    sizes = (D, grad_rows.stride(0), gate_rows.stride(0), up_rows.stride(0))
    meta = {"BLOCK": block, "num_warps": launch.num_warps_for(block, 8)}
    grid = (N, triton.cdiv(D, block))
    launch.run(swiglu_backward_kernel, grid, grad_rows, gate_rows, up_rows, out, *sizes, **meta)
    return out
