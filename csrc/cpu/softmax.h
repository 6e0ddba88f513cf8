// Online statistics of a row of logits, and the gradient of its softmax; token_logprobs.cpp and linear_head.cpp use
// them.
//
//   z = cap(x + bias) / temperature      m = max z   s = sum e^(z-m)   A = sum (z-m) e^(z-m)
//   log p(t) = (z_t - m) - log s   entropy = log s - A / s      both of the sign they must have, whatever is rounded
//
// and for a second row z2 of a reference, B = sum (z2-m2) e^(z-m): KL = (A / s - log s) - (B / s - log s2).
// Columns come in tiles of TILE, which stay in the first-level cache between the maximum and the exponentials. A tile
// is the unit of every sum: the bits depend neither on how many columns a call brings (a multiple of TILE, but for the
// last), nor on the other rows, nor on the threads.
#pragma once
#include "simd.h"

namespace {

constexpr int TILE = 1024;
constexpr float FAR = -87.f;  // e^FAR is 1.6e-38: nothing beside the 1 that the largest logit adds

struct Scaling {
  float inverse_temperature, softcap, inverse_softcap;
};

inline Scaling scaling(float temperature, float softcap) {
  return Scaling{1.f / temperature, softcap, softcap > 0.f ? 1.f / softcap : 0.f};
}

// -inf becomes FAR, so that its product with its exponential is not NaN; a NaN stays one.
INLINE f32 at_least_far(f32 x) { return max(splat(FAR), x); }

// e^x for FAR <= x <= 0, in half the time of exp: 2^n 2^f, x log2 e = n + f, the second by a minimax polynomial. Within
// 1 ulp near 0, and of e^x the absolute error that matters in a sum with the 1 of the largest logit never exceeds that.
INLINE f32 exp_near(f32 x) {
  const f32 magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32 shifted = x * 1.44269504088896341f + magic;
  const f32 f = x * 1.44269504088896341f - (shifted - magic);
  f32 p = splat(1.535336159e-04f);
  p = p * f + 1.339887452e-03f;
  p = p * f + 9.618437360e-03f;
  p = p * f + 5.550332471e-02f;
  p = p * f + 2.402264791e-01f;
  p = p * f + 6.931472029e-01f;
  p = p * f + 1.f;
  return p * as_float((as_int(shifted) << 23) + 0x3f800000);
}

INLINE float scalar_exp(float x) {
  float lanes[W];
  store(lanes, exp(splat(x)));
  return lanes[0];
}
INLINE float scalar_log(float x) {
  float lanes[W];
  store(lanes, log(splat(x)));
  return lanes[0];
}

template <bool CAP>
INLINE f32 scaled(f32 x, const Scaling& by) {
  if (CAP) x = by.softcap * tanh(x * by.inverse_softcap);
  return x * by.inverse_temperature;
}

template <class T>
INLINE f32 raw(const T* x, const float* bias, int n) {
  f32 v = n >= W ? load(x) : load_part(x, n, -__builtin_inff());
  if (bias) v = v + (n >= W ? load(bias) : load_part(bias, n, 0.f));
  return v;
}

// z of n <= TILE columns into `z`, filled up to whole vectors with -inf; the largest of them.
template <bool CAP, class T>
INLINE float scale_tile(const T* x, const float* bias, int n, const Scaling& by, float* z) {
  f32 most = splat(-__builtin_inff());
  int i = 0;
#pragma GCC unroll 4
  for (; i + W <= n; i += W) {
    const f32 v = scaled<CAP>(raw(x + i, bias ? bias + i : nullptr, W), by);
    store(z + i, v);
    most = max(most, v);
  }
  if (i < n) {
    float lanes[W];
    store(lanes, scaled<CAP>(raw(x + i, bias ? bias + i : nullptr, n - i), by));
    for (int j = n - i; j < W; ++j) lanes[j] = -__builtin_inff();
    const f32 v = load(lanes);
    store(z + i, v);
    most = max(most, v);
  }
  return largest(most);
}

struct Softmax {
  float largest, sum, moment, target;  // m, s, A, z of the target
};
constexpr Softmax nothing_yet = {-__builtin_inff(), 0.f, 0.f, 0.f};

// A tile without a logit above -inf adds nothing; but a NaN in it must show.
INLINE bool is_void(Softmax& row, const float* z, int n) {
  if (row.largest > -__builtin_inff()) return false;
  for (int i = 0; i < n; ++i)
    if (z[i] != z[i]) row.sum = z[i];
  return true;
}

// Sums around a new maximum; returns their factor.
INLINE float move(Softmax& row, float most) {
  if (!(most > row.largest)) return 1.f;
  const float factor = row.sum > 0.f ? scalar_exp(row.largest - most) : 0.f;
  row.moment = factor > 0.f ? factor * (row.moment + (row.largest - most) * row.sum) : 0.f;
  row.sum *= factor;
  row.largest = most;
  return factor;
}

template <bool CAP, class T>
INLINE void add_columns(Softmax& row, const T* x, const float* bias, int64_t columns, int64_t target,
                        const Scaling& by) {
  alignas(64) float z[TILE];
  for (int64_t begin = 0; begin < columns; begin += TILE) {
    const int n = (int)min<int64_t>(TILE, columns - begin);
    const float most = scale_tile<CAP>(x + begin, bias ? bias + begin : nullptr, n, by, z);
    if (target >= begin && target < begin + n) row.target = z[target - begin];
    move(row, max(row.largest, most));
    if (is_void(row, z, n)) continue;
    const f32 from = splat(row.largest);
    f32 sums = splat(0.f), moments = splat(0.f);
    const T* const next = x + begin + TILE;  // fetched while the processor computes; the first pass then waits less
#pragma GCC unroll 2
    for (int i = 0; i < n; i += W) {
      __builtin_prefetch(next + i);
      const f32 d = at_least_far(load(z + i) - from), e = exp_near(d);
      sums = sums + e;
      moments = moments + d * e;
    }
    row.sum += sum(sums);
    row.moment += sum(moments);
  }
}

// The gradient of one row: p (a + b log p + c (log p_ref - log p)) + g 1[target] by z, carried on to the raw logits x.
struct Slope {
  float largest, log_sum, g, a, b;
  float c, ref_largest, ref_log_sum;
};

template <bool CAP, bool KL>
INLINE f32 slope_of(f32 x, f32 ref, f32 once, const Slope& s, const Scaling& by) {
  f32 chain = splat(by.inverse_temperature);
  if (CAP) {
    const f32 t = tanh(x * by.inverse_softcap);
    chain = chain * (1.f - t * t);
    x = by.softcap * t;
  }
  const f32 exact = (x * by.inverse_temperature - s.largest) - s.log_sum, logp = at_least_far(exact);
  f32 inner = s.a + s.b * logp;
  if (KL) inner = inner + s.c * (at_least_far((scaled<CAP>(ref, by) - s.ref_largest) - s.ref_log_sum) - logp);
  const f32 p = select(exact < splat(FAR), splat(0.f), exp_near(logp));
  return (p * inner + once) * chain;
}

// out may be x. The vector that holds the target is computed first, with the target's own term, and stored last.
template <bool CAP, bool KL, class T, class Out>
INLINE void row_gradient(const T* x, const float* bias, const float* ref, const float* ref_bias, Out* out,
                         int64_t columns, int64_t target, const Slope& s, const Scaling& by) {
  const bool here = target >= 0 && target < columns;
  const int64_t special = here ? target / W * W : 0;
  f32 kept = splat(0.f);
  const auto at = [&](int64_t i, int n, f32 once) {
    const f32 other = KL ? raw(ref + i, ref_bias ? ref_bias + i : nullptr, n) : once;
    return slope_of<CAP, KL>(raw(x + i, bias ? bias + i : nullptr, n), other, once, s, by);
  };
  if (here) {
    float once[W] = {};
    once[target - special] = s.g;
    kept = at(special, (int)min<int64_t>(W, columns - special), load(once));
  }
  int64_t i = 0;
  for (; i + W <= columns; i += W) store(out + i, at(i, W, splat(0.f)));
  if (i < columns) store_part(out + i, at(i, (int)(columns - i), splat(0.f)), (int)(columns - i));
  if (here) {
    if (special + W <= columns)
      store(out + special, kept);
    else
      store_part(out + special, kept, (int)(columns - special));
  }
}

}  // namespace
