// The gradients of RMSNorm and LayerNorm, for rms_norm.cpp and layer_norm.cpp. With n = (x - mean) / std, g the
// gradient of the output, a = g (weight + offset), and for RMSNorm mean = 0 and no mean of a:
//
//     x      (a - mean of a - n mean of (a n)) / std, plus the gradient of the residual stream, if there is one
//     weight the sum over rows of g n           bias   the sum over rows of g
//
// The statistics are computed again from the row, which is in the first-level cache then: they are not stored.
//
//     rows | block 0: BLOCK_ROWS rows | block 1 | ...      a thread takes blocks, QUAD rows of them at a time
//     sums | (D,) of block 0          | block 1 | ...      float32; then added up in float64, in the order of the
//     blocks
//
// A block's rows are added in their order, whatever the number of threads: the bits of a sum depend on N alone. Floor:
// two reads and one write of memory, and one more read of a residual gradient.
#pragma once
#include "norm.h"

namespace {

constexpr int64_t BLOCK_ROWS = 32;
constexpr int QUAD = 4;

// x, grad, residual_grad (or null) and x_grad are (N, D) of one dtype, weight and weight_grad (D,) of another;
// bias_grad (D,) has its own. sums is float32: (blocks, D) of the weight and, for LayerNorm, as many of the bias.
// Without `sums` only x_grad is computed.
struct NormBackwardJob {
  uintptr_t x, grad, residual_grad, weight, x_grad, weight_grad, bias_grad, sums;
  int64_t N, D;
  bool is_bf16, weight_is_bf16, bias_is_bf16;
  float eps, offset;
  int threads;
};

template <int N>
struct RowCount {
  static constexpr int value = N;
};

struct RowStats {
  float mean, inverse;                      // inverse is 1 / std
  float mean_scaled, projection, x_factor;  // x_grad = x_factor (a - mean_scaled - projection (x - mean))
};

// The sums of two functions of (x, grad, weight) over a row.
template <class X, class Wt, class F>
INLINE void two_row_sums(const X* x, const X* grad, const Wt* weight, int64_t D, float fill, float out[2], F f) {
  f32 sums[2][2] = {};
  int64_t i = 0;
  for (; i + 2 * W <= D; i += 2 * W)
    for (int j = 0; j < 2; ++j)
      f(load(x + i + j * W), load(grad + i + j * W), load(weight + i + j * W), sums[0][j], sums[1][j]);
  if (i + W <= D) {
    f(load(x + i), load(grad + i), load(weight + i), sums[0][0], sums[1][0]);
    i += W;
  }
  if (i < D) {
    const int n = (int)(D - i);
    f(load_partial(x + i, n, fill), load_partial(grad + i, n, 0.f), load_partial(weight + i, n, 0.f), sums[0][1],
      sums[1][1]);
  }
  for (int k = 0; k < 2; ++k) out[k] = reduce_sum(sums[k][0] + sums[k][1]);
}

template <bool CENTERED, class X, class Wt>
INLINE RowStats row_stats(const X* x, const X* grad, const Wt* weight, float offset, float eps, int64_t D) {
  const float count = (float)D;
  float sums[2], mean = 0.f, mean_scaled = 0.f;
  if (CENTERED) {
    two_row_sums(x, grad, weight, D, 0.f, sums, [](f32 v, f32 g, f32 w, f32& a, f32& b) {
      a += v;
      b += g * w;
    });
    mean = sums[0] / count;
    mean_scaled = sums[1] / count;
  }
  two_row_sums(x, grad, weight, D, mean, sums, [=](f32 v, f32 g, f32 w, f32& a, f32& b) {
    const f32 centered = v - mean;
    a += centered * centered;
    b += centered * (g * (w + offset));
  });
  const float inverse = 1.f / __builtin_sqrtf(sums[0] / count + eps);
  // The gradient of one number is 0: a fused multiply-add in a - mean_scaled would leave the rounding of a.
  const float x_factor = CENTERED && D == 1 ? 0.f : inverse;
  return {mean, inverse, mean_scaled, inverse * inverse * (sums[1] / count), x_factor};
}

// The gradients of R rows. Their part of the sums is added to weight_sums and bias_sums, unless these are null.
template <bool CENTERED, int R, class X, class Wt>
INLINE void norm_backward_rows(const X* x, const X* grad, const X* residual_grad, const Wt* weight, float offset,
                               float eps, int64_t D, X* x_grad, float* weight_sums, float* bias_sums) {
  RowStats stats[R];
  for (int r = 0; r < R; ++r) stats[r] = row_stats<CENTERED>(x + r * D, grad + r * D, weight, offset, eps, D);
  for (int64_t i = 0; i < D; i += W) {
    const int n = (int)min<int64_t>(W, D - i);
    const bool is_full = n == W;
    const f32 scale = (is_full ? load(weight + i) : load_partial(weight + i, n, 0.f)) + offset;
    f32 weight_sum = {}, bias_sum = {};
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * D + i;
      const f32 g = is_full ? load(grad + at) : load_partial(grad + at, n, 0.f);
      const f32 centered = (is_full ? load(x + at) : load_partial(x + at, n, 0.f)) - stats[r].mean;
      f32 dx = (g * scale - stats[r].mean_scaled - centered * stats[r].projection) * stats[r].x_factor;
      if (residual_grad) dx += is_full ? load(residual_grad + at) : load_partial(residual_grad + at, n, 0.f);
      if (is_full)
        store(x_grad + at, dx);
      else
        store_partial(x_grad + at, dx, n);
      weight_sum += g * (centered * stats[r].inverse);
      if (CENTERED) bias_sum += g;
    }
    if (!weight_sums) continue;
    if (is_full) {
      store(weight_sums + i, load(weight_sums + i) + weight_sum);
      if (CENTERED) store(bias_sums + i, load(bias_sums + i) + bias_sum);
    } else {
      store_partial(weight_sums + i, load_partial(weight_sums + i, n, 0.f) + weight_sum, n);
      if (CENTERED) store_partial(bias_sums + i, load_partial(bias_sums + i, n, 0.f) + bias_sum, n);
    }
  }
}

