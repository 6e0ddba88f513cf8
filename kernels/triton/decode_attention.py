"""decode_attention on a GPU: every key and value that a token attends to is read from memory once.

A program takes one token, one key head and up to 16 of the query heads that share it. It walks tiles of keys, which lie
in the pages of the token's row of the block table:

    keys       | split 0: 256 keys | split 1 | ... |        a token's result merges its splits in their order
    split      | tile | tile | tile | tile |                up to 64 keys
    page       | tile | tile | ...         |                page number: block_table[row, position // PAGE_SIZE]

Few tokens: one program per split stores its state, 4 (dv + 2) bytes per query head (1.6 % of what is read if four heads
share 16-bit keys of 128), and a second kernel merges the states. Many tokens: one program merges all splits of its
token, and nothing is stored. Both run the same code, and the merge is written in explicit fused steps. The bits of a
token's result depend on its own keys alone.

Floor: one read of the keys and values. While one tile is multiplied the next two are loaded, as many keys as 64 KiB of
shared memory hold twice: 32 to 64 KiB per program, with two or three programs on an SM, by count; an H100 needs about
40 KiB in flight per SM to read at its full rate. Products of 16-bit queries and keys run on tensor cores, as 16 rows.
The weights are multiplied as the sum of two 16-bit numbers, so that they are not rounded to one. Other dtypes are
multiplied in float32 without tensor cores.

Lengths and pages are read on the device. The grid follows from shapes, and a program without keys reads nothing.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.kernels._tensors import contiguous, empty_float32
from rlhf_fast.kernels.decode_attention import _check_tables
from rlhf_fast.kernels.triton import launch

SPLIT = 256  # keys
MAX_HEAD_DIM = 256
TILE_BYTES = 64 << 10  # of shared memory for the tiles in flight
MAX_FLOAT32_PRODUCTS = 16384  # of queries and keys in float32, in registers at once
MAX_PARTIAL_BYTES = 64 << 20  # of the splits' states, where there are enough tokens to do without
STATES_AT_ONCE = 8  # that the second kernel loads before it merges the first
LOG2_E = 1.4426950408889634
MINUS_INF = tl.constexpr(float("-inf"))
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Cache(NamedTuple):
    """The paged keys and values, and the row of the block table and the number of keys of each token."""

    k: Tensor
    v: Tensor
    block_table: Tensor
    lengths: Tensor
    rows: Tensor


class Partials(NamedTuple):
    """Memory for the states of splits: m and s (..., 2), and acc (..., dv)."""

    sums: Tensor
    acc: Tensor


class State(NamedTuple):
    """The softmax of some keys: the largest score m, in powers of 2, s = sum 2^(score - m), and acc = sum
    2^(score - m) value."""

    m: Tensor
    s: Tensor
    acc: Tensor


@triton.jit
def finite(m):
    """Return m as it is subtracted from scores: 0 before the first score, as -inf - -inf would be NaN."""
    return tl.where(m == MINUS_INF, 0.0, m)


@triton.jit
def merge(first, second):
    """Return the `State` of two groups of keys."""
    m = tl.maximum(first.m, second.m)
    x = tl.exp2(first.m - finite(m))
    y = tl.exp2(second.m - finite(m))
    acc = tl.fma(first.acc, x[:, None], second.acc * y[:, None])
    return State(m, tl.fma(first.s, x, second.s * y), acc)


@triton.jit
def empty_state(HEADS: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return the `State` of no key."""
    m = tl.full((HEADS,), MINUS_INF, tl.float32)
    return State(m, tl.zeros((HEADS,), tl.float32), tl.zeros((HEADS, BLOCK_V), tl.float32))


@triton.jit
def weighted_mean(state, is_empty):
    """Return acc / s, and 0 without keys. Scores that are all -inf give NaN, as a softmax does."""
    return state.acc / tl.where(is_empty, 1.0, state.s)[:, None]


