// Loads and stores of float32, bfloat16 and float16 numbers in vectors of 16 bytes; in registers they are float32.
//
// A row may start at any address, but a load of 16 bytes must be aligned. We read aligned vectors only: vector k of a
// row is assembled from the two aligned vectors that it straddles. The second one is the next thread's first, so it
// is in the cache.
//
//     address  0               16              32              48
//     aligned  |    vecs[0]    |    vecs[1]    |    vecs[2]    |
//     row      . . . . . .|    vector 0   |    vector 1   |  the rest: one number at a time
//              <- shift ->^ base
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <string.h>

#include "dtypes.h"
#include "launch.cuh"

CONSTANT(dtype_float16, FLOAT16)

namespace {

// Numbers in 16 bytes.
template <class T>
constexpr int vec_size = 16 / sizeof(T);

// Two 16-bit numbers in 4 bytes, the first in the low half.
template <class T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ float2 unpack2(unsigned bits) {
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  }
  static __device__ __forceinline__ __nv_bfloat162 pack2(float x, float y) { return __floats2bfloat162_rn(x, y); }
};
template <>
struct Pair<__half> {
  static __device__ __forceinline__ float2 unpack2(unsigned bits) {
    __half2 pair;
    memcpy(&pair, &bits, 4);
    return __half22float2(pair);
  }
  static __device__ __forceinline__ __half2 pack2(float x, float y) { return __floats2half2_rn(x, y); }
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// y = x, rounded to nearest.
__device__ __forceinline__ void from_float(float x, float& y) { y = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_float(float x, __half& y) { y = __float2half_rn(x); }

// The numbers of a vector as float32.
template <class T>
__device__ __forceinline__ void unpack(const uint4& vec, float (&x)[vec_size<T>]) {
  const unsigned bits[4] = {vec.x, vec.y, vec.z, vec.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(bits[i]);
    } else {
      const float2 pair = Pair<T>::unpack2(bits[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}
// The inverse of `unpack`, rounded to nearest.
template <class T>
__device__ __forceinline__ uint4 pack(const float (&x)[vec_size<T>]) {
  unsigned bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      bits[i] = __float_as_uint(x[i]);
    } else {
      const auto pair = Pair<T>::pack2(x[2 * i], x[2 * i + 1]);
      memcpy(&bits[i], &pair, 4);
    }
  }
  return make_uint4(bits[0], bits[1], bits[2], bits[3]);
}

// The 16 bytes that start `shift` bytes (an even number below 16) into the 32 bytes of a and b.
__device__ __forceinline__ uint4 funnel_shift(const uint4& a, const uint4& b, int shift) {
  unsigned x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  if (shift & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) x[i] = x[i + 2];
  }
  if (shift & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) x[i] = x[i + 1];
  }
  const int bits = shift % 4 * 8;
  return make_uint4(__funnelshift_r(x[0], x[1], bits), __funnelshift_r(x[1], x[2], bits),
                    __funnelshift_r(x[2], x[3], bits), __funnelshift_r(x[3], x[4], bits));
}

// A row of `count` numbers in vectors that are counted from `base`, which is `offset` numbers before the row: vector k
// has the numbers base[k * vec_size] to base[(k + 1) * vec_size - 1]. A vector is full if both aligned vectors that it
// straddles lie within the row.
template <class T>
struct UnalignedRow {
  static constexpr int size = vec_size<T>;
  const uint4* vecs;  // aligned vectors; the first one contains the address `base`
  const T* base;
  int shift;                 // bytes from `vecs` to `base`
  int begin, end;            // the row's numbers, counted from `base`
  int full_begin, full_end;  // its full vectors

