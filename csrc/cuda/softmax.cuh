// Online softmax of a row of logits: the maximum, sum and first moment of all logits but the target's in one pass, and
// the gradient by the logits.
//
//     y = tanh(x / softcap) and u = softcap / T, or where there is no softcap y = x and u = 1 / T
//     m = max y    d = (y - m) u / ln 2    sum = sum of 2^d    moment = sum of d 2^d
//
// The difference comes first: a product with u would round away what d is made of.
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
constexpr float min_exponent = -126.f;  // 2^-126 adds nothing to the 1 of the largest logit

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

struct Scaling {
  float exponent_factor;  // u / ln 2
  float inverse_temperature, softcap, inverse_softcap;
  double exact_inverse_temperature;
};

inline Scaling make_scaling(double temperature, float softcap) {
  const double inverse = 1. / temperature;
  const double exponent_factor = (softcap > 0.f ? softcap : 1.) * inverse / 0.693147180559945309;
  const float largest = 3e38f;
  return {exponent_factor < largest ? static_cast<float>(exponent_factor) : largest,
          inverse < largest ? static_cast<float>(inverse) : largest, softcap, softcap > 0.f ? 1.f / softcap : 0.f,
          inverse};
}

template <bool SOFTCAP>
__device__ __forceinline__ float apply_softcap(float x, const Scaling& scaling) {
  return SOFTCAP ? tanhf(__fmul_rn(x, scaling.inverse_softcap)) : x;
}

// Returns what to subtract from z so that the exponentials stay finite. 0 if max is -inf: (-inf) - (-inf) would be NaN.
__device__ __forceinline__ float zero_if_minus_inf(float max) { return max == -INFINITY ? 0.f : max; }

// Statistics of some logits: the largest raw logit x, of which y is `origin`, and the sums relative to it. The origin
// is 0 if max is -inf without a softcap: (-inf) - (-inf) would be NaN.
struct SoftmaxState {
  float max, origin, sum, moment;
};

__device__ __forceinline__ SoftmaxState empty_state() { return {-INFINITY, 0.f, 0.f, 0.f}; }

template <bool SOFTCAP>
__device__ __forceinline__ float origin_of(float max, const Scaling& scaling) {
  return SOFTCAP ? apply_softcap<true>(max, scaling) : zero_if_minus_inf(max);
}

__device__ __forceinline__ float exponent(float y, float origin, const Scaling& scaling) {
  return __fmul_rn(__fadd_rn(y, -origin), scaling.exponent_factor);
}

// The state with its sums around the y of a larger maximum. A NaN stays a NaN.
__device__ __forceinline__ SoftmaxState rescale(const SoftmaxState& state, float max, float origin,
                                                const Scaling& scaling) {
  const float distance = state.sum == 0.f ? 0.f : exponent(state.origin, origin, scaling);
  const float factor = fast_exp2(distance);
  const float moment = __fmaf_rn(fmaxf(distance, min_exponent), state.sum, state.moment);
  return {max, origin, __fmul_rn(factor, state.sum), __fmul_rn(factor, moment)};
}

template <bool SOFTCAP>
__device__ __forceinline__ SoftmaxState merge(const SoftmaxState& first, const SoftmaxState& second,
                                              const Scaling& scaling) {
  const float max = fmaxf(first.max, second.max), origin = origin_of<SOFTCAP>(max, scaling);
  const SoftmaxState a = rescale(first, max, origin, scaling), b = rescale(second, max, origin, scaling);
  return {max, origin, __fadd_rn(a.sum, b.sum), __fadd_rn(a.moment, b.moment)};
}

