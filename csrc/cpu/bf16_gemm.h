// A B of bfloat16 A (rows, K) and B (K, columns) into float32, for the many rows of a training step.
//
//     panel    64 columns of B by 256 elements, in pairs over K:  | pair 0 of columns 0 ... 63 | pair 1 ... | ...
//     tile     6 rows of A by a panel: 24 vectors of sums in registers; a step broadcasts a pair of each row of A and
//              multiplies it with the pairs of 16 columns, one instruction of AVX512-BF16
//
// A panel is made of rows of B' (columns, K), transposed by pairs, or of rows of B (K, columns), of which two are
// interleaved. A's pairs may be anywhere: side by side in a row of A, or in one of A', of which two are interleaved.
//
// A panel, 32 KiB, stays in the first-level cache while all rows of A come from the second. Meanwhile the next panel's
// elements are prefetched, evenly over the tiles. Between two panels of a column the sums are in `out`. Every result is
// one chain of sums over the pairs in their order, the same in any tile.
//
// Floor: 2 rows columns K operations, 64 an instruction.
#pragma once
#include "bf16_product.h"

namespace {

constexpr int PANEL_COLUMNS = 64, PANEL_PAIRS = 128, BF16_ROWS = 6, COLUMN_VECTORS = PANEL_COLUMNS / 16;

// Rows of A: element k of row r is at data + r stride + k / 2 pair_stride + k % 2.
struct PairRows {
  const uint16_t* data;
  int64_t stride, pair_stride;

  INLINE PairRows from(int64_t row, int64_t k) const {
    return {data + row * stride + k / 2 * pair_stride, stride, pair_stride};
  }
};

// The interleaved elements of two rows, of n or of W, and 0 behind them. `second` may be null: 0.
INLINE u32 interleave(const uint16_t* first, const uint16_t* second, int64_t n) {
  const auto bits = [&](const uint16_t* p) __attribute__((always_inline)) {
    return (u32)(n >= W ? load((const bf16*)p) : load_partial((const bf16*)p, (int)n, 0.f));
  };
  return bits(first) >> 16 | (second ? bits(second) : u32{});
}

// panel[pair][column] of `columns` <= 64 columns of B by `elements` rows; what is missing is 0.
inline void interleave_panel(const uint16_t* b, int64_t b_stride, int64_t columns, int64_t elements, uint32_t* panel) {
  for (int64_t k = 0; k < elements; k += 2)
    for (int64_t c = 0; c < PANEL_COLUMNS; c += W) {
      const uint16_t* const first = b + k * b_stride + c;
      u32 pairs = {};
      if (c < columns) pairs = interleave(first, k + 1 < elements ? first + b_stride : nullptr, columns - c);
      memcpy(panel + k / 2 * PANEL_COLUMNS + c, &pairs, sizeof pairs);
    }
}

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

// R rows of A by C vectors of a panel, added to the sums in `out` unless they are the first.
template <class Dot, int R, int C>
INLINE void bf16_gemm_tile(const PairRows& a, const uint32_t* panel, int64_t elements, bool is_first, float* out,
                           int64_t out_stride) {
  const uint16_t* x = a.data;
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
      const Pairs pair = Pairs{} + load_pair(x + row * a.stride);
      unrolled<C>([&](auto c) __attribute__((always_inline)) {
        constexpr int n = decltype(c)::value;
        Dot::step(sums[row * C + n], pair, b[n]);
      });
    });
    panel += PANEL_COLUMNS;
    x += a.pair_stride;
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

// `rows` of A by a panel of `columns` <= 64 columns. Before tiles, prefetch(line) is called for 0 ... lines - 1.
template <class Dot, class Prefetch>
INLINE void bf16_gemm_panel(const PairRows& a, int64_t rows, const uint32_t* panel, int64_t columns, int64_t elements,
                            bool is_first, float* out, int64_t out_stride, int64_t lines, Prefetch prefetch) {
  alignas(64) float part[BF16_ROWS * PANEL_COLUMNS];  // of a panel whose columns end within a vector
  const bool is_full = columns % 16 == 0;
  by_tiles<BF16_ROWS>(rows, lines, prefetch, [&](int64_t row, auto R) {
    constexpr int n = decltype(R)::value;
    float* const to = out + row * out_stride;
    for (int r = 0; r < n && !is_first && !is_full; ++r)
      memcpy(part + r * PANEL_COLUMNS, to + r * out_stride, 4 * columns);
    with_constant<COLUMN_VECTORS>((columns + 15) / 16, [&](auto C) {
      bf16_gemm_tile<Dot, n, decltype(C)::value>(a.from(row, 0), panel, elements, is_first, is_full ? to : part,
                                                 is_full ? out_stride : PANEL_COLUMNS);
    });
    for (int r = 0; r < n && !is_full; ++r) memcpy(to + r * out_stride, part + r * PANEL_COLUMNS, 4 * columns);
  });
}

// X W' of `columns` <= 64 rows of W. `after` of the rows behind them are prefetched.
template <class Dot>
inline void bf16_gemm_columns(const uint16_t* x, int64_t x_stride, int64_t rows, const uint16_t* w, int64_t w_stride,
                              int64_t columns, int64_t after, int64_t D, float* out, int64_t out_stride) {
  alignas(64) uint32_t panel[PANEL_PAIRS * PANEL_COLUMNS];
  const PairRows a = {x, x_stride, 2};
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
    bf16_gemm_panel<Dot>(a.from(0, k), rows, panel, columns, elements, k == 0, out, out_stride, next_rows * lines,
                         prefetch);
  }
}

// A B of `columns` <= 64 columns of B (K, columns), or with `by_rows` of the matrix B' (columns, K).
template <class Dot>
inline void bf16_gemm_columns(const PairRows& a, int64_t rows, const uint16_t* b, int64_t b_stride, bool by_rows,
                              int64_t columns, int64_t K, float* out, int64_t out_stride) {
  alignas(64) uint32_t panel[PANEL_PAIRS * PANEL_COLUMNS];
  for (int64_t k = 0; k == 0 || k < K; k += 2 * PANEL_PAIRS) {
    const int64_t elements = min<int64_t>(2 * PANEL_PAIRS, K - k);
    if (by_rows)
      pack_panel(b + k, b_stride, columns, elements, panel);
    else
      interleave_panel(b + k * b_stride, b_stride, columns, elements, panel);
    bf16_gemm_panel<Dot>(a.from(0, k), rows, panel, columns, elements, k == 0, out, out_stride, 0, [](int64_t) {});
  }
}

}  // namespace
