// A B of float32 A (rows, K) and B (K, columns) for the many rows of a training step, into float32.
//
//     panel    4 vectors of columns of B by 128 elements, copied or transposed:  | k = 0 of the columns | k = 1 ... |
//     tile     6 rows of A by a panel: 24 vectors of sums in registers; a step broadcasts an element of each row
//
// So much with AVX-512; half the columns without. Either matrix may be the transpose of what is in memory. A panel
// stays in the first-level cache while the rows of A come from the second. A tile prefetches what it will write, the
// next tile's rows and a part of the next panel. These prefetches are spread over the products, a few lines at a time,
// as a core has few places for lines on their way.
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

constexpr int64_t LINE = 16;      // floats of a cache line
constexpr int64_t GEMM_STEP = 4;  // of k; some prefetches precede the products of each step

// The cache lines of the next panel's part of B, prefetched one after the other.
struct NextPanel {
  const float* at;
  int64_t lines_of_row, stride, left, line = 0;  // a row in memory: of B, or a column of it

  NextPanel(const GemmMatrix& b, int64_t columns, int64_t K)
      : at(b.data),
        lines_of_row(((b.stride == 1 ? columns : K) + LINE - 1) / LINE),
        stride(b.stride == 1 ? b.k_stride : b.stride),
        left(lines_of_row * (b.stride == 1 ? K : columns)) {}

  INLINE void prefetch() {
    if (!left) return;
    __builtin_prefetch(at + line * LINE, 0, 2);
    --left;
    if (++line == lines_of_row) {
      line = 0;
      at += stride;
    }
  }
};

// R rows of A by C vectors of a panel, added to the sums in `out` unless they are the first. Before each
// GEMM_STEP of k, `next_lines` of the next panel are prefetched.
template <int R, int C>
INLINE void gemm_tile(const GemmMatrix& a, const float* panel, int64_t K, bool is_first, float* out, int64_t out_stride,
                      NextPanel& next, int64_t next_lines) {
  f32 sums[R * C] = {};
  const float* x = a.data;
  const auto multiply = [&](const float* panel) __attribute__((always_inline)) {
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
    x += a.k_stride;
  };
  int64_t k = 0;
  for (; k + GEMM_STEP <= K; k += GEMM_STEP) {
    if (k < R * C)
      for (int64_t n = k; n < k + GEMM_STEP; ++n) __builtin_prefetch(out + n / C * out_stride + n % C * W, 1, 3);
    if (a.k_stride != 1) {
      for (int64_t n = 0; n < GEMM_STEP; ++n) __builtin_prefetch(x + n * a.k_stride + LINE, 0, 3);
    } else if (k % LINE < GEMM_ROWS / 2 * GEMM_STEP) {  // a line of each row, two rows a step
      const float* const row = x + (GEMM_ROWS + k % LINE / GEMM_STEP * 2) * a.stride;
      __builtin_prefetch(row, 0, 3);
      __builtin_prefetch(row + a.stride, 0, 3);
    }
    for (int64_t n = 0; n < next_lines; ++n) next.prefetch();
    unrolled<GEMM_STEP>([&](auto i) __attribute__((always_inline)) { multiply(panel + i.value * GEMM_COLUMNS); });
    panel += GEMM_STEP * GEMM_COLUMNS;
  }
  for (; k < K; ++k, panel += GEMM_COLUMNS) multiply(panel);
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

// `rows` of A by `columns` <= GEMM_COLUMNS columns of B, or with `adds` added to `out`. Of B there are `columns_after`
// more, of which the panel that follows is made.
inline void gemm_columns(const GemmMatrix& a, int64_t rows, const GemmMatrix& b, int64_t columns, int64_t columns_after,
                         int64_t K, bool adds, float* out, int64_t out_stride) {
  alignas(64) float panel[GEMM_K * GEMM_COLUMNS];
  alignas(64) float part[GEMM_ROWS * GEMM_COLUMNS];  // of columns that end within a vector
  const int64_t vectors = (columns + W - 1) / W;
  const bool is_full = columns % W == 0;
  for (int64_t k = 0; k == 0 || k < K; k += GEMM_K) {
    const int64_t count = min(GEMM_K, K - k), left = K - k - count;
    fill_panel({b.data + k * b.k_stride, b.stride, b.k_stride}, columns, count, panel);
    NextPanel next =
        left ? NextPanel({b.data + (k + count) * b.k_stride, b.stride, b.k_stride}, columns, min(GEMM_K, left))
             : NextPanel({b.data + columns * b.stride, b.stride, b.k_stride}, min<int64_t>(GEMM_COLUMNS, columns_after),
                         min(GEMM_K, K));
    const int64_t steps = max<int64_t>(1, (rows + GEMM_ROWS - 1) / GEMM_ROWS * (count / GEMM_STEP));
    const int64_t next_lines = (next.left + steps - 1) / steps;
    const bool is_first = k == 0 && !adds;
    by_tiles<GEMM_ROWS>(rows, [&](int64_t row, auto R) {
      constexpr int n = decltype(R)::value;
      const GemmMatrix from = {a.data + row * a.stride + k * a.k_stride, a.stride, a.k_stride};
      float* const to = out + row * out_stride;
      for (int r = 0; r < n && !is_first && !is_full; ++r)
        memcpy(part + r * GEMM_COLUMNS, to + r * out_stride, 4 * columns);
      with_constant<GEMM_VECTORS>(vectors, [&](auto C) {
        gemm_tile<n, decltype(C)::value>(from, panel, count, is_first, is_full ? to : part,
                                         is_full ? out_stride : GEMM_COLUMNS, next, next_lines);
      });
      for (int r = 0; r < n && !is_full; ++r) memcpy(to + r * out_stride, part + r * GEMM_COLUMNS, 4 * columns);
    });
  }
}

}  // namespace
