// The operations of csrc/dialect.h for one float; csrc/cpu/simd.h has them for a vector.
//
// CUDA and math.h provide min, max, abs, exp, log and log1p themselves.
#pragma once
#include <math.h>
#include <stdlib.h>

#include "launch.cuh"

#define INLINE __device__ __forceinline__

namespace {

template <class F>
using Mask = bool;

template <class F>
INLINE F splat(float x) {
  return x;
}
INLINE float select(bool mask, float yes, float no) { return mask ? yes : no; }
INLINE float clamp(float x, float low, float high) {
  if (x < low) return low;
  return x > high ? high : x;
}
INLINE float reciprocal(float x) { return __fdividef(1.f, x); }
INLINE float clear_low_bits(float x, unsigned bits) { return __uint_as_float(__float_as_uint(x) & ~bits); }

}  // namespace
