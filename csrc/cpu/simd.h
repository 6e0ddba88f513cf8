// Vectors of float32 for the CPU kernels: W floats in the compiler's own vector types, so that one source serves SSE2,
// NEON, AVX2 and AVX-512. It is compiled once per instruction set; everything is in an anonymous namespace (kernel.h
// says why).
//
//     load_partial(p, 3, fill), W = 8:    | p[0] | p[1] | p[2] | fill | fill | fill | fill | fill |   one a lane
//
// reduce_sum adds lane i to lane i + W/2, then + W/4, ..., + 1: one fixed order, so results repeat bit for bit.
#pragma once
#include <float.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) && !defined(SIMD_WIDTH)
#include "intrinsics.h"
#endif

#include "kernel.h"

namespace {

#if defined(SIMD_WIDTH)
constexpr int W = SIMD_WIDTH;
#elif defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float f32 __attribute__((vector_size(W * 4)));
typedef int32_t i32 __attribute__((vector_size(W * 4)));
typedef uint32_t u32 __attribute__((vector_size(W * 4)));
typedef uint16_t u16 __attribute__((vector_size(W * 2)));

#define INLINE __attribute__((always_inline)) inline
#define NOINLINE __attribute__((noinline))  // for what loses its registers in a large function

// Vector of the lanes of a and b with the given numbers; b's follow a's.
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype((a) < (b)){__VA_ARGS__})
#endif

template <class T>
INLINE T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
INLINE T max(T a, T b) {
  return a < b ? b : a;
}

INLINE f32 splat(float x) { return x - f32{}; }  // x + 0 would take an instruction, as it makes 0 of -0
template <class F>
INLINE F splat(float x) {
  return x - F{};
}
INLINE i32 as_int(f32 x) { return (i32)x; }
INLINE f32 as_float(i32 x) { return (f32)x; }
INLINE f32 select(i32 mask, f32 yes, f32 no) { return mask ? yes : no; }
INLINE f32 zero_unless(i32 mask, f32 x) { return as_float(as_int(x) & mask); }  // 0 even if x is NaN

// A bfloat16 in memory.
struct bf16 {
  uint16_t bits;
};

// Vectors of N floats, or of numbers of 32 and 16 bits; of W by default.
template <int N>
struct Vectors {
  typedef float f32 __attribute__((vector_size(N * 4)));
  typedef uint32_t u32 __attribute__((vector_size(N * 4)));
  typedef uint16_t u16 __attribute__((vector_size(N * 2)));
};

// Conversions of W numbers have an instruction that GCC 12 does not find.
template <int N>
INLINE typename Vectors<N>::u32 widen(typename Vectors<N>::u16 v) {
  return __builtin_convertvector(v, typename Vectors<N>::u32);
}
template <int N>
INLINE typename Vectors<N>::u16 narrow(typename Vectors<N>::u32 v) {
  return __builtin_convertvector(v, typename Vectors<N>::u16);
}
#if defined(__AVX512F__) && !defined(SIMD_WIDTH)
template <>
INLINE u32 widen<W>(u16 v) {
  return (u32)_mm512_cvtepu16_epi32((__m256i)v);
}
template <>
INLINE u16 narrow<W>(u32 v) {
  return (u16)_mm512_cvtepi32_epi16((__m512i)v);
}
#elif defined(__AVX2__) && !defined(SIMD_WIDTH)
template <>
INLINE u32 widen<W>(u16 v) {
  return (u32)_mm256_cvtepu16_epi32((__m128i)v);
}
#endif

