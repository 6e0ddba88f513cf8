"""What the stages minimise. Each loss is `(model, batch, units) -> (loss, stats)`: a weighted sum over a batch, divided
by `units`, the `batch.units()` of the whole optimizer batch, so that parts of a batch add up. So do stats (learner.py).

Only tokens that carry loss go through the output head. Options are keywords; bind them with functools.partial.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.batches import Comparisons, Demonstrations, Experience, Texts

Stats = dict[str, Tensor]


def sft_loss(model, batch: Demonstrations, units: float, *, pack: bool = False) -> tuple[Tensor, Stats]:
    """Cross-entropy of the response tokens, nats per token; `pack` lays rows end to end for the forward pass."""
    loss = _cross_entropy(model, batch.tokens, batch.prompt_lengths, batch.lengths, units, pack)
    return loss, {"loss/sft": loss}


def pretrain_loss(model, batch: Texts, units: float, *, pack: bool = False) -> tuple[Tensor, Stats]:
    """Cross-entropy of every token but the first, nats per token."""
    loss = _cross_entropy(model, batch.tokens, torch.ones_like(batch.lengths), batch.lengths, units, pack)
    return loss, {"loss/pretrain": loss}


def reward_loss(model, batch: Comparisons, units: float) -> tuple[Tensor, Stats]:
    """-log sigmoid(better - worse), mean over the pairs of a prompt's responses, then over prompts. One forward pass a
    response, whatever the number of pairs; tied pairs are dropped."""
    scores = model.last_scores(batch.tokens, batch.lengths)
    groups = len(batch.group_offsets) - 1
    weights = scores.new_full((groups,), 1 / units)
    loss, sums = ops.ranking_loss(scores, batch.group_offsets.to(scores.device), batch.ranks.to(scores.device), weights)
    pairs, correct, margin = sums[:3]
    return loss, {
        "loss/reward": loss,
        "reward/accuracy": torch.stack([correct, pairs]),
        "reward/margin": torch.stack([margin, pairs]),
    }


def policy_loss(
    model, batch: Experience, units: float, *, temperature: float = 1.0, clip_low: float = 0.2, clip_high: float = 0.2,
    dual_clip: float = 0.0, entropy_coef: float = 0.0,
) -> tuple[Tensor, Stats]:  # fmt: skip
    """PPO's clipped objective, negated, minus entropy_coef times the entropy; `temperature` is the rollout's."""
    hidden, targets, where = model.hidden_and_targets(
        batch.tokens, batch.prompt_lengths, batch.lengths, keep=batch.mask
    )
    old, advantages = _pick(batch.old_logprobs, where, hidden), _pick(batch.advantages, where, hidden)
    weights = _pick(batch.weights, where, hidden) / units
    loss, logprobs, _, sums = ops.linear_ppo_loss(
        hidden, model.head_weight, targets, old, advantages, weights, clip_low=clip_low, clip_high=clip_high,
        dual_clip=dual_clip, entropy_coef=entropy_coef, temperature=temperature, softcap=model.softcap,
        bias=model.head_bias,
    )  # fmt: skip
    sums = dict(zip(ops.linear_ppo_loss.stats, sums, strict=True))
    return loss, {
        "loss/policy_avg": loss,
        "policy/approxkl_avg": (weights * 0.5 * (logprobs.detach() - old) ** 2).sum(),
        "policy/clipfrac_avg": sums["clipped_low"] + sums["clipped_high"],
        "policy/entropy_avg": sums["entropy"],
        "val/ratio": sums["ratio"],
        "val/ratio_max": sums["ratio_max"],
        "val/ratio_min": sums["ratio_min"],
    }


def value_loss(model, batch: Experience, units: float, *, value_clip: float = 0.2) -> tuple[Tensor, Stats]:
    """Half the larger of the squared errors of the value and of the value clipped to value_clip around the old one."""
    hidden, _, where = model.hidden_and_targets(batch.tokens, batch.prompt_lengths, batch.lengths, keep=batch.mask)
    values, weights = model.score_hidden(hidden), _pick(batch.weights, where, hidden) / units
    old, returns = _pick(batch.values, where, hidden), _pick(batch.returns, where, hidden)
    _, loss, sums = ops.ppo_loss(None, None, None, weights, values, old, returns, value_clip=value_clip)
    sums = dict(zip(ops.ppo_loss.stats, sums, strict=True))
    return loss, {
        "loss/value_avg": loss,
        "val/clipfrac_avg": sums["value_clipped"],
        "val/error": sums["value_error"],
        "val/mean": sums["value"],
    }


def _cross_entropy(model, tokens: Tensor, first: Tensor, lengths: Tensor, units: float, pack: bool) -> Tensor:
    hidden, targets, _ = model.hidden_and_targets(tokens, first, lengths, pack=pack)
    weights = torch.full((len(targets),), 1 / units, device=hidden.device)
    loss, _ = ops.linear_cross_entropy(
        hidden, model.head_weight, targets, weights, bias=model.head_bias, softcap=model.softcap
    )
    return loss


def _pick(field: Tensor, where: tuple[Tensor, Tensor], like: Tensor) -> Tensor:
    """Entries (N,) of a (B, R) field, on the device of `like`."""
    return field[where].to(like.device)
