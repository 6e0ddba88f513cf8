"""Attention of new tokens over keys and values in pages: one query a token, as many keys as its sequence has.

A token's result depends on its own query, keys and values alone, bit for bit: not on the tokens around it, their order,
the pages, or the number of threads. The keys are read in splits of 256, merged in their order.
"""

import torch
from torch import Tensor

from rlhf_fast.kernels._launch import Unsupported, dtype_codes, require_dtypes, stream_or_threads
from rlhf_fast.kernels._op import op

SPLIT = 256  # keys, as csrc/ has it too
BLOCKS = 32  # for each multiprocessor: more than ten times what it holds at once
SCRATCH = 64 << 20  # bytes of the splits' states, where blocks are many enough to do without


def _fake(q, k_cache, v_cache, *rest):
    return torch.empty(*q.shape[:2], v_cache.shape[3], dtype=q.dtype, device=q.device)


def _check_tables(k_cache: Tensor, block_table: Tensor, lengths: Tensor, slots: Tensor, window: int) -> None:
    """ValueError where a token would read beyond the table or the cache; on CPU alone, elsewhere it would wait."""
    if lengths.device.type != "cpu" or not lengths.numel():
        return
    (pages, _, P, _), (S, M) = k_cache.shape, block_table.shape
    if not 0 <= slots.min() <= slots.max() < S:
        came = f"{int(slots.min())} to {int(slots.max())}"
        raise ValueError(f"decode_attention: rows must be from 0 to {S - 1}, as block_table has rows, got {came}")
    if not 0 <= lengths.min() <= lengths.max() <= M * P:
        came = f"{int(lengths.min())} to {int(lengths.max())}"
        raise ValueError(f"decode_attention: lengths must be from 0 to {M * P}, as a row has places, got {came}")
    starts, ends = torch.arange(M, device="cpu") * P, lengths[:, None]
    read = (starts < ends) & (starts + P > ends - window) if window else starts < ends
    used = block_table[slots.long()][read]
    if used.numel() and not 0 <= used.min() <= used.max() < pages:
        came = f"{int(used.min())} to {int(used.max())}"
        raise ValueError(f"decode_attention: pages must be from 0 to {pages - 1} where a token reads, got {came}")


