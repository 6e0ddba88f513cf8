// X W' for the few rows of a decoding step: float32 X (rows, in), W float32 or bfloat16 as (out, in), torch's Linear,
// or (in, out), GPT-2's Conv1D, into float32. W is neither packed nor copied, so an optimizer's step is seen at once.
//
//     W (out, in):   dot_tile, R rows of X by 4 rows of W: lane l sums the elements l, l + W, ... of both, then the
//                    lanes are added by halves
//                    dot_gemm.h sums the same for many rows
//     W (in, out):   outer_tile, R rows of X by 2 vectors of columns: lane l sums the `in` products of its column
//                    f32_gemm.h sums the same for many rows
//
// Rows of W pass through the first-level cache once: a panel of them meets all rows of X, which stay in the second
// level. bfloat16 is converted once a panel.
//
// Every result is a chain of fused multiply-adds in a fixed order, or the sum of chains of CHAIN_K in theirs, so a
// token's numbers do not depend on the tile, on the other rows or on the threads.
//
// Floor: W once from memory; beyond some 12 rows, the 2 rows out in operations at two vectors a cycle.
#pragma once
#include "dot_gemm.h"

namespace {

// A linear layer as the module holds it. rlhf_fast/rollout/compiled_step.py has the same structure.
struct Matrix {
  const void* weight;
  const void* bias;  // (out_features,) of the weight's dtype, or null
  int64_t out_features, in_features, stride;
  int32_t is_bf16, transposed;  // transposed: weight is (in, out)
};

// The reduce_sum of four vectors.
typedef float f32x4 __attribute__((vector_size(16)));
INLINE f32x4 sum_four(f32 a, f32 b, f32 c, f32 d) {
#if defined(__SSE2__)
  constexpr int parts = W / 4;
  const f32 all[4] = {a, b, c, d};
  f32x4 s[4];
  for (int i = 0; i < 4; ++i) {
    f32x4 part[parts];
    memcpy(part, &all[i], sizeof part);
    for (int half = parts / 2; half; half /= 2)
      for (int j = 0; j < half; ++j) part[j] += part[j + half];
    s[i] = part[0];
  }
  const __m128 ab = (__m128)_mm_unpacklo_ps((__m128)s[0], (__m128)s[1]),
               AB = _mm_unpackhi_ps((__m128)s[0], (__m128)s[1]);
  const __m128 cd = (__m128)_mm_unpacklo_ps((__m128)s[2], (__m128)s[3]),
               CD = _mm_unpackhi_ps((__m128)s[2], (__m128)s[3]);
  const __m128 first = _mm_add_ps(ab, AB), second = _mm_add_ps(cd, CD);
  return (f32x4)_mm_add_ps(_mm_movelh_ps(first, second), _mm_movehl_ps(second, first));
#else
  return f32x4{reduce_sum(a), reduce_sum(b), reduce_sum(c), reduce_sum(d)};
#endif
}

constexpr int TILE_ROWS = W == 16 ? 6 : 3;  // rows of X in a tile: by 4 columns, their sums fill the registers
constexpr int PANEL_SIZE = 24 * 1024;       // floats, for rows of W converted to float32

// R rows of X by C (4, 8 or 1) rows of W. Meanwhile PREFETCH rows of W from `next` on are prefetched.
template <int R, int C, int PREFETCH, class T>
INLINE void dot_tile(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t K, float* out,
                     int64_t out_stride, const T* next) {
  f32 sums[R][C] = {};
  int64_t k = 0;
  for (; k + W <= K; k += W) {
    if (PREFETCH && k % (int64_t)(64 / sizeof(T)) == 0)
      for (int c = 0; c < PREFETCH; ++c) __builtin_prefetch(next + c * w_stride + k, 0, 2);
    f32 a[R];
    for (int r = 0; r < R; ++r) a[r] = load(x + r * x_stride + k);
    for (int c = 0; c < C; ++c) {
      const f32 b = load(w + c * w_stride + k);
      for (int r = 0; r < R; ++r) sums[r][c] = fma(a[r], b, sums[r][c]);
    }
  }
  if (k < K) {
    f32 a[R];
    for (int r = 0; r < R; ++r) a[r] = load_partial(x + r * x_stride + k, (int)(K - k), 0.f);
    for (int c = 0; c < C; ++c) {
      const f32 b = load_partial(w + c * w_stride + k, (int)(K - k), 0.f);
      for (int r = 0; r < R; ++r) sums[r][c] = fma(a[r], b, sums[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    if (C == 1) out[r * out_stride] = reduce_sum(sums[r][0]);
    for (int c = 0; c + 4 <= C; c += 4) {
      const f32x4 four = sum_four(sums[r][c], sums[r][c + 1], sums[r][c + 2], sums[r][c + 3]);
      memcpy(out + r * out_stride + c, &four, sizeof four);
    }
  }
}

// All rows of X by `columns` rows of W. With PREFETCHES, each four rows of W are prefetched while the four before are
// multiplied: evenly over the tiles, as a core can wait for a few cache lines at a time.
template <bool PREFETCHES, class T>
INLINE void dot_columns(const float* x, int64_t x_stride, int64_t rows, const T* w, int64_t w_stride, int64_t columns,
                        int64_t K, float* out, int64_t out_stride) {
  int64_t c = 0;
  if (rows == 1)
    for (; c + 8 <= columns; c += 8) {
      const T* const rows_of_w = w + c * w_stride;
      dot_tile<1, 8, PREFETCHES ? 8 : 0>(x, 0, rows_of_w, w_stride, K, out + c, 0, rows_of_w + 16 * w_stride);
    }
  for (; c + 4 <= columns; c += 4) {
    const T *const rows_of_w = w + c * w_stride, *next = rows_of_w + 4 * w_stride;
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    int64_t left = PREFETCHES ? 4 : 0, r = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t share = left ? (left + tiles - t - 1) / (tiles - t) : 0;  // rows to prefetch during this tile
      const int64_t n = min<int64_t>(TILE_ROWS, rows - r);
      const float* const from = x + r * x_stride;
      float* const to = out + c + r * out_stride;
      const auto tile = [&](auto R) {
        constexpr int count = decltype(R)::value;
        if (share == 0)
          dot_tile<count, 4, 0>(from, x_stride, rows_of_w, w_stride, K, to, out_stride, next);
        else if (share == 1)
          dot_tile<count, 4, 1>(from, x_stride, rows_of_w, w_stride, K, to, out_stride, next);
        else
          dot_tile<count, 4, 4>(from, x_stride, rows_of_w, w_stride, K, to, out_stride, next);
      };
      with_constant<TILE_ROWS>(n, tile);
      const int64_t done = share > 1 ? 4 : share;
      left = max<int64_t>(0, left - done);
      next += done * w_stride;
      r += n;
    }
  }
  for (; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r)
      dot_tile<1, 1, 0>(x + r * x_stride, x_stride, w + c * w_stride, w_stride, K, out + r * out_stride + c, 0, w);
}

// R rows of X by C vectors of columns of W (in, out), of which `columns` exist, added to `out` unless they are the
// first.
template <int R, int C, class T>
INLINE void outer_chain(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t columns, int64_t K,
                        bool is_first, float* out, int64_t out_stride) {
  f32 sums[R * C] = {};
  const bool is_full = columns >= C * W;
  for (int64_t k = 0; k < K; ++k) {
    const T* const row = w + k * w_stride;
    __builtin_prefetch(row + 8 * w_stride, 0, 2);
    f32 b[C];
    unrolled<C>([&](auto c) __attribute__((always_inline)) {
      const int64_t left = columns - c.value * W;
      b[c.value] = is_full || left >= W ? load(row + c.value * W)
                   : left > 0           ? load_partial(row + c.value * W, (int)left, 0.f)
                                        : splat(0.f);
    });
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      constexpr int first = decltype(r)::value * C;
      const f32 a = splat(x[r.value * x_stride + k]);
      unrolled<C>([&](auto c) __attribute__((always_inline)) {
        constexpr int n = first + decltype(c)::value;
        sums[n] = fma(a, b[decltype(c)::value], sums[n]);
      });
    });
  }
  unrolled<R * C>([&](auto i) __attribute__((always_inline)) {
    constexpr int n = decltype(i)::value;
    const int64_t left = columns - n % C * W;
    float* const to = out + n / C * out_stride + n % C * W;
    if (left >= W)
      store(to, is_first ? sums[n] : load(to) + sums[n]);
    else if (left > 0)
      store_partial(to, is_first ? sums[n] : load_partial(to, (int)left, 0.f) + sums[n], (int)left);
  });
}

// All of K, by chains.
template <int R, int C, class T>
INLINE void outer_tile(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t columns, int64_t K,
                       float* out, int64_t out_stride) {
  for (int64_t k = 0; k == 0 || k < K; k += CHAIN_K)
    outer_chain<R, C>(x + k, x_stride, w + k * w_stride, w_stride, columns, min(CHAIN_K, K - k), k == 0, out,
                      out_stride);
}

template <class T>
INLINE void outer_columns(const float* x, int64_t x_stride, int64_t rows, const T* w, int64_t w_stride, int64_t columns,
                          int64_t K, float* out, int64_t out_stride) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6)
    for (int64_t c = 0; c < columns; c += 2 * W)
      outer_tile<6, 2>(x + r * x_stride, x_stride, w + c, w_stride, columns - c, K, out + r * out_stride + c,
                       out_stride);
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += 8 * W)
      outer_tile<1, 8>(x + r * x_stride, x_stride, w + c, w_stride, columns - c, K, out + r * out_stride + c,
                       out_stride);
}