template <int N = W>
INLINE typename Vectors<N>::f32 load(const float* p) {
  typename Vectors<N>::f32 v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <int N = W>
INLINE typename Vectors<N>::f32 load(const bf16* p) {
  typename Vectors<N>::u16 v;
  memcpy(&v, p, sizeof v);
  return (typename Vectors<N>::f32)(widen<N>(v) << 16);
}
template <class F>
INLINE void store(float* p, F v) {
  memcpy(p, &v, sizeof v);
}

// Round to nearest even, as torch does; a NaN stays a NaN.
template <class F, int N = sizeof(F) / 4>
INLINE typename Vectors<N>::u16 round_to_bf16(F v) {
  typedef typename Vectors<N>::u32 Bits;
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet = (bits >> 16) | 0x40u;
  return narrow<N>((v != v) ? quiet : rounded);
}
template <class F>
INLINE void store(bf16* p, F v) {
  const auto bits = round_to_bf16(v);
  memcpy(p, &bits, sizeof bits);
}

template <int... I>
INLINE i32 lane_numbers(Indices<I...>) {
  return i32{I...};
}

// load_partial returns the first n <= W elements at p, and `fill` in the other lanes; store_partial stores the first n.
#if defined(__AVX512F__) && !defined(SIMD_WIDTH)
INLINE f32 load_partial(const float* p, int n, float fill) {
  return (f32)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), (__mmask16)((1u << n) - 1), p);
}
INLINE f32 load_partial(const bf16* p, int n, float fill) {
  const u16 v = (u16)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
  const f32 x = (f32)(widen<W>(v) << 16);
  return select(lane_numbers(typename Count<W>::type()) < n, x, splat(fill));
}
INLINE void store_partial(float* p, f32 v, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v); }
INLINE void store_partial(bf16* p, f32 v, int n) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)round_to_bf16(v));
}
#else
// Copies n < W elements in pieces of powers of two: a memcpy of n elements would be a call.
template <int SIZE = W / 2, class T>
INLINE void copy_few(T* to, const T* from, int n) {
  if (n & SIZE) {
    memcpy(to, from, SIZE * sizeof(T));
    to += SIZE;
    from += SIZE;
  }
  if constexpr (SIZE > 1) copy_few<SIZE / 2>(to, from, n);
}
template <class T>
INLINE f32 load_partial(const T* p, int n, float fill) {
  if (n == W) return load(p);
  T part[W] = {};
  copy_few(part, p, n);
  return select(lane_numbers(typename Count<W>::type()) < n, load(part), splat(fill));
}
template <class T>
INLINE void store_partial(T* p, f32 v, int n) {
  if (n == W) return store(p, v);
  T part[W];
  store(part, v);
  copy_few(p, part, n);
}
#endif

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// The result is b where one of them is a NaN or both are 0.
#if defined(__AVX512F__) && !defined(SIMD_WIDTH)  // beside another comparison with a, GCC makes two instructions of one
INLINE f32 max(f32 a, f32 b) { return (f32)_mm512_maskz_max_ps((__mmask16)-1, (__m512)a, (__m512)b); }
INLINE f32 min(f32 a, f32 b) { return (f32)_mm512_maskz_min_ps((__mmask16)-1, (__m512)a, (__m512)b); }
#else
INLINE f32 max(f32 a, f32 b) { return a > b ? a : b; }
INLINE f32 min(f32 a, f32 b) { return a < b ? a : b; }
#endif
INLINE f32 abs(f32 x) { return as_float(as_int(x) & 0x7fffffff); }

// Lane i of the result is lane (i + D) % W of x.
template <int D, int... I>
INLINE f32 rotate_lanes(f32 x, Indices<I...>) {
  return SHUFFLE(x, x, ((I + D) % W)...);
}

template <int D = W / 2>
INLINE float reduce_sum(f32 v) {
  v = v + rotate_lanes<D>(v, typename Count<W>::type());
  if constexpr (D > 1) return reduce_sum<D / 2>(v);
  return v[0];
}
template <int D = W / 2>
INLINE float reduce_max(f32 v) {
  v = max(rotate_lanes<D>(v, typename Count<W>::type()), v);
  if constexpr (D > 1) return reduce_max<D / 2>(v);
  return v[0];
}

// Sums of vectors in float64: lane i adds lanes i and i + W / 2.
struct DoubleSums {
  typedef float Half __attribute__((vector_size(W * 2)));
  typedef double Lanes __attribute__((vector_size(W * 4)));
  Lanes lanes = {};

  INLINE void add(f32 v) {
    Half halves[2];
    memcpy(halves, &v, sizeof v);
    lanes += __builtin_convertvector(halves[0], Lanes) + __builtin_convertvector(halves[1], Lanes);
  }
  INLINE void add_square(f32 v) {
    Half halves[2];
    memcpy(halves, &v, sizeof v);
    for (int i = 0; i < 2; ++i) {
      const Lanes x = __builtin_convertvector(halves[i], Lanes);
      lanes += x * x;
    }
  }
  INLINE double total() const {
    double sums[W / 2];
    memcpy(sums, &lanes, sizeof lanes);
    for (int half = W / 4; half; half /= 2)
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    return sums[0];
  }
};

// The rest of dialect.h's operations.
template <class F>
struct MaskOf {
  using type = i32;
};
template <class F>
using Mask = typename MaskOf<F>::type;

