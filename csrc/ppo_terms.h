// A token's terms of PPO's losses and the estimators of its KL, for a vector of tokens (csrc/cpu) or one (csrc/cuda).
// kernels/ppo_loss.py and kernels/ppo_advantages.py have the formulas.
#pragma once
#include "dialect.h"

namespace {

// Sums over the tokens: the statistics in the order of ppo_loss.stats, then the losses.
struct PpoSum {
  enum {
    WEIGHT,
    CLIPPED_LOW,
    CLIPPED_HIGH,
    CLIPPED_DUAL,
    KL_K1,
    KL_K3,
    RATIO,
    RATIO_SQUARE,
    IMPORTANCE,
    IMPORTANCE_CAPPED,
    VALUE_WEIGHT,
    VALUE_CLIPPED,
    VALUE,
    VALUE_ERROR,
    RETURN,
    POLICY_LOSS,
    VALUE_LOSS,
    COUNT
  };
};
constexpr int num_summed_stats = PpoSum::POLICY_LOSS;

// The estimators of the KL divergence from a reference model, in the order of kernels/_ppo.py.
enum class KlEstimator { K1, K2, K3, ABS };

// e^x - 1 - x, where exp_x = e^x. Near 0 the difference would cancel, down to negative numbers: there it is a series.
template <class F>
INLINE F exp_minus_1_minus(F x, F exp_x) {
  F s = 1.f + x * 0.125f;
  s = 1.f + x * (1.f / 7.f) * s;
  s = 1.f + x * (1.f / 6.f) * s;
  s = 1.f + x * 0.2f * s;
  s = 1.f + x * 0.25f * s;
  s = 1.f + x * (1.f / 3.f) * s;
  return select(abs(x) <= splat<F>(0.5f), 0.5f * x * x * s, (exp_x - 1.f) - x);
}

// The estimate of a token's KL by d, the log-ratio of policy and reference (Schulman 2020). exp(-d) is taken of at most
// exp(20), which keeps it finite.
template <KlEstimator E, class F>
INLINE F kl_estimate(F d) {
  if constexpr (E == KlEstimator::K1) return d;
  if constexpr (E == KlEstimator::K2) return 0.5f * d * d;
  if constexpr (E == KlEstimator::K3)
    return exp_minus_1_minus(-d, exp(select(-d > splat<F>(20.f), splat<F>(20.f), -d)));
  return abs(d);
}

struct PpoClip {
  float ratio_low, ratio_high;  // the clip of the ratio: 1 - clip_low, -infinity for CISPO, and 1 + clip_high
  float dual;                   // dual_clip, for DUAL
  float value;                  // value_clip, for CLIP
  float log_ratio;              // log_ratio_clamp; infinite if it is off
};

template <class F>
INLINE F clamped_log_ratio(F unclipped_log_ratio, const PpoClip& clip) {
  return clamp(unclipped_log_ratio, splat<F>(-clip.log_ratio), splat<F>(clip.log_ratio));
}

template <class F>
struct PolicyTerm {
  F loss, grad;
  Mask<F> is_clipped, is_dual;
};

// The clipped term of the policy loss and its gradient by the log-probability. ratio = exp(clamped_log_ratio(...)).
// The gradient is that of torch.maximum and torch.minimum: halved at a tie with the dual clip, and 0 beyond the clamp
// of the log-ratio. A NaN in an argument is one in loss and gradient: it fails every comparison, so what it fails keeps
// it.
template <bool DUAL, class F>
INLINE PolicyTerm<F> policy_term(F unclipped_log_ratio, F ratio, F advantage, const PpoClip& clip) {
  const F zero = splat<F>(0.f);
  const F unclipped = -advantage * ratio;
  const F clipped = -advantage * clamp(ratio, splat<F>(clip.ratio_low), splat<F>(clip.ratio_high));
  PolicyTerm<F> term;
  term.is_clipped = clipped > unclipped;
  term.loss = select(term.is_clipped, clipped, unclipped);
  const Mask<F> beyond_clamp = abs(unclipped_log_ratio) > splat<F>(clip.log_ratio);
  term.grad = select(beyond_clamp | term.is_clipped, zero, unclipped);
  term.is_dual = Mask<F>{};
  if constexpr (DUAL) {
    const F bound = select(advantage < zero, -advantage * clip.dual, splat<F>(__builtin_inff()));
    term.is_dual = term.loss > bound;
    term.grad = select(term.loss == bound, 0.5f * term.grad, term.grad);
    term.grad = select(term.is_dual, zero, term.grad);
    term.loss = select(term.is_dual, bound, term.loss);
  }
  return term;
}

// The term of CISPO, -A min(ratio, ratio_high) log p, whose ratio has no gradient. A NaN in an argument is one in loss
// and gradient.
template <class F>
INLINE PolicyTerm<F> cispo_term(F logprob, F ratio, F advantage, const PpoClip& clip) {
  const F high = splat<F>(clip.ratio_high);
  PolicyTerm<F> term;
  term.is_clipped = ratio > high;
  term.is_dual = Mask<F>{};
  term.grad = -advantage * select(term.is_clipped, high, ratio);
  term.loss = term.grad * logprob;
  return term;
}

template <class F>
struct ValueTerm {
  F loss, grad, squared_error;
  Mask<F> is_clipped;
};

// The clipped squared error of a value, and half its gradient by the value. At a tie outside the clip the gradient is
// halved. A NaN in an argument is one in loss and gradient.
template <bool CLIP, class F>
INLINE ValueTerm<F> value_term(F value, F old_value, F target, const PpoClip& clip) {
  const F error = value - target;
  ValueTerm<F> term;
  term.squared_error = error * error;
  term.loss = term.squared_error;
  term.grad = error;
  term.is_clipped = Mask<F>{};
  if constexpr (CLIP) {
    const F low = old_value - clip.value, high = old_value + clip.value;
    // A NaN bound makes the clamped value NaN.
    const F bounded = select(value > high, high, select(value >= low, value, low));
    const F clipped_error = bounded - target, clipped = clipped_error * clipped_error;
    const Mask<F> is_inside = (value >= low) & (value <= high);
    const F grad_at_tie = select(is_inside, error, 0.5f * error);
    term.is_clipped = clipped > term.squared_error;
    term.grad = select(clipped == term.squared_error, grad_at_tie, error);
    const Mask<F> is_nan = clipped != clipped;  // old_value is NaN, or value or target and with it all else
    term.grad = select(is_nan, clipped, select(term.is_clipped, splat<F>(0.f), term.grad));
    term.loss = select(is_nan | term.is_clipped, clipped, term.squared_error);
  }
  return term;
}

}  // namespace
