// Online softmax of a row of logits: the maximum, sum and first moment of all logits but the target's in one pass, and
// the gradient by the logits.
//
//     m = max x    d = (z(x) - z(m)) / ln 2    sum = sum of 2^d    moment = sum of d 2^d
//     without softcap    d = (x - m) / (T ln 2)
//     with softcap       d = (w - 1) / (w + q) scale,   w = e^(2 (x - m) / softcap)   q = e^(-2 m / softcap)
//                                                       scale = 2 q / (1 + q) softcap / (T ln 2)
//
// The difference x - m comes first: a product, or a tanh, would round away what d is made of. So d has relative
// precision, and logits that tie with the largest are exactly 0 away from it. The second form is tanh(x / softcap) -
// tanh(m / softcap): it needs no more operations than a tanh.
//
// The target's logit stays out of the sums. A target that is far ahead has p = 1 - 1e-12, say, and log p = -1e-12: the
// others' sum, relative to the target, has that number in full precision. A sum with the target in it has 1. `Softmax`
// joins the two.
//
// The threads of a warp or block take vectors of 16 bytes of a row in turn, U of them at a time:
//
//     vector   0    1   ...  T-1 |  T   T+1  ... 2T-1 | ... U vectors of thread t: t, t + T, ..., t + (U-1) T
//     thread   0    1   ...  T-1 |  0    1   ...  T-1 | ...
//
// Floor: one load of the row; per logit one exponential and about 6 operations.
//
// The row's length and dtype alone decide which logits a thread adds, and in which order. The operations that
// decide a row's bits are written as intrinsics (__fmul_rn, __fmaf_rn): otherwise the compiler might fuse products and
// sums differently in two kernels.
#pragma once
#include <math.h>

#include "reduce.cuh"
#include "vec.cuh"

