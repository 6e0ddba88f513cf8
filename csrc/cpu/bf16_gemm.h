// X W' of bfloat16 X (rows, D) and W (columns, D) into float32, for the many rows of a training step.
//
//     panel    64 rows of W by 256 elements, transposed by pairs:  | pair 0 of rows 0 ... 63 | pair 1 ... | ...
//     tile     6 rows of X by a panel: 24 vectors of sums in registers; a step broadcasts a pair of each row of X and
//              multiplies it with the pairs of 16 columns, one instruction of AVX512-BF16
//
// A panel, 32 KiB, stays in the first-level cache while all rows of X come from the second. Meanwhile the next panel's
// elements are prefetched, evenly over the tiles. Between two panels of a column the sums are in `out`. Every result is
// one chain of sums over the pairs in their order, the same in any tile.
//
// Floor: 2 rows columns D operations, 64 an instruction.
#pragma once
#include "bf16_product.h"

namespace {

constexpr int PANEL_COLUMNS = 64, PANEL_PAIRS = 128, BF16_ROWS = 6, COLUMN_VECTORS = PANEL_COLUMNS / 16;

// panel[pair][column] of `columns` rows of W by `elements` of them; what is missing is 0.
inline void pack_panel(const uint16_t* w, int64_t w_stride, int64_t columns, int64_t elements, uint32_t* panel) {
  for (int64_t c = 0; c < PANEL_COLUMNS; c += 16)
    for (int64_t k = 0; k < elements; k += 32) {
      Pairs rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        rows[i] = Pairs{};
        if (c + i < columns) load_pairs(rows[i], w + (c + i) * w_stride + k, elements - k);
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) memcpy(panel + (k / 2 + i) * PANEL_COLUMNS + c, &rows[i], sizeof rows[i]);
    }
}

// R rows of X by a panel, added to the sums in `out` unless they are the first.
template <class Dot, int R>
INLINE void bf16_gemm_tile(const uint16_t* x, int64_t x_stride, const uint32_t* panel, int64_t elements, bool is_first,
                           float* out, int64_t out_stride) {
  constexpr int C = COLUMN_VECTORS;
  Sums sums[R * C] = {};
  if (!is_first)
    unrolled<R * C>([&](auto i) __attribute__((always_inline)) {
      constexpr int n = decltype(i)::value;
      memcpy(&sums[n], out + n / C * out_stride + n % C * 16, sizeof sums[n]);
    });
  const auto step = [&](auto load_pair) __attribute__((always_inline)) {
    Pairs b[C];
    unrolled<C>([&](auto c) __attribute__((always_inline)) {
      constexpr int n = decltype(c)::value;
      memcpy(&b[n], panel + 16 * n, sizeof b[n]);
    });
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      constexpr int row = decltype(r)::value;
      const Pairs a = Pairs{} + load_pair(x + row * x_stride);
      unrolled<C>([&](auto c) __attribute__((always_inline)) {
        constexpr int n = decltype(c)::value;
        Dot::step(sums[row * C + n], a, b[n]);
      });
    });
    panel += PANEL_COLUMNS;
    x += 2;
  };
  for (int64_t k = 0; k + 2 <= elements; k += 2)
    step([](const uint16_t* p) __attribute__((always_inline)) {
      uint32_t pair;
      memcpy(&pair, p, sizeof pair);
      return pair;
    });
  if (elements % 2) step([](const uint16_t* p) __attribute__((always_inline)) { return (uint32_t)*p; });
  unrolled<R * C>([&](auto i) __attribute__((always_inline)) {
    constexpr int n = decltype(i)::value;
    memcpy(out + n / C * out_stride + n % C * 16, &sums[n], sizeof sums[n]);
  });
}

// `columns` <= 64 columns of the product. `after` of the rows of W behind them are prefetched.
template <class Dot>
inline void bf16_gemm_columns(const uint16_t* x, int64_t x_stride, int64_t rows, const uint16_t* w, int64_t w_stride,
                              int64_t columns, int64_t after, int64_t D, float* out, int64_t out_stride) {
  alignas(64) uint32_t panel[PANEL_PAIRS * PANEL_COLUMNS];
  alignas(64) float part[BF16_ROWS * PANEL_COLUMNS];  // of a panel that has fewer columns
  const bool is_full = columns == PANEL_COLUMNS;
  for (int64_t k = 0; k == 0 || k < D; k += 2 * PANEL_PAIRS) {
    const int64_t elements = min<int64_t>(2 * PANEL_PAIRS, D - k);
    pack_panel(w + k, w_stride, columns, elements, panel);
    const bool is_last = k + elements >= D;
    const uint16_t* const next = is_last ? w + columns * w_stride : w + k + elements;
    const int64_t next_rows = is_last ? after : columns;
    const int64_t lines = (min<int64_t>(2 * PANEL_PAIRS, is_last ? D : D - k - elements) + 31) / 32;
    const auto prefetch = [&](int64_t line) {
      __builtin_prefetch(next + line / lines * w_stride + line % lines * 32, 0, 2);
    };
    by_tiles<BF16_ROWS>(rows, next_rows * lines, prefetch, [&](int64_t row, auto R) {
      constexpr int n = decltype(R)::value;
      float* const to = out + row * out_stride;
      for (int r = 0; r < n && k && !is_full; ++r) memcpy(part + r * PANEL_COLUMNS, to + r * out_stride, 4 * columns);
      bf16_gemm_tile<Dot, n>(x + row * x_stride + k, x_stride, panel, elements, k == 0, is_full ? to : part,
                             is_full ? out_stride : PANEL_COLUMNS);
      for (int r = 0; r < n && !is_full; ++r) memcpy(to + r * out_stride, part + r * PANEL_COLUMNS, 4 * columns);
    });
  }
}

}  // namespace
