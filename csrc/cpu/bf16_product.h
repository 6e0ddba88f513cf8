// X W' of bfloat16 X (rows, D) and W (columns, D) into float32: exact products, float32 sums, no packing.
//
//     x row 0   | 32 elements | 32 elements | ...  |     a step multiplies 32 elements of x with 32 of w, in pairs,
//     into w row 0   | 32 elements | 32 elements | ...  |     16 float32 sums: one instruction of AVX512-BF16
//
// A tile of 3 by 8 results loads 11 vectors for 24 such steps. Eight rows of W stay in the first-level cache while the
// rows of X, a few hundred kilobytes, come from the second; meanwhile the next eight rows of W are prefetched. The sums
// of a tile are added over their lanes together. Every result is the same sum in any tile.
//
// Floor: W once from memory; beyond some 24 rows, the 2 rows columns D operations, 64 an instruction.
#pragma once
#include "tiles.h"

namespace {

typedef float Sums __attribute__((vector_size(64)));
typedef uint32_t Pairs __attribute__((vector_size(64)));

// The instruction in ordinary arithmetic: the tests run the same tiles on machines without it.
struct EmulatedDot {
  static INLINE void step(Sums& sums, const Pairs& a, const Pairs& b) {
    sums += (Sums)(a & 0xffff0000u) * (Sums)(b & 0xffff0000u);
    sums += (Sums)(a << 16) * (Sums)(b << 16);
  }
  static INLINE void round(const Sums& x, uint16_t* y) { store((bf16*)y, x); }
};

#if defined(__AVX512F__) && defined(__x86_64__)
// In assembly, not by intrinsic: this file is compiled for AVX-512 without its bfloat16 part, which is looked for at
// run time.
struct MachineDot {
  static INLINE void step(Sums& sums, const Pairs& a, const Pairs& b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
  }
  // Denormal numbers become 0, as they count in a step.
  static INLINE void round(const Sums& x, uint16_t* y) {
    u16 halves;
    asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(x));
    memcpy(y, &halves, sizeof halves);
  }
};
bool has_bf16_dot() { return __builtin_cpu_supports("avx512bf16"); }
#else
typedef EmulatedDot MachineDot;
bool has_bf16_dot() { return false; }
#endif

INLINE void load_pairs(Pairs& to, const uint16_t* from, int64_t n) {
  if (n >= 32) {
    memcpy(&to, from, sizeof to);
  } else {
    uint16_t part[32] = {};
    memcpy(part, from, n * sizeof(uint16_t));
    memcpy(&to, part, sizeof to);
  }
}

// Lane l of sums[0] becomes the sum of all lanes of sums[l]. One fixed order: lane i is added to lane i + 8, then + 4,
// + 2, + 1.
template <int STEP = 8>
INLINE void reduce_sixteen(Sums* sums) {
  unrolled<STEP>([&](auto i) __attribute__((always_inline)) {
    constexpr int n = decltype(i)::value;
    exchange_lanes<STEP>(sums[n], sums[n + STEP], typename Count<16>::type());
    sums[n] += sums[n + STEP];
  });
  if constexpr (STEP > 1) reduce_sixteen<STEP / 2>(sums);
}

// R rows of X by C rows of W. Meanwhile PREFETCH rows of W from `next` on are prefetched.
template <class Dot, int R, int C, int PREFETCH>
INLINE void bf16_tile(const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t w_stride, float* out,
                      int64_t out_stride, int64_t D, const uint16_t* next) {
  constexpr int PARTS = (R * C + 15) / 16;
  Sums sums[16 * PARTS] = {};
  const auto step = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    unrolled<PREFETCH>([&](auto c)
                           __attribute__((always_inline)) { __builtin_prefetch(next + c.value * w_stride + k, 0, 2); });
    Pairs a[R];
    unrolled<R>([&](auto r) __attribute__((always_inline)) { load_pairs(a[r.value], x + r.value * x_stride + k, n); });
    unrolled<C>([&](auto c) __attribute__((always_inline)) {
      constexpr int column = decltype(c)::value;
      Pairs b;
      load_pairs(b, w + column * w_stride + k, n);
      unrolled<R>([&](auto r) __attribute__((always_inline)) { Dot::step(sums[r.value * C + column], a[r.value], b); });
    });
  };
  int64_t k = 0;
  for (; k + 32 <= D; k += 32) step(k, 32);
  if (k < D) step(k, D - k);
  float results[16 * PARTS];
  unrolled<PARTS>([&](auto i) __attribute__((always_inline)) {
    reduce_sixteen(sums + 16 * i.value);
    memcpy(results + 16 * i.value, &sums[16 * i.value], sizeof(Sums));
  });
  for (int r = 0; r < R; ++r) memcpy(out + r * out_stride, results + r * C, C * sizeof(float));
}

// `rows` of X by 8 rows of W: tiles of nearly one size. The next 8 rows of W are prefetched evenly over the tiles, as a
// core can wait for a few cache lines at a time.
template <class Dot>
INLINE void bf16_eight_columns(const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t w_stride, float* out,
                               int64_t out_stride, int64_t rows, int64_t D) {
  const uint16_t* next = w + 8 * w_stride;
  const int64_t tiles = (rows + 2) / 3;
  for (int64_t t = 0, left = 8; t < tiles; ++t) {
    const int64_t n = rows / tiles + (t < rows % tiles);
    const int64_t share = (left + tiles - t - 1) / (tiles - t);  // rows to prefetch during this tile
    int64_t prefetched = 0;
    const auto tile = [&](auto R, auto PREFETCH) {
      bf16_tile<Dot, decltype(R)::value, 8, decltype(PREFETCH)::value>(x, x_stride, w, w_stride, out, out_stride, D,
                                                                       next);
      prefetched = PREFETCH.value;
    };
    const auto tile_of = [&](auto R) {
      if (share == 0)
        tile(R, Number<0>());
      else if (share <= 2)
        tile(R, Number<2>());
      else if (share <= 4)
        tile(R, Number<4>());
      else
        tile(R, Number<8>());
    };
    if (n == 1) tile_of(Number<1>());
    if (n == 2) tile_of(Number<2>());
    if (n == 3) tile_of(Number<3>());
    left = max<int64_t>(0, left - prefetched);
    next += prefetched * w_stride;
    x += n * x_stride;
    out += n * out_stride;
  }
}

// out = X W' of `columns` rows of W.
template <class Dot>
void bf16_columns(const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t w_stride, float* out,
                  int64_t out_stride, int64_t rows, int64_t columns, int64_t D) {
  int64_t c = 0;
  if (rows == 1)
    for (; c + 16 <= columns; c += 16)
      bf16_tile<Dot, 1, 16, 16>(x, 0, w + c * w_stride, w_stride, out + c, 0, D, w + (c + 16) * w_stride);
  for (; c + 8 <= columns; c += 8)
    bf16_eight_columns<Dot>(x, x_stride, w + c * w_stride, w_stride, out + c, out_stride, rows, D);
  for (; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r)
      bf16_tile<Dot, 1, 1, 0>(x + r * x_stride, 0, w + c * w_stride, 0, out + r * out_stride + c, 0, D, w);
}

}  // namespace
