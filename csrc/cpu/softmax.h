// Online statistics of a row of logits x, and the gradient by them, for token_logprobs.cpp and linear_head.cpp.
//
//     z = softcap(x + bias) / temperature      m = max z   s = sum e^(z-m)   A = sum (z-m) e^(z-m)
//     log p(t) = (z_t - m) - log s             entropy = log s - A / s
//
// and with the row z2 of a reference, B = sum (z2-m2) e^(z-m): KL = (A / s - log s) - (B / s - log s2). These forms
// keep their signs under rounding.
//
//     row    | tile 0: 1024 columns | tile 1 | ...     one thread; a tile stays in the first-level cache for two passes
//     tile   z and its maximum, then the exponentials: lane l sums the columns l, l + W, ... of the tile
//
// Floor: one read of the logits; some 25 vector operations for W of them. A tile is the unit of every sum, and calls
// bring whole tiles (but for the row's last): the bits of a row do not depend on the calls, the other rows or the
// threads.
#pragma once
#include "simd.h"

namespace {

constexpr int TILE = 1024;
constexpr float MIN_EXPONENT = -87.f;  // e^-87 is 1.6e-38: it adds nothing to the 1 of the largest logit

struct Scaling {
  float inverse_temperature, softcap, inverse_softcap;
};

inline Scaling make_scaling(float temperature, float softcap) {
  return Scaling{1.f / temperature, softcap, softcap > 0.f ? 1.f / softcap : 0.f};
}

// -inf becomes MIN_EXPONENT, so that its product with its exponential is not NaN. A NaN stays a NaN.
INLINE f32 clamp_exponent(f32 x) { return max(splat(MIN_EXPONENT), x); }

// e^x for MIN_EXPONENT <= x <= 0, in half the time of exp: 2^n 2^f, x log2 e = n + f, 2^f by a minimax polynomial.
// Within 1 ulp near 0; below, the absolute error, which matters in a sum with the 1 of the largest logit, is no larger.
INLINE f32 fast_exp(f32 x) {
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

// z of raw logits x.
template <bool SOFTCAP>
INLINE f32 apply_softcap_temperature(f32 x, const Scaling& scaling) {
  if (SOFTCAP) x = scaling.softcap * tanh(x * scaling.inverse_softcap);
  return x * scaling.inverse_temperature;
}

// min(n, W) logits with their bias; the other lanes hold -inf.
template <class T>
INLINE f32 load_logits(const T* x, const float* bias, int n) {
  f32 v = n >= W ? load(x) : load_partial(x, n, -__builtin_inff());
  if (bias) v = v + (n >= W ? load(bias) : load_partial(bias, n, 0.f));
  return v;
}

// Writes z of n <= TILE columns, filled up to whole vectors with -inf, and returns their maximum.
template <bool SOFTCAP, class T>
INLINE float scale_tile(const T* x, const float* bias, int n, const Scaling& scaling, float* z) {
  f32 largest = splat(-__builtin_inff());
  int i = 0;
#pragma GCC unroll 4
  for (; i + W <= n; i += W) {
    const f32 v = apply_softcap_temperature<SOFTCAP>(load_logits(x + i, bias ? bias + i : nullptr, W), scaling);
    store(z + i, v);
    largest = max(largest, v);
  }
  if (i < n) {
    float lanes[W];
    store(lanes, apply_softcap_temperature<SOFTCAP>(load_logits(x + i, bias ? bias + i : nullptr, n - i), scaling));
    for (int j = n - i; j < W; ++j) lanes[j] = -__builtin_inff();
    const f32 v = load(lanes);
    store(z + i, v);
    largest = max(largest, v);
  }
  return reduce_max(largest);
}

// m, s, A, and z of the target.
struct SoftmaxState {
  float max, sum, moment, target;
};
constexpr SoftmaxState empty_state = {-__builtin_inff(), 0.f, 0.f, 0.f};

// True if no logit so far is above -inf: then there is nothing to add. A NaN among the n of this tile makes the sum
// NaN.
INLINE bool is_empty(SoftmaxState& state, const float* z, int n) {
  if (state.max > -__builtin_inff()) return false;
  for (int i = 0; i < n; ++i)
    if (z[i] != z[i]) state.sum = z[i];
  return true;
}

// Moves the sums to a new maximum, and returns the factor of the sum.
INLINE float rescale(SoftmaxState& state, float new_max) {
  if (!(new_max > state.max)) return 1.f;
  const float factor = state.sum > 0.f ? scalar_exp(state.max - new_max) : 0.f;
  state.moment = factor > 0.f ? factor * (state.moment + (state.max - new_max) * state.sum) : 0.f;
  state.sum *= factor;
  state.max = new_max;
  return factor;
}

// Adds columns to a row's state. `target` is counted from the first of them.
template <bool SOFTCAP, class T>
INLINE void add_columns(SoftmaxState& state, const T* x, const float* bias, int64_t columns, int64_t target,
                        const Scaling& scaling) {
  alignas(64) float z[TILE];
  for (int64_t begin = 0; begin < columns; begin += TILE) {
    const int n = (int)min<int64_t>(TILE, columns - begin);
    const float tile_max = scale_tile<SOFTCAP>(x + begin, bias ? bias + begin : nullptr, n, scaling, z);
    if (target >= begin && target < begin + n) state.target = z[target - begin];
    rescale(state, max(state.max, tile_max));
    if (is_empty(state, z, n)) continue;
    const f32 row_max = splat(state.max);
    f32 sums = splat(0.f), moments = splat(0.f);
    const T* const next = x + begin + TILE;  // prefetched here, as the next tile's first pass only waits for memory
#pragma GCC unroll 2
    for (int i = 0; i < n; i += W) {
      __builtin_prefetch(next + i);
      const f32 d = clamp_exponent(load(z + i) - row_max), e = fast_exp(d);
      sums = sums + e;
      moments = moments + d * e;
    }
    state.sum += reduce_sum(sums);
    state.moment += reduce_sum(moments);
  }
}

// The gradient of a row by z is p (a + b log p + c (log p_ref - log p)) + g 1[target]; the chain rule carries it to the
// raw logits x.
struct LogitGrad {
  float max, log_sum, g, a, b;
  float c, ref_max, ref_log_sum;
};

// `target_term` is g in the target's lane, else 0.
template <bool SOFTCAP, bool KL>
INLINE f32 logit_grad(f32 x, f32 ref, f32 target_term, const LogitGrad& grad, const Scaling& scaling) {
  f32 dz_dx = splat(scaling.inverse_temperature);
  if (SOFTCAP) {
    const f32 t = tanh(x * scaling.inverse_softcap);
    dz_dx = dz_dx * (1.f - t * t);
    x = scaling.softcap * t;
  }
  const f32 exact = (x * scaling.inverse_temperature - grad.max) - grad.log_sum, logp = clamp_exponent(exact);
  f32 inner = grad.a + grad.b * logp;
  if (KL) {
    const f32 ref_z = apply_softcap_temperature<SOFTCAP>(ref, scaling);
    inner = inner + grad.c * (clamp_exponent((ref_z - grad.ref_max) - grad.ref_log_sum) - logp);
  }
  const f32 p = select(exact < splat(MIN_EXPONENT), splat(0.f), fast_exp(logp));
  return (p * inner + target_term) * dz_dx;
}

// out may be x. So the vector with the target is computed before all others, and stored after them.
template <bool SOFTCAP, bool KL, class T, class Out>
INLINE void row_gradient(const T* x, const float* bias, const float* ref, const float* ref_bias, Out* out,
                         int64_t columns, int64_t target, const LogitGrad& grad, const Scaling& scaling) {
  const bool has_target = target >= 0 && target < columns;
  const int64_t target_begin = has_target ? target / W * W : 0;
  f32 target_vector = splat(0.f);
  const auto grad_at = [&](int64_t i, int n, f32 target_term) {
    const f32 ref_logits = KL ? load_logits(ref + i, ref_bias ? ref_bias + i : nullptr, n) : target_term;
    return logit_grad<SOFTCAP, KL>(load_logits(x + i, bias ? bias + i : nullptr, n), ref_logits, target_term, grad,
                                   scaling);
  };
  if (has_target) {
    float target_term[W] = {};
    target_term[target - target_begin] = grad.g;
    target_vector = grad_at(target_begin, (int)min<int64_t>(W, columns - target_begin), load(target_term));
  }
  int64_t i = 0;
  for (; i + W <= columns; i += W) store(out + i, grad_at(i, W, splat(0.f)));
  if (i < columns) store_partial(out + i, grad_at(i, (int)(columns - i), splat(0.f)), (int)(columns - i));
  if (has_target) {
    if (target_begin + W <= columns)
      store(out + target_begin, target_vector);
    else
      store_partial(out + target_begin, target_vector, (int)(columns - target_begin));
  }
}

}  // namespace
