// X W' of float32 X (rows, K) and W (columns, K) for many rows, in the order of sums of product.h's dot_tile.
//
//     dot_tile    lane l sums the elements l, l + W, l + 2 W, ... of a row of X and of W; then the lanes are added
//     here        lanes are columns of the result. For l and l + W / 2 at a time, two chains of sums of each result are
//                 in registers; the sums of these pairs are added by halves in memory
//
// So nothing is added over lanes, which takes dot_tile longer than the products where K is small. A panel holds 2
// vectors of columns, transposed: for each pair the elements l and l + W / 2, then those W further, and so on.
//
// Floor: 2 rows columns K operations, two vectors of fused multiply-adds a cycle.
#pragma once
#include "tiles.h"

namespace {

constexpr int DOT_VECTORS = 2, DOT_COLUMNS = DOT_VECTORS * W, DOT_PAIRS = W / 2, DOT_ROWS = W == 16 ? 6 : 3;
constexpr int64_t DOT_MAX_K = 4096;  // a panel of 512 KiB with AVX-512

// Says whether a panel pays, by measurement: where K is small the lanes' sums of a dot_tile cost more than a panel.
INLINE bool uses_dot_panel(int64_t rows, int64_t K) {
  return K <= DOT_MAX_K && rows >= (K < 1024 ? max<int64_t>(8, K / 8) : 64);
}
INLINE int64_t dot_panel_size(int64_t K) { return (K + W - 1) / W * W * DOT_COLUMNS; }

// Fills the panel of `columns` <= DOT_COLUMNS rows of W; what is missing is 0.
inline void fill_dot_panel(const float* w, int64_t w_stride, int64_t columns, int64_t K, float* panel) {
  const int64_t steps = (K + W - 1) / W;
  for (int64_t v = 0; v * W < columns; ++v)
    for (int64_t j = 0; j < steps; ++j) {
      f32 rows[W];
      unrolled<W>([&](auto i) __attribute__((always_inline)) {
        constexpr int n = decltype(i)::value;
        const float* const from = w + (v * W + n) * w_stride + j * W;
        const int64_t left = K - j * W;
        rows[n] = v * W + n >= columns ? f32{} : left >= W ? load(from) : load_partial(from, (int)left, 0.f);
      });
      transpose(rows);
      unrolled<W>([&](auto i) __attribute__((always_inline)) {
        constexpr int lane = decltype(i)::value;
        store(panel + (((lane % DOT_PAIRS * steps + j) * 2 + lane / DOT_PAIRS) * DOT_VECTORS + v) * W, rows[lane]);
      });
    }
}

// R rows of X by C vectors of a panel.
template <int R, int C>
INLINE void dot_panel_tile(const float* x, int64_t x_stride, const float* panel, int64_t K, int64_t columns, float* out,
                           int64_t out_stride) {
  constexpr int N = R * C;
  const int64_t steps = (K + W - 1) / W, whole = K / W, rest = K % W;
  f32 totals[DOT_PAIRS][N];
  for (int p = 0; p < DOT_PAIRS; ++p) {
    f32 sums[2 * N] = {};
    const float* from = panel + p * steps * 2 * DOT_COLUMNS;
    const auto add = [&](auto half, int64_t j) __attribute__((always_inline)) {
      constexpr int h = decltype(half)::value;
      f32 b[C];
      unrolled<C>([&](auto c)
                      __attribute__((always_inline)) { b[c.value] = load(from + h * DOT_COLUMNS + c.value * W); });
      unrolled<R>([&](auto r) __attribute__((always_inline)) {
        constexpr int row = decltype(r)::value;
        const f32 y = splat(x[row * x_stride + j * W + p + h * DOT_PAIRS]);
        unrolled<C>([&](auto c) __attribute__((always_inline)) {
          constexpr int n = h * N + row * C + decltype(c)::value;
          sums[n] = fma(y, b[c.value], sums[n]);
        });
      });
    };
    for (int64_t j = 0; j < whole; ++j, from += 2 * DOT_COLUMNS) {
      add(Number<0>(), j);
      add(Number<1>(), j);
    }
    if (p < rest) add(Number<0>(), whole);
    if (p + DOT_PAIRS < rest) add(Number<1>(), whole);
    unrolled<N>([&](auto i) __attribute__((always_inline)) {
      constexpr int n = decltype(i)::value;
      totals[p][n] = sums[n] + sums[N + n];
    });
  }
  for (int half = DOT_PAIRS / 2; half; half /= 2)
    for (int p = 0; p < half; ++p)
      for (int n = 0; n < N; ++n) totals[p][n] += totals[p + half][n];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      const int64_t left = columns - c * W;
      float* const to = out + r * out_stride + c * W;
      if (left >= W)
        store(to, totals[0][r * C + c]);
      else
        store_partial(to, totals[0][r * C + c], (int)left);
    }
}

// All rows of X by `columns` rows of W, DOT_COLUMNS at a time; the next ones are prefetched meanwhile. `panel` holds
// dot_panel_size(K) floats.
inline void dot_panels(const float* x, int64_t x_stride, int64_t rows, const float* w, int64_t w_stride,
                       int64_t columns, int64_t K, float* out, int64_t out_stride, float* panel) {
  const int64_t lines = (K + 15) / 16;
  for (int64_t first = 0; first < columns; first += DOT_COLUMNS) {
    const int64_t count = min<int64_t>(DOT_COLUMNS, columns - first);
    const float* const next = w + (first + count) * w_stride;
    fill_dot_panel(w + first * w_stride, w_stride, count, K, panel);
    const auto prefetch = [&](int64_t line) {
      __builtin_prefetch(next + line / lines * w_stride + line % lines * 16, 0, 2);
    };
    by_tiles<DOT_ROWS>(rows, count * lines, prefetch, [&](int64_t row, auto R) {
      const float* const from = x + row * x_stride;
      float* const to = out + row * out_stride + first;
      with_constant<DOT_VECTORS>((count + W - 1) / W, [&](auto C) {
        dot_panel_tile<decltype(R)::value, decltype(C)::value>(from, x_stride, panel, K, count, to, out_stride);
      });
    });
  }
}

}  // namespace
