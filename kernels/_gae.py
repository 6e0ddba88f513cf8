"""Shared by gae, gae_packed and ppo_advantages: the definition of GAE, and how a GPU splits long rows into chunks."""

import torch
from torch import Tensor


def discounts(op: str, gamma: float, lam: float) -> tuple[float, float]:
    """Return both as floats. Raise ValueError unless they are within [0, 1]."""
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"{op}: gamma and lam must be within [0, 1], got {gamma} and {lam}")
    return float(gamma), float(lam)


def gae_reference(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns (B, T), computed column by column from the last; kernels/gae.py has the formula."""
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
