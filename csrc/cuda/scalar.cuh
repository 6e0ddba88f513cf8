// The operations of dialect.h on float, one token or number a thread. CUDA has min, max, abs, and exp, log and log1p of
// double already.
#pragma once
#include <math.h>
#include <stdint.h>

#include "launch.cuh"

#define INLINE __device__ __forceinline__

namespace {

template <class F>
struct MaskOf {
  using type = bool;
};
template <class F>
using Mask = typename MaskOf<F>::type;

template <class F>
INLINE F splat(float x) {
  return x;
}
INLINE float select(bool mask, float yes, float no) { return mask ? yes : no; }
INLINE float clamp(float x, float low, float high) { return select(x < low, low, select(x > high, high, x)); }
INLINE float reciprocal(float x) { return __fdividef(1.f, x); }
INLINE float clear_low_bits(float x, unsigned bits) { return __uint_as_float(__float_as_uint(x) & ~bits); }

}  // namespace
