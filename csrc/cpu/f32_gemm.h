// A B of float32 A (rows, K) and B (K, columns) for the many rows of a training step, into float32.
//
//     panel    4 vectors of columns of B by 128 elements, copied or transposed:  | k = 0 of the columns | k = 1 ... |
//     tile     6 rows of A by a panel: 24 vectors of sums in registers; a step broadcasts an element of each row
//
// So much with AVX-512; half the columns without. Either matrix may be the transpose of what is in memory. A panel
// stays in the first-level cache while the rows of A come from the second; the next one is prefetched meanwhile.
// The sums of a panel are one chain of fused multiply-adds over its k in their order, and are then added to `out`: the
// same in any tile, and the error grows with 128 + K / 128, where one chain's would grow with K.
//
// Floor: 2 rows columns K operations, two vectors of fused multiply-adds a cycle.
#pragma once
#include "tiles.h"

namespace {

constexpr int GEMM_VECTORS = W == 16 ? 4 : 2, GEMM_COLUMNS = GEMM_VECTORS * W, GEMM_ROWS = 6;
constexpr int64_t GEMM_K = CHAIN_K;

// A matrix with K on one side: element (i, k), of a row of A or a column of B, is at i stride + k k_stride.
struct GemmMatrix {
  const float* data;
  int64_t stride, k_stride;
};

// R rows of A by C vectors of a panel, added to the sums in `out` unless they are the first.
template <int R, int C>
INLINE void gemm_tile(const GemmMatrix& a, const float* panel, int64_t K, bool is_first, float* out,
                      int64_t out_stride) {
  f32 sums[R * C] = {};
  const float* x = a.data;
  for (int64_t k = 0; k < K; ++k) {
    f32 b[C];
    unrolled<C>([&](auto c) __attribute__((always_inline)) { b[c.value] = load(panel + c.value * W); });
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      constexpr int row = decltype(r)::value;
      const f32 y = splat(x[row * a.stride]);
      unrolled<C>([&](auto c) __attribute__((always_inline)) {
        constexpr int n = row * C + decltype(c)::value;
        sums[n] = fma(y, b[c.value], sums[n]);
      });
    });
    panel += GEMM_COLUMNS;
    x += a.k_stride;
  }
  unrolled<R * C>([&](auto i) __attribute__((always_inline)) {
    constexpr int n = decltype(i)::value;
    float* const to = out + n / C * out_stride + n % C * W;
    store(to, is_first ? sums[n] : load(to) + sums[n]);
  });
}

// panel[k][column] of `columns` columns of B by K; what is missing is 0. Either stride of B is 1.
inline void fill_panel(const GemmMatrix& b, int64_t columns, int64_t K, float* panel) {
  if (b.stride == 1) {
    for (int64_t k = 0; k < K; ++k)
      for (int64_t c = 0; c < columns; c += W) {
        const float* const from = b.data + k * b.k_stride + c;
        store(panel + k * GEMM_COLUMNS + c,
              columns - c >= W ? load(from) : load_partial(from, (int)(columns - c), 0.f));
      }
    return;
  }
  for (int64_t c = 0; c < columns; c += W)
    for (int64_t k = 0; k < K; k += W) {
      f32 rows[W];
      unrolled<W>([&](auto i) __attribute__((always_inline)) {
        constexpr int n = decltype(i)::value;
        const float* const from = b.data + (c + n) * b.stride + k;
        rows[n] = c + n >= columns ? f32{} : K - k >= W ? load(from) : load_partial(from, (int)(K - k), 0.f);
      });
      transpose(rows);
      unrolled<W>([&](auto i) __attribute__((always_inline)) {
        store(panel + (k + i.value) * GEMM_COLUMNS + c, rows[i.value]);
      });
    }
}

// Prefetches cache line number `line` of `columns` columns of B by K.
INLINE void prefetch_line(const GemmMatrix& b, int64_t columns, int64_t K, int64_t line) {
  const int64_t lines = ((b.stride == 1 ? columns : K) + 15) / 16;
  const float* const from = b.data + line / lines * (b.stride == 1 ? b.k_stride : b.stride) + line % lines * 16;
  __builtin_prefetch(from, 0, 2);
}

// `rows` of A by `columns` <= GEMM_COLUMNS columns of B, or with `adds` added to `out`.
inline void gemm_columns(const GemmMatrix& a, int64_t rows, const GemmMatrix& b, int64_t columns, int64_t K, bool adds,
                         float* out, int64_t out_stride) {
  alignas(64) float panel[GEMM_K * GEMM_COLUMNS];
  alignas(64) float part[GEMM_ROWS * GEMM_COLUMNS];  // of columns that end within a vector
  const int64_t vectors = (columns + W - 1) / W;
  const bool is_full = columns % W == 0;
  for (int64_t k = 0; k == 0 || k < K; k += GEMM_K) {
    const int64_t count = min(GEMM_K, K - k), next_count = min(GEMM_K, K - k - count);
    fill_panel({b.data + k * b.k_stride, b.stride, b.k_stride}, columns, count, panel);
    const GemmMatrix next = {b.data + (k + count) * b.k_stride, b.stride, b.k_stride};
    const int64_t lines = b.stride == 1 ? next_count * ((columns + 15) / 16) : columns * ((next_count + 15) / 16);
    const bool is_first = k == 0 && !adds;
    const auto prefetch = [&](int64_t line) { prefetch_line(next, columns, next_count, line); };
    by_tiles<GEMM_ROWS>(rows, lines, prefetch, [&](int64_t row, auto R) {
      constexpr int n = decltype(R)::value;
      const GemmMatrix from = {a.data + row * a.stride + k * a.k_stride, a.stride, a.k_stride};
      float* const to = out + row * out_stride;
      for (int r = 0; r < n && !is_first && !is_full; ++r)
        memcpy(part + r * GEMM_COLUMNS, to + r * out_stride, 4 * columns);
      with_constant<GEMM_VECTORS>(vectors, [&](auto C) {
        gemm_tile<n, decltype(C)::value>(from, panel, count, is_first, is_full ? to : part,
                                         is_full ? out_stride : GEMM_COLUMNS);
      });
      for (int r = 0; r < n && !is_full; ++r) memcpy(to + r * out_stride, part + r * GEMM_COLUMNS, 4 * columns);
    });
  }
}

}  // namespace
