// RMSNorm and LayerNorm of rows, with the residual added first; rms_norm.cu and layer_norm.cu use it.
//
// Floor: one load of x, residual and weight, one store of the residual and the output. A row stays in registers, 4
// vectors of 16 bytes per thread:
//
//     bytes of a row   threads                vectors of thread t of T
//     up to 2 KiB      a warp                 t, t + T, t + 2 T, t + 3 T
//     up to 16 KiB     a block of 256         the same
//     more             a block of 512         the same, from 0, 4 T, 8 T, ... on; above 32 KiB each pass loads the row
//                                             again, from the caches
//
// Deterministic: which numbers a thread adds, and in which order, depends on D and the dtype alone. Products and sums
// are intrinsics: left to itself the compiler fuses them in the kernel for aligned rows, and not in the other.
#pragma once
#include "reduce.cuh"
#include "vec.cuh"

namespace {

constexpr int vecs_per_thread = 4;

struct NormJob {
  const void* x;
  void* residual;  // or null
  const void *weight, *bias;
  int weight_code;
  void* out;
  int64_t N;
  int D;
  float eps, offset;
};

// Threads for a row of D numbers.
template <class T>
__host__ __device__ int threads_for(int D) {
  const int num_vecs = (D + vec_size<T> - 1) / vec_size<T>;
  if (num_vecs <= vecs_per_thread * warp_size) return warp_size;
  if (num_vecs <= vecs_per_thread * 256) return 256;
  return 512;
}

// One row, as one of its threads sees it. ALIGNED: all vectors of all arrays are full and aligned.
template <class T, bool CENTERED, bool ALIGNED>
struct NormRow {
  static constexpr int size = vec_size<T>;
  const NormJob& job;
  const T* x;
  T *residual, *out;
  int thread, num_threads;

  // The first column of this thread's vector k, counted from vector `first` of the row.
  __device__ int column(int first, int k) const { return (first + k * num_threads + thread) * size; }