@triton.jit
def key_range(lengths, n, max_length, window):
    """Return the positions [begin, end) that token n attends to."""
    end = tl.minimum(tl.load(lengths + n), max_length)
    return tl.where(window > 0, tl.maximum(end - window, 0), 0), end


@triton.jit
def load_tile(cache, row, valid, D: tl.constexpr, BLOCK: tl.constexpr):
    """Return rows (TILE, BLOCK) of a cache."""
    column = tl.arange(0, BLOCK)[None, :]
    return tl.load(cache + row[:, None] * D + column, mask=valid[:, None] & (column < D), other=0.0)


@triton.jit
def attend_to_tile(
    state, query, keys, values, valid, scale, inverse_softcap,
    SOFTCAP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the `State` of a split after one more tile of keys."""
    if DTYPE == tl.float32:
        score = tl.sum(query[:, None, :] * keys[None, :, :], axis=2)
    else:
        score = launch.dot(query, tl.trans(keys), tl.zeros((HEADS, TILE), tl.float32))
    if SOFTCAP:
        score = launch.tanh(score * inverse_softcap)
    scaled = tl.where(valid[None, :], score * scale, MINUS_INF)
    m = tl.maximum(state.m, tl.max(scaled, axis=1))
    weight = tl.where(valid[None, :], tl.exp2(tl.fma(score, scale, -finite(m)[:, None])), 0.0)
    shrink = tl.exp2(state.m - finite(m))
    s = tl.fma(state.s, shrink, tl.sum(weight, axis=1))
    if DTYPE == tl.float32:
        acc = tl.fma(state.acc, shrink[:, None], tl.sum(weight[:, :, None] * values[None, :, :], axis=1))
    else:
        rounded = launch.cast(weight, DTYPE)
        rest = launch.cast(weight - rounded.to(tl.float32), DTYPE)
        acc = launch.dot(rest, values, launch.dot(rounded, values, state.acc * shrink[:, None]))
    return State(m, s, acc)


@triton.jit(do_not_specialize=["programs_per_head", "keys_per_program", "max_pages", "window"])
def decode_attention_kernel(
    q, cache, out, partials, q_strides, scale, inverse_softcap, programs_per_head, keys_per_program, max_pages, window,
    H: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr, HEAD_BLOCKS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, DTYPE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store the result of a token for HEADS query heads, or the state of one of its splits in `partials`.

    scale: what a score is multiplied by (after the softcap's tanh), times log2(e)."""
    head_block = tl.program_id(0) % HEAD_BLOCKS
    kv_head = tl.program_id(1)
    n = (tl.program_id(0) // HEAD_BLOCKS // programs_per_head).to(tl.int64)
    split = tl.program_id(0) // HEAD_BLOCKS % programs_per_head
    begin, end = key_range(cache.lengths, n, max_pages * PAGE_SIZE, window)
    low = tl.maximum(begin, split * keys_per_program)
    high = tl.minimum(end, split * keys_per_program + keys_per_program)
    pages = cache.block_table + tl.load(cache.rows + n).to(tl.int64) * max_pages
    GROUP: tl.constexpr = H // KV_HEADS
    group_head = head_block * HEADS + tl.arange(0, HEADS)
    head = kv_head * GROUP + group_head
    inside = group_head < GROUP
    column = tl.arange(0, BLOCK)[None, :]
    column_v = tl.arange(0, BLOCK_V)[None, :]
    loads_query = (inside & (low < high))[:, None] & (column < D)
    query_index = n * q_strides[0] + head[:, None] * q_strides[1] + column
    query = tl.load(q + query_index, mask=loads_query, other=0.0).to(DTYPE)
    split_state = empty_state(HEADS, BLOCK_V)
    state = empty_state(HEADS, BLOCK_V)
    page = tl.load(pages + low // PAGE_SIZE, mask=low < high, other=0)
    for start in tl.range(low // TILE * TILE, high, TILE, num_stages=STAGES):
        position = start + tl.arange(0, TILE)
        valid = (position >= low) & (position < high)
        if PAGE_SIZE % TILE == 0:  # a tile is in one page, whose number is loaded a tile ahead
            row = (page.to(tl.int64) * KV_HEADS + kv_head) * PAGE_SIZE + position % PAGE_SIZE
            next_start = start + TILE
            page = tl.load(pages + next_start // PAGE_SIZE, mask=next_start < high, other=0)
        else:
            key_page = tl.load(pages + position // PAGE_SIZE, mask=valid, other=0).to(tl.int64)
            row = (key_page * KV_HEADS + kv_head) * PAGE_SIZE + position % PAGE_SIZE
        keys = load_tile(cache.k, row, valid, D, BLOCK).to(DTYPE)
        values = load_tile(cache.v, row, valid, DV, BLOCK_V).to(DTYPE)
        is_new_split = start % SPLIT == 0
        merged = merge(state, split_state)
        state = State(
            tl.where(is_new_split, merged.m, state.m),
            tl.where(is_new_split, merged.s, state.s),
            tl.where(is_new_split, merged.acc, state.acc),
        )
        split_state = State(
            tl.where(is_new_split, MINUS_INF, split_state.m),
            tl.where(is_new_split, 0.0, split_state.s),
            tl.where(is_new_split, 0.0, split_state.acc),
        )
        split_state = attend_to_tile(
            split_state, query, keys, values, valid, scale, inverse_softcap, SOFTCAP, HEADS, TILE, DTYPE
        )
    state = merge(state, split_state)
    place = n * H + head
    if programs_per_head > 1:
        place = place * programs_per_head + split
        mask = inside & (low < high)
        tl.store(partials.sums + 2 * place, state.m, mask=mask)
        tl.store(partials.sums + 2 * place + 1, state.s, mask=mask)
        tl.store(partials.acc + place[:, None] * DV + column_v, state.acc, mask=mask[:, None] & (column_v < DV))
    else:
        y = launch.cast(weighted_mean(state, low >= high), out.dtype.element_ty)
        tl.store(out + place[:, None] * DV + column_v, y, mask=inside[:, None] & (column_v < DV))


@triton.jit(do_not_specialize=["splits", "max_length", "window"])
def decode_attention_merge_kernel(
    partials, lengths, out, splits, max_length, window, H,
    DV: tl.constexpr, BLOCK_V: tl.constexpr, SPLIT: tl.constexpr, STATES_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query head of a token."""
    n = tl.program_id(0).to(tl.int64)
    place = n * H + tl.program_id(1)
    column = tl.arange(0, BLOCK_V)[None, :]
    begin, end = key_range(lengths, n, max_length, window)
    state = empty_state(1, BLOCK_V)
    last = tl.cdiv(end, SPLIT)
    for first in range(begin // SPLIT, last, STATES_AT_ONCE):
        for i in tl.static_range(STATES_AT_ONCE):
            split = first + i + tl.arange(0, 1)
            index = place * splits + split
            exists = split < last
            m = tl.load(partials.sums + 2 * index, mask=exists, other=MINUS_INF)
            s = tl.load(partials.sums + 2 * index + 1, mask=exists, other=0.0)
            mask = exists[:, None] & (column < DV)
            acc = tl.load(partials.acc + index[:, None] * DV + column, mask=mask, other=0.0)
            state = merge(state, State(m, s, acc))
    y = launch.cast(weighted_mean(state, begin >= end), out.dtype.element_ty)
    tl.store(out + place * DV + column, y, mask=column < DV)


def tile_meta(group: int, page_size: int, d: int, dv: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> dict:
    """Return the heads of a program, the keys of a tile, warps and stages. They depend on the model alone, so that the
    bits of a result do too."""
    block = launch.block_size(max(d, dv))
    tile = max(16, min(64, TILE_BYTES // (4 * block * dtype.itemsize)))
    if dtype == torch.float32:
        heads = min(triton.next_power_of_2(group), max(1, min(8, 1024 // block)))
        tile = max(16, min(tile, MAX_FLOAT32_PRODUCTS // (heads * block)))
        warps, stages = 8, 3
    else:
        heads, warps = 16, 4
        stages = 3 if page_size % tile == 0 else 5
    if d * cache_dtype.itemsize % 16 or dv * cache_dtype.itemsize % 16:  # elements are loaded one by one
        tile, stages = 16, 1
    return {"HEADS": heads, "TILE": tile, "STAGES": launch.num_stages_for(stages), "num_warps": warps}


def choose_programs_per_head(N: int, H: int, kv_heads: int, dv: int, splits: int, x: Tensor) -> int:
    """Return the number of programs for each token and key head: one for each split, or one for all."""
    programs_per_sm = N * kv_heads / launch.num_sms(x)
    partial_bytes = 4 * N * H * splits * (dv + 2)
    if programs_per_sm < 2 or (programs_per_sm < 16 and partial_bytes <= MAX_PARTIAL_BYTES):
        return splits
    return 1


def decode_attention(q, k_cache, v_cache, block_table, lengths, rows, scale, window, softcap):
    launch.require_dtypes(q, k_cache)
    N, H, d = q.shape
    _, kv_heads, page_size, dv = v_cache.shape
    max_pages = block_table.shape[1]
    max_length = max_pages * page_size
    if max(d, dv) > MAX_HEAD_DIM:
        raise Unsupported(f"no Triton kernel for heads wider than {MAX_HEAD_DIM}, got {max(d, dv)}")
    _check_tables(k_cache, block_table, lengths, rows, window)
    dtype = k_cache.dtype if q.dtype == k_cache.dtype else torch.float32
    tile = tile_meta(H // kv_heads, page_size, d, dv, dtype, k_cache.dtype)
    head_blocks = triton.cdiv(H // kv_heads, tile["HEADS"])
    splits = max(1, triton.cdiv(max_length, SPLIT))
    programs_per_head = choose_programs_per_head(N, H, kv_heads, dv, splits, q)
    num_partials = N * H * programs_per_head if programs_per_head > 1 else 0
    partials = Partials(empty_float32(q, num_partials, 2), empty_float32(q, num_partials, dv))
    out = torch.empty(N, H, dv, dtype=q.dtype, device=q.device)
    q = q if q.stride(2) == 1 else q.contiguous()
    cache = Cache(*contiguous(k_cache, v_cache, block_table, lengths, rows))
    keys_per_program = SPLIT if programs_per_head > 1 else max_length
    scales = ((softcap or scale) * LOG2_E, scale / softcap if softcap else 1.0)
    sizes = (programs_per_head, keys_per_program, max_pages, window)
    block_v = launch.block_size(dv)
    meta = {
        "H": H,
        "KV_HEADS": kv_heads,
        "D": d,
        "DV": dv,
        "PAGE_SIZE": page_size,
        "SOFTCAP": softcap > 0,
        "HEAD_BLOCKS": head_blocks,
        "BLOCK": launch.block_size(d),
        "BLOCK_V": block_v,
        "SPLIT": SPLIT,
        "DTYPE": TRITON_DTYPES[dtype],
        **tile,
    }
    grid = (N * programs_per_head * head_blocks, kv_heads)
    launch.run(decode_attention_kernel, grid, q, cache, out, partials, q.stride()[:2], *scales, *sizes, **meta)
    if programs_per_head > 1:
        meta = {"DV": dv, "BLOCK_V": block_v, "SPLIT": SPLIT, "STATES_AT_ONCE": STATES_AT_ONCE, "num_warps": 1}
        sizes = (programs_per_head, max_length, window, H)
        launch.run(decode_attention_merge_kernel, (N, H), partials, cache.lengths, out, *sizes, **meta)
    return out
