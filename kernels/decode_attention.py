"""Attention of new tokens over a paged KV cache: each token is one query, over all keys of its sequence.

A token's result depends only on its own query, keys and values, bit for bit: not on the other tokens, their order, the
pages, or the number of threads. Keys are read in splits of 256, whose results are merged in order.
"""

import torch
from torch import Tensor

from rlhf_fast.kernels._launch import Unsupported, data_ptrs, dtype_codes, require_dtypes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import as_float, contiguous

BLOCKS_PER_SM = 32  # more than ten times what an SM runs at once
MAX_STATE_BYTES = 64 << 20  # of the splits' states, where there are enough blocks without sharing tokens


def _fake(q, _k_cache, v_cache, *_rest):
    return torch.empty(*q.shape[:2], v_cache.shape[3], dtype=q.dtype, device=q.device)


def _check_tables(k_cache: Tensor, block_table: Tensor, lengths: Tensor, rows: Tensor, window: int) -> None:
    """Raise ValueError if a token would read outside the table or the cache. On a GPU nothing is checked: it would wait
    for the device."""
    if lengths.device.type != "cpu" or not lengths.numel():
        return
    num_pages, _, P, _ = k_cache.shape
    S, M = block_table.shape
    if not 0 <= rows.min() <= rows.max() < S:
        given = f"{int(rows.min())} to {int(rows.max())}"
        raise ValueError(f"decode_attention: rows must be from 0 to {S - 1}, as block_table has rows, got {given}")
    if not 0 <= lengths.min() <= lengths.max() <= M * P:
        given = f"{int(lengths.min())} to {int(lengths.max())}"
        raise ValueError(f"decode_attention: lengths must be from 0 to {M * P}, as a row has places, got {given}")
    page_starts, ends = torch.arange(M, device="cpu") * P, lengths[:, None]
    is_read = page_starts < ends
    if window:
        is_read &= page_starts + P > ends - window
    pages = block_table[rows.long()][is_read]
    if pages.numel() and not 0 <= pages.min() <= pages.max() < num_pages:
        given = f"{int(pages.min())} to {int(pages.max())}"
        raise ValueError(f"decode_attention: pages must be from 0 to {num_pages - 1} where a token reads, got {given}")


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
    """Return softmax(cap(scale q k)) v of N tokens, (N, H, dv) in q's dtype.

        cap(x) = softcap tanh(x / softcap), or x where softcap is 0

        q (N, H, d): query head h reads key head h Hkv // H
        k_cache (num_pages, Hkv, P, d), v_cache (num_pages, Hkv, P, dv): pages of P positions, of one dtype
        block_table (S, M) int32: the pages of S sequences; position p of sequence s is row p % P of page
            block_table[s, p // P]
        lengths (N,) int32: token n reads positions max(0, lengths[n] - window) to lengths[n] - 1; window 0 means all;
            a token of length 0 gets 0
        rows (N,) int32: the sequence of each token, a row of block_table

    Nothing else is read: other pages, and positions beyond the length, may hold anything. It is computed in float32 and
    rounded once. A cache that is not contiguous is copied. No gradient: for inference.

    Raises ValueError where shapes differ, or a row, length or page is out of range (the last three only on the CPU).
    """
    _check_tables(k_cache, block_table, lengths, rows, window)
    N, H, d = q.shape
    _, Hkv, P, dv = v_cache.shape
    M = block_table.shape[1]
    dtype = torch.float64 if torch.float64 in (q.dtype, k_cache.dtype) else torch.float32
    out = torch.zeros(N, H, dv, dtype=dtype, device=q.device)
    positions = torch.arange(M * P, device=q.device)
    for n in range(N):  # token by token: the keys of all tokens together may not fit in memory
        length = lengths[n]
        valid = positions < length
        if window:
            valid &= positions >= length - window
        pages = torch.where(valid.view(M, P).any(1), block_table[rows[n].long()].long(), 0)
        k, v = (x[pages].transpose(0, 1).reshape(Hkv, M * P, -1).to(dtype) for x in (k_cache, v_cache))
        k, v = k.masked_fill(~valid[:, None], 0), v.masked_fill(~valid[:, None], 0)
        scores = q[n].to(dtype).view(Hkv, H // Hkv, d) @ k.mT * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        weights = scores.masked_fill(~valid, -torch.inf).softmax(-1)
        out[n] = torch.where(length > 0, weights @ v, 0.0).view(H, dv)
    return out.to(q.dtype)


@decode_attention.normalize
def _(q, k_cache, v_cache, block_table, lengths, rows, scale, window, softcap):
    tensors = q, k_cache, v_cache, block_table, lengths, rows
    if not _shapes_fit(*tensors):
        raise ValueError(
            "decode_attention: q (N, H, d), k_cache (pages, Hkv, P, d), v_cache (pages, Hkv, P, dv), block_table "
            "(S, M), lengths and rows (N,) must fit together, H a multiple of Hkv, got "
            f"{[list(x.shape) for x in tensors]}"
        )
    if k_cache.dtype != v_cache.dtype:
        raise ValueError(f"decode_attention: both caches must have one dtype, got {k_cache.dtype}, {v_cache.dtype}")
    if window < 0 or not 0 <= softcap < float("inf"):
        given = f"{window} and {softcap}"
        raise ValueError(f"decode_attention: window and softcap must be 0 (off) or more, and finite, got {given}")
    tables = (x if x.dtype == torch.int32 else x.int() for x in (block_table, lengths, rows))
    return *(x.detach() for x in (q, k_cache, v_cache)), *tables, as_float(scale), int(window), float(softcap)


def _shapes_fit(q, k_cache, v_cache, block_table, lengths, rows) -> bool:
    if [x.dim() for x in (q, k_cache, v_cache, block_table, lengths, rows)] != [3, 4, 4, 2, 1, 1]:
        return False
    N, H, d = q.shape
    num_pages, Hkv, P, _ = k_cache.shape
    caches_fit = k_cache.shape[3] == d and v_cache.shape[:3] == (num_pages, Hkv, P) and P > 0
    return caches_fit and lengths.shape == rows.shape == (N,) and Hkv > 0 and H % Hkv == 0


@decode_attention.compiled(devices=("cpu",))
def _(kernels, q, k_cache, v_cache, block_table, lengths, rows, scale, window, softcap):
    require_dtypes(q, k_cache)
    tables = contiguous(block_table, lengths, rows)
    k_cache, v_cache = contiguous(k_cache, v_cache)
    query = q.float().contiguous()
    N, H, d = q.shape
    num_pages, Hkv, P, dv = v_cache.shape
    S, M = block_table.shape
    threads = stream_or_threads(q)
    # With few tokens, threads share the splits of one token, and the state of each split is kept for the merge.
    splits = -(-int(lengths.max()) // kernels.decode_attention_split) if 0 < N * Hkv < 4 * threads else 1
    num_states = N * Hkv * splits if splits > 1 else threads
    states = torch.empty(
        num_states, H // Hkv * (kernels.decode_attention_state_floats + dv), dtype=torch.float32, device=q.device
    )
    out = torch.empty(N, H, dv, dtype=torch.float32, device=q.device)
    try:
        kernels.decode_attention(
            *data_ptrs(query, k_cache, v_cache), k_cache.dtype == torch.bfloat16, *data_ptrs(*tables, out, states),
            N, H, Hkv, d, dv, num_pages, P, S, M, splits, scale, window, softcap, threads,
        )  # fmt: skip
    except RuntimeError:
        _check_tables(k_cache, *tables, window)
        raise
    return out.to(q.dtype)


# Before Triton: on an H100 at 64 x 512, 9 / 3 heads of 64, a call takes 128 us, Triton's 434. On the device alone
# Triton is faster: 22.2 us against 23.2, and 112 against 122 at 64 x 2048, 32 / 8 heads.
@decode_attention.compiled(devices=("cuda",))
def _(kernels, q, k_cache, v_cache, block_table, lengths, rows, scale, window, softcap):
    q_code, cache_code = dtype_codes(kernels, q, k_cache)
    N, H, d = q.shape
    num_pages, Hkv, P, dv = v_cache.shape
    M = block_table.shape[1]
    if not d or max(d, dv) > 256 or max(num_pages * Hkv * P, 2 * M * P) >= 1 << 31:
        raise Unsupported(f"no compiled kernel for heads of {d} and {dv} (up to 256), or caches of 2^31 rows")
    _check_tables(k_cache, block_table, lengths, rows, window)
    q = q if q.stride(2) == 1 else q.contiguous()
    tables = contiguous(block_table, lengths, rows)
    k_cache, v_cache = contiguous(k_cache, v_cache)
    split = kernels.decode_attention_split
    longest = min(M * P, window + split - 1) if window else M * P
    splits = -(-longest // split)
    parts = _blocks_per_head(N, H, Hkv, dv, splits, q)
    num_states = N * H * splits if parts > 1 else 0
    padded_dv = -(-dv // 4) * 4
    states, sums = (torch.empty(num_states, n, dtype=torch.float32, device=q.device) for n in (2, padded_dv))
    out = torch.empty(N, H, dv, dtype=q.dtype, device=q.device)
    kernels.decode_attention(
        q.data_ptr(), q_code, *q.stride()[:2], *data_ptrs(k_cache, v_cache), cache_code,
        *data_ptrs(*tables, out, states, sums), N, H, Hkv, d, dv, P, M, parts, splits, scale, window, softcap,
        stream_or_threads(q),
    )  # fmt: skip
    return out


def _blocks_per_head(N: int, H: int, Hkv: int, dv: int, splits: int, x: Tensor) -> int:
    """Return the number of blocks that share the splits of one token and key head: enough to fill the GPU and to finish
    at about the same time. It depends only on shapes, not on `lengths`, which the host does not know."""
    num_sms = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4  # for tests
    blocks = max(N * Hkv, 1)
    if blocks >= 2 * num_sms and 4 * N * H * splits * (dv + 2) > MAX_STATE_BYTES:
        return 1
    return max(1, min(splits, BLOCKS_PER_SM * num_sms // blocks))


@decode_attention.cost
def _(_gradient, q, k_cache, v_cache, _block_table, lengths, _rows, _scale, window, _softcap):
    """Count the keys and values that are read, not the whole cache."""
    H, d = q.shape[1:]
    Hkv, dv = v_cache.shape[1], v_cache.shape[3]
    num_keys = int((lengths.clamp(max=window) if window else lengths).sum())
    moved = num_keys * Hkv * (d + dv) * k_cache.element_size() + q.nbytes * (d + dv) // d
    return moved, 2.0 * num_keys * H * (d + dv)


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
    """Pages are in a random order. Pages that no token reads, and positions beyond a length, hold NaN."""
    N = len(lengths)
    M = -(-max(lengths, default=1) // P) + 1
    num_pages = N * M + 1
    block_table = torch.randperm(num_pages, device=device)[: N * M].view(N, M).int()
    ends = torch.tensor(lengths, dtype=torch.int32, device=device)
    order = torch.randperm(N, device=device)
    caches = []
    for head_size in (d, dv or d):
        pages = torch.full((num_pages, Hkv, P, head_size), torch.nan, device=device)
        for row, n in enumerate(lengths):
            sequence = torch.full((M * P, Hkv, head_size), torch.nan, device=device)
            sequence[:n] = torch.randn(n, Hkv, head_size, device=device)
            pages[block_table[row].long()] = sequence.view(M, P, Hkv, head_size).transpose(1, 2)
        caches.append(pages.to(cache or dtype))
    q = spread * torch.randn(N, H, d, device=device, dtype=dtype)
    return q, *caches, block_table, ends[order], order.int(), d**-0.5, window, softcap
