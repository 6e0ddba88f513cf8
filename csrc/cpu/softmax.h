// Online statistics of a row of logits x, for token_logprobs.cpp and linear_head.cpp.
//
//     z = softcap(x + bias) / temperature      and of all tokens but the target t
//     m = max z        s = sum e^(z-m)         A = sum (z-m) e^(z-m)        S = s + e^(z_t-m)
//
//     log p(t) = -log1p(s e^(m-z_t))   or, where t is not ahead, (z_t - m) - log S        1 - p(t) = s / S
//     entropy = log S - (A + (z_t-m) e^(z_t-m)) / S
//
// The target stays out of the sums: beside its 1 a sum of 1e-9 would be lost, and with it log p and 1 - p. With the row
// z2 of a reference and B = sum (z2-m2) e^(z-m), the others' part of the KL is (A - B + s (log S2 - log S)) / S.
//
//     row    | tile 0: 1024 columns | tile 1 | ...     one thread; a tile stays in the first-level cache for two passes
//     tile   x and its maximum, then the exponentials: added pairwise by 8 vectors, these in float64
//
// Distances z - m are made of x - max x, which float32 has exactly or nearly so, and not of z. Floor: one read of the
// logits; some 25 vector operations for W of them. A tile is the unit of every sum, and calls bring whole tiles (but
// for the row's last): the bits of a row do not depend on the calls, the other rows or the threads.
#pragma once
#include "simd.h"

namespace {

constexpr int TILE = 1024, GROUP = 8;  // columns, vectors

// Positions are raw logits, or with softcap tanh(x / softcap); one of them is `unit` nats.
struct Scaling {
  double unit, temperature;
  float softcap, inverse_softcap[2];  // in two parts, for a product that is rounded once
  float saturated;                    // tanh of logits beyond is 1; their products with the two parts are finite
  float exponent[2];                  // unit log2(e), in two parts
  double exponent_rest;               // the second part in nats
  float lowest;                       // the distance of MIN_EXPONENT nats

  // z of a logit: tanh within 1e-16 of 1, from one exponential.
  INLINE double z(float x) const {
    if (softcap <= 0.f) return x / temperature;
    const double e = exp(-2. * __builtin_fabs(x) / softcap), tanh = (1. - e) / (1. + e);
    return __builtin_copysign(softcap * tanh, x) / temperature;
  }
  // dz/dx.
  INLINE double z_grad(float x) const {
    const double by_logit = min(1. / temperature, 3e38);
    if (softcap <= 0.f) return by_logit;
    const double e = exp(-2. * __builtin_fabs(x) / softcap);
    return by_logit * 4. * e / ((1. + e) * (1. + e));
  }
};

INLINE void split(double x, float* parts) {
  parts[0] = (float)x;
  parts[1] = (float)(x - parts[0]);
}

inline Scaling make_scaling(double temperature, float softcap) {
  Scaling scaling = {};
  // A unit beyond these bounds would be infinite or 0 in float32.
  scaling.unit = min(max((softcap > 0.f ? softcap : 1.) / temperature, 1e-30), 1e38);
  scaling.temperature = temperature;
  scaling.softcap = softcap;
  scaling.saturated = (float)min(32. * softcap, (double)FLT_MAX);
  if (softcap > 0.f) split(1. / softcap, scaling.inverse_softcap);
  split(scaling.unit * LOG2_E, scaling.exponent);
  scaling.exponent_rest = scaling.exponent[1] / LOG2_E;
  scaling.lowest = (float)(MIN_EXPONENT / scaling.unit);
  return scaling;
}

// e^z of a distance not below scaling.lowest; garbage where it is so far above 0 that 2^n overflows. ROUNDED leaves the
// exponent's second part out: the result is too small by exponent_rest times the distance, relatively.
template <bool ROUNDED = false>
INLINE f32 exp_distance(f32 distance, const Scaling& scaling) {
  const f32 shifted = distance * scaling.exponent[0] + ROUND;
  const f32 f = distance * scaling.exponent[0] - (shifted - ROUND);
  return power_of_two(shifted, ROUNDED ? f : f + distance * scaling.exponent[1]);
}

INLINE float scalar_exp(float x) {
  float lanes[W];
  store(lanes, exp(splat(x)));
  return lanes[0];
}

// The position of logits. One of -inf is a token of the row, at the lowest position that softcap gives.
template <bool SOFTCAP>
INLINE f32 position(f32 x, const Scaling& scaling) {
  if (!SOFTCAP) return x;
  x = max(splat(-scaling.saturated), min(splat(scaling.saturated), x));  // a NaN stays a NaN
#if defined(__FMA__)
  x = x * scaling.inverse_softcap[0] + x * scaling.inverse_softcap[1];
#else
  x = x / scaling.softcap;
#endif
  const f32 a = abs(x) * (float)(2 * LOG2_E), shifted = a + ROUND;
  return tanh(x, power_of_two(shifted, abs(x) * (float)(2 * LOG2_E) - (shifted - ROUND)));
}
template <bool SOFTCAP>
INLINE float position(float x, const Scaling& scaling) {
  if (!SOFTCAP) return max(x, -FLT_MAX);  // finite, so that -inf has a distance
  float lanes[W];
  store(lanes, position<true>(splat(max(x, -FLT_MAX)), scaling));
  return lanes[0];
}

// min(n, W) logits with their bias; the other lanes hold -inf.
template <class T>
INLINE f32 load_logits(const T* x, const float* bias, int n) {
  f32 v = n >= W ? load(x) : load_partial(x, n, -__builtin_inff());
  if (bias) v = v + (n >= W ? load(bias) : load_partial(bias, n, 0.f));
  return v;
}

// The largest of n logits with their bias.
template <class T>
INLINE float largest_logit(const T* x, const float* bias, int n) {
  f32 largest = splat(-__builtin_inff());
  for (int i = 0; i < n; i += W) largest = max(largest, load_logits(x + i, bias ? bias + i : nullptr, n - i));
  return reduce_max(largest);
}

// The positions of a tile in memory, filled up with -inf to whole vectors.
struct Tile {
  alignas(64) float x[TILE];
  int columns;  // filled up
  float max;    // the largest logit