// Floats of scratch memory that multiply needs for in_features <= K.
INLINE int64_t panel_size(int64_t K) {
  return max(max<int64_t>(PANEL_SIZE, 4 * K), dot_panel_size<FloatLanes>(min(K, DOT_MAX_K)));
}

// X, and X rounded to bfloat16, or null if the product is in float32.
struct Activations {
  const float* x;
  const uint16_t* x_bf16;
  int64_t stride, rows;
};

// Rounds a row of X to bfloat16.
INLINE void round_row(const float* x, int64_t n, uint16_t* y) {
  int64_t k = 0;
  for (; k + W <= n; k += W) store((bf16*)y + k, load(x + k));
  if (k < n) store_partial((bf16*)y + k, load_partial(x + k, (int)(n - k), 0.f), (int)(n - k));
}

// Columns [begin, end) of X W', without the bias; `out` points at column `begin`. `panel` holds panel_size(in)
// floats.
template <class Dot>
INLINE void multiply(const Activations& input, const Matrix& m, int64_t begin, int64_t end, float* out,
                     int64_t out_stride, float* panel) {
  const int64_t columns = end - begin, K = m.in_features;
  if (m.transposed) {
    if (m.is_bf16)
      outer_columns(input.x, input.stride, input.rows, (const bf16*)m.weight + begin, m.stride, columns, K, out,
                    out_stride);
    else
      outer_columns(input.x, input.stride, input.rows, (const float*)m.weight + begin, m.stride, columns, K, out,
                    out_stride);
    return;
  }
  if (!m.is_bf16) {
    const float* const w = (const float*)m.weight + begin * m.stride;
    if (uses_dot_panel<FloatLanes>(input.rows, K))
      return dot_panels<FloatLanes>(input.x, input.stride, input.rows, w, m.stride, columns, K, out, out_stride, panel);
    dot_columns<true>(input.x, input.stride, input.rows, w, m.stride, columns, K, out, out_stride);
    return;
  }
  const bf16* const w = (const bf16*)m.weight + begin * m.stride;
  if (input.x_bf16) {
    if (uses_dot_panel<PairLanes<Dot>>(input.rows, K))
      return dot_panels<PairLanes<Dot>>(input.x_bf16, input.stride, input.rows, &w->bits, m.stride, columns, K, out,
                                        out_stride, panel);
    bf16_columns<Dot>(input.x_bf16, input.stride, &w->bits, m.stride, out, out_stride, input.rows, columns, K);
    return;
  }
  if (input.rows <= TILE_ROWS) {
    dot_columns<true>(input.x, input.stride, input.rows, w, m.stride, columns, K, out, out_stride);
    return;
  }
  const int64_t panel_rows = max<int64_t>(4, PANEL_SIZE / max<int64_t>(K, 1) / 4 * 4);
  for (int64_t c = 0; c < columns; c += panel_rows) {
    const int64_t count = min(panel_rows, columns - c);
    for (int64_t i = 0; i < count; ++i) {
      const bf16* const row = w + (c + i) * m.stride;
      int64_t k = 0;
      for (; k + W <= K; k += W) store(panel + i * K + k, load(row + k));
      for (; k < K; ++k) panel[i * K + k] = to_float(row[k]);
    }
    dot_columns<false>(input.x, input.stride, input.rows, panel, K, count, K, out + c, out_stride);
  }
}

// Adds the bias of columns [begin, begin + n) to a row of results.
INLINE void add_bias(const Matrix& m, int64_t begin, int64_t n, float* row) {
  if (!m.bias) return;
  for (int64_t c = 0; c < n; ++c)
    row[c] += m.is_bf16 ? to_float(((const bf16*)m.bias)[begin + c]) : ((const float*)m.bias)[begin + c];
}

}  // namespace
