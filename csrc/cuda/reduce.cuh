// Sums, maxima and minima over a warp and over a block, in one fixed order: every thread gets the same bits, and they
// repeat from run to run.
#pragma once
#include "launch.cuh"

namespace {

constexpr int warp_size = 32;
constexpr unsigned full_mask = 0xffffffffu;

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {  // ignores a NaN
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ double operator()(double a, double b) const { return fmax(a, b); }
};
struct Min {  // ignores a NaN
  __device__ float operator()(float a, float b) const { return fminf(a, b); }
};

// A butterfly: both lanes of every exchange combine the same two numbers, so all lanes have the same bits.
template <class Op, class T>
__device__ __forceinline__ T warp_reduce(T x) {
#pragma unroll
  for (int distance = warp_size / 2; distance; distance /= 2) x = Op()(x, __shfl_xor_sync(full_mask, x, distance));
  return x;
}

// Reduces over a block of whole warps. `shared` holds 32 numbers; the next call may reuse it at once.
template <class Op, class T>
__device__ __forceinline__ T block_reduce(T x, T identity, T* shared) {
  x = warp_reduce<Op>(x);
  if (blockDim.x == warp_size) return x;
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  __syncthreads();  // until all threads have read the results of the call before
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  return warp_reduce<Op>(lane < blockDim.x / warp_size ? shared[lane] : identity);
}

}  // namespace
