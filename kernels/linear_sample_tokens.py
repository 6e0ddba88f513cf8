"""Sample one token for each row of hidden states: a linear head's product and sample_tokens in one, for decoding.

Without a filter nothing of size B x V is written: a tile of logits is sampled from while it is in the cache.
kernels/_sampling.py defines the noise, the filters and the choice.
"""

from functools import lru_cache

import torch
from torch import Tensor

from rlhf_fast.kernels import _product
from rlhf_fast.kernels._launch import Unsupported, data_ptrs, require_dtypes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._sampling import SamplingOptions, empty_outputs, normalize_options, sample_reference
from rlhf_fast.kernels._tensors import contiguous, upcast

MIN_NANOSECONDS_TO_THREAD = 200_000
"""Work of one thread from which on others are called. Waiting for them takes some microseconds, and far more on a
machine that is busy with other things."""


def _fake(hidden, _weight, *_options):
    return empty_outputs(hidden.shape[:1], hidden)


@op(fake=_fake)
def linear_sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    temperature: float | Tensor | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    seed: int = 0,
    row_ids: Tensor | None = None,
    steps: int | Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    banned: Tensor | None = None,
    ban_rows: Tensor | None = None,
    device_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sample one token for each row of `hidden` (B, D) under the head `weight` (V, D); all outputs (B,), nats.
    `row_ids` and `steps` are required: they key the noise.

        logits = cap(hidden weight' + bias), cap(x) = softcap tanh(x / softcap) or x where softcap is 0
        outputs = sample_tokens(logits, temperature, top_k, top_p, min_p, seed, row_ids, steps)

    hidden, weight: `hidden` may be float32 beside a bfloat16 `weight`. Logits are float32.
    bias: (V,).
    banned (K,) int64, ban_rows (B,) bool: these tokens are not sampled in the rows where ban_rows is true, and the
        filters do not see them. logprobs, raw_logprobs and entropy ignore the ban; kept_logprobs and log_kept_mass
        include it.
    device_seed (1,) int64: replaces `seed`. A kernel loads it, so that a captured CUDA graph can be replayed with
        another.

    On the CPU a row's outputs do not depend on the other rows, bit for bit.
    Gradients: none.
    Raises ValueError where shapes do not fit, a number is out of range, or row_ids or steps are missing.
    """
    logits = upcast(hidden) @ upcast(weight).to(upcast(hidden).dtype).t()
    logits = logits if bias is None else logits + bias.to(logits.dtype)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    allowed = None
    if banned is not None and ban_rows is not None:
        allowed = torch.ones_like(logits, dtype=torch.bool).index_fill(1, banned, False) | ~ban_rows[:, None]
    assert row_ids is not None and steps is not None  # the normalizer has checked it
    key = seed if device_seed is None else device_seed
    options = SamplingOptions._make((temperature, top_k, top_p, min_p, key, row_ids, steps))
    return sample_reference(logits, options, allowed=allowed)


@linear_sample_tokens.normalize
def _(hidden, weight, *args):
    *options, bias, softcap, banned, ban_rows, device_seed = args
    _check(hidden, weight, bias, softcap, banned, ban_rows, device_seed)
    options = normalize_options("linear_sample_tokens", hidden, *options)
    bias = bias if bias is None else bias.detach()
    bans = (None, None) if banned is None else (banned.long(), ban_rows.bool())
    return hidden.detach(), weight.detach(), *options, bias, float(softcap), *bans, device_seed


def _check(hidden, weight, bias, softcap, banned, ban_rows, device_seed) -> None:
    name = "linear_sample_tokens"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not weight.shape[0]:
        raise ValueError(
            f"{name}: hidden must be (B, D) and weight (V > 0, D), got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if not (hidden.is_floating_point() and weight.is_floating_point()) or hidden.device != weight.device:
        raise ValueError(
            f"{name}: hidden and weight must be floating point on one device, got {hidden.dtype} on {hidden.device} and"
            f" {weight.dtype} on {weight.device}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must have shape ({weight.shape[0]},), got {list(bias.shape)}")
    if softcap < 0:
        raise ValueError(f"{name}: softcap must be 0 (off) or more, got {softcap}")
    if (banned is None) != (ban_rows is None):
        raise ValueError(f"{name}: banned and ban_rows go together, got only one of them")
    if banned is not None and (banned.dim() != 1 or ban_rows.shape != hidden.shape[:1]):
        shapes = [list(banned.shape), list(ban_rows.shape)]
        raise ValueError(f"{name}: banned must be (K,) and ban_rows ({hidden.shape[0]},), got {shapes}")
    if device_seed is not None and (device_seed.shape != (1,) or device_seed.dtype != torch.int64):
        raise ValueError(
            f"{name}: device_seed must be int64 of shape (1,), got {device_seed.dtype} {list(device_seed.shape)}"
        )


@lru_cache(maxsize=256)
def _workspace_bytes(
    kernels, rows: int, V: int, D: int, is_bf16: bool, keeps_logits: bool, bf16_dot: int, threads: int
) -> int:
    """Return the bytes of memory that a call needs besides its outputs."""
    needed = torch.zeros(1, dtype=torch.int64, device="cpu")
    outputs = [0] * 6
    kernels.linear_sample_tokens(
        0, False, rows, 0, 0, V, D, D, is_bf16, 0.0, 0, int(keeps_logits), 0, 0, 0, 0, 0, 0, 0, 0, *outputs, bf16_dot,
        0, 0, needed.data_ptr(), threads,
    )  # fmt: skip
    return int(needed)


@linear_sample_tokens.compiled
def _(kernels, hidden, weight, *args):
    *options, seed, row_ids, steps, bias, softcap, banned, ban_rows, device_seed = args
    seed = seed if device_seed is None else int(device_seed)
    V, D = weight.shape
    require_dtypes(hidden, weight)
    if V > 2**31 - 2**20:
        raise Unsupported(f"no compiled kernel for a vocabulary of {V}")
    hidden = hidden.contiguous()
    weight = weight if weight.stride(1) == 1 or D == 1 else weight.contiguous()
    bias = bias if bias is None else bias.to(weight.dtype).contiguous()
    options = contiguous(*options)
    keys_and_bans = contiguous(row_ids, steps, banned, ban_rows)
    row_ids_ptr, steps_ptr, banned_ptr, ban_rows_ptr = data_ptrs(*keys_and_bans)
    num_banned = 0 if banned is None else len(banned)
    is_bf16 = weight.dtype == torch.bfloat16
    keeps_logits = banned is not None or any(x is not None for x in options[1:])
    threads = stream_or_threads(hidden)
    size = _workspace_bytes(kernels, len(hidden), V, D, is_bf16, keeps_logits, _product.BF16_DOT, threads)
    workspace = torch.empty(max(size, 1), dtype=torch.uint8, device="cpu")
    outputs = _fake(hidden, weight)
    kernels.linear_sample_tokens(
        hidden.data_ptr(), hidden.dtype == torch.bfloat16, len(hidden), weight.data_ptr(), *data_ptrs(bias), V, D,
        weight.stride(0), is_bf16, softcap, *data_ptrs(*options), seed, row_ids_ptr, steps_ptr, banned_ptr, num_banned,
        ban_rows_ptr, *data_ptrs(*outputs), _product.BF16_DOT, MIN_NANOSECONDS_TO_THREAD, workspace.data_ptr(), 0,
        threads,
    )  # fmt: skip
    return outputs


@linear_sample_tokens.cost
def _(_gradient, hidden, weight, *_options):
    return hidden.nbytes + weight.nbytes, 2.0 * hidden.shape[0] * weight.numel()


@linear_sample_tokens.inputs(
    small_sizes=[
        {"B": 1, "D": 8, "V": 1},
        {"B": 3, "D": 17, "V": 33, "seed_on_device": True},
        {"B": 5, "D": 32, "V": 2100, "temperature": 0.7},
        {"B": 70, "D": 9, "V": 131, "biased": True},
        {"B": 7, "D": 9, "V": 131, "top_p": 0.8, "seed_on_device": True},
        {"B": 4, "D": 64, "V": 999, "top_k": 5, "softcap": 3.0},
        {"B": 13, "D": 24, "V": 1050, "mixed": True, "biased": True, "softcap": 20.0},
        {"B": 6, "D": 16, "V": 300, "bans": 3},
        {"B": 6, "D": 16, "V": 300, "bans": 40, "min_p": 0.05, "temperature": 1.5, "mixed": True},
        {"B": 0, "D": 4, "V": 7},
    ],
    large_sizes=[
        {"B": 1, "D": 576, "V": 49152},
        {"B": 32, "D": 576, "V": 49152},
        {"B": 32, "D": 2048, "V": 128256},
        {"B": 32, "D": 576, "V": 49152, "temperature": 0.7, "biased": True, "softcap": 20.0, "bans": 3},
        {"B": 32, "D": 576, "V": 49152, "top_p": 0.9, "biased": True, "softcap": 20.0, "bans": 3},
    ],
)
def _(
    B, D, V, device, dtype, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, mixed=False, biased=False, softcap=0.0,
    bans=0, seed_on_device=False,
):  # fmt: skip
    # Values on a coarse grid: every product and sum is exact, so all backends sample from the very same logits.
    hidden = torch.randint(-4, 5, (B, D), device=device).to(dtype) / 4
    weight = torch.randint(-4, 5, (V, D), device=device).to(dtype) / 4
    bias = torch.randint(-8, 9, (V,), device=device).to(dtype) / 4 if biased else None
    if mixed:
        temperature = torch.tensor([0.0, 1.0, 0.5, 2.0, 1e-3, 1.0], device=device).repeat(B)[:B]
        top_k = torch.tensor([0, 3, V, 40, 1, 0, 0], device=device).repeat(B)[:B]
        top_p = torch.tensor([1.0, 0.9, 0.5, 1e-6, 1.0, 1.0, 1.0], device=device).repeat(B)[:B]
        min_p = torch.tensor([0.0, 0.02, 1.0, 0.0, 0.0], device=device).repeat(B)[:B]
    row_ids, steps = torch.randint(-(2**62), 2**62, (2, B), device=device)
    banned = torch.randperm(V, device=device)[:bans] if bans else None
    ban_rows = torch.arange(B, device=device) % 3 != 0 if bans else None
    options = temperature, top_k, top_p, min_p, int(torch.randint(2**62, ())), row_ids, steps % 2**31
    device_seed = torch.randint(2**62, (1,), device=device) if seed_on_device else None
    return hidden, weight, *options, bias, softcap, banned, ban_rows, device_seed
