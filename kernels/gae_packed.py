"""Generalized advantage estimation over responses packed one behind the other, without padding."""

import torch
from torch import Tensor

from rlhf_fast.kernels._gae import chunking, discounts, gae_reference, made_discounts, row_discounts
from rlhf_fast.kernels._launch import data_ptrs, ptrs_and_codes, refuse_float64, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import (
    as_bool,
    check_offsets,
    contiguous_float32,
    contiguous_floats,
    detached,
    empty_float32,
    promote_to_float64,
    upcast,
    upcast_dtype,
)


def _fake(rewards, *rest):
    out = torch.empty(rewards.shape, dtype=upcast_dtype(rewards), device=rewards.device)
    return out, torch.empty_like(out)


@op(fake=_fake, rows=("gamma", "lam"))
def gae_packed(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, each (N,) float32, of S packed responses. `gae` has the formula.

        rewards, values (N,)
        mask (N,), bool or integers (nonzero is inside): a token outside it is skipped, and both of its outputs are 0
        cu_seqlens (S + 1,), int32 or int64: response s is tokens cu_seqlens[s] to cu_seqlens[s + 1]; it may be empty
        gamma, lam: numbers, or tensors (S,) with one for each response, each independently; a tensor () is a number
        bootstrap (S,): V after the last token of each response; None means 0

    No gradient: advantages are targets.

    Raises ValueError where shapes differ, mask is floating point, another tensor is of integers, gamma or lam is not
    within [0, 1], or cu_seqlens does not rise from 0 to N (a tensor's numbers and cu_seqlens only on the CPU).
    """
    check_offsets("gae_packed", "cu_seqlens", cu_seqlens, rewards.shape[0])
    starts, lengths = cu_seqlens[:-1, None].long(), cu_seqlens.diff()[:, None]
    longest = int(lengths.max()) if lengths.numel() else 0
    positions = torch.arange(longest, device=rewards.device)
    inside = positions < lengths
    padded_shape = (starts + positions).shape

    def pad(x: Tensor) -> Tensor:
        return x.new_zeros(padded_shape).masked_scatter(inside, x)

    padded = gae_reference("gae_packed", pad(upcast(rewards)), pad(upcast(values)), pad(mask), gamma, lam, bootstrap)
    return padded[0][inside], padded[1][inside]


@gae_packed.normalize
def _(rewards, values, mask, cu_seqlens, gamma, lam, bootstrap):
    if rewards.dim() != 1 or not rewards.shape == values.shape == mask.shape:
        shapes = [list(x.shape) for x in (rewards, values, mask)]
        raise ValueError(f"gae_packed: rewards, values and mask must have one shape (N,), got {shapes}")
    if cu_seqlens.dim() != 1 or not cu_seqlens.shape[0] or cu_seqlens.dtype not in (torch.int32, torch.int64):
        given = f"{list(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise ValueError(f"gae_packed: cu_seqlens must be int32 or int64 of shape (S + 1,), got {given}")
    S = cu_seqlens.shape[0] - 1
    if bootstrap is not None and bootstrap.shape != (S,):
        raise ValueError(f"gae_packed: bootstrap must have shape ({S},), got {list(bootstrap.shape)}")
    gamma, lam = discounts("gae_packed", gamma, lam, rewards, S)
    tensors = detached((rewards, values, bootstrap))
    rewards, values, bootstrap, gamma, lam = promote_to_float64(*tensors, gamma, lam)
    return rewards, values, as_bool("gae_packed", mask), cu_seqlens, gamma, lam, bootstrap


def _outputs(rewards):
    return empty_float32(rewards, *rewards.shape), empty_float32(rewards, *rewards.shape)


@gae_packed.compiled(devices=("cpu",))
def _(kernels, rewards, values, mask, cu_seqlens, gamma, lam, bootstrap):
    refuse_float64(rewards)
    check_offsets("gae_packed", "cu_seqlens", cu_seqlens, rewards.shape[0])
    gamma, lam, *rows = row_discounts("gae_packed", gamma, lam)
    rewards, values, bootstrap = contiguous_float32(rewards, values, bootstrap)
    cu_seqlens = cu_seqlens.long().contiguous()
    tensors = (rewards, values, mask.contiguous(), cu_seqlens, bootstrap, *rows, *_outputs(rewards))
    S, N = len(cu_seqlens) - 1, len(rewards)
    kernels.gae_packed(*data_ptrs(*tensors), S, N, gamma, lam, stream_or_threads(rewards))
    return tensors[-2:]


@gae_packed.compiled(devices=("cuda",))
def _(kernels, rewards, values, mask, cu_seqlens, gamma, lam, bootstrap):
    refuse_float64(rewards)
    check_offsets("gae_packed", "cu_seqlens", cu_seqlens, rewards.shape[0])
    gamma, lam, *rows = row_discounts("gae_packed", gamma, lam)
    rewards, values, bootstrap = contiguous_floats(rewards, values, bootstrap)
    mask, cu_seqlens, outputs = mask.contiguous(), cu_seqlens.contiguous(), _outputs(rewards)
    S, N = cu_seqlens.shape[0] - 1, rewards.shape[0]
    chunk, chunk_maps = chunking(S, N, N, rewards)
    kernels.gae_packed(
        *ptrs_and_codes(kernels, rewards, values), *data_ptrs(mask, *rows, cu_seqlens), cu_seqlens.dtype == torch.int32,
        *ptrs_and_codes(kernels, bootstrap), *data_ptrs(*outputs, chunk_maps), chunk, S, N, gamma, lam,
        stream_or_threads(rewards),
    )  # fmt: skip
    return outputs


@gae_packed.inputs(
    small_sizes=[
        {"lengths": (1,)},
        {"lengths": (5, 0, 17, 1, 33)},
        {"lengths": (0, 9, 0, 0), "bootstrap": True, "index": "int32"},
        {"lengths": (40, 3, 8, 16, 7, 9, 15, 31, 64, 2, 0, 12, 5, 5, 5, 5, 70, 1, 1), "bootstrap": True},
        {"lengths": (7, 12), "gaps": False},
        {"lengths": (3, 1100, 20)},
        {"lengths": (521, 0, 520), "gaps": False},
        {"lengths": (40, 3, 8, 0, 7, 33), "per_row": "lam"},
        {"lengths": (3, 1100, 20), "per_row": "gamma", "bootstrap": True},
        {"lengths": (0, 9, 521, 0), "per_row": "gamma and lam", "index": "int32"},
        {"lengths": ()},
        {"lengths": (0, 0)},
    ],
    large_sizes=[{"lengths": (1024,) * 64}, {"lengths": tuple(range(1, 1024, 8))}, {"lengths": (131072,)}],
)
def _(lengths, device, dtype, gaps=True, bootstrap=False, index="int64", per_row=""):
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(getattr(torch, index))
    rewards, values = torch.randn(2, sum(lengths), device=device, dtype=dtype)
    mask = torch.rand(sum(lengths), device=device) > (0.2 if gaps else -1)
    bootstrap_values = torch.randn(len(lengths), device=device, dtype=dtype) if bootstrap else None
    return rewards, values, mask, cu_seqlens, *made_discounts(per_row, len(lengths), device, dtype), bootstrap_values
