"""The gap between trainer and sampler: the difference of their log-probabilities of the same token."""

from __future__ import annotations

import torch
from torch import Tensor

RATIO_BAND = (0.9, 1.1)
"""`rollout/ratio_outside` is the share of tokens whose probability ratio (trainer over sampler) is outside."""


@torch.no_grad()
def rollout_gap(trainer: Tensor, sampler: Tensor) -> dict[str, Tensor]:
    """Return `rollout/gap_mean`, `rollout/gap_max` and `rollout/ratio_outside` of the valid tokens' log-probabilities
    (N,) by the weights that sampled them. They are stats as learner.py describes them; {} if N is 0."""
    if not len(trainer):
        return {}
    gap = trainer.double() - sampler.double()
    count = gap.new_tensor(float(len(gap)))
    ratio = gap.exp()
    outside = (ratio < RATIO_BAND[0]) | (ratio > RATIO_BAND[1])
    return {
        "rollout/gap_mean": torch.stack([gap.abs().sum(), count]),
        "rollout/gap_max": gap.abs().max(),
        "rollout/ratio_outside": torch.stack([outside.sum().double(), count]),
    }
