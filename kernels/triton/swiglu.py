"""swiglu on a GPU: one program per tile of a row, in one pass. Rows with gaps between them are read in place.

    program (i, j)    row i, columns [j BLOCK, (j + 1) BLOCK)

Floor: two reads and one write per element. Elements are independent, so the result does not depend on the tiles.
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
