// RMSNorm and LayerNorm of one row, statistics in float32; rms_norm.cpp and the decode step use them.
//
// Every sum runs over the row alone, in one order: four vectors in turn, added pairwise, then the lanes.
#pragma once
#include "kernel.h"
#include "simd.h"

namespace {

// The sum of f(x) over a row. The lanes beyond its end hold `fill`, for which f must be 0.
template <class X, class F>
INLINE float row_sum(const X* x, int64_t D, float fill, F f) {
  f32 sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= D; i += 4 * W)
    for (int j = 0; j < 4; ++j) sums[j] += f(load(x + i + j * W));
  for (; i + W <= D; i += W) sums[0] += f(load(x + i));
  if (i < D) sums[1] += f(load_part(x + i, (int)(D - i), fill));
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// y = f(x, w, b) over a row; w and b may be null, and are 1 - offset and 0 then. y may be x.
template <class X, class Wt, class F>
INLINE void row_map(const X* x, const Wt* w, const Wt* b, float missing, int64_t D, X* y, F f) {
  int64_t i = 0;
  for (; i + W <= D; i += W)
    store(y + i, f(load(x + i), w ? load(w + i) : splat(missing), b ? load(b + i) : splat(0.f)));
  if (i == D) return;
  const int n = (int)(D - i);
  const f32 scale = w ? load_part(w + i, n, 0.f) : splat(missing), shift = b ? load_part(b + i, n, 0.f) : splat(0.f);
  store_part(y + i, f(load_part(x + i, n, 0.f), scale, shift), n);
}

// y = x / sqrt(mean of x^2 + eps) * (w + offset); without w, the factor is 1.
template <class X, class Wt>
INLINE void rms_norm_row(const X* x, const Wt* w, float offset, float eps, int64_t D, X* y) {
  const float squares = row_sum(x, D, 0.f, [](f32 v) { return v * v; });
  const float inverse = 1.f / __builtin_sqrtf(squares / (float)D + eps);
  row_map(x, w, (const Wt*)nullptr, 1.f - offset, D, y,
          [=](f32 v, f32 scale, f32) { return v * inverse * (scale + offset); });
}

// y = (x - mean) / sqrt(variance + eps) * w + b, the variance around the mean in a second visit.
template <class X, class Wt>
INLINE void layer_norm_row(const X* x, const Wt* w, const Wt* b, float eps, int64_t D, X* y) {
  const float mean = row_sum(x, D, 0.f, [](f32 v) { return v; }) / (float)D;
  const float squares = row_sum(x, D, mean, [=](f32 v) { return (v - mean) * (v - mean); });
  const float inverse = 1.f / __builtin_sqrtf(squares / (float)D + eps);
  row_map(x, w, b, 1.f, D, y, [=](f32 v, f32 scale, f32 shift) { return (v - mean) * inverse * scale + shift; });
}

// residual += x, rounded to its type, as it is normalised next.
template <class X>
INLINE void add_row(X* residual, const X* x, int64_t D) {
  int64_t i = 0;
  for (; i + W <= D; i += W) store(residual + i, load(residual + i) + load(x + i));
  const int n = (int)(D - i);
  if (n) store_part(residual + i, load_part(residual + i, n, 0.f) + load_part(x + i, n, 0.f), n);
}

// norm(row, y) of every row of x, (N, D), to that of out, on several threads. With a residual, x is added to it and the
// sum is what is normalised.
template <class X, class F>
INLINE void norm_rows(uintptr_t x, uintptr_t residual, uintptr_t out, int64_t N, int64_t D, int threads, F norm) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && N * D > 32768)
  for (int64_t row = 0; row < N; ++row) {
    const X* from = ptr<const X>(x) + row * D;
    if (residual) {
      X* const stream = ptr<X>(residual) + row * D;
      add_row(stream, from, D);
      from = stream;
    }
    norm(from, ptr<X>(out) + row * D);
  }
}

}  // namespace
