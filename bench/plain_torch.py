"""PPO's arithmetic in plain torch, as trainers write it today: what our ops and our update are measured beside."""

import torch
from torch import Tensor


def gae_loop(rewards, values, mask, gamma, lam):
    """Compute GAE one column after the other, masked by carry-forward, as verl and NeMo-RL write it."""
    next_value = last = torch.zeros_like(rewards[:, 0])
    reversed_advantages = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * last
        next_value = values[:, t] * mask[:, t] + (1 - mask[:, t]) * next_value
        last = advantage * mask[:, t] + (1 - mask[:, t]) * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, advantages + values


def advantages_loop(logprobs, ref_logprobs, values, scores, mask, kl_coef, gamma, lam):
    """Compute KL per token, the score at the last token, the loop, and the mean and variance for whitening."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    rows, ends = torch.arange(len(scores), device=scores.device), mask.sum(1).long() - 1
    rewards[rows, ends] += scores * (ends >= 0)
    advantages, returns = gae_loop(rewards, values, mask, gamma, lam)
    count = mask.sum()
    mean = (advantages * mask).sum() / count
    variance = ((advantages - mean) ** 2 * mask).sum() / count
    return advantages, returns, mean, variance


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, count: Tensor | float
) -> tuple[Tensor, list[Tensor]]:
    """Compute PPO's clipped loss over `count` tokens, and clip fraction, KL and ratio, which TRL and verl log."""
    log_ratio = (logprobs - old_logprobs).clamp(-20, 20)
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    loss = (torch.max(unclipped, clipped) * mask).sum() / count
    with torch.no_grad():
        metrics = [
            ((clipped > unclipped).float() * mask).sum() / count, (-log_ratio * mask).sum() / count,
            (ratio * mask).sum() / count,
        ]  # fmt: skip
    return loss, metrics


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, count: Tensor | float
) -> tuple[Tensor, list[Tensor]]:
    """Compute the clipped value loss over `count` tokens, and clip fraction, values, error and returns."""
    clipped_values = values.clamp(old_values - 0.2, old_values + 0.2)
    unclipped, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    loss = 0.5 * (torch.max(unclipped, clipped) * mask).sum() / count
    with torch.no_grad():
        metrics = [
            ((clipped > unclipped).float() * mask).sum() / count, (values * mask).sum() / count,
            (unclipped * mask).sum() / count, (returns * mask).sum() / count,
        ]  # fmt: skip
    return loss, metrics


def eager_losses(logprobs, old_logprobs, advantages, mask, values, old_values, returns):
    """Compute both losses as masked means, with all metrics."""
    count = mask.sum()
    policy, policy_metrics = policy_loss(logprobs, old_logprobs, advantages, mask, count)
    value, value_metrics = value_loss(values, old_values, returns, mask, count)
    return policy, value, policy_metrics + value_metrics
