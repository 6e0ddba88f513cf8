// CUDA's device functions, for g++: barriers, exchanges of a warp, atomics, loads, arithmetic, bfloat16 and half.
// simt.h runs the threads that call them, and includes this file.
#pragma once

#define SIMT_LOCATION(function) (simt::Location{__FILE__, __LINE__, function})
#define __syncthreads() simt::block_wait(SIMT_LOCATION("__syncthreads"))
#define __syncthreads_count(vote) simt::block_count(SIMT_LOCATION("__syncthreads_count"), vote)
#define __syncthreads_or(vote) (simt::block_count(SIMT_LOCATION("__syncthreads_or"), vote) > 0)
#define __syncthreads_and(vote) (simt::block_count(SIMT_LOCATION("__syncthreads_and"), !(vote)) == 0)
#define __syncwarp(...) simt::warp_wait(simt::mask_of(__VA_ARGS__), SIMT_LOCATION("__syncwarp"))
#define __shfl_sync(...) simt::shuffle(SIMT_LOCATION("__shfl_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) simt::shuffle_xor(SIMT_LOCATION("__shfl_xor_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) simt::shuffle_down(SIMT_LOCATION("__shfl_down_sync"), __VA_ARGS__)
#define __shfl_up_sync(...) simt::shuffle_up(SIMT_LOCATION("__shfl_up_sync"), __VA_ARGS__)
#define __ballot_sync(...) simt::ballot(SIMT_LOCATION("__ballot_sync"), __VA_ARGS__)
#define __any_sync(...) (simt::ballot(SIMT_LOCATION("__any_sync"), __VA_ARGS__) != 0)
#define __all_sync(mask, vote) (simt::ballot(SIMT_LOCATION("__all_sync"), mask, !(vote)) == 0)
#define __reduce_add_sync(...) simt::reduce(SIMT_LOCATION("__reduce_add_sync"), std::plus<>(), __VA_ARGS__)
#define __reduce_max_sync(...) simt::reduce(SIMT_LOCATION("__reduce_max_sync"), simt::Max(), __VA_ARGS__)
#define __reduce_min_sync(...) simt::reduce(SIMT_LOCATION("__reduce_min_sync"), simt::Min(), __VA_ARGS__)

namespace simt {

inline unsigned mask_of(unsigned mask = ~0u) { return mask; }

// Shuffles within groups of `width` lanes. If the source is beyond the group, a lane gets its own value.
template <class T>
T shuffle(const Location& location, unsigned mask, T value, int source, int width = 32) {
  return exchange(mask, value, lane() / width * width + (source & (width - 1)), location);
}
template <class T>
T shuffle_xor(const Location& location, unsigned mask, T value, int lane_mask, int width = 32) {
  const int source = lane() ^ lane_mask, group_end = (lane() / width + 1) * width;
  return exchange(mask, value, source < group_end ? source : lane(), location);
}
template <class T>
T shuffle_down(const Location& location, unsigned mask, T value, unsigned delta, int width = 32) {
  const int distance = static_cast<int>(delta);
  return exchange(mask, value, lane() % width + distance < width ? lane() + distance : lane(), location);
}
template <class T>
T shuffle_up(const Location& location, unsigned mask, T value, unsigned delta, int width = 32) {
  const int distance = static_cast<int>(delta);
  return exchange(mask, value, lane() % width >= distance ? lane() - distance : lane(), location);
}

// One exchange, then f(lane, value) for the value of every lane of the warp.
template <class T, class F>
void for_each_lane(const Location& location, unsigned mask, T value, F f) {
  const int64_t parity = warp_barrier().phase & 1;
  const int begin = warp_begin(), end = warp_end();
  exchange(mask, value, lane(), location);
  for (int i = begin; i < end; ++i) {
    T lane_value;
    std::memcpy(&lane_value, slot_of(i, parity), sizeof(T));
    f(i - begin, lane_value);
  }
}

inline unsigned ballot(const Location& location, unsigned mask, bool vote) {
  unsigned bits = 0;
  for_each_lane(location, mask, int(vote), [&](int l, int v) { bits |= unsigned(v == 1) << l; });
  return bits;
}

struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
template <class Op, class T>
T reduce(const Location& location, Op op, unsigned mask, T value) {
  static_assert(sizeof(T) == 4 && std::is_integral<T>::value, "the instruction takes 32-bit integers");
  T out = value;
  bool first = true;
  for_each_lane(location, mask, value, [&](int, T v) {
    out = first ? v : op(out, v);
    first = false;
  });
  return out;
}

}  // namespace simt

template <class T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = old + v;
  return old;
}
template <class T>
T atomicMax(T* p, T v) {
  const T old = *p;
  *p = std::max(old, v);
  return old;
}
template <class T>
T atomicMin(T* p, T v) {
  const T old = *p;
  *p = std::min(old, v);
  return old;
}
template <class T>
T atomicOr(T* p, T v) {
  const T old = *p;
  *p = old | v;
  return old;
}
template <class T>
T atomicExch(T* p, T v) {
  const T old = *p;
  *p = v;
  return old;
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  const T old = *p;
  if (old == expected) *p = v;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}

inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline int __float_as_int(float x) {
  int u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
// The GPU's fast functions are off by a few units in the last place. These are too: by 1 or 2 units; the result's own
// bits decide by which of them. 0, 1 (e^0) and values that are not finite are exact.
inline float perturb(float y) {
  if (y == 0.f || y == 1.f || !std::isfinite(y)) return y;
  const int errors[4] = {-2, -1, 1, 2};
  const unsigned bits = __float_as_uint(y);
  return __uint_as_float(bits + errors[bits * 2654435761u >> 30]);
}
inline float ex2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.f : perturb(y);
}
// Off by less: by 1 unit, up or down.
inline float rcp_approx(float x) {
  const float y = 1.f / x;
  if (y == 0.f || y == 1.f || !std::isfinite(y)) return y;
  const unsigned bits = __float_as_uint(y);
  return __uint_as_float(bits * 2654435761u >> 31 ? bits + 1 : bits - 1);
}
inline float __expf(float x) { return perturb(std::exp2(x * 1.44269504f)); }
inline float __logf(float x) { return perturb(std::log(x)); }
inline float __fdividef(float a, float b) { return perturb(a / b); }
inline float rsqrtf(float x) { return perturb(1.f / std::sqrt(x)); }
inline float __int_as_float(int u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

// The types of the runtime that the host code of the kernels names.
using cudaStream_t = struct CUstream_st*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

// The part of cuda_bf16.h and cuda_fp16.h that the kernels use.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float(unsigned(h.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned u = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
inline float __half2float(__half h) {
  _Float16 x;
  std::memcpy(&x, &h.bits, 2);
  return float(x);
}
inline __half __float2half_rn(float f) {
  const _Float16 x = _Float16(f);
  __half h;
  std::memcpy(&h.bits, &x, 2);
  return h;
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