namespace {

constexpr float log2_e = 1.44269504088896341f, ln_2 = 0.693147180559945309f;
constexpr double ln_2_squared = 0.480453013918201425;
constexpr float min_exponent = -126.f;  // 2^-126 adds nothing to the 1 of the largest logit
constexpr float max_exponent = 100.f;   // of q: tanh(log(2^100) / 2) is 1 - 2^-99

// 2^x within 2 units in the last place, in one instruction; 0 where the result is no normal float32.
__device__ __forceinline__ float fast_exp2(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return ex2_approx(x);
#endif
}
__device__ __forceinline__ float fast_exp(float x) { return fast_exp2(__fmul_rn(x, log2_e)); }

// 1 / x within 1 unit in the last place, in one instruction, for x that is no denormal.
__device__ __forceinline__ float fast_reciprocal(float x) {
#if defined(__CUDACC__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return rcp_approx(x);
#endif
}

// The smaller of two numbers. A NaN stays a NaN, unlike in fminf.
__device__ __forceinline__ float min_or_nan(float x, float bound) {
#if defined(__CUDACC__)
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
  return y;
#else
  return x > bound ? bound : x;
#endif
}

struct Scaling {
  float exponent_factor;  // 1 / (T ln 2), or with softcap 2 softcap / (T ln 2)
  float rounding;         // without softcap, ln 2 times what float32 lacks of the factor, relative to it
  float inverse_temperature, softcap;
  float softcap_factor;  // 2 / (softcap ln 2)
  float saturated;       // logits beyond are as far from all others as this one
  double exact_inverse_temperature;
};

inline Scaling make_scaling(double temperature, float softcap) {
  constexpr double ln2 = 0.693147180559945309, largest = 3e38;
  const auto finite = [](double x) { return static_cast<float>(x < largest ? x : largest); };
  const double inverse = 1. / temperature, factor = (softcap > 0.f ? 2. * softcap : 1.) * inverse / ln2;
  Scaling scaling;
  scaling.exponent_factor = finite(factor);
  scaling.rounding = factor < largest ? static_cast<float>((factor / scaling.exponent_factor - 1.) * ln2) : 0.f;
  scaling.inverse_temperature = finite(inverse);
  scaling.softcap = softcap;
  scaling.softcap_factor = softcap > 0.f ? finite(2. / (softcap * ln2)) : 0.f;
  scaling.saturated = softcap > 0.f ? finite(max_exponent / scaling.softcap_factor) : 0.f;
  scaling.exact_inverse_temperature = inverse;
  return scaling;
}

// Returns what to subtract from z so that the exponentials stay finite. 0 if max is -inf: (-inf) - (-inf) would be NaN.
__device__ __forceinline__ float zero_if_minus_inf(float max) { return max == -INFINITY ? 0.f : max; }

// Statistics of some logits: the largest raw logit x, and the sums relative to `origin`. This is the largest, but 0 if
// that is -inf without a softcap: (-inf) - (-inf) would be NaN. With softcap it is at most `saturated` away from 0.
struct SoftmaxState {
  float max, origin, sum, moment;
};

__device__ __forceinline__ SoftmaxState empty_state() { return {-INFINITY, 0.f, 0.f, 0.f}; }

template <bool SOFTCAP>
__device__ __forceinline__ float origin_of(float max, const Scaling& scaling) {
  return SOFTCAP ? fminf(fmaxf(max, -scaling.saturated), scaling.saturated) : zero_if_minus_inf(max);
}

// An origin with what the distances from it need: q and scale, only with softcap.
struct Origin {
  float x, q, scale;
};

template <bool SOFTCAP>
__device__ __forceinline__ Origin make_origin(float x, const Scaling& scaling) {
  if (!SOFTCAP) return {x, 0.f, 0.f};
  const float q = fast_exp2(__fmul_rn(-x, scaling.softcap_factor));
  return {x, q, __fmul_rn(__fmul_rn(q, fast_reciprocal(__fadd_rn(1.f, q))), scaling.exponent_factor)};
}

// 2^x - 1 for x <= 0 with relative precision, given 2^x.
__device__ __forceinline__ float exp2_minus_1(float x, float exp2_x) {
  float p = 1.54035304e-4f;  // Taylor's series
  p = __fmaf_rn(p, x, 1.33335581e-3f);
  p = __fmaf_rn(p, x, 9.61812911e-3f);
  p = __fmaf_rn(p, x, 5.55041087e-2f);
  p = __fmaf_rn(p, x, 2.40226507e-1f);
  p = __fmaf_rn(p, x, ln_2);
  return x > -0.36f ? __fmul_rn(p, x) : __fadd_rn(exp2_x, -1.f);
}

// d of a logit x <= origin.x, and the derivative of its softcap.
struct Distance {
  float d, softcap_grad;
};

template <bool SOFTCAP>
__device__ __forceinline__ Distance distance_from(const Origin& origin, float x, const Scaling& scaling) {
  const float difference = __fadd_rn(x, -origin.x);
  if (!SOFTCAP) return {__fmul_rn(difference, scaling.exponent_factor), 1.f};
  const float exponent = __fmul_rn(difference, scaling.softcap_factor), w = fast_exp2(exponent);
  const float inverse = fast_reciprocal(__fadd_rn(w, origin.q));
  const float ratio = __fmul_rn(exp2_minus_1(exponent, w), inverse);
  return {__fmul_rn(ratio, origin.scale), 4.f * (w * inverse) * (origin.q * inverse)};
}

// The state with its sums around a larger maximum. A NaN stays a NaN.
template <bool SOFTCAP>
__device__ __forceinline__ SoftmaxState rescale(const SoftmaxState& state, float max, const Origin& origin,
                                                const Scaling& scaling) {
  const float distance = state.sum == 0.f ? 0.f : distance_from<SOFTCAP>(origin, state.origin, scaling).d;
  const float factor = fast_exp2(distance);
  const float moment = __fmaf_rn(fmaxf(distance, min_exponent), state.sum, state.moment);
  return {max, origin.x, __fmul_rn(factor, state.sum), __fmul_rn(factor, moment)};
}

template <bool SOFTCAP>
__device__ __forceinline__ SoftmaxState merge(const SoftmaxState& first, const SoftmaxState& second,
                                              const Scaling& scaling) {
  const float max = fmaxf(first.max, second.max);
  const Origin origin = make_origin<SOFTCAP>(origin_of<SOFTCAP>(max, scaling), scaling);
  const SoftmaxState a = rescale<SOFTCAP>(first, max, origin, scaling);
  const SoftmaxState b = rescale<SOFTCAP>(second, max, origin, scaling);
  return {max, origin.x, __fadd_rn(a.sum, b.sum), __fadd_rn(a.moment, b.moment)};
}

template <bool SOFTCAP>
__device__ __forceinline__ SoftmaxState warp_merge(const SoftmaxState& state, const Scaling& scaling) {
  const float max = warp_reduce<Max>(state.max);
  const Origin origin = make_origin<SOFTCAP>(origin_of<SOFTCAP>(max, scaling), scaling);
  const SoftmaxState rescaled = rescale<SOFTCAP>(state, max, origin, scaling);
  return {max, rescaled.origin, warp_reduce<Add>(rescaled.sum), warp_reduce<Add>(rescaled.moment)};
}

// Merges over a block of whole warps; `shared` holds 96 numbers.
template <bool SOFTCAP>
__device__ __forceinline__ SoftmaxState block_merge(SoftmaxState state, const Scaling& scaling, float* shared) {
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size, num_warps = blockDim.x / warp_size;
  float *const maxima = shared, *const sums = shared + warp_size, *const moments = shared + 2 * warp_size;
  state = warp_merge<SOFTCAP>(state, scaling);
  __syncthreads();
  if (lane == 0) {
    maxima[warp] = state.max;
    sums[warp] = state.sum;
    moments[warp] = state.moment;
  }
  __syncthreads();
  state = empty_state();
  if (lane < num_warps) state = {maxima[lane], origin_of<SOFTCAP>(maxima[lane], scaling), sums[lane], moments[lane]};
  return warp_merge<SOFTCAP>(state, scaling);
}

// Adds U vectors of a row's logits to its state, without number `left_out`, which vector 0 starts from, if it is among
// them. Vectors have -inf outside the row. With softcap that is not enough: softcap makes a logit of -inf finite, which
// must count inside the row and must not outside. There, only the first `num_valid - u * vec_stride` numbers of vector
// u belong to the row; +inf marks the others, once it is in no logit.
template <int U, bool SOFTCAP, class T>
__device__ __forceinline__ void add_vecs(SoftmaxState& state, const uint4 (&vecs)[U], int num_valid, int vec_stride,
                                         int left_out, const Scaling& scaling) {
  constexpr int size = vec_size<T>;
  float x[U][size], max = state.max;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    unpack<T>(vecs[u], x[u]);
    const unsigned left_out_here = static_cast<unsigned>(left_out - u * vec_stride);
    if (left_out_here < size) {
#pragma unroll
      for (int i = 0; i < size; ++i)
        if (i == static_cast<int>(left_out_here)) x[u][i] = -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < size; ++i) {
      if (SOFTCAP) x[u][i] = min_or_nan(x[u][i], scaling.saturated);
      max = fmaxf(max, x[u][i]);
    }
    if (SOFTCAP && (left_out_here < size || num_valid - u * vec_stride < size)) {
#pragma unroll
      for (int i = 0; i < size; ++i)
        if (i >= num_valid - u * vec_stride || i == static_cast<int>(left_out_here)) x[u][i] = INFINITY;
    }
  }
  const Origin origin = make_origin<SOFTCAP>(origin_of<SOFTCAP>(max, scaling), scaling);
  state = rescale<SOFTCAP>(state, max, origin, scaling);
  float sums[U], moments[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    sums[u] = 0.f;
    moments[u] = 0.f;
#pragma unroll
    for (int i = 0; i < size; ++i) {
      float distance = distance_from<SOFTCAP>(origin, x[u][i], scaling).d;
      if (SOFTCAP && x[u][i] == INFINITY) distance = -INFINITY;
      const float e = fast_exp2(distance);
      sums[u] = __fadd_rn(sums[u], e);
      moments[u] = __fmaf_rn(fmaxf(distance, min_exponent), e, moments[u]);  // fmaxf: -inf times 0 is NaN
    }
  }
#pragma unroll
  for (int distance = U / 2; distance; distance /= 2) {
#pragma unroll
    for (int u = 0; u < distance; ++u) {
      sums[u] = __fadd_rn(sums[u], sums[u + distance]);
      moments[u] = __fadd_rn(moments[u], moments[u + distance]);
    }
  }
  state.sum = __fadd_rn(state.sum, sums[0]);
  state.moment = __fadd_rn(state.moment, moments[0]);
}

