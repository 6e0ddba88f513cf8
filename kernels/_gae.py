"""What the ops over rows and segments of tokens share: the scan that defines GAE, the check of offsets, and how a GPU's
kernels cut a few long rows."""

import torch
from torch import Tensor


def scan(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, T), one column after the other from the last; kernels/gae.py has the formula."""
    advantage = rewards.new_zeros(rewards.shape[0])
    next_value = advantage if bootstrap is None else bootstrap.to(advantage.dtype)
    advantages = []
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(here, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(here, values[:, t], next_value)
        advantages.append(torch.where(here, advantage, 0))
    advantages = torch.stack(advantages[::-1], dim=1) if advantages else torch.zeros_like(rewards)
    return advantages, torch.where(mask, advantages + values, 0)


ROWS, LONG, PIECES, LEAST = 64, 4096, 512, 1024


def pieces(rows: int, tokens: int, longest: int, like: Tensor) -> tuple[int, Tensor | None]:
    """How many tokens a piece has, a power of two, and memory for a map of each: 0 and None where rows stay whole.

    Up to `ROWS` rows would leave a GPU's processors idle, or wait for the longest of them."""
    if rows > ROWS or longest <= LONG:
        return 0, None
    piece = max(LEAST, 1 << (-(-tokens // PIECES) - 1).bit_length())
    return piece, torch.empty(-(-tokens // piece) + rows, 2, dtype=torch.float32, device=like.device)
