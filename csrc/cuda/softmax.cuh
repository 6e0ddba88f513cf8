// Online softmax of a row of logits: its maximum, sum and first moment in one pass, and the gradient by the logits.
// csrc/cpu/softmax.h has the formulas.
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

constexpr float log2_e = 1.44269504088896341f;
constexpr float min_exponent = -87.f;  // e^-87 is 1.6e-38: it adds nothing to the 1 of the largest logit

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
  float inverse_temperature, softcap, inverse_softcap;
};

inline Scaling make_scaling(float temperature, float softcap) {
  return {1.f / temperature, softcap, softcap > 0.f ? 1.f / softcap : 0.f};
}

// z of a raw logit x.
template <bool SOFTCAP>
__device__ __forceinline__ float apply_softcap_temperature(float x, const Scaling& scaling) {
  if (SOFTCAP) x = __fmul_rn(scaling.softcap, tanhf(__fmul_rn(x, scaling.inverse_softcap)));
  return __fmul_rn(x, scaling.inverse_temperature);
}

// Statistics of some logits z: their maximum, the sum of e^(z - max) and the sum of (z - max) e^(z - max).
struct SoftmaxState {
  float max, sum, moment;
};

__device__ __forceinline__ SoftmaxState empty_state() { return {-INFINITY, 0.f, 0.f}; }

// Returns what to subtract from z so that the exponentials stay finite. 0 if max is -inf: (-inf) - (-inf) would be NaN.
__device__ __forceinline__ float zero_if_minus_inf(float max) { return max == -INFINITY ? 0.f : max; }

// The state with its sums around `origin`, at least state.max, in place of state.max. A NaN stays a NaN.
__device__ __forceinline__ SoftmaxState rescale(const SoftmaxState& state, float origin, float max) {
  const float distance = state.max - origin, factor = fast_exp(distance);
  const float moment = __fmaf_rn(fmaxf(distance, min_exponent), state.sum, state.moment);
  return {max, __fmul_rn(factor, state.sum), __fmul_rn(factor, moment)};
}

__device__ __forceinline__ SoftmaxState merge(const SoftmaxState& first, const SoftmaxState& second) {
  const float max = fmaxf(first.max, second.max), origin = zero_if_minus_inf(max);
  const SoftmaxState a = rescale(first, origin, max), b = rescale(second, origin, max);
  return {max, __fadd_rn(a.sum, b.sum), __fadd_rn(a.moment, b.moment)};
}

__device__ __forceinline__ SoftmaxState warp_merge(const SoftmaxState& state) {
  const float max = warp_reduce<Max>(state.max);
  const SoftmaxState rescaled = rescale(state, zero_if_minus_inf(max), max);
  return {max, warp_reduce<Add>(rescaled.sum), warp_reduce<Add>(rescaled.moment)};
}

// Merges over a block of whole warps; `shared` holds 96 numbers.
__device__ __forceinline__ SoftmaxState block_merge(SoftmaxState state, float* shared) {
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size, num_warps = blockDim.x / warp_size;
  float *const maxima = shared, *const sums = shared + warp_size, *const moments = shared + 2 * warp_size;
  state = warp_merge(state);
  __syncthreads();
  if (lane == 0) {
    maxima[warp] = state.max;
    sums[warp] = state.sum;
    moments[warp] = state.moment;
  }
  __syncthreads();
  state = empty_state();
  if (lane < num_warps) state = {maxima[lane], sums[lane], moments[lane]};
  return warp_merge(state);
}

// Adds U vectors of a row's logits to its state. Vectors have -inf outside the row. With softcap that is not enough:
// softcap makes a logit of -inf finite, which must count inside the row and must not outside. There, only the first
// `num_valid - u * vec_stride` numbers of vector u belong to the row.
template <int U, bool SOFTCAP, class T>
__device__ __forceinline__ void add_vecs(SoftmaxState& state, const uint4 (&vecs)[U], int num_valid, int vec_stride,
                                         const Scaling& scaling) {
  constexpr int size = vec_size<T>;
  float z[U][size], max = state.max;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    unpack<T>(vecs[u], z[u]);
#pragma unroll
    for (int i = 0; i < size; ++i) {
      z[u][i] = apply_softcap_temperature<SOFTCAP>(z[u][i], scaling);
      if (SOFTCAP && i >= num_valid - u * vec_stride) z[u][i] = -INFINITY;
      max = fmaxf(max, z[u][i]);
    }
  }
  const float origin = zero_if_minus_inf(max);
  state = rescale(state, origin, max);
  float sums[U], moments[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    sums[u] = 0.f;
    moments[u] = 0.f;
#pragma unroll
    for (int i = 0; i < size; ++i) {
      const float distance = z[u][i] - origin, e = fast_exp(distance);
      sums[u] = __fadd_rn(sums[u], e);
      moments[u] = __fmaf_rn(fmaxf(distance, min_exponent), e, moments[u]);  // fmaxf: -inf times 0 is NaN
    }
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    state.sum = __fadd_rn(state.sum, sums[u]);
    state.moment = __fadd_rn(state.moment, moments[u]);
  }
}

// Returns the state of the vectors of `row` from `first` to `last` that `thread` of `num_threads` takes. Loads U
// vectors before it uses the first. Copies the aligned vectors with index < num_saved to `saved`, if they are full.
template <int U, bool SOFTCAP, class T>
__device__ __forceinline__ SoftmaxState row_state(const UnalignedRow<T>& row, int first, int last, int thread,
                                                  int num_threads, const Scaling& scaling, uint4* saved = nullptr,
                                                  int num_saved = 0) {
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
    add_vecs<U, SOFTCAP, T>(state, vecs, row.end - start * vec_size<T>, num_threads * vec_size<T>, scaling);
  }
  return state;
}

// Coefficients of one row's gradient. By z it is p (a + b log p + c (log p_ref - log p)) + g 1[target];
// kernels/_head.py derives it. `max` and `log_sum` are the row's statistics, `ref_max` and `ref_log_sum` those of the
// reference.
struct LogitGrad {
  float max, log_sum, g, a, b;
  float c, ref_max, ref_log_sum;
};

// The gradient by a raw logit x; `target_term` is g at the target, else 0.
template <bool SOFTCAP, bool KL>
__device__ __forceinline__ float logit_grad(float x, float ref, float target_term, const LogitGrad& grad,
                                            const Scaling& scaling) {
  float dz_dx = scaling.inverse_temperature;
  if (SOFTCAP) {
    const float t = tanhf(x * scaling.inverse_softcap);
    dz_dx *= 1.f - t * t;
    x = scaling.softcap * t;
  }
  const float logp = (x * scaling.inverse_temperature - grad.max) - grad.log_sum;
  const float finite_logp = fmaxf(logp, min_exponent);
  float inner = grad.a + grad.b * finite_logp;
  if (KL) {
    const float ref_logp = (apply_softcap_temperature<SOFTCAP>(ref, scaling) - grad.ref_max) - grad.ref_log_sum;
    inner += grad.c * (fmaxf(ref_logp, min_exponent) - finite_logp);
  }
  return (fast_exp(logp) * inner + target_term) * dz_dx;
}

}  // namespace