// Returns the state of the vectors of `row` from `first` to `last` that `thread` of `num_threads` takes, without the
// logit of column `left_out`. Loads U vectors before it uses the first. Copies the aligned vectors with index <
// num_saved to `saved`, if they are full.
template <int U, bool SOFTCAP, class T>
__device__ __forceinline__ SoftmaxState row_state(const UnalignedRow<T>& row, int first, int last, int thread,
                                                  int num_threads, int left_out, const Scaling& scaling,
                                                  uint4* saved = nullptr, int num_saved = 0) {
  SoftmaxState state = empty_state();
  for (; first < last; first += U * num_threads) {
    const int start = first + thread;
    uint4 vecs[U];
    if (row.is_full(start) && row.is_full(start + (U - 1) * num_threads)) {
#pragma unroll
      for (int u = 0; u < U; ++u) vecs[u] = row.vecs[start + u * num_threads];
      if (num_saved) {
#pragma unroll
        for (int u = 0; u < U; ++u)
          if (start + u * num_threads < num_saved) saved[start + u * num_threads] = vecs[u];
      }
      if (row.shift) {
        uint4 next[U];
#pragma unroll
        for (int u = 0; u < U; ++u) next[u] = row.vecs[start + u * num_threads + 1];
#pragma unroll
        for (int u = 0; u < U; ++u) vecs[u] = funnel_shift(vecs[u], next[u], row.shift);
      }
    } else {
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int k = start + u * num_threads;
        vecs[u] = row.load(k);
        if (k < num_saved && row.is_full(k)) saved[k] = row.vecs[k];
      }
    }
    add_vecs<U, SOFTCAP, T>(state, vecs, row.end - start * vec_size<T>, num_threads * vec_size<T>,
                            left_out - start * vec_size<T>, scaling);
  }
  return state;
}

