"""rope_store on a GPU: one launch, every number read once and written once.

A program takes one token and some of its heads: of the queries, which it rotates into the output, or of the keys and
values, which it writes into the token's place of a page. The two halves of a head are read as two tiles, so that a
thread holds both numbers of each pair it turns. q, k and v are read as they lie, for instance side by side in the rows
of one projection. A slot that is no place of the caches writes nothing.
"""

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._tensors import copy_back
from rlhf_fast.kernels.rope_store import _check_slots
from rlhf_fast.kernels.triton import launch

TILE = 512


@triton.jit
def _turn(x, x_stride, y, y_stride, cos, sin, head, inside, D: tl.constexpr, HALF: tl.constexpr):
    """The rows `head` of x to those of y: the first 2 HALF of D columns rotated, the rest as they are."""
    x, y = x + head[:, None] * x_stride, y + head[:, None] * y_stride
    if HALF:
        block: tl.constexpr = triton.next_power_of_2(HALF)
        column = tl.arange(0, block)[None, :]
        across = column < HALF
        mask = inside[:, None] & across
        c = tl.load(cos + column, mask=across, other=0.0).to(tl.float32)
        s = tl.load(sin + column, mask=across, other=0.0).to(tl.float32)
        a = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + HALF + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + column, launch.cast(a * c - b * s, y.dtype.element_ty), mask=mask)
        tl.store(y + HALF + column, launch.cast(b * c + a * s, y.dtype.element_ty), mask=mask)
    if 2 * HALF < D:
        rest: tl.constexpr = triton.next_power_of_2(D - 2 * HALF)
        column = 2 * HALF + tl.arange(0, rest)[None, :]
        mask = inside[:, None] & (column < D)
        kept = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + column, launch.cast(kept, y.dtype.element_ty), mask=mask)


@triton.jit
def _kernel(
    q, k, v, cos, sin, k_cache, v_cache, slots, out, places, q_token, q_head, k_token, k_head, v_token, v_head,
    H: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts: tl.constexpr = triton.cdiv(H, ROWS)
    cos, sin = cos + n * HALF, sin + n * HALF
    if part < parts:
        head = part * ROWS + tl.arange(0, ROWS)
        _turn(q + n * q_token, q_head, out + n * H * D, D, cos, sin, head, head < H, D, HALF)
    else:
        head = (part - parts) * ROWS + tl.arange(0, ROWS)
        slot = tl.load(slots + n)
        inside = (head < KV_HEADS) & (slot >= 0) & (slot < places)
        row = slot // P * KV_HEADS * P + slot % P
        _turn(k + n * k_token, k_head, k_cache + row * D, P * D, cos, sin, head, inside, D, HALF)
        _turn(v + n * v_token, v_head, v_cache + row * DV, P * DV, cos, sin, head, inside, DV, 0)


def rope_store(q, k, v, cos, sin, k_cache, v_cache, slots):
    launch.require_dtypes(q, k_cache, cos, sin)
    _check_slots(slots, k_cache)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    k_held, v_held = k_cache.contiguous(), v_cache.contiguous()
    (N, H, d), (pages, kv_heads, P, dv) = q.shape, v_cache.shape
    out = torch.empty(N, H, d, dtype=q.dtype, device=q.device)
    half = cos.shape[1]
    together = max(1, TILE // triton.next_power_of_2(max(half, d - 2 * half, dv // 2, 1)))
    together = min(together, triton.next_power_of_2(max(H, kv_heads, 1)))
    launch.run(
        _kernel,
        (N, triton.cdiv(H, together) + triton.cdiv(kv_heads, together)),
        q,
        k,
        v,
        cos.contiguous(),
        sin.contiguous(),
        k_held,
        v_held,
        slots.contiguous(),
        out,
        pages * P,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        H=H,
        KV_HEADS=kv_heads,
        D=d,
        DV=dv,
        HALF=half,
        P=P,
        ROWS=together,
        num_warps=launch.num_warps_for(TILE, 8),
    )
    copy_back(k_held, k_cache)
    copy_back(v_held, v_cache)
    return out
