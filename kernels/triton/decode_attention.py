"""decode_attention on a GPU: every key and value that a token reads comes from memory once.

A program takes one token, one key head and the query heads that share it, up to 16 of them. It walks tiles of up to 64
keys, as many as 64 KiB of shared memory hold twice: while one is multiplied the next two are on their way, 32 to 64 KiB
a program with two or three programs on a multiprocessor, by count; an H100 needs some 40 KiB under way on each to read
at its full rate. Products of 16-bit queries and caches run on tensor cores, as 16 rows; the weights go there as the sum
of two 16-bit numbers, so that they are not rounded to one. Anything else is multiplied in float32, number by number.

Keys come in splits of 256, cut at its multiples: of each the largest score (top), the sum of e^(score - top), and that
of e^(score - top) value. A token's result is the left fold of its splits. Few tokens: a program a split, whose state
goes to memory (4 (dv + 2) bytes a query head, 1.6 % of what is read where four share 16-bit keys of 128) for a second
kernel that folds them. Many tokens: a program folds all splits of its token, and nothing is kept. Both run the same
code, and the fold is written in explicit fused steps: the bits depend on the token's own keys alone. Lengths and pages
are read on the device; the grid comes from shapes, and a program without keys reads nothing.
"""

import torch
import triton
import triton.language as tl

from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.kernels.decode_attention import _check_tables
from rlhf_fast.kernels.triton import launch

SPLIT = 256
WIDEST = 256
ROOM = 64 << 10  # bytes of shared memory for the tiles under way
PRODUCTS = 16384  # of queries and keys in float32, in registers at once
SCRATCH = 64 << 20  # bytes of the splits' results, where tokens are many enough to do without
TOGETHER = 8  # splits whose results the second kernel reads at once
LOG2_E = 1.4426950408889634
_LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def _finite(top):
    """What is subtracted from the exponents: no score yet, and -inf - -inf would be NaN."""
    return tl.where(top == _LOWEST, 0.0, top)


@triton.jit
def _fold(top, total, sums, next_top, next_total, next_sums):
    """The state of some splits, and of the one that follows, as one."""
    most = tl.maximum(top, next_top)
    x, y = tl.exp2(top - _finite(most)), tl.exp2(next_top - _finite(most))
    return most, tl.fma(total, x, next_total * y), tl.fma(sums, x[:, None], next_sums * y[:, None])


@triton.jit
def _divided(total, sums, empty):
    """The weighted mean; 0 without keys. Scores that are all -inf give NaN, as a softmax does."""
    return sums / tl.where(empty, 1.0, total)[:, None]


@triton.jit
def _reads(lengths, n, most, window):
    """The positions that token n reads: from, and to."""
    end = tl.minimum(tl.load(lengths + n), most)
    return tl.where(window > 0, tl.maximum(end - window, 0), 0), end


