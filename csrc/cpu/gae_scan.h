// The scan of gae, gae_packed and ppo_advantages: one row, right to left, W tokens a step.
//
//     tokens   | step 0 | step 1 | ... | last step |       <-- steps from right to left, one row a thread
//     step     delta_t = r_t + gamma V_{t+1} - V_t in lane t
//              x += c shift(x, 1);  x += c^2 shift(x, 2);  ...;  x += c^(W - t) A
//
// with c = gamma lambda and A the advantage right of the step: A_t = delta_t + c A_{t+1} by doubling. So the chain
// through a row is one multiply-add and one broadcast for every W tokens. A step with masked and unmasked tokens goes
// token by token.
//
// Steps start at multiples of W from the row's start, so a row's bits depend neither on padding behind it nor on the
// other rows.
#pragma once
#include "kernel.h"
#include "simd.h"

namespace {

// Up to here one thread takes under 0.1 ms; waiting for others may take longer if the cores have other work.
constexpr int64_t MIN_TOKENS_TO_THREAD = 65536;

// Lane i gets lane i + D of x followed by fill.
template <int D, int... I>
INLINE f32 shift_lanes(f32 x, f32 fill, Indices<I...>) {
  return SHUFFLE(x, fill, (I + D)...);
}
template <int D>
INLINE f32 shift(f32 x, f32 fill) {
  return shift_lanes<D>(x, fill, typename Count<W>::type());
}

// x_i + c x_{i+1} + c^2 x_{i+2} + ... by doubling, from power = c.
template <int D>
INLINE f32 discounted_sums(f32 x, float power) {
  if constexpr (D < W) {
    return discounted_sums<2 * D>(x + power * shift<D>(x, splat(0.f)), power * power);
  } else {
    return x;
  }
}

// The number of valid tokens among W: none, some or all.
enum Valid { NONE, SOME, ALL };
INLINE Valid load_valid(const uint8_t* mask) {
  uint32_t words[W / 4], all = ~0u, any = 0;
  memcpy(words, mask, W);
  for (int i = 0; i < W / 4; ++i) {
    all &= words[i];
    any |= words[i];
  }
  if (any == 0) return NONE;
  return all == 0x01010101u ? ALL : SOME;
}

struct Discount {
  float gamma, decay;  // decay = gamma lambda
  f32 powers;          // decay^(W - i) in lane i
};
INLINE Discount make_discount(float gamma, float lam) {
  float powers[W], power = 1.f;
  for (int i = W - 1; i >= 0; --i) powers[i] = power *= gamma * lam;
  return {gamma, gamma * lam, load(powers)};
}

// The discount of row `row`: of all rows one, or each its own.
struct OneDiscount {
  Discount discount;

  INLINE const Discount& of(int64_t) const { return discount; }
};
struct RowDiscounts {
  float gamma, lam;
  const float *gammas, *lams;  // null, or one number for each row, in place of gamma or lam

  INLINE Discount of(int64_t row) const { return make_discount(gammas ? gammas[row] : gamma, lams ? lams[row] : lam); }
};

// Calls `run` with one of them, so that a loop over rows with one discount has no branch or copy more.
template <class Run>
INLINE void with_discounts(float gamma, float lam, uintptr_t gammas, uintptr_t lams, const Run& run) {
  if (gammas || lams) return run(RowDiscounts{gamma, lam, ptr<const float>(gammas), ptr<const float>(lams)});
  run(OneDiscount{make_discount(gamma, lam)});
}

// Scans a row of n tokens; `next_value` is the value after the last. `rewards` computes the reward of W valid tokens,
// vector(t), or of one, scalar(t), from right to left, and receives the advantages and returns in on_result.
template <class Rewards>
INLINE void scan_row(Rewards& rewards, const float* values, const uint8_t* mask, float* advantages, float* returns,
                     int64_t n, float next_value, const Discount& discount) {
  f32 next_advantages = splat(0.f), next_values = splat(next_value);  // lane 0: A and V right of this step
  for (int64_t start = (n - 1) / W * W; start >= 0; start -= W) {
    const Valid valid = start + W <= n ? load_valid(mask + start) : SOME;
    if (valid == ALL) {
      const f32 v = load(values + start);
      const f32 delta = (rewards.vector(start) + discount.gamma * shift<1>(v, next_values)) - v;
      const f32 a = discounted_sums<1>(delta, discount.decay) + discount.powers * splat(next_advantages[0]);
      store(advantages + start, a);
      store(returns + start, a + v);
      rewards.on_result(a, a + v);
      next_advantages = a;
      next_values = v;
    } else if (valid == NONE) {
      store(advantages + start, splat(0.f));
      store(returns + start, splat(0.f));
    } else {
      float advantage = next_advantages[0], value = next_values[0];
      for (int64_t t = min(start + W, n) - 1; t >= start; --t) {
        advantages[t] = returns[t] = 0.f;
        if (!mask[t]) continue;
        advantage = ((rewards.scalar(t) + discount.gamma * value) - values[t]) + discount.decay * advantage;
        value = values[t];
        advantages[t] = advantage;
        returns[t] = advantage + value;
        rewards.on_result(advantage, advantage + value);
      }
      next_advantages[0] = advantage;
      next_values[0] = value;
    }
  }
}

// Rewards that are given in memory.
struct GivenRewards {
  const float* rewards;
  INLINE f32 vector(int64_t t) const { return load(rewards + t); }
  INLINE float scalar(int64_t t) const { return rewards[t]; }
  template <class T>
  INLINE void on_result(T, T) const {}
};

}  // namespace
