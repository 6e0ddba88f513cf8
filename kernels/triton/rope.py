"""rope on a GPU: a program takes one token and some of its heads, which are read in place, whatever their strides.

    head         | first half | second half | rest |        two tiles are loaded, so that a thread has both numbers of
                                                            each pair that it rotates; the rest is copied

Floor: one read and one write of x. Elements are independent, so the result does not depend on the tiles.
"""

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._tensors import contiguous
from rlhf_fast.kernels.triton import launch
from rlhf_fast.kernels.triton._rope import NUM_WARPS, Heads, heads_per_program, rotate_heads


@triton.jit
def rope_kernel(
    x, cos, sin, out, H: tl.constexpr, NUM_ROTATED: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Rotate ROWS heads of a token; those from NUM_ROTATED on are copied."""
    n = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = x.x + n * x.token_stride
    y = out + n * H * D
    is_rotated = head < NUM_ROTATED
    rotate_heads(token, x.head_stride, y, D, cos + n * HALF, sin + n * HALF, head, is_rotated, D, HALF)
    if NUM_ROTATED < H:
        rotate_heads(token, x.head_stride, y, D, cos, sin, head, (head < H) & (head >= NUM_ROTATED), D, 0)


def rope(x, cos, sin, num_rotated):
    launch.require_dtypes(x, cos, sin)
    cos, sin = contiguous(cos, sin)
    N, H, d = x.shape
    half = cos.shape[1]
    out = torch.empty((N, H, d), dtype=x.dtype, device=x.device)
    rows = heads_per_program(H, half, d - 2 * half)
    meta = {"H": H, "NUM_ROTATED": num_rotated, "D": d, "HALF": half, "ROWS": rows, "num_warps": NUM_WARPS}
    launch.run(rope_kernel, (N, triton.cdiv(H, rows)), Heads.of(x), cos, sin, out, **meta)
    return out
