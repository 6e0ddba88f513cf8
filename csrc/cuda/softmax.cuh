// Online statistics of a row of logits, and the gradient of its softmax; csrc/cpu/softmax.h has the formulas.
//
// The operations that decide bits are spelled out (__fmul_rn, __fmaf_rn): the compiler may fuse products and sums
// differently in two kernels, and a row must have the same bits in both.
#pragma once
#include <math.h>

#include "reduce.cuh"
#include "vec.cuh"

namespace {

constexpr float log2_e = 1.44269504088896341f;
constexpr float far = -87.f;  // e^far is 1.6e-38: nothing beside the 1 that the largest logit adds

// 2^x within 2 units in the last place, 0 where float32 has no normal number: one instruction.
__device__ __forceinline__ float exp2_near(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return ex2_approx(x);
#endif
}
__device__ __forceinline__ float exp_near(float x) { return exp2_near(__fmul_rn(x, log2_e)); }

struct Scaling {
  float inverse_temperature, softcap, inverse_softcap;
};

inline Scaling scaling(float temperature, float softcap) {
  return {1.f / temperature, softcap, softcap > 0.f ? 1.f / softcap : 0.f};
}

template <bool CAP>
__device__ __forceinline__ float scaled(float x, const Scaling& by) {
  if (CAP) x = __fmul_rn(by.softcap, tanhf(__fmul_rn(x, by.inverse_softcap)));
  return __fmul_rn(x, by.inverse_temperature);
}

// Of some columns: the largest z, the sum of e^(z - largest), that of (z - largest) e^(z - largest).
struct Softmax {
  float largest, sum, moment;
};

__device__ __forceinline__ Softmax nothing_yet() { return {-INFINITY, 0.f, 0.f}; }

// What is subtracted from z: the largest, or 0 where nothing is above -inf. (-inf) - (-inf) would be NaN.
__device__ __forceinline__ float origin(float largest) { return largest == -INFINITY ? 0.f : largest; }

// The same sums around another origin, which is no smaller; one that is NaN stays so.
__device__ __forceinline__ Softmax moved(const Softmax& row, float to, float largest) {
  const float distance = row.largest - to, factor = exp_near(distance);
  const float moment = __fmaf_rn(fmaxf(distance, far), row.sum, row.moment);
  return {largest, __fmul_rn(factor, row.sum), __fmul_rn(factor, moment)};
}

__device__ __forceinline__ Softmax joined(const Softmax& one, const Softmax& other) {
  const float largest = fmaxf(one.largest, other.largest), to = origin(largest);
  const Softmax a = moved(one, to, largest), b = moved(other, to, largest);
  return {largest, __fadd_rn(a.sum, b.sum), __fadd_rn(a.moment, b.moment)};
}

__device__ __forceinline__ Softmax warp_joined(const Softmax& row) {
  const float largest = warp_reduce<Largest>(row.largest);
  const Softmax mine = moved(row, origin(largest), largest);
  return {largest, warp_reduce<Add>(mine.sum), warp_reduce<Add>(mine.moment)};
}

// Over a block of whole warps; `memory` has room for 96 numbers.
__device__ __forceinline__ Softmax block_joined(Softmax row, float* memory) {
  const int lane = threadIdx.x % lanes, warps = blockDim.x / lanes;
  row = warp_joined(row);
  __syncthreads();
  if (lane == 0) {
    const int at = threadIdx.x / lanes;
    memory[at] = row.largest, memory[lanes + at] = row.sum, memory[2 * lanes + at] = row.moment;
  }
  __syncthreads();
  row = nothing_yet();
  if (lane < warps) row = {memory[lane], memory[lanes + lane], memory[2 * lanes + lane]};
  return warp_joined(row);
}

// U words' columns join a row's. What the row does not have is -inf; `here` tells it from a logit where one of -inf
// counts, since softcap makes it finite: of word u only the first `here - u * apart` exist.
template <int U, bool CAP, class T>
__device__ __forceinline__ void add_words(Softmax& row, const uint4 (&words)[U], int here, int apart,
                                          const Scaling& by) {
  constexpr int per = per_word<T>;
  float z[U][per], largest = row.largest;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    unpack<T>(words[u], z[u]);
#pragma unroll
    for (int i = 0; i < per; ++i) {
      z[u][i] = scaled<CAP>(z[u][i], by);
      if (CAP && i >= here - u * apart) z[u][i] = -INFINITY;
      largest = fmaxf(largest, z[u][i]);
    }
  }
  const float from = origin(largest);
  row = moved(row, from, largest);
  float sums[U], moments[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    sums[u] = moments[u] = 0.f;
#pragma unroll
    for (int i = 0; i < per; ++i) {
      const float distance = z[u][i] - from, e = exp_near(distance);
      sums[u] = __fadd_rn(sums[u], e);
      moments[u] = __fmaf_rn(fmaxf(distance, far), e, moments[u]);  // not -inf times 0
    }
  }
#pragma unroll
  for (int u = 0; u < U; ++u) row.sum = __fadd_rn(row.sum, sums[u]), row.moment = __fadd_rn(row.moment, moments[u]);
}

// What thread `thread` of `threads` sees of the words `first` to `last` of a row, U of them at a time, whose loads are
// all under way before the first is looked at. The first `kept` of memory's words that are read as such stay in
// `memory`.
template <int U, bool CAP, class T>
__device__ __forceinline__ Softmax statistics(const Words<T>& x, int first, int last, int thread, int threads,
                                              const Scaling& by, uint4* memory = nullptr, int kept = 0) {
  Softmax row = nothing_yet();
  for (; first < last; first += U * threads) {
    const int own = first + thread;
    uint4 words[U];
    if (x.inside(own) && x.inside(own + (U - 1) * threads)) {
#pragma unroll
      for (int u = 0; u < U; ++u) words[u] = x.aligned[own + u * threads];
      if (kept) {
#pragma unroll
        for (int u = 0; u < U; ++u)
          if (own + u * threads < kept) memory[own + u * threads] = words[u];
      }
      if (x.shift) {
        uint4 after[U];
#pragma unroll
        for (int u = 0; u < U; ++u) after[u] = x.aligned[own + u * threads + 1];
#pragma unroll
        for (int u = 0; u < U; ++u) words[u] = shifted(words[u], after[u], x.shift);
      }
    } else {
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int k = own + u * threads;
        words[u] = x.read(k);
        if (k < kept && x.inside(k)) memory[k] = x.aligned[k];
      }
    }
    add_words<U, CAP, T>(row, words, x.end - own * per_word<T>, threads * per_word<T>, by);
  }
  return row;
}

// The gradient of one row: p (a + b log p + c (log p_ref - log p)) + g 1[target] by z, carried on to the raw logits.
struct Slope {
  float largest, log_sum, g, a, b;
  float c, ref_largest, ref_log_sum;
};

template <bool CAP, bool KL>
__device__ __forceinline__ float logit_gradient(float x, float ref, float once, const Slope& s, const Scaling& by) {
  float chain = by.inverse_temperature;
  if (CAP) {
    const float t = tanhf(x * by.inverse_softcap);
    chain *= 1.f - t * t;
    x = by.softcap * t;
  }
  const float logp = (x * by.inverse_temperature - s.largest) - s.log_sum, finite = fmaxf(logp, far);
  float inner = s.a + s.b * finite;
  if (KL) inner += s.c * (fmaxf((scaled<CAP>(ref, by) - s.ref_largest) - s.ref_log_sum, far) - finite);
  return (exp_near(logp) * inner + once) * chain;
}

}  // namespace
