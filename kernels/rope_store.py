"""Rotate queries and keys by their positions, and store keys and values in a paged KV cache."""

import torch
from torch import Tensor

from rlhf_fast.kernels._launch import data_ptrs, dtype_codes, require_dtypes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._rope import rotate
from rlhf_fast.kernels._tensors import contiguous, copy_back, detached


def _check_slot_mapping(slot_mapping: Tensor, k_cache: Tensor) -> None:
    num_slots = k_cache.shape[0] * k_cache.shape[2]
    if slot_mapping.device.type != "cpu" or not slot_mapping.numel():
        return
    low, high = int(slot_mapping.min()), int(slot_mapping.max())
    if low < 0 or high >= num_slots:
        raise ValueError(f"rope_store: slot_mapping must be from 0 to {num_slots - 1}, got {low} to {high}")


@op(fake=lambda q, *_rest: torch.empty(q.shape, dtype=q.dtype, device=q.device), mutates=("k_cache", "v_cache"))
def rope_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    """Return q (N, H, d) rotated, and write k rotated, and v, into the caches in place.

        x1, x2, rest = x[: r/2], x[r/2 : r], x[r :]        out = x1 cos - x2 sin, x2 cos + x1 sin, rest

    (Su et al. 2021, arXiv 2104.09864; dimensions are paired by halves, as in Llama and NeoX.)

        k (N, Hkv, d), v (N, Hkv, dv), in q's dtype
        cos, sin (N, r/2): of each token's position; r = 0 rotates nothing
        k_cache (num_pages, Hkv, P, d), v_cache (num_pages, Hkv, P, dv): pages of P positions, of one dtype
        slot_mapping (N,) int64: token n is stored at position slot_mapping[n] % P of page slot_mapping[n] // P; no two
            are equal

    It is computed in float32 and rounded once. A cache that is not contiguous is copied, and copied back. No
    gradient: for inference.

    Raises ValueError where shapes or dtypes differ, or a slot is out of range (the last only on the CPU).
    """
    _check_slot_mapping(slot_mapping, k_cache)
    P = k_cache.shape[2]
    page, position = slot_mapping // P, slot_mapping % P
    k_cache[page, :, position] = rotate(k, cos, sin).to(k_cache.dtype)
    v_cache[page, :, position] = v.to(v_cache.dtype)
    return rotate(q, cos, sin).to(q.dtype)


@rope_store.normalize
def _(q, k, v, cos, sin, k_cache, v_cache, slot_mapping):
    tensors = q, k, v, cos, sin, k_cache, v_cache, slot_mapping
    if not _shapes_fit(*tensors):
        raise ValueError(
            "rope_store: q (N, H, d), k (N, Hkv, d), v (N, Hkv, dv), cos and sin (N, r/2) with r <= d, k_cache "
            "(pages, Hkv, P, d), v_cache (pages, Hkv, P, dv) and slot_mapping (N,) must fit together, got "
            f"{[list(x.shape) for x in tensors]}"
        )
    if not q.dtype == k.dtype == v.dtype or k_cache.dtype != v_cache.dtype:
        given = [str(x.dtype)[6:] for x in (q, k, v, k_cache, v_cache)]
        raise ValueError(f"rope_store: q, k and v must have one dtype, and both caches one, got {given}")
    return *detached(tensors[:-1]), slot_mapping.long()


def _shapes_fit(q, k, v, cos, sin, k_cache, v_cache, slot_mapping) -> bool:
    if [x.dim() for x in (q, k, v, cos, sin, k_cache, v_cache, slot_mapping)] != [3, 3, 3, 2, 2, 4, 4, 1]:
        return False
    N, Hkv, d = k.shape
    dv, half = v.shape[2], cos.shape[1]
    num_pages, _, P, _ = k_cache.shape
    tokens_fit = q.shape[::2] == (N, d) and v.shape[:2] == (N, Hkv) and slot_mapping.shape == (N,)
    angles_fit = cos.shape == sin.shape == (N, half) and 2 * half <= d
    caches_fit = k_cache.shape == (num_pages, Hkv, P, d) and v_cache.shape == (num_pages, Hkv, P, dv)
    return tokens_fit and angles_fit and caches_fit