template <bool SOFTCAP>
__device__ __forceinline__ SoftmaxState warp_merge(const SoftmaxState& state, const Scaling& scaling) {
  const float max = warp_reduce<Max>(state.max);
  const SoftmaxState rescaled = rescale(state, max, origin_of<SOFTCAP>(max, scaling), scaling);
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
// u belong to the row.
template <int U, bool SOFTCAP, class T>
__device__ __forceinline__ void add_vecs(SoftmaxState& state, const uint4 (&vecs)[U], int num_valid, int vec_stride,
                                         int left_out, const Scaling& scaling) {
  constexpr int size = vec_size<T>;
  float y[U][size], max = state.max;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    unpack<T>(vecs[u], y[u]);
    const unsigned left_out_here = static_cast<unsigned>(left_out - u * vec_stride);
    if (left_out_here < size) {
#pragma unroll
      for (int i = 0; i < size; ++i)
        if (i == static_cast<int>(left_out_here)) y[u][i] = -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < size; ++i) {
      max = fmaxf(max, y[u][i]);
      if (!SOFTCAP) continue;
      y[u][i] = apply_softcap<true>(y[u][i], scaling);
      if (i >= num_valid - u * vec_stride) y[u][i] = -INFINITY;
    }
    if (SOFTCAP && left_out_here < size) {
#pragma unroll
      for (int i = 0; i < size; ++i)
        if (i == static_cast<int>(left_out_here)) y[u][i] = -INFINITY;
    }
  }
  const float origin = origin_of<SOFTCAP>(max, scaling);
  state = rescale(state, max, origin, scaling);
  float sums[U], moments[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    sums[u] = 0.f;
    moments[u] = 0.f;
#pragma unroll
    for (int i = 0; i < size; ++i) {
      const float distance = exponent(y[u][i], origin, scaling), e = fast_exp2(distance);
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
// All sums have terms of one sign, so log p and 1 - p keep their precision however close p is to 1. The exponential is
// expf, of a difference that is exact: fast_exp2 has a relative error of |x| 2^-24.
struct Softmax {
  float origin, factor, log2_factor;  // of other logits: p = factor 2^d, log2 p = d + log2_factor
  float logprob, p, rest;             // of the target: log p, p and 1 - p
  float entropy;
};

// tanh(x) with an absolute error of 1e-16, in fewer registers than tanh.
__device__ __forceinline__ double exact_tanh(double x) { return 1. - 2. / (exp(2. * x) + 1.); }

constexpr float min_logprob = -1000.f;  // its p is 0, and 0 times it is not NaN, as 0 times -inf would be

template <bool SOFTCAP>
__device__ __forceinline__ Softmax softmax_of(const SoftmaxState& others, float x, const Scaling& scaling) {
  double lead = static_cast<double>(x) - others.max;
  float exact_sum = others.sum;
  if (SOFTCAP) {
    const double softcap = scaling.softcap;
    float error = 0.f;
    lead = 0.;
#pragma unroll 1  // one after the other: together they take more registers
    for (int i = 0; i < 2; ++i) {
      const double y = exact_tanh((i ? x : others.max) / softcap);
      // float32 does not have the largest y exactly, so all others are nearer to it, or further away, than in the sum.
      if (i == 0) error = static_cast<float>((y - others.origin) * softcap * scaling.exact_inverse_temperature);
      lead = y - lead;
    }
    lead *= softcap;
    if (others.sum > 1.f) exact_sum -= (others.sum - 1.f) * error;
  }
  lead *= scaling.exact_inverse_temperature;
  const bool is_ahead = lead > 0.;
  const double exact_distance = is_ahead ? -lead : lead;
  const float distance = static_cast<float>(exact_distance), finite_distance = fmaxf(distance, min_logprob);
  float lesser = SOFTCAP || x < INFINITY ? expf(distance) : NAN;
  if (lesser > 0.f) lesser = __fmaf_rn(lesser, static_cast<float>(exact_distance - distance), lesser);
  const float excess = is_ahead ? lesser * exact_sum : (exact_sum - 1.f) + lesser, sum = 1.f + excess;
  const float log_sum = log1pf(excess);
  Softmax row;
  row.origin = others.origin;
  row.factor = (is_ahead ? lesser : 1.f) / sum;
  row.log2_factor = ((is_ahead ? finite_distance : 0.f) - log_sum) * log2_e;
  row.logprob = (is_ahead ? 0.f : distance) - log_sum;
  row.p = (is_ahead ? 1.f : lesser) / sum;
  row.rest = row.factor * exact_sum;
  row.entropy = log_sum - row.factor * __fmaf_rn(finite_distance, is_ahead ? others.sum : lesser, ln_2 * others.moment);
  return row;
}

// Coefficients of one row's gradient by z / T, that is, by x but for the gradient of the softcap: p (a + b log2 p) / T
// for logits but the target's, whose gradient is `target`. kernels/_head.py derives it.
struct LogitGrad {
  float origin, factor, log2_factor;  // p / T = factor 2^d, log2 p = d + log2_factor
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
  grad.target = (logprob_grad * row.rest - entropy_grad * surprise) * scaling.inverse_temperature;
  return grad;
}

// The gradient by a raw logit x, of the target or another one. Its exponential is, to the bit, that of the sums.
template <bool SOFTCAP>
__device__ __forceinline__ float logit_grad(float x, bool is_target, const LogitGrad& grad, const Scaling& scaling) {
  x = apply_softcap<SOFTCAP>(x, scaling);
  const float softcap_grad = SOFTCAP ? 1.f - x * x : 1.f;
  if (is_target) return grad.target * softcap_grad;
  const float distance = exponent(x, grad.origin, scaling);
  const float log2_p = fmaxf(distance + grad.log2_factor, min_logprob);
  return fast_exp2(distance) * grad.factor * (grad.a + grad.b * log2_p) * softcap_grad;
}

}  // namespace