  __device__ UnalignedRow(const T* row, int offset, int count) : begin(offset), end(offset + count) {
    // Pointer arithmetic, not integers: the compiler would lose that this is global memory.
    const char* const address = reinterpret_cast<const char*>(row) - offset * sizeof(T);
    base = reinterpret_cast<const T*>(address);
    shift = static_cast<int>(reinterpret_cast<uintptr_t>(address) & 15);
    vecs = reinterpret_cast<const uint4*>(address - shift);
    const int shift_numbers = shift / static_cast<int>(sizeof(T));
    full_begin = (begin + shift_numbers + size - 1) / size;
    full_end = (end + shift_numbers) / size - (shift ? 1 : 0);
  }
  __device__ __forceinline__ int num_vecs() const { return (end + size - 1) / size; }
  __device__ __forceinline__ bool is_full(int k) const { return k >= full_begin && k < full_end; }
  __device__ __forceinline__ uint4 load_full(int k) const {
    return shift ? funnel_shift(vecs[k], vecs[k + 1], shift) : vecs[k];
  }
  // A vector that is not full: one number at a time, -inf outside the row.
  __device__ __forceinline__ uint4 load_edge(int k) const {
    T x[size];
#pragma unroll
    for (int i = 0; i < size; ++i) {
      const int column = k * size + i;
      if (column >= begin && column < end)
        x[i] = base[column];
      else
        from_float(-INFINITY, x[i]);
    }
    uint4 vec;
    memcpy(&vec, x, 16);
    return vec;
  }
  __device__ __forceinline__ uint4 load(int k) const { return is_full(k) ? load_full(k) : load_edge(k); }
};

// Loads COUNT numbers, a multiple of 4, as float32. If `aligned`, all of them exist and p is a multiple of their bytes,
// at most 16. Otherwise it loads the first `num_valid` and sets the others to 0.
template <int COUNT, class T>
__device__ __forceinline__ void load_floats(const T* p, bool aligned, int num_valid, float (&x)[COUNT]) {
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) x[i] = i < num_valid ? to_float(p[i]) : 0.f;
  } else if constexpr (COUNT * sizeof(T) >= 16) {
#pragma unroll
    for (int k = 0; k < COUNT / vec_size<T>; ++k) {
      float vec[vec_size<T>];
      unpack<T>(reinterpret_cast<const uint4*>(p)[k], vec);
#pragma unroll
      for (int i = 0; i < vec_size<T>; ++i) x[k * vec_size<T> + i] = vec[i];
    }
  } else {
    const uint2 bits = *reinterpret_cast<const uint2*>(p);
    const float2 low = Pair<T>::unpack2(bits.x), high = Pair<T>::unpack2(bits.y);
    x[0] = low.x;
    x[1] = low.y;
    x[2] = high.x;
    x[3] = high.y;
  }
}
// The same from p[index] on, for numbers of a dtype.
template <int COUNT>
__device__ __forceinline__ void load_floats(const void* p, int dtype, int64_t index, bool aligned, int num_valid,
                                            float (&x)[COUNT]) {
  if (dtype == FLOAT32)
    load_floats(static_cast<const float*>(p) + index, aligned, num_valid, x);
  else if (dtype == BFLOAT16)
    load_floats(static_cast<const __nv_bfloat16*>(p) + index, aligned, num_valid, x);
  else
    load_floats(static_cast<const __half*>(p) + index, aligned, num_valid, x);
}

// Stores the first `num_valid` numbers of a vector, rounded to p's type; `aligned` as above.
template <int COUNT, class T>
__device__ __forceinline__ void store_floats(T* p, bool aligned, int num_valid, const float (&x)[COUNT]) {
  static_assert(COUNT == vec_size<T>, "one vector");
  if (aligned) {
    *reinterpret_cast<uint4*>(p) = pack<T>(x);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (i < num_valid) from_float(x[i], p[i]);
  }
}

// True if all addresses are multiples of 16; a null address is one.
template <class... Addresses>
__host__ inline bool are_16_byte_aligned(Addresses... addresses) {
  return ((uintptr_t(addresses) | ...) & 15) == 0;
}

// Calls f with a number of a dtype.
template <class F>
const char* dispatch_dtype(int dtype, F f) {
  if (dtype == FLOAT32) return f(float());
  if (dtype == BFLOAT16) return f(__nv_bfloat16());
  return f(__half());
}

}  // namespace
