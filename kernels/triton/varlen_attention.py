"""varlen_attention on a GPU, forward and backward, without a matrix of scores in memory and without atomics.

    forward, dq    a program takes BLOCK_M queries of one sequence and head, and walks tiles of BLOCK_N keys: those of
                   the parent, then its own, up to the diagonal
    dk, dv         a program takes BLOCK_N keys of one sequence and key head, and walks, for each query head of the
                   group, the queries of the sequence from the diagonal on, then those of its children

    query blocks   | sequence 0: 0 | 1 | 2 | sequence 1: 0 | 1 | ... | unused |    at most N / BLOCK_M + S of them

Their number follows from shapes alone; which sequence a block is of, a kernel finds. Sums have a fixed order. The
sums of p and of p dp, which the backward pass needs first, are made anew from unrounded numbers by the program of dq.

Floor: 4 d operations for a query and a key that it sees, 14 d more with the gradient as it is split here. Products of
16-bit numbers run on tensor cores; weights are rounded to 16 bits for them. A key or value that a query does not see is
not multiplied by its weight of 0 where it is not finite.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._launch import Unsupported
from rlhf_fast.kernels._tensors import empty_float32
from rlhf_fast.kernels._varlen_plan import check_sequences
from rlhf_fast.kernels.triton import launch

MAX_HEAD_DIM = 256
BLOCKS, SEQUENCES = 32, 128  # of a program that finds the sequences of blocks, and of its tile
LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
MINUS_INF = tl.constexpr(float("-inf"))

SM90_TILES = {
    ("forward", False): (64, 64, 4, 3),
    ("dq", False): (64, 64, 4, 2),
    ("dkdv", False): (64, 64, 4, 1),
    ("forward", True): (64, 64, 4, 1),
    ("dq", True): (64, 32, 4, 1),
    ("dkdv", True): (64, 32, 8, 1),
}
"""Queries, keys, warps and stages of 16-bit tiles, by kernel and whether heads are wider than 64. A product of 64 rows
by 4 warps is a wgmma."""


class Sequences(NamedTuple):
    """The sequences, and for each block of tokens its sequence and its first token, counted from that one's."""

    offsets: Tensor
    parents: Tensor | None
    block_sequence: Tensor
    block_first: Tensor


class Rows(NamedTuple):
    """A tensor (N, heads, D) with its strides of tokens and heads."""

    data: Tensor
    token_stride: int
    head_stride: int


class Scales(NamedTuple):
    """Factors of a score: before a soft cap's tanh or as a power of 2, after the tanh as a power of 2, of gradients."""

    score: float
    cap: float
    gradient: float


class State(NamedTuple):
    """The softmax of some keys: the largest score m, in powers of 2, s = sum 2^(score - m), and acc = sum
    2^(score - m) value."""

    m: Tensor
    s: Tensor
    acc: Tensor


@triton.jit
def load_rows(x, head, token, valid, D: tl.constexpr, BLOCK: tl.constexpr):
    """Return rows (n, BLOCK) of a head, 0 where not valid."""
    column = tl.arange(0, BLOCK)[None, :]
    index = token[:, None] * x.token_stride + head * x.head_stride + column
    return tl.load(x.data + index, mask=valid[:, None] & (column < D), other=0.0)


@triton.jit
def finite_or_zero(x):
    """Return x, and 0 where it is not finite."""
    return tl.where(x - x == 0.0, x, 0.0).to(x.dtype)


@triton.jit
def power(score, scales, SOFTCAP: tl.constexpr):
    """Return a score as a power of 2, and the gradient of its soft cap."""
    x = score * scales.score
    if SOFTCAP:
        t = launch.tanh(x)
        x = t * scales.cap
        grad = 1.0 - t * t
    else:
        grad = 1.0
    return x, grad


@triton.jit
def find_sequence(sequences, s, exists):
    """Return where a sequence begins and its length: int64, as addresses are, and int32, as positions are."""
    begin = tl.load(sequences.offsets + s, mask=exists, other=0)
    return begin, (tl.load(sequences.offsets + s + 1, mask=exists, other=0) - begin).to(tl.int32)


