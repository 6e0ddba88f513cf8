"""rope_store on a GPU: one launch; every number is read once and written once.

A program takes one token and some of its heads: query heads, which it rotates into the output, or key heads, whose keys
and values it writes to the token's slot of a page:

    head         | first half | second half | rest |        two tiles are loaded, so that a thread has both numbers of
                                                            each pair that it rotates; the rest is copied
    program      (token, query heads [0, ROWS)), ..., (token, key heads [0, ROWS)), ...

q, k and v are read in place, for instance from the rows of one projection. A slot outside the caches writes nothing.

Floor: one read and one write of q, k and v. Elements are independent, so the result does not depend on the tiles.
"""

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._tensors import contiguous, copy_back
from rlhf_fast.kernels.rope_store import _check_slot_mapping
from rlhf_fast.kernels.triton import launch
from rlhf_fast.kernels.triton._rope import NUM_WARPS, Heads, heads_per_program, rotate_heads


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
    rows = heads_per_program(max(H, kv_heads), half, d - 2 * half, dv // 2)
    meta = {
        "H": H,
        "KV_HEADS": kv_heads,
        "D": d,
        "DV": dv,
        "HALF": half,
        "PAGE_SIZE": page_size,
        "ROWS": rows,
        "num_warps": NUM_WARPS,
    }
    grid = (N, triton.cdiv(H, rows) + triton.cdiv(kv_heads, rows))
    inputs = (Heads.of(q), Heads.of(k), Heads.of(v), cos, sin)
    launch.run(rope_store_kernel, grid, *inputs, k_pages, v_pages, slot_mapping, out, num_pages * page_size, **meta)
    copy_back(k_pages, k_cache)
    copy_back(v_pages, v_cache)
    return out
