// Register tiles: loops unrolled at compile time, a fused multiply-add, transposes of as many vectors as one has lanes.
#pragma once
#include "intrinsics.h"
#include "simd.h"

namespace {

INLINE f32 fma(f32 a, f32 b, f32 c) {
#if defined(__AVX512F__) && (!defined(SIMD_WIDTH) || SIMD_WIDTH == 16)
  return (f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && (!defined(SIMD_WIDTH) || SIMD_WIDTH == 8)
  return (f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Products that are one chain of fused multiply-adds where a lane has a column: f32_gemm.h and outer_tile of product.h
// add the chains of a longer sum in their order, and so give the same bits.
constexpr int64_t CHAIN_K = 128;

template <int N>
struct Number {
  static constexpr int value = N;
};

// Calls f(Number<0>()) ... f(Number<N - 1>()). An array that is indexed by them alone stays in registers; one that is
// indexed in a loop may not, as compilers unroll after they have chosen.
template <int... I, class F>
INLINE void unrolled(Indices<I...>, [[maybe_unused]] F f) {
  (f(Number<I>()), ...);
}
template <int N, class F>
INLINE void unrolled(F f) {
  unrolled(typename Count<N>::type(), f);
}

// Lane l of the results is lane l of a or lane l - STEP of b, and lane l + STEP of a or lane l of b.
template <int STEP, class V, int... I>
INLINE void exchange_lanes(V& a, V& b, Indices<I...>) {
  constexpr int LANES = sizeof...(I);
  const V old = a;
  a = SHUFFLE(old, b, ((I & STEP) ? LANES + I - STEP : I)...);
  b = SHUFFLE(old, b, ((I & STEP) ? LANES + I : I + STEP)...);
}

// Transposes as many vectors as one has lanes, of 4 bytes each.
template <int STEP = 1, class V>
INLINE void transpose(V* rows) {
  constexpr int LANES = sizeof(V) / 4;
  unrolled<LANES>([&](auto i) __attribute__((always_inline)) {
    constexpr int n = decltype(i)::value;
    if constexpr (!(n & STEP)) exchange_lanes<STEP>(rows[n], rows[n + STEP], typename Count<LANES>::type());
  });
  if constexpr (2 * STEP < LANES) transpose<2 * STEP>(rows);
}

// Calls f(Number<n>()) for the n in 1 ... MAX.
template <int MAX, class F>
INLINE void with_constant(int64_t n, F f) {
  if constexpr (MAX > 1)
    if (n < MAX) return with_constant<MAX - 1>(n, f);
  f(Number<MAX>());
}

// Calls f(row, Number<n>()) for tiles of n <= MAX rows, of which no two differ by more than one row. Before them it
// calls prefetch(line) for the cache lines 0 ... lines - 1, as many before each: a core waits for a few at a time.
template <int MAX, class Prefetch, class F>
INLINE void by_tiles(int64_t rows, int64_t lines, Prefetch prefetch, F f) {
  const int64_t tiles = (rows + MAX - 1) / MAX;
  int64_t line = 0, row = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t n = rows / tiles + (t < rows % tiles);
    for (const int64_t until = lines * (t + 1) / tiles; line < until; ++line) prefetch(line);
    with_constant<MAX>(n, [&](auto R) { f(row, R); });
    row += n;
  }
}

template <int MAX, class F>
INLINE void by_tiles(int64_t rows, F f) {
  by_tiles<MAX>(rows, 0, [](int64_t) {}, f);
}

}  // namespace
