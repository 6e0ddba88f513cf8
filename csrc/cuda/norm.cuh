// RMSNorm and LayerNorm of rows, with the residual stream that they read; rms_norm.cu and layer_norm.cu use them.
//
// A row is held in registers, 4 words of 16 bytes a thread, so that memory is visited once: x, the residual and out,
// and the weight, of the second-level cache. A warp takes a row of 2 KiB, a block of 256 threads one of 16, a block of
// 512 wider ones; above 32 KiB a row is walked, for each of its statistics and to be written, and found in the caches
// again. Which numbers a thread adds up, and in which order, depends on D and the dtype alone.
#pragma once
#include "reduce.cuh"
#include "vec.cuh"

namespace {

constexpr int held = 4;  // words a thread

struct Norm {
  const void* x;
  void* residual;
  const void *weight, *bias;
  int weight_code;
  void* out;
  int64_t N;
  int D;
  float eps, offset;
};

template <class T>
__host__ __device__ int threads_for(int D) {
  const int words = (D + per_word<T> - 1) / per_word<T>;
  return words <= held * lanes ? lanes : words <= held * 256 ? 256 : 512;
}

// One row, as a team of threads sees it.
template <class T, bool WHOLE>
struct NormRow {
  static constexpr int per = per_word<T>;
  const Norm& n;
  const T* x;
  T *residual, *out;
  int thread, threads;

  __device__ int column(int first, int j) const { return (first + j * threads + thread) * per; }

  // The words from `first` on, all on their way before one is looked at; 0 beyond the row's end.
  __device__ __forceinline__ void read_words(const T* from, int first, uint4 (&words)[held]) const {
#pragma unroll
    for (int j = 0; j < held; ++j) {
      const int at = column(first, j);
      if constexpr (WHOLE) {
        words[j] = at < n.D ? *reinterpret_cast<const uint4*>(from + at) : make_uint4(0, 0, 0, 0);
      } else {
        float v[per];
        read_numbers(from + at, false, n.D - at, v);
        words[j] = packed<T>(v);
      }
    }
  }
  // With a residual, their sums with it, which become the residual, rounded as it is.
  __device__ __forceinline__ void read(int first, uint4 (&words)[held]) const {
    read_words(x, first, words);
    if (!residual) return;
    uint4 more[held];
    read_words(residual, first, more);
#pragma unroll
    for (int j = 0; j < held; ++j) {
      float v[per], w[per];
      unpack<T>(words[j], v), unpack<T>(more[j], w);
#pragma unroll
      for (int i = 0; i < per; ++i) v[i] += w[i];
      const int at = column(first, j);
      write_numbers(residual + at, WHOLE && at < n.D, n.D - at, v);
      words[j] = packed<T>(v);
    }
  }
  // The sum of f over the words' numbers.
  template <class F>
  __device__ __forceinline__ float sum(int first, const uint4 (&words)[held], F f) const {
    float total = 0.f;
#pragma unroll
    for (int j = 0; j < held; ++j) {
      const int here = n.D - column(first, j);
      float v[per], part = 0.f;
      unpack<T>(words[j], v);
#pragma unroll
      for (int i = 0; i < per; ++i) part += (WHOLE ? here > 0 : i < here) ? f(v[i]) : 0.f;
      total += part;
    }
    return total;
  }
  __device__ __forceinline__ void write(int first, const uint4 (&words)[held], float mean, float inverse) const {
#pragma unroll
    for (int j = 0; j < held; ++j) {
      const int at = column(first, j);
      if (at >= n.D) continue;
      float v[per], scale[per], shift[per] = {};
      unpack<T>(words[j], v);
      read_numbers(n.weight, n.weight_code, at, WHOLE, n.D - at, scale);
      if (n.bias) read_numbers(n.bias, n.weight_code, at, WHOLE, n.D - at, shift);
#pragma unroll
      for (int i = 0; i < per; ++i) v[i] = (v[i] - mean) * inverse * (scale[i] + n.offset) + shift[i];
      write_numbers(out + at, WHOLE, n.D - at, v);
    }
  }
};

template <class T, bool CENTERED, bool WHOLE>
__global__ void __launch_bounds__(512) norm_kernel(const Norm n) {
  __shared__ float memory[lanes];
  const int threads = threads_for<T>(n.D), words = (n.D + per_word<T> - 1) / per_word<T>;
  const int64_t index = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / threads, at = index * n.D;
  if (index >= n.N) return;
  T* const residual = static_cast<T*>(n.residual);
  const NormRow<T, WHOLE> row{n,
                              static_cast<const T*>(n.x) + at,
                              residual ? residual + at : nullptr,
                              static_cast<T*>(n.out) + at,
                              static_cast<int>(threadIdx.x) % threads,
                              threads};
  const auto joined = [&](float x) {
    return threads == lanes ? warp_reduce<Add>(x) : block_reduce<Add>(x, 0.f, memory);
  };
  const int step = held * threads;
  uint4 tile[held];
  float total = 0.f, mean = 0.f;
  for (int first = 0; first < words; first += step) {
    row.read(first, tile);
    total += row.sum(first, tile, [](float v) { return CENTERED ? v : v * v; });
  }
  total = joined(total) / n.D;
  if (CENTERED) {
    mean = total, total = 0.f;
    for (int first = 0; first < words; first += step) {
      if (words > step) row.read_words(residual ? row.residual : row.x, first, tile);
      total += row.sum(first, tile, [&](float v) { return (v - mean) * (v - mean); });
    }
    total = joined(total) / n.D;
  }
  const float inverse = 1.f / sqrtf(total + n.eps);
  for (int first = 0; first < words; first += step) {
    if (words > step) row.read_words(residual ? row.residual : row.x, first, tile);
    row.write(first, tile, mean, inverse);
  }
}

template <bool CENTERED>
const char* launch_norm(Norm n, int64_t D, int code, uintptr_t stream) {
  if (n.N == 0) return nullptr;
  if (D > 1 << 30) return "a row has more than 2^30 numbers";
  n.D = static_cast<int>(D);
  return with_type(code, [&](auto type) {
    using T = decltype(type);
    const int threads = threads_for<T>(n.D), block = threads == lanes ? 256 : threads;
    const bool whole = D % per_word<T> == 0 && multiples_of_16(n.x, n.residual, n.weight, n.bias, n.out);
    const unsigned blocks = blocks_for(n.N, block / threads);
    if (!blocks) return "more rows than a grid has blocks";
    return launch(whole ? norm_kernel<T, CENTERED, true> : norm_kernel<T, CENTERED, false>, blocks, block, 0, stream,
                  n);
  });
}

}  // namespace