@triton.jit
def _tile(cache, row, valid, D: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    return tl.load(cache + row[:, None] * D + column, mask=valid[:, None] & (column < D), other=0.0)


@triton.jit(do_not_specialize=["parts", "walk", "M", "window"])
def _attend(
    q, k_cache, v_cache, table, lengths, rows, out, kept_states, kept_sums, parts, walk, M, window, inverse, factor,
    q_token, q_head, H: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, P: tl.constexpr,
    SOFTCAP: tl.constexpr, CHUNKS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, NUMBER: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunk, kv = tl.program_id(0) % CHUNKS, tl.program_id(1)
    n, part = (tl.program_id(0) // CHUNKS // parts).to(tl.int64), tl.program_id(0) // CHUNKS % parts
    begin, end = _reads(lengths, n, M * P, window)
    low, high = tl.maximum(begin, part * walk), tl.minimum(end, part * walk + walk)
    pages = table + tl.load(rows + n).to(tl.int64) * M
    G: tl.constexpr = H // KV_HEADS
    mine = chunk * HEADS + tl.arange(0, HEADS)
    head, inside = kv * G + mine, mine < G
    column, column_v = tl.arange(0, BLOCK)[None, :], tl.arange(0, BLOCK_V)[None, :]
    asked = (inside & (low < high))[:, None] & (column < D)
    query = tl.load(q + n * q_token + head[:, None] * q_head + column, mask=asked, other=0.0).to(NUMBER)
    top, whole_top = tl.full((HEADS,), _LOWEST, tl.float32), tl.full((HEADS,), _LOWEST, tl.float32)
    total, whole_total = tl.zeros((HEADS,), tl.float32), tl.zeros((HEADS,), tl.float32)
    sums, whole_sums = tl.zeros((HEADS, BLOCK_V), tl.float32), tl.zeros((HEADS, BLOCK_V), tl.float32)
    page = tl.load(pages + low // P, mask=low < high, other=0)
    for start in tl.range(low // TILE * TILE, high, TILE, num_stages=STAGES):
        position = start + tl.arange(0, TILE)
        valid = (position >= low) & (position < high)
        if P % TILE == 0:
            row = (page.to(tl.int64) * KV_HEADS + kv) * P + position % P
            following = start + TILE
            page = tl.load(pages + following // P, mask=following < high, other=0)
        else:
            each = tl.load(pages + position // P, mask=valid, other=0).to(tl.int64)
            row = (each * KV_HEADS + kv) * P + position % P
        keys = _tile(k_cache, row, valid, D, BLOCK).to(NUMBER)
        values = _tile(v_cache, row, valid, DV, BLOCK_V).to(NUMBER)
        opens = start % SPLIT == 0
        folded_top, folded_total, folded_sums = _fold(whole_top, whole_total, whole_sums, top, total, sums)
        whole_top, whole_total = tl.where(opens, folded_top, whole_top), tl.where(opens, folded_total, whole_total)
        whole_sums, sums = tl.where(opens, folded_sums, whole_sums), tl.where(opens, 0.0, sums)
        top, total = tl.where(opens, _LOWEST, top), tl.where(opens, 0.0, total)
        if tl.float32 == NUMBER:
            score = tl.sum(query[:, None, :] * keys[None, :, :], axis=2)
        else:
            score = launch.dot(query, tl.trans(keys), tl.zeros((HEADS, TILE), tl.float32))
        if SOFTCAP:
            score = launch.tanh(score * inverse)
        scaled = tl.where(valid[None, :], score * factor, _LOWEST)
        most = tl.maximum(top, tl.max(scaled, axis=1))
        weight = tl.where(valid[None, :], tl.exp2(tl.fma(score, factor, -_finite(most)[:, None])), 0.0)
        shrink = tl.exp2(top - _finite(most))
        top, total = most, tl.fma(total, shrink, tl.sum(weight, axis=1))
        if tl.float32 == NUMBER:
            sums = tl.fma(sums, shrink[:, None], tl.sum(weight[:, :, None] * values[None, :, :], axis=1))
        else:
            near = launch.cast(weight, NUMBER)
            rest = launch.cast(weight - near.to(tl.float32), NUMBER)
            sums = launch.dot(rest, values, launch.dot(near, values, sums * shrink[:, None]))
    top, total, sums = _fold(whole_top, whole_total, whole_sums, top, total, sums)
    place = n * H + head
    if parts > 1:
        place, kept = place * parts + part, inside & (low < high)
        tl.store(kept_states + 2 * place, top, mask=kept)
        tl.store(kept_states + 2 * place + 1, total, mask=kept)
        tl.store(kept_sums + place[:, None] * DV + column_v, sums, mask=kept[:, None] & (column_v < DV))
    else:
        y = launch.cast(_divided(total, sums, low >= high), out.dtype.element_ty)
        tl.store(out + place[:, None] * DV + column_v, y, mask=inside[:, None] & (column_v < DV))


@triton.jit(do_not_specialize=["parts", "most", "window"])
def _join(
    kept_states, kept_sums, lengths, out, parts, most, window, H, DV: tl.constexpr, BLOCK_V: tl.constexpr,
    SPLIT: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One program for each query head of a token."""
    n = tl.program_id(0).to(tl.int64)
    place, column = n * H + tl.program_id(1), tl.arange(0, BLOCK_V)[None, :]
    begin, end = _reads(lengths, n, most, window)
    top, total = tl.full((1,), _LOWEST, tl.float32), tl.zeros((1,), tl.float32)
    sums = tl.zeros((1, BLOCK_V), tl.float32)
    last = tl.cdiv(end, SPLIT)
    for first in range(begin // SPLIT, last, TOGETHER):
        for i in tl.static_range(TOGETHER):
            part = first + i + tl.arange(0, 1)
            here, there = place * parts + part, part < last
            next_top = tl.load(kept_states + 2 * here, mask=there, other=_LOWEST)
            next_total = tl.load(kept_states + 2 * here + 1, mask=there, other=0.0)
            mask = there[:, None] & (column < DV)
            next_sums = tl.load(kept_sums + here[:, None] * DV + column, mask=mask, other=0.0)
            top, total, sums = _fold(top, total, sums, next_top, next_total, next_sums)
    y = launch.cast(_divided(total, sums, begin >= end), out.dtype.element_ty)
    tl.store(out + place * DV + column, y, mask=column < DV)


def _sizes(group, P, d, dv, number, held):
    """Query heads of a program, keys of a tile, warps, stages. All that bits hang on comes from the model alone."""
    widest = launch.block_size(max(d, dv))
    tile = max(16, min(64, ROOM // (4 * widest * number.itemsize)))
    heads, warps, stages = 16, 4, 3 if P % tile == 0 else 5
    if number == torch.float32:
        heads, warps, stages = min(triton.next_power_of_2(group), max(1, min(8, 1024 // widest))), 8, 3
        tile = max(16, min(tile, PRODUCTS // (heads * widest)))
    if d * held.itemsize % 16 or dv * held.itemsize % 16:  # single numbers are read, each by an address of its own
        tile, stages = 16, 1
    return heads, tile, warps, launch.num_stages_for(stages)


def _parts(N, H, kv_heads, dv, splits, x):
    """Programs for each token and key head: one for each split, or one for all."""
    filled, bytes = N * kv_heads / launch.num_sms(x), 4 * N * H * splits * (dv + 2)
    return splits if filled < 2 or (filled < 16 and bytes <= SCRATCH) else 1


def decode_attention(q, k_cache, v_cache, block_table, lengths, slots, scale, window, softcap):
    launch.require_dtypes(q, k_cache)
    (N, H, d), (_, kv_heads, P, dv), M = q.shape, v_cache.shape, block_table.shape[1]
    if max(d, dv) > WIDEST:
        raise Unsupported(f"no Triton kernel for heads wider than {WIDEST}, got {max(d, dv)}")
    _check_tables(k_cache, block_table, lengths, slots, window)
    number = k_cache.dtype if q.dtype == k_cache.dtype else torch.float32
    block, block_v = launch.block_size(d), launch.block_size(dv)
    heads, tile, warps, stages = _sizes(H // kv_heads, P, d, dv, number, k_cache.dtype)
    splits = max(1, triton.cdiv(M * P, SPLIT))
    parts = _parts(N, H, kv_heads, dv, splits, q)
    chunks = triton.cdiv(H // kv_heads, heads)
    kept = N * H * parts if parts > 1 else 0
    out = torch.empty(N, H, dv, dtype=q.dtype, device=q.device)
    kept_states, kept_sums = (torch.empty(kept, width, dtype=torch.float32, device=q.device) for width in (2, dv))
    q = q if q.stride(2) == 1 else q.contiguous()
    lengths = lengths.contiguous()
    launch.run(
        _attend,
        (N * parts * chunks, kv_heads),
        q,
        k_cache.contiguous(),
        v_cache.contiguous(),
        block_table.contiguous(),
        lengths,
        slots.contiguous(),
        out,
        kept_states,
        kept_sums,
        parts,
        SPLIT if parts > 1 else M * P,
        M,
        window,
        scale / softcap if softcap else 1.0,
        (softcap or scale) * LOG2_E,
        *q.stride()[:2],
        H=H,
        KV_HEADS=kv_heads,
        D=d,
        DV=dv,
        P=P,
        SOFTCAP=softcap > 0,
        CHUNKS=chunks,
        HEADS=heads,
        BLOCK=block,
        BLOCK_V=block_v,
        TILE=tile,
        SPLIT=SPLIT,
        NUMBER=NUMBERS[number],
        STAGES=stages,
        num_warps=warps,
    )
    if parts > 1:
        launch.run(
            _join,
            (N, H),
            kept_states,
            kept_sums,
            lengths,
            out,
            parts,
            M * P,
            window,
            H,
            DV=dv,
            BLOCK_V=block_v,
            SPLIT=SPLIT,
            TOGETHER=TOGETHER,
            num_warps=1,
        )
    return out


NUMBERS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
