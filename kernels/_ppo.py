"""The mathematics of PPO's losses, in plain torch: policy, KL and value, with their gradients. Not an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels._tensors import upcast, upcast_dtype

CLIP_MODES = ("ppo", "cispo")
RATIO_LEVELS = ("token", "sequence")


class Clip(NamedTuple):
    """Bounds of PPO's losses; 0 turns `dual`, `value` and `log_ratio` off. Then one of CLIP_MODES and RATIO_LEVELS."""

    low: float  # the ratio is clipped from below at 1 - low
    high: float  # and from above at 1 + high
    dual: float  # the loss is at most -A * dual where A < 0
    value: float  # values are clipped to old_values +- value
    log_ratio: float  # log-ratios are clamped to +- log_ratio, without a gradient beyond
    mode: str = "ppo"
    level: str = "token"

    @property
    def is_cispo(self) -> bool:
        return self.mode == "cispo"

    @property
    def is_by_row(self) -> bool:
        return self.level == "sequence"

    @property
    def shares_grad(self) -> bool:
        """True if a token's term has a gradient by the log-probabilities of its whole row."""
        return self.is_by_row and not self.is_cispo

    def check(self, op: str, shape: torch.Size) -> None:
        """Raise ValueError for an unknown mode or level, and for a shape or a dual clip that they do not take."""
        for name, value, known in (("clip_mode", self.mode, CLIP_MODES), ("ratio_level", self.level, RATIO_LEVELS)):
            if value not in known:
                raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {value!r}")
        if self.is_cispo and self.dual > 0:
            raise ValueError(f"{op}: clip_mode='cispo' has no dual clip, got dual_clip={self.dual}")
        if self.is_by_row and len(shape) != 2:
            raise ValueError(f"{op}: ratio_level='sequence' needs a row for each sequence, (B, T), got {list(shape)}")

    @property
    def max_log_ratio(self) -> float:
        return self.log_ratio if self.log_ratio > 0 else torch.inf


class KL(NamedTuple):
    """The KL term of a loss: coef * kl_estimate(..., estimator)."""

    coef: float
    estimator: str


class Whitening(NamedTuple):
    """Tensors () or None: A = (advantages - shift) * scale."""

    shift: Tensor | None
    scale: Tensor | None

    @classmethod
    def normalize(cls, op: str, shift: Tensor | float | None, scale: Tensor | float | None, like: Tensor) -> Whitening:
        """Convert an op's arguments advantage_shift and advantage_scale, numbers or tensors of one element."""
        return cls(_one_element(op, "advantage_shift", shift, like), _one_element(op, "advantage_scale", scale, like))

    def apply(self, advantages: Tensor) -> Tensor:
        advantages = upcast(advantages)
        if self.shift is not None:
            advantages = advantages - upcast(self.shift)
        return advantages if self.scale is None else advantages * upcast(self.scale)


def _one_element(op: str, name: str, x: Tensor | float | None, like: Tensor) -> Tensor | None:
    if x is None:
        return None
    if not isinstance(x, Tensor):
        return torch.full((), x, dtype=upcast_dtype(like), device=like.device)
    if x.numel() != 1:
        raise ValueError(f"{op}: {name} must be a number or one element, got shape {list(x.shape)}")
    x = x.detach() if x.requires_grad else x
    return x.reshape(()) if x.dim() else x


class TokenInputs(NamedTuple):
    """Tensors with one number for each token, besides its log-probability and entropy."""

    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    ref_logprobs: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenInputs:
        ref_logprobs = None if self.ref_logprobs is None else function(self.ref_logprobs)
        return TokenInputs(function(self.old_logprobs), function(self.advantages), function(self.weights), ref_logprobs)


class PolicyStats(NamedTuple):
    """Statistics of `policy_loss`, defined in linear_ppo_loss's docstring: `PolicyStats(*stats).ratio_max`."""

    weight: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor
    kl_k1: Tensor
    kl_k3: Tensor
    ratio: Tensor
    ratio_square: Tensor
    policy_loss: Tensor
    ref_kl: Tensor
    entropy: Tensor
    ratio_max: Tensor
    ratio_min: Tensor


