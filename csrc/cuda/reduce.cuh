// Sums and maxima over a warp and over a block, in one fixed order: the same bits from run to run, in every thread.
#pragma once
#include "launch.cuh"

namespace {

constexpr int lanes = 32;
constexpr unsigned all_lanes = 0xffffffffu;

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Largest {  // a NaN is passed over
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// A butterfly: both sides of every exchange add the same two numbers, so that all lanes have the same bits.
template <class Op, class T>
__device__ __forceinline__ T warp_reduce(T x) {
#pragma unroll
  for (int apart = lanes / 2; apart; apart /= 2) x = Op()(x, __shfl_xor_sync(all_lanes, x, apart));
  return x;
}

// Over a block of whole warps. `memory` has room for 32 numbers; it may be used again at once.
template <class Op, class T>
__device__ __forceinline__ T block_reduce(T x, T nothing, T* memory) {
  x = warp_reduce<Op>(x);
  if (blockDim.x == lanes) return x;
  __syncthreads();  // what a call before this one left there has been read
  if (threadIdx.x % lanes == 0) memory[threadIdx.x / lanes] = x;
  __syncthreads();
  return warp_reduce<Op>(threadIdx.x % lanes < blockDim.x / lanes ? memory[threadIdx.x % lanes] : nothing);
}

}  // namespace