@rope_store.compiled(devices=("cpu",))
def _(kernels, q, k, v, cos, sin, k_cache, v_cache, slot_mapping):
    require_dtypes(q, k_cache, cos, sin)
    q, k, v, cos, sin, slot_mapping = contiguous(q, k, v, cos.float(), sin.float(), slot_mapping)
    dense_k_cache, dense_v_cache = contiguous(k_cache, v_cache)
    out = torch.empty_like(q)
    num_pages, Hkv, P, d = k_cache.shape
    try:
        kernels.rope_store(
            *data_ptrs(q, k, v), q.dtype == torch.bfloat16,
            *data_ptrs(cos, sin, dense_k_cache, dense_v_cache), k_cache.dtype == torch.bfloat16,
            *data_ptrs(slot_mapping, out), *q.shape[:2], Hkv, d, v.shape[2], cos.shape[1], num_pages, P,
            stream_or_threads(q),
        )  # fmt: skip
    except RuntimeError:
        _check_slot_mapping(slot_mapping, k_cache)
        raise
    copy_back(dense_k_cache, k_cache)
    copy_back(dense_v_cache, v_cache)
    return out


@rope_store.compiled(devices=("cuda",))
def _(kernels, q, k, v, cos, sin, k_cache, v_cache, slot_mapping):
    q_code, cos_code, sin_code, cache_code = dtype_codes(kernels, q, cos, sin, k_cache)
    _check_slot_mapping(slot_mapping, k_cache)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    cos, sin, slot_mapping = contiguous(cos, sin, slot_mapping)
    dense_k_cache, dense_v_cache = contiguous(k_cache, v_cache)
    N, H, d = q.shape
    num_pages, Hkv, P, dv = v_cache.shape
    out = torch.empty(N, H, d, dtype=q.dtype, device=q.device)
    kernels.rope_store(
        *data_ptrs(q, k, v), q_code, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        cos.data_ptr(), cos_code, sin.data_ptr(), sin_code, *data_ptrs(dense_k_cache, dense_v_cache), cache_code,
        *data_ptrs(slot_mapping, out), N, H, Hkv, d, dv, cos.shape[1], num_pages, P, stream_or_threads(q),
    )  # fmt: skip
    copy_back(dense_k_cache, k_cache)
    copy_back(dense_v_cache, v_cache)
    return out


@rope_store.cost
def _(_gradient, q, k, v, cos, sin, k_cache, v_cache, slot_mapping):
    """Count only the written slots of the caches."""
    moved = 2 * q.nbytes + k.nbytes + v.nbytes + cos.nbytes + sin.nbytes + slot_mapping.nbytes
    return moved + k.numel() * k_cache.element_size() + v.numel() * v_cache.element_size(), 0.0


@rope_store.inputs(
    small_sizes=[
        {"N": 1, "H": 1, "Hkv": 1, "d": 2, "P": 1},
        {"N": 5, "H": 6, "Hkv": 2, "d": 64, "P": 16},
        {"N": 7, "H": 3, "Hkv": 3, "d": 80, "P": 4, "r": 20, "cache": torch.bfloat16},
        {"N": 3, "H": 4, "Hkv": 1, "d": 33, "P": 3, "r": 14, "dv": 17, "cache": torch.float32},
        {"N": 4, "H": 2, "Hkv": 2, "d": 9, "P": 2, "r": 0},
        {"N": 0, "H": 2, "Hkv": 1, "d": 8, "P": 4},
    ],
    large_sizes=[{"N": 32, "H": 9, "Hkv": 3, "d": 64, "P": 64}, {"N": 2048, "H": 9, "Hkv": 3, "d": 64, "P": 64}],
)
def _(N, H, Hkv, d, P, device, dtype, r=None, dv=None, cache=None):
    r = d if r is None else r
    dv = dv or d
    num_pages = N // P + 2
    q, k, v = (torch.randn(N, *shape, device=device, dtype=dtype) for shape in ((H, d), (Hkv, d), (Hkv, dv)))
    angles = 6 * torch.rand(N, r // 2, device=device)
    k_cache, v_cache = (torch.randn(num_pages, Hkv, P, n, device=device).to(cache or dtype) for n in (d, dv))
    slot_mapping = torch.randperm(num_pages * P, device=device)[:N]
    return q, k, v, angles.cos(), angles.sin(), k_cache, v_cache, slot_mapping
