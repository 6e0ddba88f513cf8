"""Arguments and definition of ppo_loss in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels._ppo import (
    KL,
    Clip,
    PolicyLoss,
    TokenInputs,
    Whitening,
    clamp,
    count_over_rows,
    mean_over_rows,
    policy_loss,
    value_loss,
    where_valid,
)
from rlhf_fast.kernels._tensors import upcast, upcast_dtype

IMPORTANCE_MODES = ("truncate", "mask")


class PPOStats(NamedTuple):
    """Statistics of `ppo_loss`, whose docstring defines them: `PPOStats(*stats).ratio_max`."""

    weight: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor
    kl_k1: Tensor
    kl_k3: Tensor
    ratio: Tensor
    ratio_square: Tensor
    importance: Tensor
    importance_capped: Tensor
    value_weight: Tensor
    value_clipped: Tensor
    value: Tensor
    value_error: Tensor
    return_: Tensor
    ratio_max: Tensor
    ratio_min: Tensor


STATS = tuple(name.rstrip("_") for name in PPOStats._fields)


class Inputs(NamedTuple):
    """The arguments of `ppo_loss`, in its order."""

    logprobs: Tensor | None
    old_logprobs: Tensor | None
    advantages: Tensor | None
    weights: Tensor
    values: Tensor | None
    old_values: Tensor | None
    returns: Tensor | None
    value_weights: Tensor | None
    sampler_logprobs: Tensor | None
    advantage_shift: Tensor | None
    advantage_scale: Tensor | None
    clip_low: float
    clip_high: float
    dual_clip: float
    value_clip: float
    log_ratio_clamp: float
    importance_cap: float
    importance_mode: str
    importance_floor: float
    clip_mode: str
    ratio_level: str

    @property
    def token_tensors(self) -> tuple[Tensor | None, ...]:
        """logprobs to sampler_logprobs: tensors with one element for each token."""
        return self[:9]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:11]

    @property
    def scalars(self) -> tuple[float, ...]:
        """clip_low to importance_cap."""
        return self[11:17]

    @property
    def clip(self) -> Clip:
        bounds = (self.clip_low, self.clip_high, self.dual_clip, self.value_clip, self.log_ratio_clamp)
        return Clip(*bounds, self.clip_mode, self.ratio_level)


class Losses(NamedTuple):
    policy: Tensor
    value: Tensor
    stats: Tensor
    logprob_grad: Tensor | None = None
    value_grad: Tensor | None = None


def losses(x: Inputs) -> Losses:
    """Return what `ppo_loss` defines, in plain torch."""
    zero = x.weights.new_zeros((), dtype=upcast_dtype(x.weights))
    out = Losses(zero, zero.clone(), zero)
    stats = dict.fromkeys(PPOStats._fields, zero) | {"ratio_max": zero - torch.inf, "ratio_min": zero + torch.inf}
    if x.logprobs is not None:
        policy, importance_stats = _policy_loss(x)
        out = out._replace(policy=policy.loss, logprob_grad=policy.logprob_grad)
        stats |= importance_stats
    if x.values is not None and x.returns is not None:
        value_weights = upcast(x.weights if x.value_weights is None else x.value_weights)
        value = value_loss(x.values, x.old_values, x.returns, value_weights, x.clip)
        out = out._replace(value=value.loss, value_grad=value.value_grad)
        stats |= value.stats._asdict()
    return out._replace(stats=torch.stack(PPOStats(**stats)))


def _policy_loss(x) -> tuple[PolicyLoss, dict[str, Tensor]]:
    """Return the policy loss with importance weights, and the statistics of PPOStats, of which only importance and
    importance_capped are with importance weights."""
    logprobs, weights = upcast(x.logprobs), upcast(x.weights)
    valid = weights != 0
    no_entropy = torch.zeros_like(logprobs)
    whitening = Whitening(x.advantage_shift, x.advantage_scale)

    def loss_with(weights: Tensor) -> PolicyLoss:
        inputs = TokenInputs(x.old_logprobs, x.advantages, weights)
        return policy_loss(logprobs, no_entropy, weights != 0, inputs, whitening, x.clip, KL(0.0, "k1"), 0.0, valid)

    policy = loss_with(weights)
    stats = {name: total for name, total in policy.stats._asdict().items() if name in PPOStats._fields}
    importance = torch.ones_like(weights)
    is_capped = torch.zeros_like(valid)
    if x.sampler_logprobs is not None:
        importance = (where_valid(valid, x.old_logprobs) - where_valid(valid, x.sampler_logprobs)).exp()
        is_capped = (importance > x.importance_cap) | (importance < x.importance_floor)
        if x.importance_mode == "mask":
            importance = torch.where(is_capped, 0.0, importance)
        else:
            importance = clamp(importance, x.importance_floor, x.importance_cap)
        policy = loss_with(weights * importance)
    stats["importance"] = torch.where(valid, weights * importance, 0).sum()
    stats["importance_capped"] = torch.where(valid & is_capped, weights, 0).sum()
    return policy, stats


class RowRatios(NamedTuple):
    """Kernels for GPUs take a token's log-ratio from here, if it is its row's."""

    log_ratios: Tensor | None = None  # (B, 1) float32, the rows' means
    length: int = 1  # tokens of a row


def run_with_row_ratios(launch: Callable[..., tuple], x: Inputs, needs_grad: tuple[bool, bool], rounds: bool) -> list:
    """Return what `launch(x, needs_grad, rounds, row_ratios)` returns, whose kernels have token-wise gradients: both
    losses, stats, and the gradients of logprobs and of values, or None."""
    if x.logprobs is None or x.old_logprobs is None or not x.clip.is_by_row:
        return list(launch(x, needs_grad, rounds, RowRatios()))
    valid = x.weights != 0
    count = count_over_rows(valid)
    means = mean_over_rows(where_valid(valid, x.logprobs) - where_valid(valid, x.old_logprobs), count)
    row_ratios = RowRatios(means.contiguous(), x.weights.shape[1])
    if not (x.clip.shares_grad and needs_grad[0]):
        return list(launch(x, needs_grad, rounds, row_ratios))
    # The tokens' gradients by the mean are not rounded: their dtype is that of logprobs.
    out = list(launch(x._replace(logprobs=x.logprobs.float()), needs_grad, rounds, row_ratios))
    row_grads = torch.where(valid, mean_over_rows(out[3], count), 0)
    out[3] = row_grads.to(x.logprobs.dtype if rounds else torch.float32).contiguous()
    return out


def check_parts(x: Inputs) -> None:
    """Raise ValueError where a part, of the policy or of the value, lacks some of its arguments."""
    num_missing = (x.logprobs is None) + (x.old_logprobs is None) + (x.advantages is None)
    if num_missing and (num_missing < 3 or x.sampler_logprobs is not None):
        raise ValueError("ppo_loss: the policy part needs logprobs, old_logprobs and advantages, or none of them")
    if x.logprobs is None and x.values is None:
        raise ValueError("ppo_loss: there is neither logprobs nor values, nothing to compute")
    without_values = x.values is None and (x.old_values is not None or x.value_weights is not None)
    if without_values or (x.values is None) != (x.returns is None):
        raise ValueError("ppo_loss: the value part needs values and returns, or none of them")
    if x.values is not None and x.value_clip > 0 and x.old_values is None:
        raise ValueError(f"ppo_loss: value_clip={x.value_clip} needs old_values; value_clip=0 does without")


def check(x: Inputs) -> None:
    """Raise ValueError for arguments that do not fit together."""
    shape = x.weights.shape
    shapes = [t.shape for t in x.token_tensors if t is not None]
    if shapes != [shape] * len(shapes):
        got = list(map(list, shapes))
        raise ValueError(f"ppo_loss: all must have the shape of weights, {list(shape)}, got {got}")
    if x.clip_mode != "ppo" or x.ratio_level != "token":
        x.clip.check("ppo_loss", shape)
    if x.importance_mode not in IMPORTANCE_MODES:
        modes = ", ".join(IMPORTANCE_MODES)
        raise ValueError(f"ppo_loss: importance_mode must be one of {modes}, got {x.importance_mode!r}")
    if not x.importance_floor >= 0:
        raise ValueError(f"ppo_loss: importance_floor must be positive, or 0 for none, got {x.importance_floor}")
    if x.importance_floor > 0 and x.importance_floor > x.importance_cap:
        bounds = f"importance_floor={x.importance_floor} is above importance_cap={x.importance_cap}"
        raise ValueError(f"ppo_loss: {bounds}; no importance weight would be left as it is")