// The softmax of a row, from the state of all logits but the target's and the target's raw logit.
//
//     y_t > m    f = e^(u (m - y_t)), S = 1 + f sum     log p = -log1p(f sum)               factor = f / S
//     else       e = e^(u (y_t - m)), S = sum + e       log p = u (y_t - m) - log S         factor = 1 / S
//
// The sum gets what the factors' rounding took from it: relative to d this is the same for all logits (with softcap,
// near the largest), so it is a multiple of the moment. All sums have terms of one sign, so log p and 1 - p keep their
// precision however close p is to 1. The exponential is expf, of a difference that is exact: fast_exp2 has a relative
// error of |x| 2^-24.
struct Softmax {
  Origin origin;
  float factor, log2_factor;             // of other logits: p = factor 2^d, log2 p = d + log2_factor
  float logprob, p, rest, softcap_grad;  // of the target: log p, p, 1 - p, and the derivative of its softcap
  float entropy;
};

// tanh(x) with an absolute error of 1e-16, in fewer registers than tanh.
__device__ __forceinline__ double exact_tanh(double x) { return 1. - 2. / (exp(2. * x) + 1.); }

constexpr float min_logprob = -1000.f;  // its p is 0, and 0 times it is not NaN, as 0 times -inf would be

template <bool SOFTCAP>
__device__ __forceinline__ Softmax softmax_of(const SoftmaxState& others, float x, const Scaling& scaling) {
  Softmax row;
  row.origin = make_origin<SOFTCAP>(others.origin, scaling);
  row.softcap_grad = 1.f;
  double lead = static_cast<double>(x) - others.max;
  float exact_sum = __fmaf_rn(scaling.rounding, others.moment, others.sum);
  if (SOFTCAP) {
    const double softcap = scaling.softcap;
    exact_sum = others.sum;
    lead = 0.;
#pragma unroll 1  // one after the other: together they take more registers
    for (int i = 0; i < 2; ++i) {
      const double y = exact_tanh((i ? x : others.max) / softcap), grad = (1. - y) * (1. + y);
      if (i == 0 && row.origin.q > 0.05f) {  // else q has digits that 1 - y * y lacks
        const double exact_scale = grad * (1. + row.origin.q) * scaling.exact_inverse_temperature;
        const double rounded = ln_2_squared * scaling.softcap_factor * row.origin.scale;
        exact_sum = __fmaf_rn(static_cast<float>(exact_scale / rounded - 1.) * ln_2, others.moment, others.sum);
      }
      row.softcap_grad = static_cast<float>(grad);
      lead = y - lead;
    }
    lead *= softcap;
  }
  lead *= scaling.exact_inverse_temperature;
  const bool is_ahead = lead > 0.;
  const double exact_distance = is_ahead ? -lead : lead;
  const float distance = static_cast<float>(exact_distance), finite_distance = fmaxf(distance, min_logprob);
  float lesser = SOFTCAP || x < INFINITY ? expf(distance) : NAN;
  if (lesser > 0.f) lesser = __fmaf_rn(lesser, static_cast<float>(exact_distance - distance), lesser);
  const float excess = is_ahead ? lesser * exact_sum : (exact_sum - 1.f) + lesser, sum = 1.f + excess;
  const float log_sum = log1pf(excess);
  row.log2_factor = ((is_ahead ? finite_distance : 0.f) - log_sum) * log2_e;
  row.logprob = (is_ahead ? 0.f : distance) - log_sum;
  row.p = (is_ahead ? 1.f : lesser) / sum;
  row.rest = (is_ahead ? excess : exact_sum) / sum;
  row.factor = others.sum == 0.f ? 0.f : row.rest / others.sum;
  row.entropy = log_sum - row.factor * __fmaf_rn(finite_distance, is_ahead ? others.sum : lesser, ln_2 * others.moment);
  return row;
}

