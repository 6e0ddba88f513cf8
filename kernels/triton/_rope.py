"""Heads of tokens and their rotation on a GPU, for rope and rope_store. Not an op."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.triton import launch

TILE = 512  # elements of a half
NUM_WARPS = launch.num_warps_for(TILE, 8)


class Heads(NamedTuple):
    """Heads of the tokens (N, heads, d), with contiguous heads."""

    x: Tensor
    token_stride: int
    head_stride: int

    @staticmethod
    def of(x: Tensor) -> "Heads":
        x = x if x.stride(2) == 1 else x.contiguous()
        return Heads(x, x.stride(0), x.stride(1))


@triton.jit
def rotate_heads(x, x_stride, y, y_stride, cos, sin, head, inside, D: tl.constexpr, HALF: tl.constexpr):
    """Store the heads of x in y, their first 2 HALF of D elements rotated."""
    x += head[:, None] * x_stride
    y += head[:, None] * y_stride
    if HALF:
        BLOCK: tl.constexpr = triton.next_power_of_2(HALF)
        column = tl.arange(0, BLOCK)[None, :]
        in_half = column < HALF
        mask = inside[:, None] & in_half
        c = tl.load(cos + column, mask=in_half, other=0.0).to(tl.float32)
        s = tl.load(sin + column, mask=in_half, other=0.0).to(tl.float32)
        a = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + HALF + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + column, launch.cast(a * c - b * s, y.dtype.element_ty), mask=mask)
        tl.store(y + HALF + column, launch.cast(b * c + a * s, y.dtype.element_ty), mask=mask)
    if 2 * HALF < D:
        REST: tl.constexpr = triton.next_power_of_2(D - 2 * HALF)
        column = 2 * HALF + tl.arange(0, REST)[None, :]
        mask = inside[:, None] & (column < D)
        rest = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + column, launch.cast(rest, y.dtype.element_ty), mask=mask)


def heads_per_program(num_heads: int, *widths: int) -> int:
    """Return how many heads a program takes at once, of which it holds tiles of these widths."""
    return min(max(1, TILE // triton.next_power_of_2(max(*widths, 1))), triton.next_power_of_2(max(num_heads, 1)))