  // Loads this thread's vectors from `first` on, all before the first is used; 0 beyond the row's end.
  __device__ __forceinline__ void load_vecs(const T* row, int first, uint4 (&vecs)[vecs_per_thread]) const {
#pragma unroll
    for (int k = 0; k < vecs_per_thread; ++k) {
      const int start = column(first, k);
      if constexpr (ALIGNED) {
        vecs[k] = start < job.D ? *reinterpret_cast<const uint4*>(row + start) : make_uint4(0, 0, 0, 0);
      } else {
        float v[size];
        load_floats(row + start, false, job.D - start, v);
        vecs[k] = pack<T>(v);
      }
    }
  }
  // Loads x. With a residual it returns their sum, rounded to the residual's dtype, and stores it as the new residual.
  __device__ __forceinline__ void load_input(int first, uint4 (&vecs)[vecs_per_thread]) const {
    load_vecs(x, first, vecs);
    if (!residual) return;
    uint4 residual_vecs[vecs_per_thread];
    load_vecs(residual, first, residual_vecs);
#pragma unroll
    for (int k = 0; k < vecs_per_thread; ++k) {
      float v[size], r[size];
      unpack<T>(vecs[k], v);
      unpack<T>(residual_vecs[k], r);
#pragma unroll
      for (int i = 0; i < size; ++i) v[i] += r[i];
      const int start = column(first, k);
      store_floats(residual + start, ALIGNED && start < job.D, job.D - start, v);
      vecs[k] = pack<T>(v);
    }
  }
  // The sum over the numbers of this thread's vectors; add(v, total) adds one.
  template <class F>
  __device__ __forceinline__ float sum(int first, const uint4 (&vecs)[vecs_per_thread], F add) const {
    float total = 0.f;
#pragma unroll
    for (int k = 0; k < vecs_per_thread; ++k) {
      const int num_valid = job.D - column(first, k);
      float v[size], vec_sum = 0.f;
      unpack<T>(vecs[k], v);
#pragma unroll
      for (int i = 0; i < size; ++i) {
        const bool valid = ALIGNED ? num_valid > 0 : i < num_valid;
        vec_sum = valid ? add(v[i], vec_sum) : vec_sum;
      }
      total = __fadd_rn(total, vec_sum);
    }
    return total;
  }
  __device__ __forceinline__ void store_output(int first, const uint4 (&vecs)[vecs_per_thread], float mean,
                                               float inverse_std) const {
#pragma unroll
    for (int k = 0; k < vecs_per_thread; ++k) {
      const int start = column(first, k);
      if (start >= job.D) continue;
      float v[size], weight[size], bias[size] = {};
      unpack<T>(vecs[k], v);
      load_floats(job.weight, job.weight_code, start, ALIGNED, job.D - start, weight);
      if (job.bias) load_floats(job.bias, job.weight_code, start, ALIGNED, job.D - start, bias);
#pragma unroll
      for (int i = 0; i < size; ++i) {
        const float normalized = __fmul_rn(CENTERED ? __fadd_rn(v[i], -mean) : v[i], inverse_std);
        v[i] = __fmaf_rn(normalized, __fadd_rn(weight[i], job.offset), bias[i]);
      }
      store_floats(out + start, ALIGNED, job.D - start, v);
    }
  }
};

// CENTERED: LayerNorm, which subtracts the mean; else RMSNorm.
template <class T, bool CENTERED, bool ALIGNED>
__global__ void __launch_bounds__(512) norm_kernel(const NormJob job) {
  __shared__ float shared[warp_size];
  const int threads = threads_for<T>(job.D), num_vecs = (job.D + vec_size<T> - 1) / vec_size<T>;
  const int64_t index = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / threads, start = index * job.D;
  if (index >= job.N) return;
  T* const residual = static_cast<T*>(job.residual);
  const NormRow<T, CENTERED, ALIGNED> row{job,
                                          static_cast<const T*>(job.x) + start,
                                          residual ? residual + start : nullptr,
                                          static_cast<T*>(job.out) + start,
                                          static_cast<int>(threadIdx.x) % threads,
                                          threads};
  const auto row_sum = [&](float x) {
    return threads == warp_size ? warp_reduce<Add>(x) : block_reduce<Add>(x, 0.f, shared);
  };
  const int step = vecs_per_thread * threads;  // vectors of a row that registers hold
  uint4 vecs[vecs_per_thread];
  float sum = 0.f, mean = 0.f;
  for (int first = 0; first < num_vecs; first += step) {
    row.load_input(first, vecs);
    sum = __fadd_rn(sum, row.sum(first, vecs, [](float v, float total) {
      return CENTERED ? __fadd_rn(total, v) : __fmaf_rn(v, v, total);
    }));
  }
  float mean_square = row_sum(sum) / job.D;
  if (CENTERED) {
    mean = mean_square;
    sum = 0.f;
    for (int first = 0; first < num_vecs; first += step) {
      if (num_vecs > step) row.load_vecs(residual ? row.residual : row.x, first, vecs);
      sum = __fadd_rn(sum, row.sum(first, vecs, [&](float v, float total) {
        const float difference = __fadd_rn(v, -mean);
        return __fmaf_rn(difference, difference, total);
      }));
    }
    mean_square = row_sum(sum) / job.D;
  }
  const float inverse_std = 1.f / sqrtf(mean_square + job.eps);
  for (int first = 0; first < num_vecs; first += step) {
    if (num_vecs > step) row.load_vecs(residual ? row.residual : row.x, first, vecs);
    row.store_output(first, vecs, mean, inverse_std);
  }
}

// `job` without its D, which is checked here.
template <bool CENTERED>
const char* launch_norm(NormJob job, int64_t D, int code, uintptr_t stream) {
  if (job.N == 0) return nullptr;
  if (D > 1 << 30) return "a row has more than 2^30 numbers";
  job.D = static_cast<int>(D);
  return dispatch_dtype(code, [&](auto number) {
    using T = decltype(number);
    const int threads = threads_for<T>(job.D), block = threads == warp_size ? 256 : threads;
    const bool aligned =
        D % vec_size<T> == 0 && are_16_byte_aligned(job.x, job.residual, job.weight, job.bias, job.out);
    const unsigned blocks = blocks_for(job.N, block / threads);
    if (!blocks) return "more rows than a grid has blocks";
    const auto kernel = aligned ? norm_kernel<T, CENTERED, true> : norm_kernel<T, CENTERED, false>;
    return launch(kernel, blocks, block, 0, stream, job);
  });
}

}  // namespace