// Coefficients of one row's gradient by x: p (a + b log2 p) / T times the derivative of the softcap for logits but the
// target's, whose gradient is `target`. kernels/_head.py derives it.
struct LogitGrad {
  Origin origin;
  float factor, log2_factor;  // p / T = factor 2^d, log2 p = d + log2_factor
  float a, b, target;
};

__device__ __forceinline__ LogitGrad logit_grad_of(const Softmax& row, float logprob_grad, float entropy_grad,
                                                   const Scaling& scaling) {
  LogitGrad grad;
  grad.origin = row.origin;
  grad.factor = row.factor * scaling.inverse_temperature;
  grad.log2_factor = row.log2_factor;
  grad.a = -logprob_grad - entropy_grad * row.entropy;
  grad.b = -entropy_grad * ln_2;
  const float surprise = row.p == 0.f ? 0.f : row.p * (row.entropy + row.logprob);
  const float by_z = logprob_grad * row.rest - entropy_grad * surprise;
  grad.target = by_z * scaling.inverse_temperature * row.softcap_grad;
  return grad;
}

// The gradient by a raw logit x that is not the target's. Its exponential is, to the bit, that of the sums.
template <bool SOFTCAP>
__device__ __forceinline__ float logit_grad(float x, const LogitGrad& grad, const Scaling& scaling) {
  if (SOFTCAP) x = min_or_nan(x, scaling.saturated);
  const Distance distance = distance_from<SOFTCAP>(grad.origin, x, scaling);
  const float log2_p = fmaxf(distance.d + grad.log2_factor, min_logprob);
  return fast_exp2(distance.d) * grad.factor * (grad.a + grad.b * log2_p) * distance.softcap_grad;
}

}  // namespace
