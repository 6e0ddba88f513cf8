// X W' of bfloat16 X (rows, D) and W (columns, D) into float32: exact products, float32 sums, no packing.
//
//     x row 0   | 32 elements | 32 elements | ...  |     a step multiplies 32 elements of x with 32 of w, in pairs,
//     into w row 0   | 32 elements | 32 elements | ...  |     16 float32 sums: one instruction of AVX512-BF16
//
// A tile of 4 by 4 results loads 8 vectors for 16 such steps. Four rows of W stay in the first-level cache while the
// rows of X, a few hundred kilobytes, come from the second. Every result is the same sum in any tile.
#pragma once
#include "simd.h"

namespace {

typedef float Sums __attribute__((vector_size(64)));
typedef uint32_t Pairs __attribute__((vector_size(64)));

// The instruction in ordinary arithmetic: the tests run the same tiles on machines without it.
struct EmulatedDot {
  static INLINE void step(Sums& sums, const Pairs& a, const Pairs& b) {
    sums += (Sums)(a & 0xffff0000u) * (Sums)(b & 0xffff0000u);
    sums += (Sums)(a << 16) * (Sums)(b << 16);
  }
};

#if defined(__AVX512F__) && defined(__x86_64__)
// In assembly, not by intrinsic: this file is compiled for AVX-512 without its bfloat16 part, which is looked for at
// run time.
struct MachineDot {
  static INLINE void step(Sums& sums, const Pairs& a, const Pairs& b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
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

// One fixed order: lane i is added to lane i + 8, then + 4, + 2, + 1.
INLINE float reduce_dot(const Sums& sums) {
  float lanes[16];
  memcpy(lanes, &sums, sizeof lanes);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <class Dot, int R, int C>
INLINE void bf16_tile(const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t w_stride, float* out,
                      int64_t out_stride, int64_t D) {
  Sums sums[R][C] = {};
  for (int64_t k = 0; k < D; k += 32) {
    Pairs a[R], b[C];
    for (int r = 0; r < R; ++r) load_pairs(a[r], x + r * x_stride + k, D - k);
    for (int c = 0; c < C; ++c) load_pairs(b[c], w + c * w_stride + k, D - k);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) Dot::step(sums[r][c], a[r], b[c]);
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r * out_stride + c] = reduce_dot(sums[r][c]);
}

// Columns [begin, end) of the product.
template <class Dot>
INLINE void bf16_columns(const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t w_stride, float* out,
                         int64_t out_stride, int64_t rows, int64_t begin, int64_t end, int64_t D) {
  int64_t c = begin;
  for (; c + 4 <= end; c += 4) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
      bf16_tile<Dot, 4, 4>(x + r * x_stride, x_stride, w + c * w_stride, w_stride, out + r * out_stride + c, out_stride,
                           D);
    for (; r < rows; ++r)
      bf16_tile<Dot, 1, 4>(x + r * x_stride, x_stride, w + c * w_stride, w_stride, out + r * out_stride + c, out_stride,
                           D);
  }
  for (; c < end; ++c)
    for (int64_t r = 0; r < rows; ++r)
      bf16_tile<Dot, 1, 1>(x + r * x_stride, x_stride, w + c * w_stride, w_stride, out + r * out_stride + c, out_stride,
                           D);
}

}  // namespace