INLINE f32 clamp(f32 x, f32 low, f32 high) { return select(x < low, low, select(x > high, high, x)); }
INLINE f32 reciprocal(f32 x) { return 1.f / x; }
INLINE f32 clear_low_bits(f32 x, int32_t bits) { return as_float(as_int(x) & ~bits); }
INLINE double exp(double x) { return __builtin_exp(x); }
INLINE double log(double x) { return __builtin_log(x); }
INLINE double log1p(double x) { return __builtin_log1p(x); }

constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer

// e^x within 1.2 ulp; 0 below -87.3 (no denormals), inf above 88.7, NaN for NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2; e^r by a minimax polynomial (Cephes' coefficients), scaled by 2^n.
INLINE f32 exp(f32 x) {
  const f32 clamped = min(splat(88.72283f), max(splat(-87.33654f), x));  // a NaN stays a NaN
  const f32 shifted = clamped * 1.44269504088896341f + ROUND;
  const f32 n = shifted - ROUND;
  const f32 r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  f32 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
#if defined(__AVX512F__) && !defined(SIMD_WIDTH)
  f32 y = (f32)_mm512_maskz_scalef_ps((__mmask16)-1, (__m512)p, (__m512)n);
#else
  // 2^n as two factors: 2^128 would overflow before the product does.
  const i32 exponent = as_int(shifted) - as_int(splat(ROUND)), half = exponent >> 1;
  f32 y = p * as_float((half + 127) << 23) * as_float((exponent - half + 127) << 23);
#endif
  y = select(x < splat(-87.33654f), splat(0.f), y);
  return select(x > splat(88.72283f), splat(__builtin_inff()), y);
}

constexpr float MIN_EXPONENT = -87.f;  // e^-87 is 1.6e-38: it adds nothing to the 1 of the largest logit
constexpr double LOG2_E = 1.44269504088896340736;

// 2^n 2^f by a minimax polynomial; `shifted` is n + ROUND.
INLINE f32 power_of_two(f32 shifted, f32 f) {
  f32 p = splat(1.535336159e-04f);
  p = p * f + 1.339887452e-03f;
  p = p * f + 9.618437360e-03f;
  p = p * f + 5.550332471e-02f;
  p = p * f + 2.402264791e-01f;
  p = p * f + 6.931472029e-01f;
  p = p * f + 1.f;
  return p * (f32)(((u32)shifted << 23) + 0x3f800000u);  // unsigned: the sum wraps
}

// e^x for MIN_EXPONENT <= x <= 0, in half the time of exp. Within 1 ulp near 0; below, the absolute error, which
// matters in a sum with the 1 of the largest logit, is no larger.
INLINE f32 fast_exp(f32 x) {
  const f32 shifted = x * (float)LOG2_E + ROUND;
  return power_of_two(shifted, x * (float)LOG2_E - (shifted - ROUND));
}

// ln x within 1 ulp for normal x > 0; -inf for 0, inf for inf, NaN for x < 0 and NaN (Cephes' coefficients).
INLINE f32 log(f32 x) {
  const i32 bits = as_int(x);
  i32 exponent = ((bits >> 23) & 255) - 126;
  f32 m = as_float((bits & 0x007fffff) | 0x3f000000);  // in [0.5, 1)
  const i32 small = m < splat(0.707106781186547524f);
  exponent = exponent + small;  // true is -1
  m = select(small, m + m, m) - 1.f;
  const f32 z = m * m, e = __builtin_convertvector(exponent, f32);
  f32 p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  f32 y = m * z * p + e * -2.12194440e-4f - z * 0.5f;
  y = m + y + e * 0.693359375f;
  y = select(x == splat(0.f), splat(-__builtin_inff()), y);
  y = select(x == splat(__builtin_inff()), x, y);
  return select((x < splat(0.f)) | (x != x), splat(__builtin_nanf("")), y);
}

// tanh within 2 ulp, given e^2|x|: Cephes' polynomial near 0, 1 - 2 / (e^2x + 1) elsewhere.
INLINE f32 tanh(f32 x, f32 exp_2x) {
  const f32 a = abs(x), z = x * x;
  f32 p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const f32 near = x + x * z * p;
  const f32 one = splat(1.f), far = one - 2.f / (exp_2x + one);
  return select(a < splat(0.625f), near, select(x < splat(0.f), -far, far));
}
INLINE f32 tanh(f32 x) { return tanh(x, exp(abs(x) + abs(x))); }

}  // namespace