// out[i] = the sum of parts (blocks, D) in column i.
template <class Y>
INLINE void add_parts(const float* parts, int64_t blocks, int64_t D, int64_t i, Y* out) {
  typedef double Doubles __attribute__((vector_size(W * 8)));
  const int n = (int)min<int64_t>(W, D - i);
  Doubles sum = {};
  for (int64_t block = 0; block < blocks; ++block) {
    const float* const part = parts + block * D + i;
    sum += __builtin_convertvector(n == W ? load(part) : load_partial(part, n, 0.f), Doubles);
  }
  store_partial(out + i, __builtin_convertvector(sum, f32), n);
}

INLINE void add_parts(const float* parts, int64_t blocks, int64_t D, int64_t i, uintptr_t out, bool is_bf16) {
  is_bf16 ? add_parts(parts, blocks, D, i, ptr<bf16>(out)) : add_parts(parts, blocks, D, i, ptr<float>(out));
}

template <bool CENTERED, class X, class Wt>
void norm_backward_of(const NormBackwardJob& job) {
  const int64_t D = job.D, blocks = (job.N + BLOCK_ROWS - 1) / BLOCK_ROWS;
  const X *const x = ptr<const X>(job.x), *const grad = ptr<const X>(job.grad);
  const X* const residual_grad = ptr<const X>(job.residual_grad);
  const Wt* const weight = ptr<const Wt>(job.weight);
  float* const sums = ptr<float>(job.sums);
#pragma omp parallel num_threads(job.threads) if (job.threads > 1 && job.N * D > 32768)
  {
#pragma omp for
    for (int64_t block = 0; block < blocks; ++block) {
      float *weight_sums = nullptr, *bias_sums = nullptr;
      if (sums) {
        weight_sums = sums + block * D;
        memset(weight_sums, 0, D * sizeof(float));
        bias_sums = sums + (blocks + block) * D;
        if (CENTERED) memset(bias_sums, 0, D * sizeof(float));
      }
      const int64_t end = min(job.N, (block + 1) * BLOCK_ROWS);
      int64_t row = block * BLOCK_ROWS;
      const auto run = [&](auto rows) {
        constexpr int R = decltype(rows)::value;
        const int64_t at = row * D;
        norm_backward_rows<CENTERED, R>(x + at, grad + at, residual_grad ? residual_grad + at : nullptr, weight,
                                        job.offset, job.eps, D, ptr<X>(job.x_grad) + at, weight_sums, bias_sums);
        row += R;
      };
      while (row + QUAD <= end) run(RowCount<QUAD>());
      while (row < end) run(RowCount<1>());
    }
    if (sums) {
#pragma omp for
      for (int64_t i = 0; i < D; i += W) {
        if (job.weight_grad) add_parts(sums, blocks, D, i, job.weight_grad, job.weight_is_bf16);
        if (job.bias_grad) add_parts(sums + blocks * D, blocks, D, i, job.bias_grad, job.bias_is_bf16);
      }
    }
  }
}

template <bool CENTERED>
void norm_backward(const NormBackwardJob& job) {
  if (job.is_bf16)
    job.weight_is_bf16 ? norm_backward_of<CENTERED, bf16, bf16>(job) : norm_backward_of<CENTERED, bf16, float>(job);
  else
    job.weight_is_bf16 ? norm_backward_of<CENTERED, float, bf16>(job) : norm_backward_of<CENTERED, float, float>(job);
}

}  // namespace
