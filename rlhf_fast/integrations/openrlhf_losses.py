"""OpenRLHF's policy loss, value loss and GAE by the ops, with the tuples that OpenRLHF returns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.integrations.calls import Calls, need_grad
from rlhf_fast.integrations.token_weights import token_weights


def policy_loss_forward(theirs: Callable, aggregate: Callable, current_calls: Callable[[], Calls]) -> Callable:
    """Return PolicyLoss.forward, by `ops.ppo_loss` for the option sets that it has."""

    @functools.wraps(theirs)
    def forward(
        self: Any,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Any = None,
        global_batch_size: Any = None,
    ) -> tuple[Tensor | None, ...]:
        calls, totals = current_calls(), (dp_size, batch_num_tokens, global_batch_size)
        reason = _no_policy_loss(self, action_mask, rollout_log_probs)
        if reason or action_mask is None:
            calls.note_fallback("PolicyLoss", reason, need_grad(log_probs))
            return theirs(self, log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, *totals)
        calls.answered["PolicyLoss"] += 1
        mask = action_mask.float()
        weights = _weights(aggregate, mask, self.token_level_loss, totals)
        options = {
            "clip_low": self.clip_eps_low,
            "clip_high": self.clip_eps_high,
            "dual_clip": self.dual_clip or 0.0,
        }
        corrected = self.is_correction_level != "off"
        if corrected:
            mode = "truncate" if self.is_correction_mode == "clip" else "mask"
            options |= {"sampler_logprobs": rollout_log_probs, "importance_mode": mode}
            options["importance_cap"] = float(self.is_correction_threshold[1])
        loss = ops.ppo_loss(log_probs, old_log_probs, advantages, weights, **options)[0]
        with torch.no_grad():  # metrics are means over tokens, of ratios that no correction weighs
            stats = ops.ppo_loss(log_probs.detach(), old_log_probs, advantages, mask, **options)[2]
            found, total = dict(zip(ops.ppo_loss.stats, stats, strict=True)), mask.sum()
            clip_ratio = (found["clipped_low"] + found["clipped_high"]) / total
            kl = ((old_log_probs - log_probs.detach()) * mask).sum() / total
            if rollout_log_probs is None or not corrected:
                return loss, clip_ratio, kl, None, None
            sampler_kl = ((rollout_log_probs - old_log_probs) * mask).sum() / total
            return loss, clip_ratio, kl, sampler_kl, found["importance_capped"] / total

    return forward


def _no_policy_loss(loss: Any, mask: Tensor | None, rollout_log_probs: Tensor | None) -> str:
    """Return the reason why the op does not have these options, or ""."""
    if loss.policy_loss_type != "ppo":
        return f"policy_loss_type is {loss.policy_loss_type}"
    if loss.is_correction_level == "seq":
        return "is_correction_level is seq"
    if loss.is_correction_level != "off" and loss.is_correction_gating != "ratio":
        return f"is_correction_gating is {loss.is_correction_gating}"
    if loss.is_correction_level != "off" and loss.is_correction_threshold[0] > 0:
        return "is_correction_threshold has a lower bound"
    if loss.is_correction_level != "off" and rollout_log_probs is None:
        return "there are no rollout_log_probs"
    return "there is no action_mask" if mask is None else ""


def value_loss_forward(theirs: Callable, aggregate: Callable, current_calls: Callable[[], Calls]) -> Callable:
    """Return ValueLoss.forward."""

    @functools.wraps(theirs)
    def forward(
        self: Any,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Any = None,
        global_batch_size: Any = None,
    ) -> Tensor:
        calls, totals = current_calls(), (dp_size, batch_num_tokens, global_batch_size)
        no_clip = self.clip_eps is not None and not self.clip_eps > 0  # the op's 0 stands for no clip
        if action_mask is None or no_clip:
            reason = f"clip_eps is {self.clip_eps}" if no_clip else "there is no action_mask"
            calls.note_fallback("ValueLoss", reason, need_grad(values))
            return theirs(self, values, old_values, returns, action_mask, *totals)
        calls.answered["ValueLoss"] += 1
        weights = _weights(aggregate, action_mask.float(), self.token_level_loss, totals)
        clip = self.clip_eps or 0.0
        return ops.ppo_loss(None, None, None, weights, values, old_values, returns, value_clip=clip)[1]

    return forward


def gae_forward(theirs: Callable, current_calls: Callable[[], Calls]) -> Callable:
    """Return RemoteExperienceMaker.get_advantages_and_returns. A token outside the mask is not skipped there: it is a
    step of reward 0 and value 0."""

    @functools.wraps(theirs)
    def get_advantages_and_returns(
        self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
    ) -> tuple[Tensor, Tensor]:
        calls = current_calls()
        if not (0 <= gamma <= 1 and 0 <= lambd <= 1):
            calls.note_fallback("get_advantages_and_returns", "gamma or lambd is not within [0, 1]")
            return theirs(self, values, rewards, action_mask, gamma, lambd)
        calls.answered["get_advantages_and_returns"] += 1
        with torch.no_grad():
            if action_mask is not None:
                values, rewards = action_mask * values, action_mask * rewards
            steps = torch.ones(rewards.shape, dtype=torch.bool, device=rewards.device)
            dtype = torch.result_type(rewards, values)
            advantages, returns = ops.gae(rewards, values, steps, float(gamma), float(lambd))
            return advantages.to(dtype), returns.to(dtype)

    return get_advantages_and_returns


def _weights(aggregate: Callable, mask: Tensor, token_level: bool, totals: tuple) -> Tensor:
    return token_weights(lambda losses: aggregate(losses, mask, token_level, *totals), mask)