@triton.jit
def find_block(sequences, block, HAS_PARENTS: tl.constexpr):
    """Return for a block of queries its first token of its sequence, where the sequence begins, its length, where its
    parent begins, and the parent's length."""
    s = tl.load(sequences.block_sequence + block)
    first = tl.load(sequences.block_first + block)
    begin, length = find_sequence(sequences, s, True)
    parent_begin = begin
    parent_length = length * 0
    if HAS_PARENTS:
        parent = tl.load(sequences.parents + s)
        parent_begin, parent_length = find_sequence(sequences, parent, parent >= 0)
    return first, begin, length, parent_begin, parent_length


@triton.jit
def key_tiles(first, length, parent_length, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return four key positions: tiles from the first to the second and from the third to the fourth have keys that
    not all queries of the block see, tiles between have not."""
    begin_position = parent_length + first
    end = parent_length + tl.minimum(first + BLOCK_M, length)
    end = tl.where(first < length, end, 0)
    begin = tl.where(window > 0, tl.maximum(begin_position - window + 1, 0), 0) // BLOCK_N * BLOCK_N
    whole_begin = tl.where(window > 0, tl.maximum(end - window, 0), 0)
    whole_begin = tl.minimum((whole_begin + BLOCK_N - 1) // BLOCK_N * BLOCK_N, tl.maximum(end, begin))
    whole_begin = tl.maximum((whole_begin + BLOCK_N - 1) // BLOCK_N * BLOCK_N, begin)
    whole_end = tl.maximum(tl.minimum((begin_position + 1) // BLOCK_N * BLOCK_N, end), whole_begin)
    return begin, whole_begin, whole_end, end


@triton.jit
def sees(position, key_position, end, window):
    """Return which queries see which keys, (queries, keys)."""
    distance = position[:, None] - key_position[None, :]
    return (distance >= 0) & (key_position < end)[None, :] & ((window <= 0) | (distance < window))


@triton.jit
def load_tile(
    k, v, kv_head, start, begin, parent_begin, parent_length, end,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return the positions of the BLOCK_N keys from `start` on, the keys and the values."""
    key_position = start + tl.arange(0, BLOCK_N)
    exists = key_position < end
    token = tl.where(key_position < parent_length, parent_begin, begin - parent_length) + key_position
    keys = load_rows(k, kv_head, token, exists, D, BLOCK)
    return key_position, keys, load_rows(v, kv_head, token, exists, D, BLOCK)


@triton.jit
def attend_to_tile(
    state, query, k, v, kv_head, start, position, begin, parent_begin, parent_length, end, window, scales,
    PARTIAL: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return the `State` after one more tile of keys."""
    key_position, keys, values = load_tile(
        k, v, kv_head, start, begin, parent_begin, parent_length, end, D, BLOCK, BLOCK_N
    )
    zeros = tl.zeros((query.shape[0], BLOCK_N), tl.float32)
    x, _grad = power(launch.dot(query, tl.trans(keys), zeros), scales, SOFTCAP)
    if PARTIAL:
        seen = sees(position, key_position, end, window)
        x = tl.where(seen, x, MINUS_INF)
    m = tl.maximum(state.m, tl.max(x, axis=1))
    origin = tl.where(m == MINUS_INF, 0.0, m)  # -inf - -inf would be NaN
    p = tl.exp2(x - origin[:, None])
    if PARTIAL:
        p = tl.where(seen, p, 0.0)
    shrink = tl.exp2(state.m - origin)
    s = state.s * shrink + tl.sum(p, axis=1)
    acc = state.acc * shrink[:, None]
    weight = launch.cast(p, values.dtype)
    if PARTIAL:
        is_bad = values - values != 0.0
        acc = launch.dot(weight, finite_or_zero(values), acc)
        if tl.max(tl.max(is_bad.to(tl.int32), axis=1), axis=0) > 0:
            reached = launch.dot(seen.to(values.dtype), is_bad.to(values.dtype), tl.zeros_like(acc))
            acc = tl.where(reached > 0.0, float("nan"), acc)
    else:
        acc = launch.dot(weight, values, acc)
    return State(m, s, acc)


@triton.jit(do_not_specialize=["window", "N"])
def varlen_attention_kernel(
    q, k, v, out, lse, sequences, scales, window, N,
    H: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr, HAS_PARENTS: tl.constexpr,
    WINDOWED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store the output of a block of queries of one head, and the log-sum-exp of each."""
    head = tl.program_id(1)
    kv_head = head // (H // KV_HEADS)
    first, begin, length, parent_begin, parent_length = find_block(sequences, tl.program_id(0), HAS_PARENTS)
    row = first + tl.arange(0, BLOCK_M)
    inside = row < length
    position = parent_length + row
    query = load_rows(q, head, begin + row, inside, D, BLOCK)
    tile_begin, whole_begin, whole_end, end = key_tiles(first, length, parent_length, window, BLOCK_M, BLOCK_N)
    m = tl.full((BLOCK_M,), MINUS_INF, tl.float32)
    state = State(m, tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, BLOCK), tl.float32))
    if WINDOWED:
        for start in range(tile_begin, whole_begin, BLOCK_N):
            state = attend_to_tile(
                state, query, k, v, kv_head, start, position, begin, parent_begin, parent_length, end, window, scales,
                True, SOFTCAP, D, BLOCK, BLOCK_N,
            )  # fmt: skip
    for start in range(whole_begin, whole_end, BLOCK_N):
        state = attend_to_tile(
            state, query, k, v, kv_head, start, position, begin, parent_begin, parent_length, end, window, scales,
            False, SOFTCAP, D, BLOCK, BLOCK_N,
        )  # fmt: skip
    for start in range(whole_end, end, BLOCK_N):
        state = attend_to_tile(
            state, query, k, v, kv_head, start, position, begin, parent_begin, parent_length, end, window, scales,
            True, SOFTCAP, D, BLOCK, BLOCK_N,
        )  # fmt: skip
    total = tl.where(inside, state.s, 1.0)
    column = tl.arange(0, BLOCK)[None, :]
    index = ((begin + row)[:, None] * H + head) * D + column
    y = launch.cast(state.acc / total[:, None], out.dtype.element_ty)
    tl.store(out + index, y, mask=inside[:, None] & (column < D))
    if lse is not None:
        tl.store(lse + head.to(tl.int64) * N + begin + row, state.m * LN_2 + tl.log(total), mask=inside)


