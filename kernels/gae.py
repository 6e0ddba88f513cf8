"""Generalized advantage estimation, by a scan from the last token of each response to the first."""

import torch
from torch import Tensor

from rlhf_fast.kernels._gae import chunking, discounts, gae_reference, made_discounts, row_discounts
from rlhf_fast.kernels._launch import data_ptrs, ptrs_and_codes, refuse_float64, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import (
    as_bool,
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
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, each (B, T) float32.

        delta_t = r_t + gamma V_next(t) - V_t        A_t = delta_t + gamma lam A_next(t)        R_t = A_t + V_t

    This is eq. 16 of Schulman et al. 2016 (arXiv 1506.02438). next(t) is the next token inside the mask.

        rewards, values (B, T)
        mask (B, T), bool or integers (nonzero is inside): a token outside it is skipped, as in verl and NeMo-RL, and
            both of its outputs are 0
        gamma, lam: numbers, or tensors (B,) with one for each row, each independently; a tensor () is a number. VAPO
            (arXiv 2504.05118) has a lambda for each response's length, for its advantages:
            (1 - 1 / (0.05 * mask.sum(1))).clamp(0, 1). A float64 tensor makes all float64, in plain torch
        bootstrap (B,): V after the last token: the value of the state where a row was truncated, 0 where it ended
            by itself; None means 0 for all rows

    No gradient: advantages are targets.

    Raises ValueError where shapes differ, mask is floating point, another tensor is of integers, or gamma or lam is not
    within [0, 1] (of a tensor's numbers only on the CPU).
    """
    return gae_reference("gae", upcast(rewards), upcast(values), mask, gamma, lam, bootstrap)


@gae.normalize
def _(rewards, values, mask, gamma, lam, bootstrap):
    if rewards.dim() != 2 or not rewards.shape == values.shape == mask.shape:
        shapes = [list(x.shape) for x in (rewards, values, mask)]
        raise ValueError(f"gae: rewards, values and mask must have one shape (B, T), got {shapes}")
    if bootstrap is not None and bootstrap.shape != rewards.shape[:1]:
        raise ValueError(f"gae: bootstrap must have shape ({rewards.shape[0]},), got {list(bootstrap.shape)}")
    gamma, lam = discounts("gae", gamma, lam, rewards)
    tensors = detached((rewards, values, bootstrap))
    rewards, values, bootstrap, gamma, lam = promote_to_float64(*tensors, gamma, lam)
    return rewards, values, as_bool("gae", mask), gamma, lam, bootstrap


def _outputs(rewards):
    return empty_float32(rewards, *rewards.shape), empty_float32(rewards, *rewards.shape)


@gae.compiled(devices=("cpu",))
def _(kernels, rewards, values, mask, gamma, lam, bootstrap):
    refuse_float64(rewards)
    gamma, lam, *rows = row_discounts("gae", gamma, lam)
    rewards, values, bootstrap = contiguous_float32(rewards, values, bootstrap)
    tensors = (rewards, values, mask.contiguous(), bootstrap, *rows, *_outputs(rewards))
    kernels.gae(*data_ptrs(*tensors), *rewards.shape, gamma, lam, stream_or_threads(rewards))
    return tensors[-2:]


@gae.compiled(devices=("cuda",))
def _(kernels, rewards, values, mask, gamma, lam, bootstrap):
    refuse_float64(rewards)
    gamma, lam, *rows = row_discounts("gae", gamma, lam)
    rewards, values, bootstrap = contiguous_floats(rewards, values, bootstrap)
    mask, outputs = mask.contiguous(), _outputs(rewards)
    B, T = rewards.shape
    chunk, chunk_maps = chunking(B, B * T, T, rewards)
    kernels.gae(
        *ptrs_and_codes(kernels, rewards, values), *data_ptrs(mask, *rows), *ptrs_and_codes(kernels, bootstrap),
        *data_ptrs(*outputs, chunk_maps), chunk, B, T, gamma, lam, stream_or_threads(rewards),
    )  # fmt: skip
    return outputs


@gae.inputs(
    small_sizes=[
        {"B": 1, "T": 1},
        {"B": 3, "T": 17},
        {"B": 17, "T": 33, "bootstrap": True},
        {"B": 9, "T": 5, "gaps": False},
        {"B": 2, "T": 600},
        {"B": 2, "T": 300, "gaps": False},
        {"B": 17, "T": 33, "per_row": "lam"},
        {"B": 3, "T": 521, "per_row": "gamma", "bootstrap": True},
        {"B": 2, "T": 600, "per_row": "gamma and lam"},
        {"B": 0, "T": 4},
        {"B": 4, "T": 0},
    ],
    large_sizes=[
        {"B": 64, "T": 128},
        {"B": 64, "T": 1024},
        {"B": 512, "T": 1024},
        {"B": 512, "T": 1001},
        {"B": 4, "T": 16384},
    ],
)
def _(B, T, device, dtype, gaps=True, bootstrap=False, per_row=""):
    rewards, values = torch.randn(2, B, T, device=device, dtype=dtype)
    lengths = torch.randint(0, T + 1, (B, 1), device=device)
    mask = torch.rand(B, T, device=device) > 0.2 if gaps else torch.arange(T, device=device) < lengths
    bootstrap_values = torch.randn(B, device=device, dtype=dtype) if bootstrap else None
    return rewards, values, mask, *made_discounts(per_row, B, device, dtype), bootstrap_values
