"""Weights of tokens for `ops.ppo_loss`, from the function by which another trainer sums over them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def token_weights(aggregate: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Return the weight that each token's loss has in `aggregate`, a linear function of them: its gradient.

    So the trainer's own function decides on means of tokens or of sequences, on totals of all ranks, and on errors."""
    with torch.enable_grad():
        losses = torch.zeros(like.shape, dtype=torch.float32, device=like.device, requires_grad=True)
        (weights,) = torch.autograd.grad(aggregate(losses), losses)
    return weights
