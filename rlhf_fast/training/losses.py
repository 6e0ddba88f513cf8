"""The losses of the stages, each `(model, batch, num_items) -> (loss, stats)` as learner.py describes.

A loss is a weighted sum over the batch divided by `num_items`, the `batch.num_items()` of the whole optimizer batch, so
micro-batches add up. Only tokens that carry loss go through the output head. Options are keywords: bind them with
functools.partial.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.batches import Comparisons, Demonstrations, Experience, Texts
from rlhf_fast.model.model import Model
from rlhf_fast.model.packing import to_device
from rlhf_fast.training.rollout_gap import rollout_gap

Stats = dict[str, Tensor]


def sft_loss(model: Model, batch: Demonstrations, num_items: float, *, pack: bool = False) -> tuple[Tensor, Stats]:
    """Return the cross-entropy of the response tokens that have a loss, nats per token.

    pack: lay rows end to end for the forward pass, without attention across them.
    """
    loss = _cross_entropy(model, batch.tokens, batch.prompt_lengths, batch.lengths, num_items, pack, batch.loss_mask)
    return loss, {"loss/sft": loss}


def pretrain_loss(model: Model, batch: Texts, num_items: float, *, pack: bool = False) -> tuple[Tensor, Stats]:
    """Return the cross-entropy of every token but the first, nats per token."""
    loss = _cross_entropy(model, batch.tokens, torch.ones_like(batch.lengths), batch.lengths, num_items, pack)
    return loss, {"loss/pretrain": loss}


def reward_loss(model: Model, batch: Comparisons, num_items: float) -> tuple[Tensor, Stats]:
    """Return the mean of -log sigmoid(better - worse) over the pairs of a prompt's responses, then over prompts.

    Each response takes one forward pass, whatever the number of pairs, and a prompt one, whatever the number of
    responses, where our own layers run (model/packed_decoder.py). Tied pairs are dropped.
    """
    scores = model.last_scores(batch.tokens, batch.lengths, batch.prompt_lengths)
    num_groups = len(batch.group_offsets) - 1
    weights = scores.new_full((num_groups,), 1 / num_items)
    offsets, ranks = (to_device(x, scores.device) for x in (batch.group_offsets, batch.ranks))
    loss, sums = ops.ranking_loss(scores, offsets, ranks, weights)
    pairs, correct, margin = sums[:3]
    return loss, {
        "loss/reward": loss,
        "reward/accuracy": torch.stack([correct, pairs]),
        "reward/margin": torch.stack([margin, pairs]),
    }


def ppo_policy_loss(
    model: Model,
    batch: Experience,
    num_items: float,
    *,
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    entropy_coef: float = 0.0,
    measure_gap: bool = False,
) -> tuple[Tensor, Stats]:
    """Return PPO's clipped objective, negated, minus entropy_coef times the entropy.

    temperature: the rollout's. measure_gap: the weights are still those that sampled, and batch.old_logprobs are the
    sampler's, so that their difference to this forward pass is `rollout_gap`'s, whose stats are returned too.
    """
    hidden, targets, where = model.hidden_and_targets(
        batch.tokens, batch.prompt_lengths, batch.lengths, keep=batch.mask
    )
    old_logprobs = _gather(batch.old_logprobs, where, hidden)
    advantages = _gather(batch.advantages, where, hidden)
    weights = _gather(batch.weights, where, hidden) / num_items
    loss, logprobs, _, sums = ops.linear_ppo_loss(
        hidden,
        model.head_weight,
        targets,
        old_logprobs,
        advantages,
        weights,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        entropy_coef=entropy_coef,
        temperature=temperature,
        softcap=model.softcap,
        bias=model.head_bias,
    )
    sums = dict(zip(ops.linear_ppo_loss.stats, sums, strict=True))
    gap = rollout_gap(logprobs.detach(), old_logprobs) if measure_gap else {}
    return loss, {
        **gap,
        "loss/policy_avg": loss,
        "policy/approxkl_avg": (weights * 0.5 * (logprobs.detach() - old_logprobs) ** 2).sum(),
        "policy/clipfrac_avg": sums["clipped_low"] + sums["clipped_high"],
        "policy/entropy_avg": sums["entropy"],
        "val/ratio": sums["ratio"],
        "val/ratio_max": sums["ratio_max"],
        "val/ratio_min": sums["ratio_min"],
    }


def ppo_value_loss(
    model: Model, batch: Experience, num_items: float, *, value_clip: float = 0.2
) -> tuple[Tensor, Stats]:
    """Return half the larger of two squared errors: of the value, and of the value clipped to old +- value_clip."""
    hidden, _, where = model.hidden_and_targets(batch.tokens, batch.prompt_lengths, batch.lengths, keep=batch.mask)
    values = model.score_hidden(hidden)
    old_values = _gather(batch.values, where, hidden)
    returns = _gather(batch.returns, where, hidden)
    weights = _gather(batch.weights, where, hidden) / num_items
    _, loss, sums = ops.ppo_loss(None, None, None, weights, values, old_values, returns, value_clip=value_clip)
    sums = dict(zip(ops.ppo_loss.stats, sums, strict=True))
    return loss, {
        "loss/value_avg": loss,
        "val/clipfrac_avg": sums["value_clipped"],
        "val/error": sums["value_error"],
        "val/mean": sums["value"],
    }


def _cross_entropy(
    model: Model,
    tokens: Tensor,
    first: Tensor,
    lengths: Tensor,
    num_items: float,
    pack: bool,
    keep: Tensor | None = None,
) -> Tensor:
    """Return the sum over the tokens first <= t < length, those that `keep` (B, R) selects, divided by num_items. It is
    over all rows of the output embedding, as everywhere: those without a token lose their probability by it."""
    hidden, targets, _ = model.hidden_and_targets(tokens, first, lengths, keep, pack)
    weights = torch.full((len(targets),), 1 / num_items, device=hidden.device)
    head = model.head_layer
    loss, _ = ops.linear_cross_entropy(
        hidden, head.weight, targets, weights, bias=getattr(head, "bias", None), softcap=model.softcap
    )
    return loss


def _gather(field: Tensor, where: tuple[Tensor, Tensor], hidden: Tensor) -> Tensor:
    """Return the entries (N,) of a (B, R) field at (rows, columns), on the device of `hidden`."""
    return to_device(field[where], hidden.device)
