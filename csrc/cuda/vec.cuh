// Rows of float32, bfloat16 or float16 numbers in memory, read 16 bytes at a time wherever they begin; float32 in
// registers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <string.h>

#include "launch.cuh"

namespace {

template <class T>
constexpr int per_word = 16 / sizeof(T);

// One number of a type, and two of them in 4 bytes, the first in the low half.
template <class T>
struct Short;
template <>
struct Short<__nv_bfloat16> {
  static __device__ __forceinline__ float2 wide(unsigned bits) {
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  }
  static __device__ __forceinline__ __nv_bfloat162 narrow(float x, float y) { return __floats2bfloat162_rn(x, y); }
};
template <>
struct Short<__half> {
  static __device__ __forceinline__ float2 wide(unsigned bits) {
    __half2 pair;
    memcpy(&pair, &bits, 4);
    return __half22float2(pair);
  }
  static __device__ __forceinline__ __half2 narrow(float x, float y) { return __floats2half2_rn(x, y); }
};

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }

__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& y) { y = __float2half_rn(x); }

// The numbers of a word, and back, rounded to the nearest.
template <class T>
__device__ __forceinline__ void unpack(const uint4& word, float (&x)[per_word<T>]) {
  const unsigned bits[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(bits[i]);
    } else {
      const float2 two = Short<T>::wide(bits[i]);
      x[2 * i] = two.x, x[2 * i + 1] = two.y;
    }
  }
}
template <class T>
__device__ __forceinline__ uint4 packed(const float (&x)[per_word<T>]) {
  unsigned bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      bits[i] = __float_as_uint(x[i]);
    } else {
      const auto two = Short<T>::narrow(x[2 * i], x[2 * i + 1]);
      memcpy(&bits[i], &two, 4);
    }
  }
  return make_uint4(bits[0], bits[1], bits[2], bits[3]);
}

// The 16 bytes that begin `by` bytes (an even number) after those of `a`; b comes after a.
__device__ __forceinline__ uint4 shifted(const uint4& a, const uint4& b, int by) {
  unsigned x[7] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z}, last = b.w;
  if (by & 8) x[0] = x[2], x[1] = x[3], x[2] = x[4], x[3] = x[5], x[4] = x[6], x[5] = last;
  if (by & 4) x[0] = x[1], x[1] = x[2], x[2] = x[3], x[3] = x[4], x[4] = x[5];
  const int bits = by % 4 * 8;
  return make_uint4(__funnelshift_r(x[0], x[1], bits), __funnelshift_r(x[1], x[2], bits),
                    __funnelshift_r(x[2], x[3], bits), __funnelshift_r(x[3], x[4], bits));
}

// `count` numbers from the `begin`th after `base` on, in words that are counted from `base`, wherever it lies: a word
// that spans two of memory's is read as these two, of which a neighbour needs the one too, so that the cache has it.
// Only memory's words that lie within the numbers are read as such.
template <class T>
struct Words {
  static constexpr int per = per_word<T>;
  const uint4* aligned;  // memory's word that `base` lies in
  const T* base;
  int shift;         // bytes between the two
  int begin, end;    // the numbers
  int first, whole;  // words `first` to `whole` are read as such

  __device__ Words(const T* numbers, int before, int count) : begin(before), end(before + count) {
    // Not by way of an integer: the compiler would no longer know that this is global memory.
    const char* const at = reinterpret_cast<const char*>(numbers) - before * sizeof(T);
    base = reinterpret_cast<const T*>(at), shift = static_cast<int>(reinterpret_cast<uintptr_t>(at) & 15);
    aligned = reinterpret_cast<const uint4*>(at - shift);
    const int skipped = shift / static_cast<int>(sizeof(T));
    first = (begin + skipped + per - 1) / per, whole = (end + skipped) / per - (shift ? 1 : 0);
  }
  __device__ __forceinline__ int count() const { return (end + per - 1) / per; }
  __device__ __forceinline__ bool inside(int k) const { return k >= first && k < whole; }
  __device__ __forceinline__ uint4 read_whole(int k) const {
    return shift ? shifted(aligned[k], aligned[k + 1], shift) : aligned[k];
  }
  // Of a word that is not, one number after the other; -inf stands for those that do not exist.
  __device__ __forceinline__ uint4 read_edge(int k) const {
    T x[per];
#pragma unroll
    for (int i = 0; i < per; ++i) {
      const int at = k * per + i;
      if (at >= begin && at < end)
        x[i] = base[at];
      else
        narrow(-INFINITY, x[i]);
    }
    uint4 word;
    memcpy(&word, x, 16);
    return word;
  }
  __device__ __forceinline__ uint4 read(int k) const { return inside(k) ? read_whole(k) : read_edge(k); }
};

// COUNT numbers from p on, a multiple of 4, as float32; `whole`: all exist, and p is a multiple of their size, at
// most 16. Of others the first `here`, the rest 0.
template <int COUNT, class T>
__device__ __forceinline__ void read_numbers(const T* p, bool whole, int here, float (&x)[COUNT]) {
  if (!whole) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) x[i] = i < here ? widened(p[i]) : 0.f;
  } else if constexpr (COUNT * sizeof(T) >= 16) {
#pragma unroll
    for (int j = 0; j < COUNT / per_word<T>; ++j) {
      float some[per_word<T>];
      unpack<T>(reinterpret_cast<const uint4*>(p)[j], some);
#pragma unroll
      for (int i = 0; i < per_word<T>; ++i) x[j * per_word<T> + i] = some[i];
    }
  } else {
    const uint2 bits = *reinterpret_cast<const uint2*>(p);
    const float2 low = Short<T>::wide(bits.x), high = Short<T>::wide(bits.y);
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
  }
}
template <int COUNT>
__device__ __forceinline__ void read_numbers(const void* p, int code, int64_t at, bool whole, int here,
                                             float (&x)[COUNT]) {
  if (code == 0)
    read_numbers(static_cast<const float*>(p) + at, whole, here, x);
  else if (code == 1)
    read_numbers(static_cast<const __nv_bfloat16*>(p) + at, whole, here, x);
  else
    read_numbers(static_cast<const __half*>(p) + at, whole, here, x);
}

// Of COUNT numbers the first `here`, rounded to p's type; `whole` as above.
template <int COUNT, class T>
__device__ __forceinline__ void write_numbers(T* p, bool whole, int here, const float (&x)[COUNT]) {
  static_assert(COUNT == per_word<T>, "one word");
  if (whole) {
    *reinterpret_cast<uint4*>(p) = packed<T>(x);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (i < here) narrow(x[i], p[i]);
  }
}

// Whether addresses are multiples of 16; a null one is.
template <class... Addresses>
__host__ inline bool multiples_of_16(Addresses... addresses) {
  return ((uintptr_t(addresses) | ...) & 15) == 0;
}

// f of a number of the type whose code Python gives: kernels/_rows.py has them.
template <class F>
const char* with_type(int code, F f) {
  if (code == 0) return f(float());
  if (code == 1) return f(__nv_bfloat16());
  return f(__half());
}

}  // namespace