@op(fake=_fake)
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    rows: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(cap(scale q k)) v for N tokens, (N, H, dv) in the dtype of q (N, H, d); cap(x) = c tanh(x / c), or x.

    Caches (pages, Hkv, P, d) and (pages, Hkv, P, dv); query heads h H/Hkv .. share key head h. Token n reads the
    positions max(0, lengths[n] - window) .. lengths[n] - 1 of its sequence (window 0: all of them), position p at place
    p % P of page block_table[rows[n], p // P]. block_table (S, M), lengths and rows (N,) int32. Nothing else is read:
    other pages, and places beyond the length, may hold anything. A token of length 0 gets 0.
    Computed in float32, rounded once. A cache that is not contiguous is copied. ValueError where shapes differ, or a
    row, length or page is out of range (on CPU). No gradient: for inference.
    """
    _check_tables(k_cache, block_table, lengths, rows, window)
    N, H, d = q.shape
    (_, heads, P, dv), M = v_cache.shape, block_table.shape[1]
    exact = torch.float64 if torch.float64 in (q.dtype, k_cache.dtype) else torch.float32
    out = torch.zeros(N, H, dv, dtype=exact, device=q.device)
    places = torch.arange(M * P, device=q.device)
    for n in range(N):  # a token at a time: all the keys of a batch at once may be more than the memory holds
        last = lengths[n]
        mine = (places < last) & ((places >= last - window) if window else True)
        pages = torch.where(mine.view(M, P).any(1), block_table[rows[n].long()].long(), 0)
        k, v = (x[pages].transpose(0, 1).reshape(heads, M * P, -1).to(exact) for x in (k_cache, v_cache))
        k, v = k.masked_fill(~mine[:, None], 0), v.masked_fill(~mine[:, None], 0)
        scores = q[n].to(exact).view(heads, H // heads, d) @ k.mT * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        weights = scores.masked_fill(~mine, -torch.inf).softmax(-1)
        out[n] = torch.where(last > 0, weights @ v, 0.0).view(H, dv)
    return out.to(q.dtype)


@decode_attention.normalize
def _(q, k_cache, v_cache, block_table, lengths, rows, scale, window, softcap):
    inputs = q, k_cache, v_cache, block_table, lengths, rows
    fits = [x.dim() for x in inputs] == [3, 4, 4, 2, 1, 1]
    if fits:
        (N, H, d), (pages, heads, P, _) = q.shape, k_cache.shape
        fits = k_cache.shape[3] == d and v_cache.shape[:3] == (pages, heads, P) and lengths.shape == rows.shape == (N,)
        fits = fits and heads > 0 and H % heads == 0 and P > 0
    if not fits:
        raise ValueError(
            "decode_attention: q (N, H, d), k_cache (pages, Hkv, P, d), v_cache (pages, Hkv, P, dv), block_table "
            "(S, M), lengths and rows (N,) must fit together, H a multiple of Hkv, got "
            f"{[list(x.shape) for x in inputs]}"
        )
    if k_cache.dtype != v_cache.dtype:
        raise ValueError(f"decode_attention: both caches must have one dtype, got {k_cache.dtype}, {v_cache.dtype}")
    if window < 0 or not 0 <= softcap < float("inf"):
        came = f"{window} and {softcap}"
        raise ValueError(f"decode_attention: window and softcap must be 0 (off) or more, and finite, got {came}")
    tables = (x if x.dtype == torch.int32 else x.int() for x in (block_table, lengths, rows))
    return *(x.detach() for x in (q, k_cache, v_cache)), *tables, float(scale), int(window), float(softcap)


@decode_attention.compiled(devices=("cpu",))
def _(kernels, q, k_cache, v_cache, block_table, lengths, slots, scale, window, softcap):
    require_dtypes(q, k_cache)
    k_cache, v_cache, block_table, lengths, slots = (
        x.contiguous() for x in (k_cache, v_cache, block_table, lengths, slots)
    )
    query, threads = q.float().contiguous(), stream_or_threads(q)
    (N, H, d), (pages, heads, P, dv), (S, M) = q.shape, v_cache.shape, block_table.shape
    out = torch.empty(N, H, dv, dtype=torch.float32, device=q.device)
    # With few tokens, threads share the splits of one, and each split needs a place of its own.
    splits = -(-int(lengths.max()) // SPLIT) if 0 < N * heads < 4 * threads else 1
    places = N * heads * splits if splits > 1 else threads
    scratch = torch.empty(places, H // heads * (dv + 4), dtype=torch.float32, device=q.device)
    try:
        kernels.decode_attention(
            query.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), k_cache.dtype == torch.bfloat16,
            block_table.data_ptr(), lengths.data_ptr(), slots.data_ptr(), out.data_ptr(), scratch.data_ptr(),
            N, H, heads, d, dv, pages, P, S, M, splits, scale, window, softcap, threads,
        )  # fmt: skip
    except RuntimeError:
        _check_tables(k_cache, block_table, lengths, slots, window)
        raise
    return out.to(q.dtype)


@decode_attention.compiled(devices=("cuda",))
def _(kernels, q, k_cache, v_cache, block_table, lengths, slots, scale, window, softcap):
    codes = dtype_codes(kernels, q, k_cache)
    (N, H, d), (pages, heads, P, dv), M = q.shape, v_cache.shape, block_table.shape[1]
    if not d or max(d, dv) > 256 or max(pages * heads * P, 2 * M * P) >= 1 << 31:
        raise Unsupported(f"no compiled kernel for heads of {d} and {dv} (up to 256), or caches of 2^31 rows")
    _check_tables(k_cache, block_table, lengths, slots, window)
    q = q if q.stride(2) == 1 else q.contiguous()
    k_cache, v_cache, block_table, lengths, slots = (
        x.contiguous() for x in (k_cache, v_cache, block_table, lengths, slots)
    )
    splits = -(-min(M * P, window + SPLIT - 1 if window else M * P) // SPLIT)
    parts = _parts(N, H, heads, dv, splits, q)
    kept = N * H * splits if parts > 1 else 0
    states, sums = (torch.empty(kept, x, dtype=torch.float32, device=q.device) for x in (2, -(-dv // 4) * 4))
    out = torch.empty(N, H, dv, dtype=q.dtype, device=q.device)
    kernels.decode_attention(
        q.data_ptr(), codes[0], *q.stride()[:2], k_cache.data_ptr(), v_cache.data_ptr(), codes[1],
        block_table.data_ptr(), lengths.data_ptr(), slots.data_ptr(), out.data_ptr(), states.data_ptr(),
        sums.data_ptr(), N, H, heads, d, dv, P, M, parts, splits, scale, window, softcap, stream_or_threads(q),
    )  # fmt: skip
    return out


def _parts(N: int, H: int, heads: int, dv: int, splits: int, x: Tensor) -> int:
    """Blocks that share the splits of a token and key head: as many as fill the GPU and end together, from shapes."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4  # for tests
    blocks = max(N * heads, 1)
    if blocks >= 2 * processors and 4 * N * H * splits * (dv + 2) > SCRATCH:
        return 1
    return max(1, min(splits, BLOCKS * processors // blocks))


@decode_attention.cost
def _(gradient, q, k_cache, v_cache, block_table, lengths, slots, scale, window, softcap):
    """Keys and values that are read, not the whole cache."""
    (_, H, d), (_, heads, _, dv) = q.shape, v_cache.shape
    places = int((lengths.clamp(max=window) if window else lengths).sum())
    moved = places * heads * (d + dv) * k_cache.element_size() + q.nbytes * (d + dv) // d
    return moved, 2.0 * places * H * (d + dv)


@decode_attention.inputs(
    small_sizes=[
        {"lengths": (1,), "H": 1, "Hkv": 1, "d": 1, "P": 1},
        {"lengths": (17, 3, 64), "H": 6, "Hkv": 2, "d": 64, "P": 16},
        {"lengths": (300, 255, 257, 0), "H": 4, "Hkv": 1, "d": 80, "P": 64, "cache": torch.bfloat16},
        {"lengths": (513, 31), "H": 16, "Hkv": 2, "d": 33, "P": 7, "dv": 19, "window": 300, "cache": torch.float32},
        {"lengths": (5, 40), "H": 5, "Hkv": 1, "d": 96, "P": 16, "softcap": 2.0, "window": 8},
        {"lengths": (1, 16, 32) * 3, "H": 2, "Hkv": 2, "d": 128, "P": 16, "spread": 8.0},
        {"lengths": (3, 70), "H": 20, "Hkv": 1, "d": 16, "P": 64},
        {"lengths": (), "H": 2, "Hkv": 1, "d": 8, "P": 4},
    ],
    large_sizes=[
        {"lengths": (128,) * 32, "H": 9, "Hkv": 3, "d": 64, "P": 64},
        {"lengths": (1024,) * 32, "H": 9, "Hkv": 3, "d": 64, "P": 64},
    ],
)
def _(lengths, H, Hkv, d, P, device, dtype, dv=None, cache=None, window=0, softcap=0.0, spread=1.0):
    """Pages in a random order; those that no token reads, and places beyond a length, hold NaN."""
    N, dv, cache = len(lengths), dv or d, cache or dtype
    M = -(-max(lengths, default=1) // P) + 1
    pages = N * M + 1
    block_table = torch.randperm(pages, device=device)[: N * M].view(N, M).int()
    ends, order = torch.tensor(lengths, dtype=torch.int32, device=device), torch.randperm(N, device=device)
    caches = []
    for dim in (d, dv):
        held = torch.full((pages, Hkv, P, dim), torch.nan, device=device)
        for slot, n in enumerate(lengths):
            rows_of_pages = torch.full((M * P, Hkv, dim), torch.nan, device=device)
            rows_of_pages[:n] = torch.randn(n, Hkv, dim, device=device)
            held[block_table[slot].long()] = rows_of_pages.view(M, P, Hkv, dim).transpose(1, 2)
        caches.append(held.to(cache))
    q = spread * torch.randn(N, H, d, device=device, dtype=dtype)
    return q, *caches, block_table, ends[order], order.int(), d**-0.5, window, softcap
