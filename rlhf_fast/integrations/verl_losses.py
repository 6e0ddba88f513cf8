"""verl's GAE, policy loss and value loss by the ops. `core` is its module verl.trainer.ppo.core_algos."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.integrations.calls import Calls, need_grad
from rlhf_fast.integrations.token_weights import token_weights

UNIFORM = ("token-mean", "token-sum")
"""Values of loss_agg_mode under which all tokens weigh the same."""


def gae(core: Any, calls: Calls) -> Callable:
    """Return compute_gae_advantage_return. Its numbers are verl's inside the mask. Outside, where verl carries on the
    next token's, the advantage is that of a token with advantage 0, and the return 0."""
    theirs = core.compute_gae_advantage_return

    @functools.wraps(theirs)
    def compute_gae_advantage_return(
        token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Any, lam: Any
    ) -> tuple[Tensor, Tensor]:
        if reason := _no_gae(response_mask, gamma, lam):
            calls.note_fallback("compute_gae_advantage_return", reason)
            return theirs(token_level_rewards, values, response_mask, gamma, lam)
        from rlhf_fast import ops

        calls.answered["compute_gae_advantage_return"] += 1
        dtype = torch.result_type(token_level_rewards, values)
        with torch.no_grad():
            advantages, returns = ops.gae(token_level_rewards, values, response_mask, float(gamma), float(lam))
            return core.verl_F.masked_whiten(advantages, response_mask).to(dtype), returns.to(dtype)

    return compute_gae_advantage_return


def _no_gae(mask: Tensor, gamma: Any, lam: Any) -> str:
    if mask.is_floating_point():
        return "the mask is floating point"
    if any(isinstance(x, Tensor) and x.numel() != 1 for x in (gamma, lam)):
        return "gamma or lam is not one number"
    return "" if 0 <= gamma <= 1 and 0 <= lam <= 1 else "gamma or lam is not within [0, 1]"


def policy_loss(core: Any, calls: Calls) -> Callable:
    """Return the loss of the registry's `vanilla`: PPO with two clip bounds and the dual clip."""

    def compute_policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        from rlhf_fast import ops

        calls.answered["policy loss"] += 1
        dual_clip = config.get("clip_ratio_c", 3.0)
        if not dual_clip > 1:
            raise ValueError(f"rlhf_fast: clip_ratio_c must be above 1, got {dual_clip}")
        low, high = config.clip_ratio_low, config.clip_ratio_high
        clip = {
            "clip_low": config.clip_ratio if low is None else low,
            "clip_high": config.clip_ratio if high is None else high,
            "dual_clip": dual_clip,
        }
        weights = _weights(core, response_mask, loss_agg_mode, config.global_batch_info)
        if rollout_is_weights is not None:
            weights = torch.where(response_mask.bool(), weights * rollout_is_weights, 0)
        loss, _, stats = ops.ppo_loss(log_prob, old_log_prob, advantages, weights, **clip)
        if loss_agg_mode not in UNIFORM or rollout_is_weights is not None:  # metrics are means over tokens
            stats = ops.ppo_loss(log_prob.detach(), old_log_prob, advantages, response_mask.float(), **clip)[2]
        total, low, high, dual, kl = stats[:5].tolist()
        total = total or 1.0
        metrics = {"pg_clipfrac": (low + high) / total, "ppo_kl": kl / total, "pg_clipfrac_lower": dual / total}
        return loss, {f"actor/{name}": value for name, value in metrics.items()}

    return compute_policy_loss


def value_loss(core: Any, calls: Calls) -> Callable:
    """Return compute_value_loss."""
    theirs = core.compute_value_loss

    @functools.wraps(theirs)
    def compute_value_loss(
        vpreds: Tensor,
        returns: Tensor,
        values: Tensor,
        response_mask: Tensor,
        cliprange_value: float,
        loss_agg_mode: str = "token-mean",
        dp_size: int = 1,
        batch_num_tokens: Any = None,
        global_batch_size: Any = None,
        loss_scale_factor: Any = None,
    ) -> tuple[Tensor, Tensor]:
        info = {
            "dp_size": dp_size,
            "batch_num_tokens": batch_num_tokens,
            "global_batch_size": global_batch_size,
            "loss_scale_factor": loss_scale_factor,
        }
        if not cliprange_value > 0:  # the op's 0 stands for no clip
            calls.note_fallback("compute_value_loss", f"cliprange_value is {cliprange_value}", need_grad(vpreds))
            return theirs(vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode, **info)
        from rlhf_fast import ops

        calls.answered["compute_value_loss"] += 1
        weights = _weights(core, response_mask, loss_agg_mode, info)
        given = values, returns
        loss, stats = ops.ppo_loss(None, None, None, weights, vpreds, *given, value_clip=float(cliprange_value))[1:]
        if loss_agg_mode not in UNIFORM:
            mask = response_mask.float()
            stats = ops.ppo_loss(None, None, None, mask, vpreds.detach(), *given, value_clip=float(cliprange_value))[2]
        found = dict(zip(ops.ppo_loss.stats, stats, strict=True))
        total = found["value_weight"]
        return loss, found["value_clipped"] / torch.where(total == 0, 1, total)

    return compute_value_loss


def _weights(core: Any, mask: Tensor, mode: str, info: Any) -> Tensor:
    return token_weights(lambda losses: core.agg_loss(losses, mask, mode, **info), mask)
