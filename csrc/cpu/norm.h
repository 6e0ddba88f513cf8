// RMSNorm and LayerNorm of rows, with statistics in float32, for rms_norm.cpp, layer_norm.cpp and the decode step.
//
//     row_sum, W = 8:   x  | vector 0 | vector 1 | vector 2 | vector 3 | vector 4 | ...
//                          | sums[0]  | sums[1]  | sums[2]  | sums[3]  | sums[0]  | ...    then pairs, then lanes
//
// A row is read from memory once; later passes over it and the weight find them in the first-level cache. A sum runs
// over one row in one order, so a row's bits depend on that row alone.
#pragma once
#include "dtypes.h"
#include "simd.h"

namespace {

// The sum of f(x) over a row. The last vector is filled up with `fill`, for which f must be 0.
template <class X, class F>
INLINE float row_sum(const X* x, int64_t D, float fill, F f) {
  f32 sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= D; i += 4 * W)
    for (int j = 0; j < 4; ++j) sums[j] += f(load(x + i + j * W));
  for (; i + W <= D; i += W) sums[0] += f(load(x + i));
  if (i < D) sums[1] += f(load_partial(x + i, (int)(D - i), fill));
  return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// y = f(x, weight, bias) over a row. A null weight reads as `default_weight`, a null bias as 0. y may be x.
template <class X, class Wt, class F>
INLINE void row_map(const X* x, const Wt* weight, const Wt* bias, float default_weight, int64_t D, X* y, F f) {
  int64_t i = 0;
  for (; i + W <= D; i += W)
    store(y + i, f(load(x + i), weight ? load(weight + i) : splat(default_weight), bias ? load(bias + i) : splat(0.f)));
  if (i == D) return;
  const int n = (int)(D - i);
  const f32 scale = weight ? load_partial(weight + i, n, 0.f) : splat(default_weight);
  const f32 shift = bias ? load_partial(bias + i, n, 0.f) : splat(0.f);
  store_partial(y + i, f(load_partial(x + i, n, 0.f), scale, shift), n);
}

// y = x / sqrt(mean of x^2 + eps) * (weight + offset); without a weight, the factor is 1.
template <class X, class Wt>
INLINE void rms_norm_row(const X* x, const Wt* weight, float offset, float eps, int64_t D, X* y) {
  const float squares = row_sum(x, D, 0.f, [](f32 v) { return v * v; });
  const float inverse = 1.f / __builtin_sqrtf(squares / (float)D + eps);
  row_map(x, weight, (const Wt*)nullptr, 1.f - offset, D, y,
          [=](f32 v, f32 scale, f32) { return v * inverse * (scale + offset); });
}

// y = (x - mean) / sqrt(variance + eps) * weight + bias. The variance is summed around the mean, in a second pass.
template <class X, class Wt>
INLINE void layer_norm_row(const X* x, const Wt* weight, const Wt* bias, float eps, int64_t D, X* y) {
  const float mean = row_sum(x, D, 0.f, [](f32 v) { return v; }) / (float)D;
  const float squares = row_sum(x, D, mean, [=](f32 v) { return (v - mean) * (v - mean); });
  const float inverse = 1.f / __builtin_sqrtf(squares / (float)D + eps);
  row_map(x, weight, bias, 1.f, D, y,
          [=](f32 v, f32 scale, f32 shift) { return (v - mean) * inverse * scale + shift; });
}

// residual += x, rounded to its dtype: the norm then reads the rounded sum.
template <class X>
INLINE void add_row(X* residual, const X* x, int64_t D) {
  int64_t i = 0;
  for (; i + W <= D; i += W) store(residual + i, load(residual + i) + load(x + i));
  const int n = (int)(D - i);
  if (n) store_partial(residual + i, load_partial(residual + i, n, 0.f) + load_partial(x + i, n, 0.f), n);
}

// Arguments of a call: x, residual (or null) and out are (N, D) of one dtype; weight and bias (or null) are (D,) of
// another.
struct NormJob {
  uintptr_t x, weight, bias, residual, out;
  int64_t N, D;
  bool is_bf16, weight_is_bf16;
  int threads;
};

template <class X, class Wt, class Norm>
void norm_rows_of(const NormJob& job, Norm norm) {
#pragma omp parallel for num_threads(job.threads) if (job.threads > 1 && job.N * job.D > 32768)
  for (int64_t row = 0; row < job.N; ++row) {
    const X* x = ptr<const X>(job.x) + row * job.D;
    if (job.residual) {
      X* const residual = ptr<X>(job.residual) + row * job.D;
      add_row(residual, x, job.D);
      x = residual;
    }
    norm(x, ptr<const Wt>(job.weight), ptr<const Wt>(job.bias), ptr<X>(job.out) + row * job.D);
  }
}

// Calls norm(x, weight, bias, y) for every row, on several threads. If there is a residual, x is first added to it, and
// the sum is normalized.
template <class Norm>
void norm_rows(const NormJob& job, Norm norm) {
  if (job.is_bf16)
    job.weight_is_bf16 ? norm_rows_of<bf16, bf16>(job, norm) : norm_rows_of<bf16, float>(job, norm);
  else
    job.weight_is_bf16 ? norm_rows_of<float, bf16>(job, norm) : norm_rows_of<float, float>(job, norm);
}

}  // namespace
