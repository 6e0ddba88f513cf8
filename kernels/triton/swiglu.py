"""swiglu on a GPU: a program a tile of a row, two reads and one write an element; rows are read where they lie."""

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._tensors import as_matrix
from rlhf_fast.kernels.triton import launch


@triton.jit
def _kernel(gate, up, out, F, gate_stride, up_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    y = g / (1.0 + tl.exp(-g)) * u
    tl.store(out + row * F + column, launch.cast(y, out.dtype.element_ty), mask=inside)


def swiglu(gate, up):
    launch.require_dtypes(gate)
    a, b, y = as_matrix(gate), as_matrix(up), torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    (N, F), block = a.shape, launch.block_size(gate.shape[-1], 1024)
    launch.run(
        _kernel,
        (N, triton.cdiv(F, block)),
        a,
        b,
        y,
        F,
        a.stride(0),
        b.stride(0),
        BLOCK=block,
        num_warps=launch.num_warps_for(block, 8),
    )
    return y
