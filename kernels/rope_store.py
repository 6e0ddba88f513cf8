"""Rotate queries and keys by their positions, and write keys and values where attention will read them."""

import torch
from torch import Tensor

from rlhf_fast.kernels._launch import dtype_codes, require_dtypes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import copy_back, upcast


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, heads, d) with its first r dimensions rotated, in float32 or wider; cos and sin (N, r/2)."""
    half = cos.shape[1]
    a, b, rest = upcast(x).split([half, half, x.shape[2] - 2 * half], dim=2)
    cos, sin = upcast(cos)[:, None], upcast(sin)[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=2)


def _check_slots(slots: Tensor, k_cache: Tensor) -> None:
    places = k_cache.shape[0] * k_cache.shape[2]
    if slots.device.type == "cpu" and slots.numel() and not 0 <= slots.min() <= slots.max() < places:
        came = f"{int(slots.min())} to {int(slots.max())}"
        raise ValueError(f"rope_store: slots must be from 0 to {places - 1}, as the caches have places, got {came}")


@op(fake=lambda q, *rest: torch.empty(q.shape, dtype=q.dtype, device=q.device), mutates=("k_cache", "v_cache"))
def rope_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> Tensor:
    """q (N, H, d), rotated; k (N, Hkv, d), rotated, and v (N, Hkv, dv) are written into the caches in place.

        x1, x2, rest = x[: r/2], x[r/2 : r], x[r :]        out = x1 cos - x2 sin, x2 cos + x1 sin, rest

    (Su et al. 2021, arXiv 2104.09864, in halves, as Llama and NeoX pair the dimensions.) cos and sin (N, r/2) are those
    of each token's position; r = 0 rotates nothing. Caches (pages, Hkv, P, d) and (pages, Hkv, P, dv), of a dtype of
    their own; token n goes to place slots[n] % P of page slots[n] // P, slots (N,) int64, all different. Computed in
    float32, rounded once. A cache that is not contiguous is copied. ValueError where shapes differ, or a slot is out of
    range (on CPU). No gradient: for inference.
    """
    _check_slots(slots, k_cache)
    P = k_cache.shape[2]
    page, place = slots // P, slots % P
    k_cache[page, :, place] = _rotated(k, cos, sin).to(k_cache.dtype)
    v_cache[page, :, place] = v.to(v_cache.dtype)
    return _rotated(q, cos, sin).to(q.dtype)


@rope_store.normalize
def _(q, k, v, cos, sin, k_cache, v_cache, slots):
    shapes = [list(x.shape) for x in (q, k, v, cos, sin, k_cache, v_cache, slots)]
    fits = [x.dim() for x in (q, k, v, cos, sin, k_cache, v_cache, slots)] == [3, 3, 3, 2, 2, 4, 4, 1]
    if fits:
        N, heads, d, dv, half = *k.shape, v.shape[2], cos.shape[1]
        pages, _, P, _ = k_cache.shape
        fits = q.shape[::2] == (N, d) and v.shape[:2] == (N, heads) and slots.shape == (N,) and 2 * half <= d
        fits = fits and cos.shape == sin.shape == (N, half)
        fits = fits and k_cache.shape == (pages, heads, P, d) and v_cache.shape == (pages, heads, P, dv)
    if not fits:
        raise ValueError(
            "rope_store: q (N, H, d), k (N, Hkv, d), v (N, Hkv, dv), cos and sin (N, r/2) with r <= d, k_cache "
            f"(pages, Hkv, P, d), v_cache (pages, Hkv, P, dv) and slots (N,) must fit together, got {shapes}"
        )
    if not q.dtype == k.dtype == v.dtype or k_cache.dtype != v_cache.dtype:
        came = [str(x.dtype)[6:] for x in (q, k, v, k_cache, v_cache)]
        raise ValueError(f"rope_store: q, k and v must have one dtype, and both caches one, got {came}")
    return *(x.detach() for x in (q, k, v, cos, sin, k_cache, v_cache)), slots.long()


@rope_store.compiled(devices=("cpu",))
def _(kernels, q, k, v, cos, sin, k_cache, v_cache, slots):
    require_dtypes(q, k_cache, cos, sin)
    cos, sin = cos.float(), sin.float()
    q, k, v, cos, sin, slots = (x.contiguous() for x in (q, k, v, cos, sin, slots))
    k_held, v_held, out = k_cache.contiguous(), v_cache.contiguous(), torch.empty_like(q)
    half = q.dtype == torch.bfloat16
    pages, kv_heads, P, d = k_cache.shape
    try:
        kernels.rope_store(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), half, cos.data_ptr(), sin.data_ptr(), k_held.data_ptr(),
            v_held.data_ptr(), k_held.dtype == torch.bfloat16, slots.data_ptr(), out.data_ptr(), *q.shape[:2], kv_heads,
            d, v.shape[2], cos.shape[1], pages, P, stream_or_threads(q),
        )  # fmt: skip
    except RuntimeError:
        _check_slots(slots, k_cache)
        raise
    copy_back(k_held, k_cache)
    copy_back(v_held, v_cache)
    return out


@rope_store.compiled(devices=("cuda",))
def _(kernels, q, k, v, cos, sin, k_cache, v_cache, slots):
    code, cos_code, sin_code, cache_code = dtype_codes(kernels, q, cos, sin, k_cache)
    _check_slots(slots, k_cache)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    cos, sin, slots = cos.contiguous(), sin.contiguous(), slots.contiguous()
    k_held, v_held = k_cache.contiguous(), v_cache.contiguous()
    (N, H, d), (pages, kv_heads, P, dv) = q.shape, v_cache.shape
    out = torch.empty(N, H, d, dtype=q.dtype, device=q.device)
    kernels.rope_store(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), code, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        cos.data_ptr(), cos_code, sin.data_ptr(), sin_code, k_held.data_ptr(), v_held.data_ptr(), cache_code,
        slots.data_ptr(), out.data_ptr(), N, H, kv_heads, d, dv, cos.shape[1], pages, P, stream_or_threads(q),
    )  # fmt: skip
    copy_back(k_held, k_cache)
    copy_back(v_held, v_cache)
    return out


@rope_store.cost
def _(gradient, q, k, v, cos, sin, k_cache, v_cache, slots):
    """Of the caches only the new tokens' places, which are written."""
    moved = 2 * q.nbytes + k.nbytes + v.nbytes + cos.nbytes + sin.nbytes + slots.nbytes
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
    r, dv, cache, pages = d if r is None else r, dv or d, cache or dtype, N // P + 2
    q, k, v = (torch.randn(N, *shape, device=device, dtype=dtype) for shape in ((H, d), (Hkv, d), (Hkv, dv)))
    angles = 6 * torch.rand(N, r // 2, device=device)
    k_cache, v_cache = (torch.randn(pages, Hkv, P, x, device=device).to(cache) for x in (d, dv))
    slots = torch.randperm(pages * P, device=device)[:N]
    return q, k, v, angles.cos(), angles.sin(), k_cache, v_cache, slots
