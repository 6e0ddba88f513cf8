"""rope_store on a GPU: one launch; every number is read once and written once.

A program takes one token and some of its heads: query heads, which it rotates into the output, or key heads, whose keys
and values it writes to the token's slot of a page:

    head         | first half | second half | rest |        two tiles are loaded, so that a thread has both numbers of
                                                            each pair that it rotates; the rest is copied
    program      (token, query heads [0, ROWS)), ..., (token, key heads [0, ROWS)), ...

q, k and v are read in place, for instance from the rows of one projection. A slot outside the caches writes nothing.

Floor: one read and one write of q, k and v. Elements are independent, so the result does not depend on the tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._tensors import contiguous, copy_back
from rlhf_fast.kernels.rope_store import _check_slot_mapping
from rlhf_fast.kernels.triton import launch

TILE = 512  # elements of a half


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


@triton.jit(do_not_specialize=["num_slots"])
def rope_store_kernel(
    q, k, v, cos, sin, k_cache, v_cache, slot_mapping, out, num_slots,
    H: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rotate ROWS query heads of a token, or store ROWS of its keys and values."""
    n = tl.program_id(0).to(tl.int64)
    head_block = tl.program_id(1)
    query_blocks: tl.constexpr = triton.cdiv(H, ROWS)
    cos += n * HALF
    sin += n * HALF
    if head_block < query_blocks:
        head = head_block * ROWS + tl.arange(0, ROWS)
        q_token = q.x + n * q.token_stride
        rotate_heads(q_token, q.head_stride, out + n * H * D, D, cos, sin, head, head < H, D, HALF)
    else:
        head = (head_block - query_blocks) * ROWS + tl.arange(0, ROWS)
        slot = tl.load(slot_mapping + n)
        inside = (head < KV_HEADS) & (slot >= 0) & (slot < num_slots)
        row = slot // PAGE_SIZE * KV_HEADS * PAGE_SIZE + slot % PAGE_SIZE
        k_token = k.x + n * k.token_stride
        v_token = v.x + n * v.token_stride
        rotate_heads(k_token, k.head_stride, k_cache + row * D, PAGE_SIZE * D, cos, sin, head, inside, D, HALF)
        rotate_heads(v_token, v.head_stride, v_cache + row * DV, PAGE_SIZE * DV, cos, sin, head, inside, DV, 0)


def rope_store(q, k, v, cos, sin, k_cache, v_cache, slot_mapping):
    launch.require_dtypes(q, k_cache, cos, sin)
    _check_slot_mapping(slot_mapping, k_cache)
    k_pages, v_pages, cos, sin, slot_mapping = contiguous(k_cache, v_cache, cos, sin, slot_mapping)
    N, H, d = q.shape
    num_pages, kv_heads, page_size, dv = v_pages.shape
    out = torch.empty(N, H, d, dtype=q.dtype, device=q.device)
    half = cos.shape[1]
    rows = max(1, TILE // triton.next_power_of_2(max(half, d - 2 * half, dv // 2, 1)))
    rows = min(rows, triton.next_power_of_2(max(H, kv_heads, 1)))
    meta = {
        "H": H,
        "KV_HEADS": kv_heads,
        "D": d,
        "DV": dv,
        "HALF": half,
        "PAGE_SIZE": page_size,
        "ROWS": rows,
        "num_warps": launch.num_warps_for(TILE, 8),
    }
    grid = (N, triton.cdiv(H, rows) + triton.cdiv(kv_heads, rows))
    inputs = (Heads.of(q), Heads.of(k), Heads.of(v), cos, sin)
    launch.run(rope_store_kernel, grid, *inputs, k_pages, v_pages, slot_mapping, out, num_pages * page_size, **meta)
    copy_back(k_pages, k_cache)
    copy_back(v_pages, v_cache)
    return out
