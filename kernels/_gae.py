"""Shared by gae, gae_packed and ppo_advantages: the definition of GAE, and how a GPU splits long rows into chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.kernels._arguments import is_tracing
from rlhf_fast.kernels._tensors import as_float, contiguous_float32, upcast, upcast_dtype


def discounts(
    op: str, gamma: float | Tensor, lam: float | Tensor, rewards: Tensor, num_rows: int | None = None
) -> tuple:
    """Return each as a float, or as a tensor (num_rows,). Raise ValueError where a number is not within [0, 1] or a
    tensor's shape is another. A tensor () counts as a number. The rows are those of `rewards` if no number is given."""
    if type(gamma) is float and type(lam) is float and 0 <= gamma <= 1 and 0 <= lam <= 1:
        return gamma, lam
    rows = rewards.shape[0] if num_rows is None else num_rows
    gamma, lam = _number_or_rows(op, "gamma", gamma, rows, rewards), _number_or_rows(op, "lam", lam, rows, rewards)
    if isinstance(gamma, Tensor) or isinstance(lam, Tensor):
        for name, x in (("gamma", gamma), ("lam", lam)):
            if not isinstance(x, Tensor) and not 0 <= x <= 1:
                raise ValueError(f"{op}: {name} must be within [0, 1], got {x}")
    elif not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"{op}: gamma and lam must be within [0, 1], got {gamma} and {lam}")
    return gamma, lam


def _number_or_rows(op: str, name: str, x: float | Tensor, rows: int, like: Tensor) -> float | Tensor:
    if not isinstance(x, Tensor):
        return as_float(x)
    x = x.detach() if x.requires_grad else x
    if x.dim() == 0:
        if x.is_cpu and not is_tracing():
            return float(x)
        return x.to(device=like.device, dtype=upcast_dtype(like)).expand(rows)  # the device is not waited for
    if x.shape != (rows,):
        raise ValueError(f"{op}: {name} must be a number or have shape ({rows},), got {list(x.shape)}")
    return x


def row_discounts(op: str, gamma: float | Tensor, lam: float | Tensor) -> tuple[float, float, Any, Any]:
    """Return a launcher's gamma and lam, and of each that is a tensor, where the number is not read, a dense one in
    float32, or None. Raise ValueError as `check_rows`."""
    if type(gamma) is float and type(lam) is float:
        return gamma, lam, None, None
    check_rows(op, gamma, lam)
    gammas, lams = contiguous_float32(*(x if isinstance(x, Tensor) else None for x in (gamma, lam)))
    return 0.0 if isinstance(gamma, Tensor) else gamma, 0.0 if isinstance(lam, Tensor) else lam, gammas, lams


def check_rows(op: str, gamma: float | Tensor, lam: float | Tensor) -> None:
    """Raise ValueError where a tensor on the CPU has a number outside [0, 1]. NaN is let through: it makes NaN of its
    row. On a GPU nothing is checked: it would wait for the device."""
    for name, x in (("gamma", gamma), ("lam", lam)):
        if isinstance(x, Tensor) and x.is_cpu:
            outside = (x < 0) | (x > 1)
            if outside.any():
                row = int(outside.nonzero()[0])
                raise ValueError(f"{op}: {name} must be within [0, 1], got {x[row].item():.6g} in row {row}")


def gae_reference(
    op: str,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
    bootstrap: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns (B, T), computed column by column from the last; kernels/gae.py has the formula.
    Raise ValueError as `check_rows`, in the name of `op`."""
    check_rows(op, gamma, lam)
    gamma, lam = (upcast(x) if isinstance(x, Tensor) else x for x in (gamma, lam))
    advantage = rewards.new_zeros(rewards.shape[0])
    next_value = advantage if bootstrap is None else bootstrap.to(advantage.dtype)
    columns = []
    for t in range(rewards.shape[1] - 1, -1, -1):
        valid = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(valid, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(valid, values[:, t], next_value)
        columns.append(torch.where(valid, advantage, 0))
    advantages = torch.stack(columns[::-1], dim=1) if columns else torch.zeros_like(rewards)
    return advantages, torch.where(mask, advantages + values, 0)


def made_discounts(per_row: str, rows: int, device: torch.device | str, dtype: torch.dtype) -> tuple:
    """Return gamma and lam for inputs of tests: 0.99 and 0.95, or a tensor of each that `per_row` names."""
    gamma = 0.9 + 0.1 * torch.rand(rows, device=device, dtype=dtype) if "gamma" in per_row else 0.99
    return gamma, torch.rand(rows, device=device, dtype=dtype) if "lam" in per_row else 0.95


MAX_ROWS, MIN_LENGTH = 64, 4096  # only up to MAX_ROWS rows longer than MIN_LENGTH are split
MAX_CHUNKS, MIN_CHUNK = 512, 1024


def chunking(num_rows: int, num_tokens: int, longest: int, like: Tensor) -> tuple[int, Tensor | None]:
    """Return (chunk length, buffer with one affine map per chunk) for csrc/cuda, or (0, None) if rows are not split.

    The chunk length is a power of two. With a few long rows, one block per row would leave most SMs idle.
    """
    if num_rows > MAX_ROWS or longest <= MIN_LENGTH:
        return 0, None
    chunk = max(MIN_CHUNK, 1 << (-(-num_tokens // MAX_CHUNKS) - 1).bit_length())
    max_chunks = -(-num_tokens // chunk) + num_rows  # each row may end in a partly filled chunk
    return chunk, torch.empty(max_chunks, 2, dtype=torch.float32, device=like.device)
