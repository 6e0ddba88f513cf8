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

// The estimate of a token's KL by d, the log-ratio of policy and reference (Schulman 2020). exp(-d) is taken of at most
// exp(20), which keeps it finite.
template <KlEstimator E, class F>
INLINE F kl_estimate(F d) {
  if constexpr (E == KlEstimator::K1) return d;
  if constexpr (E == KlEstimator::K2) return 0.5f * d * d;
  if constexpr (E == KlEstimator::K3) return exp(select(-d > splat<F>(20.f), splat<F>(20.f), -d)) - 1.f + d;
  return abs(d);
}

struct PpoClip {
  float ratio_low, ratio_high;  // the clip of the ratio: 1 - clip_low and 1 + clip_high
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
// of the log-ratio.
template <bool DUAL, class F>
INLINE PolicyTerm<F> policy_term(F unclipped_log_ratio, F ratio, F advantage, const PpoClip& clip) {
  const F zero = splat<F>(0.f);
  const F unclipped = -advantage * ratio;
  const F clipped = -advantage * clamp(ratio, splat<F>(clip.ratio_low), splat<F>(clip.ratio_high));
  PolicyTerm<F> term;
  term.is_clipped = clipped > unclipped;
  term.loss = select(term.is_clipped, clipped, unclipped);
  // A NaN log-ratio is not within the clamp: its gradient is 0, as the reference's.
  const Mask<F> in_clamp = abs(unclipped_log_ratio) <= splat<F>(clip.log_ratio);
  term.grad = select(in_clamp, select(term.is_clipped, zero, unclipped), zero);
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

template <class F>
struct ValueTerm {
  F loss, grad, squared_error;
  Mask<F> is_clipped;
};

// The clipped squared error of a value, and half its gradient by the value. At a tie outside the clip the gradient is
// halved.
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
    const F clipped_error = clamp(value, low, high) - target, clipped = clipped_error * clipped_error;
    const Mask<F> is_inside = (value >= low) & (value <= high);
    const F grad_at_tie = select(is_inside, error, 0.5f * error);
    term.is_clipped = clipped > term.squared_error;
    term.grad = select(clipped == term.squared_error, grad_at_tie, error);
    term.grad = select(term.is_clipped, splat<F>(0.f), term.grad);
    term.loss = select(term.is_clipped, clipped, term.squared_error);
  }
  return term;
}

}  // namespace
