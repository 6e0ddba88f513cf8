// X W' of X (rows, K) and W (columns, K) for many rows, in the order of sums of the tiles that add over lanes:
// product.h's dot_tile in float32, bf16_product.h's bf16_tile in bfloat16, where a lane takes a pair of elements.
//
//     those tiles   lane l sums the elements l, l + L, l + 2 L, ... of a row of X and of W; then the lanes are added
//     here          lanes are columns of the result. For a few l at a time, L / CHAINS apart, the chains of sums of
//                   each result are in registers and are added there; the sums of these groups are added in memory
//
// So nothing is added over lanes, which takes those tiles longer than the products where K is small. A panel holds 2
// vectors of columns, transposed: for each group the elements of its chains, then those L further, and so on.
//
// Floor: 2 rows columns K operations, two vectors of multiply-adds a cycle.
#pragma once
#include "bf16_product.h"

namespace {

// A lane multiplies a float, or with PairLanes two bfloat16.
struct FloatLanes {
  using Element = float;
  using Operand = f32;
  using Sum = f32;
  static constexpr int LANES = W, SIZE = 1;                 // elements of a lane
  static constexpr int CHAINS = 2, ROWS = W == 16 ? 6 : 3;  // that a tile has of a result; rows of X in a tile
  static INLINE void load_row(Operand& to, const float* from, int64_t n) {
    to = n >= W ? load(from) : load_partial(from, (int)n, 0.f);
  }
  static INLINE Operand broadcast(const float* x) { return splat(*x); }
  static INLINE void step(Sum& sum, const Operand& a, const Operand& b) { sum = fma(a, b, sum); }
};

template <class Dot>
struct PairLanes {
  using Element = uint16_t;
  using Operand = Pairs;
  using Sum = Sums;
  static constexpr int LANES = 16, SIZE = 2, CHAINS = 4, ROWS = 3;
  static INLINE void load_row(Operand& to, const uint16_t* from, int64_t n) { load_pairs(to, from, n); }
  static INLINE Operand broadcast(const uint16_t* x) {
    uint32_t pair;
    memcpy(&pair, x, sizeof pair);
    return Pairs{} + pair;
  }
  static INLINE void step(Sum& sum, const Operand& a, const Operand& b) { Dot::step(sum, a, b); }
};

constexpr int DOT_VECTORS = 2;
constexpr int64_t DOT_MAX_K = 4096;  // a panel of 512 KiB with AVX-512

template <class Lanes>
constexpr int DOT_COLUMNS = DOT_VECTORS * Lanes::LANES;

// Says whether a panel pays, by measurement: where K is small the lanes' sums of a tile cost more than a panel, and in
// bfloat16 the elements that fill no vector.
template <class Lanes>
INLINE bool uses_dot_panel(int64_t rows, int64_t K) {
  if (Lanes::SIZE == 2) return K <= 384 && rows >= (K % 32 ? 16 : max<int64_t>(32, K / 4));
  return K <= DOT_MAX_K && rows >= (K < 1024 ? max<int64_t>(8, K / 8) : 64);
}
// Numbers of 4 bytes in a panel.
template <class Lanes>
INLINE int64_t dot_panel_size(int64_t K) {
  constexpr int64_t step = Lanes::LANES * Lanes::SIZE;
  return (K + step - 1) / step * Lanes::LANES * DOT_COLUMNS<Lanes>;
}

// Fills the panel of `columns` <= DOT_COLUMNS rows of W; what is missing is 0.
template <class Lanes>
inline void fill_dot_panel(const typename Lanes::Element* w, int64_t w_stride, int64_t columns, int64_t K,
                           float* panel) {
  constexpr int L = Lanes::LANES, CHAINS = Lanes::CHAINS, GROUPS = L / CHAINS, STEP = L * Lanes::SIZE;
  const int64_t steps = (K + STEP - 1) / STEP;
  for (int64_t v = 0; v * L < columns; ++v)
    for (int64_t j = 0; j < steps; ++j) {
      typename Lanes::Operand rows[L];
      unrolled<L>([&](auto i) __attribute__((always_inline)) {
        constexpr int n = decltype(i)::value;
        rows[n] = typename Lanes::Operand{};
        if (v * L + n < columns) Lanes::load_row(rows[n], w + (v * L + n) * w_stride + j * STEP, K - j * STEP);
      });
      transpose(rows);
      unrolled<L>([&](auto i) __attribute__((always_inline)) {
        constexpr int lane = decltype(i)::value;
        memcpy(panel + (((lane % GROUPS * steps + j) * CHAINS + lane / GROUPS) * DOT_VECTORS + v) * L, &rows[lane],
               sizeof rows[lane]);
      });
    }
}

// The first N of 2 HALF N vectors become the sums of all, N apart: each is added to that HALF N later, and so on.
template <int HALF, int N, class Sum>
INLINE void add_halves(Sum* sums) {
  unrolled<HALF * N>([&](auto i) __attribute__((always_inline)) {
    constexpr int n = decltype(i)::value;
    sums[n] += sums[HALF * N + n];
  });
  if constexpr (HALF > 1) add_halves<HALF / 2, N>(sums);
}

// R rows of X by C vectors of a panel.
template <class Lanes, int R, int C>
NOINLINE void dot_panel_tile(const typename Lanes::Element* x, int64_t x_stride, const float* panel, int64_t K,
                             int64_t columns, float* out, int64_t out_stride) {
  using Sum = typename Lanes::Sum;
  constexpr int N = R * C, L = Lanes::LANES, SIZE = Lanes::SIZE, CHAINS = Lanes::CHAINS, GROUPS = L / CHAINS;
  constexpr int STEP = L * SIZE;
  const int64_t whole = K / STEP, rest = K % STEP;
  typename Lanes::Element ends[R * STEP];  // what follows the whole steps, and zeros
  if (rest)
    for (int r = 0; r < R; ++r) {
      typename Lanes::Operand row;
      Lanes::load_row(row, x + r * x_stride + whole * STEP, rest);
      memcpy(ends + r * STEP, &row, sizeof row);
    }
  Sum totals[GROUPS][N];
  for (int p = 0; p < GROUPS; ++p) {
    Sum sums[CHAINS * N] = {};
    const auto step = [&](const typename Lanes::Element* from, int64_t stride) __attribute__((always_inline)) {
      unrolled<CHAINS * R>([&](auto i) __attribute__((always_inline)) {
        constexpr int h = decltype(i)::value / R, row = decltype(i)::value % R;
        const auto y = Lanes::broadcast(from + row * stride + (p + h * GROUPS) * SIZE);
        unrolled<C>([&](auto c) __attribute__((always_inline)) {
          constexpr int column = decltype(c)::value, n = h * N + row * C + column;
          typename Lanes::Operand b;
          memcpy(&b, panel + h * DOT_COLUMNS<Lanes> + column * L, sizeof b);
          Lanes::step(sums[n], y, b);
        });
      });
      panel += CHAINS * DOT_COLUMNS<Lanes>;
    };
    for (int64_t j = 0; j < whole; ++j) step(x + j * STEP, x_stride);
    if (rest) step(ends, STEP);
    add_halves<CHAINS / 2, N>(sums);
    unrolled<N>([&](auto i) __attribute__((always_inline)) {
      constexpr int n = decltype(i)::value;
      totals[p][n] = sums[n];
    });
  }
  for (int half = GROUPS / 2; half; half /= 2)
    for (int p = 0; p < half; ++p)
      for (int n = 0; n < N; ++n) totals[p][n] += totals[p + half][n];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      const int64_t left = columns - c * L;
      float* const to = out + r * out_stride + c * L;
      const Sum& sum = totals[0][r * C + c];
      if (left >= L)
        store(to, sum);
      else if constexpr (L == W)
        store_partial(to, sum, (int)left);
      else
        memcpy(to, &sum, left * sizeof(float));
    }
}

