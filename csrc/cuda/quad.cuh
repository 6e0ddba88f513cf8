// Arrays whose dtype the host names, loaded by four numbers at once. Kernels read 16-bit inputs as they are: a cast
// would be a launch of its own, and would write and read each number once more.
//
// A load returns bits; `unpack` makes floats of them where they are needed, so that no load waits for the one before.
#pragma once
#include "vec.cuh"

namespace {

constexpr int ANY_DTYPE = -1;

// DTYPE: one of dtypes.h that the compiler knows, or ANY_DTYPE.
template <int DTYPE>
struct Input {
  const void* p;
  int dtype;

  __host__ __device__ __forceinline__ bool is(int code) const {
    return DTYPE == ANY_DTYPE ? dtype == code : DTYPE == code;
  }
  __host__ __device__ __forceinline__ bool is_float32() const { return is(FLOAT32); }

  // 0 modulo 16 if four numbers from i on are one load: of 16 bytes, or of 8.
  __host__ __device__ __forceinline__ uintptr_t alignment(int64_t i) const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    return is_float32() ? address + 4 * i : 2 * (address + 2 * i);
  }
  // The bits of numbers i to i + 3: one in each word, or two.
  __device__ __forceinline__ uint4 load4(int64_t i) const {
    if (is_float32()) return *reinterpret_cast<const uint4*>(static_cast<const float*>(p) + i);
    const uint2 bits = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p) + i);
    return make_uint4(bits.x, bits.y, 0, 0);
  }
  // The same of those numbers index(k), k = 0 to 3, that are wanted; the others become 0.
  template <class Index>
  __device__ __forceinline__ uint4 load_each(unsigned wanted, Index index) const {
    unsigned x[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      x[k] = 0;
      if (!(wanted >> k & 1)) continue;
      x[k] = is_float32() ? static_cast<const unsigned*>(p)[index(k)] : static_cast<const uint16_t*>(p)[index(k)];
    }
    return is_float32() ? make_uint4(x[0], x[1], x[2], x[3]) : make_uint4(x[0] | x[1] << 16, x[2] | x[3] << 16, 0, 0);
  }
  __device__ __forceinline__ void unpack(const uint4& bits, float (&x)[4]) const {
    if (is_float32()) {
      ::unpack<float>(bits, x);
      return;
    }
    const bool is_bfloat16 = is(BFLOAT16);
    const float2 low = is_bfloat16 ? Pair<__nv_bfloat16>::unpack2(bits.x) : Pair<__half>::unpack2(bits.x);
    const float2 high = is_bfloat16 ? Pair<__nv_bfloat16>::unpack2(bits.y) : Pair<__half>::unpack2(bits.y);
    x[0] = low.x;
    x[1] = low.y;
    x[2] = high.x;
    x[3] = high.y;
  }
  __device__ __forceinline__ float load(int64_t i) const {
    if (is_float32()) return static_cast<const float*>(p)[i];
    return is(BFLOAT16) ? to_float(static_cast<const __nv_bfloat16*>(p)[i])
                        : to_float(static_cast<const __half*>(p)[i]);
  }
};

// The same for an output.
template <int DTYPE>
struct Output {
  void* p;
  int dtype;

  __host__ __device__ __forceinline__ bool is(int code) const { return Input<DTYPE>{p, dtype}.is(code); }
  __host__ __device__ __forceinline__ uintptr_t alignment(int64_t i) const {
    return Input<DTYPE>{p, dtype}.alignment(i);
  }
  __device__ __forceinline__ void store4(int64_t i, const float (&x)[4]) const {
    if (is(FLOAT32)) {
      *reinterpret_cast<float4*>(static_cast<float*>(p) + i) = make_float4(x[0], x[1], x[2], x[3]);
    } else if (is(BFLOAT16)) {
      store_pairs<__nv_bfloat16>(i, x);
    } else {
      store_pairs<__half>(i, x);
    }
  }
  __device__ __forceinline__ void store(int64_t i, float x) const {
    if (is(FLOAT32)) {
      static_cast<float*>(p)[i] = x;
    } else if (is(BFLOAT16)) {
      from_float(x, static_cast<__nv_bfloat16*>(p)[i]);
    } else {
      from_float(x, static_cast<__half*>(p)[i]);
    }
  }

 private:
  template <class T>
  __device__ __forceinline__ void store_pairs(int64_t i, const float (&x)[4]) const {
    const auto low = Pair<T>::pack2(x[0], x[1]), high = Pair<T>::pack2(x[2], x[3]);
    uint2 bits;
    memcpy(&bits.x, &low, 4);
    memcpy(&bits.y, &high, 4);
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p) + i) = bits;
  }
};

// The one dtype of all arrays that exist, else ANY_DTYPE.
struct CommonDtype {
  int dtype = -2;
  void add(const void* p, int code) {
    if (p) dtype = dtype == -2 || dtype == code ? code : ANY_DTYPE;
  }
};

// Returns true in all threads of the block that comes last; by then what every block has written is in memory. Read it
// by __ldcg. `ticket` is 0 before the first launch, and again afterwards.
__device__ __forceinline__ bool is_last_block(unsigned* ticket) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (is_last) *ticket = 0;
  }
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

}  // namespace