  // Takes n <= TILE logits with their bias. The column `taken` stays out, and its logit is returned; with -1 none does.
  template <bool SOFTCAP, class T>
  INLINE float fill(const T* from, const float* bias, int n, int64_t taken, const Scaling& scaling) {
    f32 largest = splat(-__builtin_inff());
    int i = 0;
#pragma GCC unroll 4
    for (; i + W <= n; i += W) {
      const f32 v = load_logits(from + i, bias ? bias + i : nullptr, W);
      store(x + i, position<SOFTCAP>(v, scaling));
      largest = ::max(largest, v);
    }
    if (i < n) {
      const f32 v = load_logits(from + i, bias ? bias + i : nullptr, n - i);
      store(x + i, position<SOFTCAP>(v, scaling));
      largest = ::max(largest, v);
      i += W;
    }
    for (int j = n; j < i && SOFTCAP; ++j) x[j] = -__builtin_inff();
    columns = i;
    max = reduce_max(largest);
    if (taken < 0) return 0.f;
    const float logit = to_float(from[taken]) + (bias ? bias[taken] : 0.f);
    x[taken] = -__builtin_inff();
    if (!(logit < max)) {
      const int after = (int)taken + 1;
      max = ::max(largest_logit(from, bias, (int)taken),
                  largest_logit(from + after, bias ? bias + after : nullptr, n - after));
    }
    return logit;
  }
};

// The sums of all tokens but the target: s, A in distances, the largest logit, and with softcap the number of tokens
// there; and the target's logit.
struct SoftmaxState {
  double sum, moment;
  float max, target;
  int64_t ties;
};
constexpr SoftmaxState empty_state = {0., 0., -__builtin_inff(), 0.f, 0};

// True if no logit so far is above -inf: then there is nothing to add. A NaN among those of this tile makes the sum
// NaN.
template <bool SOFTCAP>
INLINE bool is_empty(SoftmaxState& state, const Tile& tile, int n, int64_t taken) {
  if (state.max > -__builtin_inff()) return false;
  for (int i = 0; i < n; ++i) {
    if (tile.x[i] != tile.x[i]) state.sum = tile.x[i];
    if (SOFTCAP && i != taken) return false;  // softcap makes -inf finite
  }
  return true;
}

// Moves the sums to a new maximum, and returns the factor of the sum.
template <bool SOFTCAP>
INLINE double rescale(SoftmaxState& state, float new_max, const Scaling& scaling) {
  if (!(new_max > state.max)) return 1.;
  double factor = 0.;
  if (state.sum > 0.) {
    const double distance = (double)position<SOFTCAP>(state.max, scaling) - (double)position<SOFTCAP>(new_max, scaling);
    factor = exp(distance * scaling.unit);
    state.moment = factor > 0. ? factor * (state.moment + distance * state.sum) : 0.;
    state.sum *= factor;
  }
  state.max = new_max;
  state.ties = 0;
  return factor;
}

INLINE f32 sum_group(const f32* x) { return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])); }

// The sum of a tile's groups in float64: many equal small ones beside a 1 would all be rounded the same way. Of the 16
// lanes of AVX-512 two groups are added first.
struct GroupSums {
  static constexpr int PART = W > 8 ? 2 : 1;
  DoubleSums parts;
  f32 part = {};
  int count = 0;

  INLINE void add(f32 group) {
    part = part + group;
    if (++count % PART) return;
    parts.add(part);
    part = splat(0.f);
  }
  INLINE double total() {
    if (count % PART) parts.add(part);
    return parts.total();
  }
};

// Ignores what add_columns tells of each tile and its exponentials.
struct NoRecord {
  INLINE void tile(int64_t, int, float) const {}
  INLINE void exponentials(int64_t, int, f32, f32) const {}
};