STATS = PolicyStats._fields
SUMS = STATS[:-2]
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
LOSS_ESTIMATORS = KL_ESTIMATORS[:3]
MAX_EXPONENT = 20.0


def clamp(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Return x between low and high. Unlike torch.clamp's, the gradient at a NaN is not 0. A NaN bound gives NaN."""
    bounded = torch.where(x > high, high, torch.where(x < low, low, x))
    return torch.where(low == low, bounded, x + low) if isinstance(low, Tensor) else bounded


def exp_minus_1_minus(x: Tensor, exponent: Tensor) -> Tensor:
    """Return e^exponent - 1 - x, where exponent is x, or x limited to large bounds.

    Near 0 the difference would cancel, down to negative numbers: there it is a series, to the precision of float64.
    """
    is_small = x.abs() <= 0.1
    small = torch.where(is_small, x, 0)  # so that the gradient of what is not used is finite
    series = torch.ones_like(x)
    for i in range(11, 2, -1):
        series = 1 + small / i * series
    return torch.where(is_small, small * small / 2 * series, exponent.expm1() - x)


def kl_estimate(difference: Tensor, estimator: str, bound: float | None = None) -> Tensor:
    """Return an estimate of KL(policy || reference) in nats from d = log p - log p_ref of the sampled token.

        k1: d        k2: d^2 / 2        k3: exp(-d) - 1 + d        abs: |d|

    (Schulman 2020, joschu.net/blog/kl-approx.html.) k3 needs one: `bound` limits d to [-bound, bound] in both of its
    terms; with None, -d is limited to MAX_EXPONENT in the exponential alone.
    """
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    if estimator == "abs":
        return difference.abs()
    if bound is None:
        return exp_minus_1_minus(-difference, clamp(-difference, -torch.inf, MAX_EXPONENT))
    negated = clamp(-difference, -bound, bound)
    return exp_minus_1_minus(negated, negated)


def kl_grad(difference: Tensor, estimator: str, bound: float) -> Tensor:
    """Return the derivative of `kl_estimate` with respect to log p, for the estimators of a loss: k1, k2 and k3."""
    difference = difference.detach()
    if estimator == "k1":
        return torch.ones_like(difference)
    if estimator == "k2":
        return difference
    return torch.where(difference.abs() > bound, 0, -clamp(-difference, -bound, bound).expm1())


class Surrogate(NamedTuple):
    """PPO's clipped term of each token (...), its derivative with respect to the log-ratio (of CISPO to log p), and its
    parts for statistics."""

    loss: Tensor
    grad: Tensor
    log_ratio: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor


def count_over_rows(valid: Tensor) -> Tensor:
    """Return the number of each row's valid tokens, (B, 1), 1 where there is none."""
    return valid.sum(-1, keepdim=True).clamp(min=1)


def mean_over_rows(x: Tensor, count: Tensor) -> Tensor:
    """Return the mean of x (B, T) over each row's valid tokens, (B, 1), 0 without one. x is 0 at the other tokens;
    count is `count_over_rows`."""
    return x.sum(-1, keepdim=True) / count


def cispo_surrogate(unclipped_log_ratio: Tensor, logprobs: Tensor, advantage: Tensor, clip: Clip) -> Surrogate:
    """Return -A min(ratio, 1 + high) logprobs, in which the ratio has no gradient."""
    log_ratio = clamp(unclipped_log_ratio.detach(), -clip.max_log_ratio, clip.max_log_ratio)
    ratio = log_ratio.exp()
    grad = -advantage * clamp(ratio, -torch.inf, 1 + clip.high)
    never = torch.zeros_like(ratio, dtype=torch.bool)
    return Surrogate(grad * logprobs, grad, log_ratio, ratio, never, ratio > 1 + clip.high, never)


def surrogate(unclipped_log_ratio: Tensor, logprobs: Tensor, advantage: Tensor, clip: Clip) -> Surrogate:
    """Return max(-A ratio, -A clamp(ratio, 1 - low, 1 + high)), bounded by -A dual where A < 0; or `cispo_surrogate`.

    The gradient is that of torch.clamp, torch.maximum and torch.minimum: at a clip bound it is kept; at a tie with the
    dual clip it is halved. Beyond clip.log_ratio it is 0.
    """
    if clip.is_cispo:
        return cispo_surrogate(unclipped_log_ratio, logprobs, advantage, clip)
    log_ratio = clamp(unclipped_log_ratio, -clip.max_log_ratio, clip.max_log_ratio)
    ratio = log_ratio.exp()
    unclipped = -advantage * ratio
    clipped = -advantage * clamp(ratio, 1 - clip.low, 1 + clip.high)
    loss = torch.maximum(unclipped, clipped)
    pass_through = (unclipped >= clipped).to(ratio.dtype)
    clipped_dual = torch.zeros_like(ratio, dtype=torch.bool)
    if clip.dual > 0:
        dual_bound = torch.where(advantage < 0, -advantage * clip.dual, torch.inf)
        clipped_dual = loss > dual_bound
        pass_through = torch.where(loss == dual_bound, pass_through / 2, pass_through)
        pass_through = torch.where(clipped_dual, 0, pass_through)
        loss = torch.minimum(loss, dual_bound)
    grad = torch.where(unclipped_log_ratio.abs() > clip.max_log_ratio, 0, pass_through * -advantage * ratio)
    is_clipped = unclipped < clipped
    clipped_low = is_clipped & (ratio < 1 - clip.low)
    clipped_high = is_clipped & (ratio > 1 + clip.high)
    return Surrogate(loss, grad, log_ratio, ratio, clipped_low, clipped_high, clipped_dual)


class PolicyLoss(NamedTuple):
    loss: Tensor  # ()
    stats: PolicyStats  # each ()
    logprob_grad: Tensor  # of the loss by each log-probability (...)
    entropy_grad: Tensor  # and by each entropy (...)


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor,
    valid: Tensor,
    inputs: TokenInputs,
    whitening: Whitening,
    clip: Clip,
    kl: KL,
    entropy_coef: float,
    row_tokens: Tensor | None = None,
) -> PolicyLoss:
    """Return sum weights * (surrogate + kl.coef * kl - entropy_coef * entropy) over the `valid` tokens, and its parts.

    Tokens that are not valid are not evaluated: they may hold anything, even NaN. With clip.level "sequence" the
    log-ratio is the mean over those of `row_tokens` in each row, by default the valid ones.
    """

    dtype = logprobs.dtype

    def at_valid(x: Tensor) -> Tensor:
        return where_valid(valid, x).to(dtype)

    weights = at_valid(inputs.weights)
    all_logprobs, logprobs = logprobs, at_valid(logprobs)
    entropy = at_valid(entropy)
    advantage = at_valid(whitening.apply(inputs.advantages))
    log_ratio = logprobs - at_valid(inputs.old_logprobs)
    row_tokens = valid if row_tokens is None else row_tokens
    if clip.is_by_row:
        differences = where_valid(row_tokens, all_logprobs) - where_valid(row_tokens, inputs.old_logprobs)
        row_count = count_over_rows(row_tokens)
        log_ratio = torch.where(valid, mean_over_rows(differences.to(dtype), row_count), 0)
    terms = surrogate(log_ratio, logprobs, advantage, clip)
    loss = (weights * terms.loss).sum()
    surrogate_loss = loss.detach()
    grad = torch.zeros_like(terms.grad) if clip.shares_grad else terms.grad
    ref_kl = torch.zeros_like(terms.ratio)
    if inputs.ref_logprobs is not None:
        difference = logprobs - at_valid(inputs.ref_logprobs)
        ref_kl = kl_estimate(difference, kl.estimator, clip.max_log_ratio)
        if kl.coef:
            loss = loss + kl.coef * (weights * ref_kl).sum()
            grad = grad + kl.coef * kl_grad(difference, kl.estimator, clip.max_log_ratio)
    if entropy_coef:
        loss = loss - entropy_coef * (weights * entropy).sum()
    with torch.no_grad():
        infinity = terms.ratio.new_full((1,), torch.inf)
        ratio_max = torch.cat([torch.where(valid, terms.ratio, -torch.inf).flatten(), -infinity]).amax()
        ratio_min = torch.cat([torch.where(valid, terms.ratio, torch.inf).flatten(), infinity]).amin()
        ratio_sum = (weights * terms.ratio).sum()
        is_nan = ratio_sum.isnan()  # also where a weight is NaN
        stats = PolicyStats(
            weight=(weights * valid).sum(),
            clipped_low=torch.where(terms.clipped_low, weights, 0).sum(),
            clipped_high=torch.where(terms.clipped_high, weights, 0).sum(),
            clipped_dual=torch.where(terms.clipped_dual, weights, 0).sum(),
            kl_k1=(weights * -terms.log_ratio).sum(),
            kl_k3=(weights * exp_minus_1_minus(terms.log_ratio, terms.log_ratio)).sum(),
            ratio=ratio_sum,
            ratio_square=(weights * terms.ratio**2).sum(),
            policy_loss=surrogate_loss,
            ref_kl=(weights * ref_kl).sum(),
            entropy=(weights * entropy).sum(),
            ratio_max=torch.where(is_nan, ratio_sum, ratio_max),
            ratio_min=torch.where(is_nan, ratio_sum, ratio_min),
        )
        logprob_grad = weights * grad
        if clip.shares_grad:
            row_grad = mean_over_rows(weights * terms.grad, row_count)
            logprob_grad = logprob_grad + torch.where(row_tokens, row_grad, 0)
        return PolicyLoss(loss, stats, logprob_grad.detach(), -entropy_coef * weights)


