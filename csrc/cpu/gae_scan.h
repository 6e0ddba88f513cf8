// The scan of gae, gae_packed and ppo_advantages: one row, right to left, W tokens a step.
//
// Inside a step, delta_t = r_t + gamma V_{t+1} - V_t needs no chain. A_t = delta_t + c A_{t+1}, c = gamma lambda, is
// folded by doubling: x += c shift(x, 1); x += c^2 shift(x, 2); ... ; x += c^(W - i) A, A the advantage right of the
// step. So the chain through a row is one multiply-add and one broadcast for every W tokens. Steps start at multiples
// of W from the row's start: padding behind a row does not change its bits. Where a step has gaps, it is walked token
// by token.
#pragma once
#include "kernel.h"
#include "simd.h"

namespace {

// Up to here one thread takes under 0.1 ms, and waiting for others may take longer where the cores have other work.
constexpr int64_t threaded_tokens = 65536;

// Lane i gets lane i + D of (x, fill) laid end to end.
template <int D, int... I>
INLINE f32 shift_lanes(f32 x, f32 fill, Indices<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, fill, (I + D)...);
#else
  return __builtin_shuffle(x, fill, i32{(I + D)...});
#endif
}
template <int D>
INLINE f32 shift(f32 x, f32 fill) {
  return shift_lanes<D>(x, fill, typename Count<W>::type());
}

template <int D>
INLINE f32 fold(f32 x, float power) {
  if constexpr (D < W) {
    return fold<2 * D>(x + power * shift<D>(x, splat(0.f)), power * power);
  } else {
    return x;
  }
}

// How many of the W flags at p are set, as far as it matters: none, some or all. Flags are 0 or 1.
enum Flags { none, some, all };
INLINE Flags look(const uint8_t* p) {
  uint32_t words[W / 4], both = ~0u, any = 0;
  memcpy(words, p, W);
  for (int i = 0; i < W / 4; ++i) both &= words[i], any |= words[i];
  return any == 0 ? none : both == 0x01010101u ? all : some;
}

struct Discount {
  float gamma, decay;
  f32 powers;  // decay^(W - i) in lane i
};
INLINE Discount discount(float gamma, float lam) {
  float powers[W], power = 1.f;
  for (int i = W - 1; i >= 0; --i) powers[i] = power *= gamma * lam;
  return {gamma, gamma * lam, load(powers)};
}

// A row of n tokens; `next` is the value after its last one. From right to left, Row is asked what tokens that exist
// earn, W at a time by tile(t) or one by one(t), and told what came of them.
template <class Row>
INLINE void scan_row(Row& row, const float* values, const uint8_t* mask, float* advantages, float* returns, int64_t n,
                     float next, const Discount& d) {
  f32 carry = splat(0.f), after = splat(next);  // in lane 0: A and V of the next token to the right
  for (int64_t start = (n - 1) / W * W; start >= 0; start -= W) {
    const Flags flags = start + W <= n ? look(mask + start) : some;
    if (flags == all) {
      const f32 v = load(values + start);
      const f32 delta = (row.tile(start) + d.gamma * shift<1>(v, after)) - v;
      const f32 a = fold<1>(delta, d.decay) + d.powers * splat(carry[0]);
      store(advantages + start, a);
      store(returns + start, a + v);
      row.made(a, a + v);
      carry = a, after = v;
    } else if (flags == none) {
      store(advantages + start, splat(0.f));
      store(returns + start, splat(0.f));
    } else {
      float last = carry[0], value = after[0];
      for (int64_t t = min(start + W, n) - 1; t >= start; --t) {
        advantages[t] = returns[t] = 0.f;
        if (!mask[t]) continue;
        last = ((row.one(t) + d.gamma * value) - values[t]) + d.decay * last;
        value = values[t];
        advantages[t] = last;
        returns[t] = last + value;
        row.made(last, last + value);
      }
      carry[0] = last, after[0] = value;
    }
  }
}

// Rewards as they lie in memory.
struct Stored {
  const float* rewards;
  INLINE f32 tile(int64_t t) const { return load(rewards + t); }
  INLINE float one(int64_t t) const { return rewards[t]; }
  template <class T>
  INLINE void made(T, T) const {}
};

}  // namespace
