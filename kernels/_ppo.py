"""PPO's policy loss of rows whose log-probability and entropy are known, and its slopes by both. Not an op."""

import torch
from torch import Tensor

from rlhf_fast.kernels._tensors import upcast

SUMS = (
    "weight", "clipped_low", "clipped_high", "clipped_dual", "kl_k1", "kl_k3", "ratio", "ratio_square",
    "policy_loss", "ref_kl", "entropy",
)  # fmt: skip
STATS = (*SUMS, "ratio_max", "ratio_min")
ESTIMATORS = ("k1", "k2", "k3")


def reference_kl(difference: Tensor, estimator: str, bound: float) -> tuple[Tensor, Tensor]:
    """Estimates of KL(policy || reference) from log p - log p_ref of the drawn token, and their slopes by log p."""
    if estimator == "k1":
        return difference, torch.ones_like(difference)
    if estimator == "k2":
        return difference**2 / 2, difference.detach()
    inverse = -difference
    clamped = inverse.clamp(-bound, bound)
    inside = inverse.abs() <= bound
    return clamped.exp() - 1 - clamped, torch.where(inside, 1 - clamped.exp(), 0).detach()


def policy_loss(
    logprobs: Tensor, entropy: Tensor, on: Tensor, weights: Tensor, old_logprobs: Tensor, advantages: Tensor,
    ref_logprobs: Tensor | None, shift: Tensor | None, scale: Tensor | None, clip_low: float, clip_high: float,
    dual_clip: float, kl_coef: float, kl_estimator: str, entropy_coef: float, log_ratio_clamp: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss (), stats (13,), and the slopes of the loss by logprobs and by entropy.

    Only rows in `on` are evaluated. The slope passes at a bound of the clip itself, a tie with the dual clip halves it,
    as torch.clamp, torch.maximum and torch.minimum have it; beyond log_ratio_clamp it is 0.
    """

    def of(x: Tensor) -> Tensor:
        return torch.where(on, upcast(x).to(logprobs.dtype), 0)

    weights, advantage = of(weights), upcast(advantages)
    advantage = advantage if shift is None else advantage - upcast(shift)
    advantage = of(advantage if scale is None else advantage * upcast(scale))
    bound = log_ratio_clamp if log_ratio_clamp > 0 else torch.inf
    raw = of(logprobs) - of(old_logprobs)
    log_ratio = raw.clamp(-bound, bound)
    ratio = log_ratio.exp()
    free, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    terms = torch.maximum(free, clipped)
    share = (free >= clipped).to(ratio.dtype)
    dual = torch.zeros_like(on)
    if dual_clip > 0:
        limit = torch.where(advantage < 0, -advantage * dual_clip, torch.inf)
        dual, share = terms > limit, torch.where(terms > limit, 0, torch.where(terms == limit, share / 2, share))
        terms = torch.minimum(terms, limit)
    slope = torch.where(raw.abs() <= bound, share, 0) * -advantage * ratio
    total, divergence = (weights * terms).sum(), torch.zeros_like(ratio)
    surrogate = total.detach()
    if ref_logprobs is not None:
        divergence, steepness = reference_kl(of(logprobs) - of(ref_logprobs), kl_estimator, bound)
        if kl_coef:
            total = total + kl_coef * (weights * divergence).sum()
            slope = slope + kl_coef * steepness
    if entropy_coef:
        total = total - entropy_coef * (weights * of(entropy)).sum()
    with torch.no_grad():
        below, above = (free < clipped) & (ratio < 1 - clip_low), (free < clipped) & (ratio > 1 + clip_high)
        sums = [on, below, above, dual, -log_ratio, ratio - 1 - log_ratio, ratio, ratio**2]
        sums = [(weights * x).sum() for x in sums] + [surrogate]
        sums += [(weights * x).sum() for x in (divergence, of(entropy))]
        most, least = torch.where(on, ratio, -torch.inf), torch.where(on, ratio, torch.inf)
        most, least = (
            torch.cat([x.flatten(), x.new_full((1,), end)]) for x, end in ((most, -torch.inf), (least, torch.inf))
        )
        sums += [most.amax(), least.amin()]
        return total, torch.stack(sums), (weights * slope).detach(), -entropy_coef * weights