class ValueStats(NamedTuple):
    """Statistics of `value_loss`, defined in ppo_loss's docstring."""

    value_weight: Tensor
    value_clipped: Tensor
    value: Tensor
    value_error: Tensor
    return_: Tensor


class ValueLoss(NamedTuple):
    loss: Tensor  # ()
    stats: ValueStats  # each ()
    value_grad: Tensor  # of the loss by each value (N,)


def where_valid(valid: Tensor, x: Tensor) -> Tensor:
    """Return x in at least float32, and 0 where it is not valid."""
    return torch.where(valid, upcast(x), 0)


def value_loss(values: Tensor, old_values: Tensor | None, returns: Tensor, weights: Tensor, clip: Clip) -> ValueLoss:
    """Return sum weights * max((V - R)^2, (clamp(V, V_old - clip.value, V_old + clip.value) - R)^2) / 2, and its parts.

    At a bound of the clip the gradient is that of the unclipped term; where both terms tie beyond it, half of it.
    """
    valid = weights != 0
    value, target = where_valid(valid, values), where_valid(valid, returns)
    unclipped = (value - target) ** 2
    loss = unclipped
    grad = (value - target).detach()
    is_clipped = torch.zeros_like(valid)
    if clip.value > 0 and old_values is not None:
        old_value = where_valid(valid, old_values)
        low, high = old_value - clip.value, old_value + clip.value
        clipped = (clamp(value, low, high) - target) ** 2
        is_clipped = clipped > unclipped
        pass_through = torch.where(clipped == unclipped, 0.5, 1.0).to(value.dtype)
        pass_through = torch.where(is_clipped, 0, pass_through)
        inside = (value >= low) & (value <= high)
        grad = torch.where(clipped == clipped, torch.where(inside, 1, pass_through) * grad, clipped).detach()
        loss = torch.maximum(unclipped, clipped)

    def total(term: Tensor) -> Tensor:
        return torch.where(valid, weights * term, 0).sum()

    with torch.no_grad():
        stats = ValueStats(
            value_weight=total(torch.ones_like(value)),
            value_clipped=torch.where(valid & is_clipped, weights, 0).sum(),
            value=total(value),
            value_error=total(unclipped),
            return_=total(target),
        )
    return ValueLoss(total(loss) / 2, stats, torch.where(valid, weights * grad, 0).detach())