@triton.jit
def pair_gradients(
    query, keys, values, grad, origin, seen, scales, SOFTCAP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Return p, dp and the gradient of the soft cap, (queries, keys); p and dp are 0 where a key is not seen."""
    x, cap_grad = power(launch.dot(query, tl.trans(keys), tl.zeros((M, N), tl.float32)), scales, SOFTCAP)
    p = tl.where(seen, tl.exp2(x - origin[:, None]), 0.0)
    dp = launch.dot(grad, tl.trans(values), tl.zeros((M, N), tl.float32))
    return p, tl.where(seen, dp, 0.0), cap_grad


@triton.jit(do_not_specialize=["window", "N"])
def varlen_attention_dq_kernel(
    q, k, v, grad_out, lse, delta, grads, sequences, scales, window, N,
    H: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr, HAS_PARENTS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store dq of a block of queries of one head; and for the other kernel in `delta` (2, H, N) the log-sum-exp as a
    power of 2, without its rounding, and the sum of p dp."""
    head = tl.program_id(1)
    kv_head = head // (H // KV_HEADS)
    first, begin, length, parent_begin, parent_length = find_block(sequences, tl.program_id(0), HAS_PARENTS)
    row = first + tl.arange(0, BLOCK_M)
    inside = row < length
    position = parent_length + row
    query = load_rows(q, head, begin + row, inside, D, BLOCK)
    grad = load_rows(grad_out, head, begin + row, inside, D, BLOCK)
    place = head.to(tl.int64) * N + begin + row
    origin = tl.load(lse + place, mask=inside, other=0.0) / LN_2
    tile_begin, _whole_begin, _whole_end, end = key_tiles(first, length, parent_length, window, BLOCK_M, BLOCK_N)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(tile_begin, end, BLOCK_N):
        key_position, keys, values = load_tile(
            k, v, kv_head, start, begin, parent_begin, parent_length, end, D, BLOCK, BLOCK_N
        )
        seen = sees(position, key_position, end, window)
        p, dp, _cap_grad = pair_gradients(query, keys, values, grad, origin, seen, scales, SOFTCAP, BLOCK_M, BLOCK_N)
        total += tl.sum(p, axis=1)
        mean += tl.sum(p * dp, axis=1)
    total = tl.where(inside, total, 1.0)
    mean = mean / total
    origin += tl.log2(total)
    tl.store(delta + place, origin, mask=inside)
    tl.store(delta + (head + H).to(tl.int64) * N + begin + row, mean, mask=inside)
    acc = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for start in range(tile_begin, end, BLOCK_N):
        key_position, keys, values = load_tile(
            k, v, kv_head, start, begin, parent_begin, parent_length, end, D, BLOCK, BLOCK_N
        )
        seen = sees(position, key_position, end, window)
        p, dp, cap_grad = pair_gradients(query, keys, values, grad, origin, seen, scales, SOFTCAP, BLOCK_M, BLOCK_N)
        ds = tl.where(seen, p * (dp - mean[:, None]) * cap_grad, 0.0)
        acc = launch.dot(launch.cast(ds, keys.dtype), finite_or_zero(keys), acc)
    column = tl.arange(0, BLOCK)[None, :]
    index = ((begin + row)[:, None] * (H + 2 * KV_HEADS) + head) * D + column
    y = launch.cast(acc * scales.gradient, grads.dtype.element_ty)
    tl.store(grads + index, y, mask=inside[:, None] & (column < D))


@triton.jit(do_not_specialize=["window", "N"])
def varlen_attention_dkdv_kernel(
    q, k, v, grad_out, delta, grads, sequences, children, scales, window, N,
    H: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr, HAS_PARENTS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store dk and dv of a block of keys of one key head.

    children (S,) and (S + 1,): the sequences by their parents, and where those of each sequence begin among them."""
    kv_head = tl.program_id(1)
    s = tl.load(sequences.block_sequence + tl.program_id(0))
    first = tl.load(sequences.block_first + tl.program_id(0))
    begin, length = find_sequence(sequences, s, True)
    key = first + tl.arange(0, BLOCK_N)
    inside = key < length
    keys = load_rows(k, kv_head, begin + key, inside, D, BLOCK)
    values = load_rows(v, kv_head, begin + key, inside, D, BLOCK)
    dk_acc = tl.zeros((BLOCK_N, BLOCK), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, BLOCK), tl.float32)
    child_begin = 0
    num_sources = 1
    if HAS_PARENTS:
        child_begin = tl.load(children.starts + s).to(tl.int32)
        num_sources = 1 + tl.load(children.starts + s + 1).to(tl.int32) - child_begin
    GROUP: tl.constexpr = H // KV_HEADS
    for i in range(0, num_sources * GROUP):
        head = kv_head * GROUP + i % GROUP
        source = s
        shift = length * 0
        if HAS_PARENTS:
            is_child = i >= GROUP
            child = tl.load(children.sequences + child_begin + i // GROUP - 1, mask=is_child, other=0)
            source = tl.where(is_child, child, s)
            shift = tl.where(is_child, length, 0)  # of the queries' positions
        query_begin, num_queries = find_sequence(sequences, source, True)
        low = tl.maximum(first - shift, 0) // BLOCK_M * BLOCK_M
        last_key = tl.minimum(first + BLOCK_N, length)
        high = tl.where(window > 0, tl.minimum(num_queries, last_key - 1 + window - shift), num_queries)
        high = tl.where(first < length, high, 0)
        for start in range(low, high, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            exists = row < num_queries
            query = load_rows(q, head, query_begin + row, exists, D, BLOCK)
            grad = load_rows(grad_out, head, query_begin + row, exists, D, BLOCK)
            place = head.to(tl.int64) * N + query_begin + row
            origin = tl.load(delta + place, mask=exists, other=0.0)
            mean = tl.load(delta + (head + H).to(tl.int64) * N + query_begin + row, mask=exists, other=0.0)
            seen = sees(shift + row, key, length, window) & exists[:, None]
            p, dp, cap_grad = pair_gradients(query, keys, values, grad, origin, seen, scales, SOFTCAP, BLOCK_M, BLOCK_N)
            ds = tl.where(seen, p * (dp - mean[:, None]) * cap_grad, 0.0)
            dv_acc = launch.dot(tl.trans(launch.cast(p, values.dtype)), grad, dv_acc)
            dk_acc = launch.dot(tl.trans(launch.cast(ds, keys.dtype)), finite_or_zero(query), dk_acc)
    column = tl.arange(0, BLOCK)[None, :]
    index = ((begin + key)[:, None] * (H + 2 * KV_HEADS) + H + kv_head) * D + column
    mask = inside[:, None] & (column < D)
    tl.store(grads + index, launch.cast(dk_acc * scales.gradient, grads.dtype.element_ty), mask=mask)
    tl.store(grads + index + KV_HEADS * D, launch.cast(dv_acc, grads.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["S", "N", "num_blocks"])
def blocks_kernel(
    offsets, block_sequence, block_first, S, N, num_blocks,
    BLOCK: tl.constexpr, SEQUENCES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Store the sequence of each of BLOCKS blocks, and its first token; unused blocks begin behind the last."""
    index = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    sequence = tl.zeros((BLOCKS,), tl.int32)
    before = tl.zeros((BLOCKS,), tl.int32)  # blocks of earlier sequences
    total = 0
    for start in range(0, S, SEQUENCES):
        s = start + tl.arange(0, SEQUENCES)
        begin = tl.load(offsets + s, mask=s < S, other=0)
        end = tl.load(offsets + s + 1, mask=s < S, other=0)
        ends = total + tl.cumsum(((end - begin + BLOCK - 1) // BLOCK).to(tl.int32), axis=0)
        passed = (ends[None, :] <= index[:, None]) & (s < S)[None, :]
        sequence += tl.sum(passed.to(tl.int32), axis=1)
        before = tl.maximum(before, tl.max(tl.where(passed, ends[None, :], 0), axis=1))
        total = tl.max(ends, axis=0)
    first = tl.where(index < total, (index - before) * BLOCK, N)
    tl.store(block_sequence + index, tl.minimum(sequence, S - 1), mask=index < num_blocks)
    tl.store(block_first + index, first, mask=index < num_blocks)


class Children(NamedTuple):
    """The sequences by their parents, and where those of each sequence begin among them."""

    sequences: Tensor
    starts: Tensor


def split_sequences(offsets: Tensor, parents: Tensor | None, N: int, block: int) -> Sequences:
    """Return the sequences in blocks of tokens, as many as there can be; unused ones begin behind the last sequence."""
    offsets, S = offsets.contiguous(), len(offsets) - 1
    num_blocks = triton.cdiv(N, block) + S
    sequence, first = torch.empty((2, num_blocks), dtype=torch.int32, device=offsets.device).unbind(0)
    grid = (triton.cdiv(num_blocks, BLOCKS),)
    meta = {"BLOCK": block, "SEQUENCES": SEQUENCES, "BLOCKS": BLOCKS, "num_warps": 4}
    launch.run(blocks_kernel, grid, offsets, sequence, first, S, N, num_blocks, **meta)
    return Sequences(offsets, None if parents is None else parents.contiguous(), sequence, first)


def children_of(parents: Tensor) -> Children:
    """Return the children of each sequence, in their order."""
    ordered, sequences = parents.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(len(parents) + 1, device=parents.device))
    return Children(sequences, starts)


def tile_meta(kernel: str, q: Tensor) -> dict:
    """Return the queries and keys of a tile, warps and stages, such that registers do not spill for d up to 128."""
    d = q.shape[2]
    block = launch.block_size(d)
    if q.dtype == torch.float32:
        queries, keys, warps, stages = 16, 16, 4 if block <= 64 else 8, 1
    elif block <= 128 and launch.sm_arch(q) == 90:  # others were not measured
        queries, keys, warps, stages = SM90_TILES[kernel, block == 128]
    else:
        queries = 64 if kernel == "forward" or block <= 128 else 32
        keys = 32 if block <= 128 else 16
        warps, stages = 4 if block <= 16 else 8, 2 if kernel == "dkdv" and block <= 64 else 1
    if d % 16:  # elements are loaded one by one
        stages = 1
    return {"BLOCK": block, "BLOCK_M": queries, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


def rows_of(*tensors: Tensor) -> list[Rows]:
    """Return tensors (N, heads, d) as kernels read them, with a contiguous last dimension."""
    tensors = tuple(x if x.stride(2) == 1 else x.contiguous() for x in tensors)
    return [Rows(x, *x.stride()[:2]) for x in tensors]


def scales_of(scale: float, softcap: float) -> Scales:
    return Scales(scale / softcap if softcap else scale * LOG2_E, softcap * LOG2_E, scale)


def check(q: Tensor, offsets: Tensor, parents: Tensor | None) -> None:
    """Raise Unsupported for what the kernels do not serve, and ValueError for wrong sequences on a CPU."""
    launch.require_dtypes(q)
    check_sequences(offsets, parents, q.shape[0])
    if q.shape[2] > MAX_HEAD_DIM:
        raise Unsupported(f"no Triton kernel for heads wider than {MAX_HEAD_DIM}, got {q.shape[2]}")


def attend(q, k, v, offsets, scale, window, softcap, parents, _decode_order, lse):
    check(q, offsets, parents)
    N, H, d = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not N:
        return out
    meta = tile_meta("forward", q)
    sequences = split_sequences(offsets, parents, N, meta["BLOCK_M"])
    shape = {"H": H, "KV_HEADS": k.shape[1], "D": d, "SOFTCAP": softcap > 0, "HAS_PARENTS": parents is not None}
    grid = (len(sequences.block_first), H)
    args = *rows_of(q, k, v), out, lse, sequences, scales_of(scale, softcap), window, N
    launch.run(varlen_attention_kernel, grid, *args, WINDOWED=window > 0, **shape, **meta)
    return out


def varlen_attention(*args):
    return attend(*args, None)


def varlen_attention_with_statistics(q, *rest):
    lse = empty_float32(q, q.shape[1], q.shape[0])
    return attend(q, *rest, lse), lse


def varlen_attention_backward(grad_out, _out, lse, q, k, v, offsets, scale, window, softcap, parents, _decode_order):
    check(q, offsets, parents)
    N, H, d = q.shape
    Hkv = k.shape[1]
    grads = torch.empty(N, H + 2 * Hkv, d, dtype=q.dtype, device=q.device)
    if not N:
        return grads
    meta = tile_meta("dq", q)
    sequences = split_sequences(offsets, parents, N, meta["BLOCK_M"])
    delta = empty_float32(q, 2, H, N)
    shape = {"H": H, "KV_HEADS": Hkv, "D": d, "SOFTCAP": softcap > 0, "HAS_PARENTS": parents is not None}
    inputs = rows_of(q, k, v, grad_out.to(q.dtype))
    scales = scales_of(scale, softcap)
    args = *inputs, lse.contiguous(), delta, grads, sequences, scales, window, N
    launch.run(varlen_attention_dq_kernel, (len(sequences.block_first), H), *args, **shape, **meta)
    children = None if parents is None else children_of(parents)
    meta = tile_meta("dkdv", q)
    sequences = split_sequences(offsets, parents, N, meta["BLOCK_N"])
    args = *inputs, delta, grads, sequences, children, scales, window, N
    launch.run(varlen_attention_dkdv_kernel, (len(sequences.block_first), Hkv), *args, **shape, **meta)
    return grads