// Adds columns to a row's state. `target` is counted from the first of them. `record` is told the columns and the
// origin of each tile, then their exponentials and distances.
template <bool SOFTCAP, class T, class Record = NoRecord>
INLINE void add_columns(SoftmaxState& state, const T* x, const float* bias, int64_t columns, int64_t target,
                        const Scaling& scaling, const Record& record = {}) {
  Tile tile;
  for (int64_t begin = 0; begin < columns; begin += TILE) {
    const int n = (int)min<int64_t>(TILE, columns - begin);
    const int64_t taken = target >= begin && target < begin + n ? target - begin : -1;
    const float logit = tile.fill<SOFTCAP>(x + begin, bias ? bias + begin : nullptr, n, taken, scaling);
    if (taken >= 0) state.target = logit;
    rescale<SOFTCAP>(state, max(state.max, tile.max), scaling);
    record.tile(begin, n, state.max);
    if (is_empty<SOFTCAP>(state, tile, n, taken)) continue;
    const f32 origin = splat(position<SOFTCAP>(state.max, scaling)), lowest = splat(scaling.lowest);
    GroupSums sums;
    f32 moments[2] = {};
    i32 ties = {};
    const T* const next = x + begin + TILE;  // prefetched here, as the next tile's first pass only waits for memory
    const auto add = [&](int i, int j) __attribute__((always_inline)) {
      __builtin_prefetch(next + i);
      const f32 distance = max(lowest, load(tile.x + i) - origin);  // finite; a NaN stays a NaN
      const f32 e = exp_distance<true>(distance, scaling);
      record.exponentials(begin + i, n - i, e, distance);
      moments[j % 2] = moments[j % 2] + distance * e;
      if (SOFTCAP) ties -= distance == splat(0.f);
      return e;
    };
    int i = 0;
    f32 e[GROUP];
    for (; i + GROUP * W <= tile.columns; i += GROUP * W) {
#pragma GCC unroll 8
      for (int j = 0; j < GROUP; ++j) e[j] = add(i + j * W, j);
      sums.add(sum_group(e));
    }
    if (i < tile.columns) {
#pragma GCC unroll 8
      for (int j = 0; j < GROUP; ++j) e[j] = i + j * W < tile.columns ? add(i + j * W, j) : splat(0.f);
      sums.add(sum_group(e));
    }
    const double moment = reduce_sum(moments[0] + moments[1]);
    state.sum += sums.total() + scaling.exponent_rest * moment;
    state.moment += moment;
    if (SOFTCAP) state.ties += (int64_t)reduce_sum(__builtin_convertvector(ties, f32));
  }
}

// The distribution of a row. p of another token than the target is scale e^(z-m), its log (z-m) + log_scale.
struct RowSoftmax {
  double logprob, entropy, p, rest;  // of the target: log p, p, and 1 - p
  double scale, log_scale;
};

// logsumexp z of a row without a NaN.
inline double log_z(const SoftmaxState& state, const RowSoftmax& row, const Scaling& scaling) {
  return scaling.z(max(state.target, max(state.max, -FLT_MAX))) - max(row.logprob, row.log_scale);
}

inline RowSoftmax finish_row(const SoftmaxState& state, const Scaling& scaling) {
  const double infinity = __builtin_inf(), sum = state.sum, z = scaling.z(state.target);
  if (sum == 0) return {z - z, z - z, 1., z - z, z - z, -infinity};  // NaN if the target's logit is not finite either
  const bool softcap = scaling.softcap > 0.f;
  const double z_max = scaling.z(max(state.max, -FLT_MAX)), moment = state.moment * scaling.unit;
  // Between positions float32 is exact, but not in the softcap of the largest one. Where only ties have a share there
  // is nothing to correct, and the error may be thousands of nats.
  double exact_sum = sum;
  if (softcap && sum > (double)state.ties) {
    const double error = z_max - (double)position<true>(state.max, scaling) * scaling.unit;
    exact_sum = (double)state.ties + (sum - (double)state.ties) * exp(-error);
  }
  const double lead = softcap ? z - z_max : ((double)state.target - state.max) / scaling.temperature;
  if (lead > 0) {
    const double own = exp(-lead), rest = exact_sum * own, total = 1. + rest, log_total = log1p(rest);
    if (lead == infinity) return {lead - lead, lead - lead, 1., lead - lead, lead - lead, -infinity};
    const double others = own > 0. ? own * (moment - lead * sum) / total : 0.;
    return {0. - log_total, log_total - others, 1. / total, rest / total, rest / total / sum, -lead - log_total};
  }
  const double own = exp(lead), total = exact_sum + own, log_total = log(total);
  const double own_moment = own > 0. ? lead * own : own;
  return {lead - log_total,
          log_total - (moment + own_moment) / total,
          own / total,
          exact_sum / total,
          exact_sum / total / sum,
          -log_total};
}

}  // namespace