// All rows of X by `columns` rows of W, DOT_COLUMNS at a time; the next ones are prefetched meanwhile. `panel` holds
// dot_panel_size(K) floats.
template <class Lanes>
inline void dot_panels(const typename Lanes::Element* x, int64_t x_stride, int64_t rows,
                       const typename Lanes::Element* w, int64_t w_stride, int64_t columns, int64_t K, float* out,
                       int64_t out_stride, float* panel) {
  constexpr int64_t per_line = 64 / sizeof(typename Lanes::Element);
  const int64_t lines = (K + per_line - 1) / per_line;
  for (int64_t first = 0; first < columns; first += DOT_COLUMNS<Lanes>) {
    const int64_t count = min<int64_t>(DOT_COLUMNS<Lanes>, columns - first);
    const auto* const next = w + (first + count) * w_stride;
    fill_dot_panel<Lanes>(w + first * w_stride, w_stride, count, K, panel);
    const auto prefetch = [&](int64_t line) {
      __builtin_prefetch(next + line / lines * w_stride + line % lines * per_line, 0, 2);
    };
    by_tiles<Lanes::ROWS>(rows, count * lines, prefetch, [&](int64_t row, auto R) {
      const auto* const from = x + row * x_stride;
      float* const to = out + row * out_stride + first;
      with_constant<DOT_VECTORS>((count + Lanes::LANES - 1) / Lanes::LANES, [&](auto C) {
        dot_panel_tile<Lanes, decltype(R)::value, decltype(C)::value>(from, x_stride, panel, K, count, to, out_stride);
      });
    });
  }
}

}  // namespace
