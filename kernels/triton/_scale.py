"""Multiply a tensor by a number that is on the device, unless it is 1. Not an op.

The gradients that a loss's forward pass made are multiplied by the gradient of the loss, which is 1 unless somebody
scales the loss: then each program reads that number and ends, instead of reading and writing the tensor once more. The
host does not wait for the number.
"""

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.triton import launch

BLOCK = 4096
PROGRAMS_PER_SM = 8


@triton.jit
def scale_kernel(x, factor, N, BLOCK: tl.constexpr):
    """Multiply x (N,) by the number `factor`, unless it is 1."""
    f = tl.load(factor).to(tl.float32)
    if f != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, N, tl.num_programs(0) * BLOCK):
            index = start + tl.arange(0, BLOCK)
            y = tl.load(x + index, mask=index < N, other=0.0).to(tl.float32)
            tl.store(x + index, launch.cast(f * y, x.dtype.element_ty), mask=index < N)


def can_scale(x: Tensor) -> bool:
    """Return whether `scale_in_place` serves x."""
    return x.dtype in launch.FLOATS and x.is_contiguous()


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """Multiply dense x by `factor`, a tensor of one element on the same device."""
    N = x.numel()
    programs = min(triton.cdiv(N, BLOCK), PROGRAMS_PER_SM * launch.num_sms(x))
    meta = {"BLOCK": BLOCK, "num_warps": launch.num_warps_for(BLOCK)}
    launch.run(scale_kernel, (programs,), x, factor, N, **meta)
