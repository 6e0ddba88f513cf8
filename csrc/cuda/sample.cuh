// Samples a token from a row of logits on NVIDIA GPUs: the noise and the Gumbel argmax. kernels/_sampling.py defines
// them, sampling.h has what CPU and CUDA share.
//
// The token is the argmax of z + gumbel, gumbel = -log(w), w = -log1p(-u): the one with the smallest arrival time
// w e^-z. As w >= u, u e^-z is a lower bound of that time and takes no logarithm:
//
//     1. each thread      the two smallest bounds of its tokens, and the token of the smallest
//     2. the block        the smallest bound of all; its token's score z + gumbel in float64 becomes the threshold
//     3. each thread      the float64 scores of its other tokens whose bound may beat the threshold: mostly none
//     4. the block        the largest score; of equal scores the smallest token
//
// Floor: 10 rounds of Philox for four tokens, some 15 operations a token. The result is deterministic: it is the argmax
// of the float64 scores, whatever the order of the threads.
#pragma once
#include "sampling.h"
#include "softmax.cuh"

namespace {

constexpr double infinity = INFINITY;

// Philox4x32-10 (Salmon et al. 2011): one random word for each of the tokens 4 quad to 4 quad + 3.
__device__ __forceinline__ uint4 philox(const NoiseKey& noise_key, unsigned quad) {
  unsigned a = quad, b = noise_key.step, c = noise_key.row_id[0], d = noise_key.row_id[1];
  unsigned key0 = noise_key.seed[0], key1 = noise_key.seed[1];
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned left = 0xD2511F53u * a, left_high = __umulhi(0xD2511F53u, a);
    const unsigned right = 0xCD9E8D57u * c, right_high = __umulhi(0xCD9E8D57u, c);
    a = right_high ^ b ^ key0;
    b = right;
    c = left_high ^ d ^ key1;
    d = left;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return make_uint4(a, b, c, d);
}

// Word i of four. An array with a variable index would be in local memory.
__device__ __forceinline__ unsigned word_at(const uint4& words, int i) {
  if (i == 0) return words.x;
  if (i == 1) return words.y;
  if (i == 2) return words.z;
  return words.w;
}

// The score of a token in float64: x / temperature + gumbel, or the logit itself if sampling is greedy.
__device__ __forceinline__ double exact_score(const SamplingParams& params, float x, int token) {
  if (params.greedy) return x;
  const double z = x / params.temperature;
  if (params.noise) return z + params.noise[token];
  return z + gumbel(word_at(philox(params.key, static_cast<unsigned>(token) / 4), token % 4));
}

__device__ __forceinline__ Candidate warp_best(Candidate best) {
#pragma unroll
  for (int distance = warp_size / 2; distance; distance /= 2) {
    const double score = __shfl_xor_sync(full_mask, best.score, distance);
    const float logit = __shfl_xor_sync(full_mask, best.logit, distance);
    const int token = __shfl_xor_sync(full_mask, best.token, distance);
    best.update(score, logit, token);
  }
  return best;
}

struct SampleShared {
  Candidate best[warp_size];
  float bound[warp_size];
  double score[warp_size];
};

__device__ __forceinline__ Candidate block_best(Candidate best, SampleShared& shared) {
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  best = warp_best(best);
  __syncthreads();  // until all threads have read the results of the call before
  if (lane == 0) shared.best[warp] = best;
  __syncthreads();
  return warp_best(lane < blockDim.x / warp_size ? shared.best[lane] : no_candidate());
}

// The two smallest bounds seen by this thread, and the token of the smallest.
struct TwoSmallest {
  float smallest, second, logit;
  int token;

  __device__ __forceinline__ void update(float bound, float x, int new_token) {
    if (bound < smallest) {
      second = smallest;
      smallest = bound;
      logit = x;
      token = new_token;
    } else if (bound < second) {
      second = bound;
    }
  }
};

// Lower bounds of the arrival times of tokens v to v + 3, relative to that of `max_logit`. If sampling is greedy, the
// distances of their logits from the largest one.
__device__ __forceinline__ void arrival_bounds(const SamplingParams& params, float max_logit, int v,
                                               const float (&x)[4], const float (&inverse_mass)[4], float (&bound)[4]) {
  const float smallest = fminf(fminf(inverse_mass[0], inverse_mass[1]), fminf(inverse_mass[2], inverse_mass[3]));
  uint4 random = make_uint4(0, 0, 0, 0);
  if (!params.greedy && smallest < INFINITY) random = philox(params.key, static_cast<unsigned>(v) / 4);
  const unsigned words[4] = {random.x, random.y, random.z, random.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float u = (static_cast<float>(words[i]) + 0.5f) * 0x1p-32f;
    bound[i] = params.greedy ? max_logit - x[i] : u * inverse_mass[i];
    if (inverse_mass[i] == INFINITY) bound[i] = INFINITY;
  }
}

// Returns the best of this thread's tokens, by the score of each of them.
template <class ForEachQuad>
__device__ __forceinline__ Candidate best_of_all(const SamplingParams& params, const ForEachQuad& for_each_quad) {
  Candidate best = no_candidate();
  for_each_quad([&](int v, const float (&x)[4], const float (&inverse_mass)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (inverse_mass[i] < INFINITY) best.update(exact_score(params, x[i], v + i), x[i], v + i);
  });
  return best;
}

// Returns the best of this thread's tokens, or no candidate if none of them can win: steps 1 to 3 above.
template <class ForEachQuad>
__device__ __forceinline__ Candidate best_by_bounds(const SamplingParams& params, float max_logit,
                                                    const ForEachQuad& for_each_quad, SampleShared& shared) {
  Candidate best = no_candidate();
  TwoSmallest mine{INFINITY, INFINITY, 0.f, -1};
  for_each_quad([&](int v, const float (&x)[4], const float (&inverse_mass)[4]) {
    float bound[4];
    arrival_bounds(params, max_logit, v, x, inverse_mass, bound);
#pragma unroll
    for (int i = 0; i < 4; ++i) mine.update(bound[i], x[i], v + i);
  });

  const float smallest = block_reduce<Min>(mine.smallest, INFINITY, shared.bound);
  const bool has_smallest = mine.smallest == smallest && mine.token >= 0;
  if (has_smallest) best.update(exact_score(params, mine.logit, mine.token), mine.logit, mine.token);
  const double score = block_reduce<Max>(best.score, -infinity, shared.score);
  // 1e-4: more than the error of a bound in float32
  const float threshold =
      params.greedy ? smallest : static_cast<float>(exp(max_logit / params.temperature - score) * (1 + 1e-4));

  if (mine.second <= threshold) {
    for_each_quad([&](int v, const float (&x)[4], const float (&inverse_mass)[4]) {
      float bound[4];
      arrival_bounds(params, max_logit, v, x, inverse_mass, bound);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (bound[i] <= threshold && inverse_mass[i] < INFINITY)
          best.update(exact_score(params, x[i], v + i), x[i], v + i);
    });
  } else if (mine.smallest <= threshold && !has_smallest && mine.token >= 0) {
    best.update(exact_score(params, mine.logit, mine.token), mine.logit, mine.token);
  }
  return best;
}

// e^-z of a token, z relative to the largest logit; infinite if the token cannot be sampled.
__device__ __forceinline__ float inverse_mass(float x, float max_logit, float inverse_temperature) {
  return x == -INFINITY ? INFINITY : fminf(fast_exp((max_logit - x) * inverse_temperature), 3e38f);
}

// The same argmax in one visit of each quad, in any order, for warps whose lanes do not hold their quads in registers.
// `limit` is an upper bound of the smallest arrival time so far: a token whose lower bound is greater has lost. A lane
// remembers one token that has not, and computes a score only if it would have to remember a second one.
struct Race {
  const SamplingParams& params;
  const NoiseKey key;
  const bool has_bounds;  // not if sampling is greedy, nor with the caller's noise
  Candidate best = no_candidate();
  float limit = INFINITY, pending_bound = INFINITY, pending_logit = 0.f;
  int pending_token = -1;

  __device__ explicit Race(const SamplingParams& params)
      : params(params), key(params.key), has_bounds(!params.greedy && !params.noise) {}
  __device__ __forceinline__ void update(float x, int token) { best.update(exact_score(params, x, token), x, token); }
  // All lanes of the warp call it; inverse_mass is infinite for tokens that do not take part.
  __device__ __forceinline__ void offer(int v, const float (&x)[4], const float (&inverse_mass)[4]) {
    unsigned due = 0;  // tokens whose score we compute now, as bits
    if (!has_bounds) {
#pragma unroll
      for (int i = 0; i < 4; ++i) due |= inverse_mass[i] < INFINITY ? 1u << i : 0u;
    } else {
      const uint4 random = philox(key, static_cast<unsigned>(v) / 4);
      const unsigned words[4] = {random.x, random.y, random.z, random.w};
      float bound[4], upper = INFINITY;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float u = (static_cast<float>(words[i]) + 0.5f) * 0x1p-32f;
        bound[i] = u * inverse_mass[i];
        if (u < 0.68f) upper = fminf(upper, fmaf(bound[i], u, bound[i]));  // there w <= u + u^2
      }
      if (upper > 1e25f) upper = INFINITY;  // an inverse mass may be at its largest value, less than it should be
      limit = warp_min(fminf(limit, upper * (1 + 1e-4f)));  // 1e-4: more than the error of a bound in float32
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!(bound[i] <= limit && bound[i] < INFINITY)) continue;
        if (pending_token >= 0 && pending_bound <= limit) {
          due |= 1u << i;
        } else {
          pending_bound = bound[i];
          pending_logit = x[i];
          pending_token = v + i;
        }
      }
    }
    for (; due; due &= due - 1) {
      const int i = __ffs(static_cast<int>(due)) - 1;
      update(i < 2 ? (i ? x[1] : x[0]) : (i == 2 ? x[2] : x[3]), v + i);
    }
  }
  // Returns the block's token.
  __device__ __forceinline__ Candidate finish(SampleShared& shared) {
    const float block_limit = block_reduce<Min>(limit, INFINITY, shared.bound);
    if (pending_token >= 0 && pending_bound <= block_limit) update(pending_logit, pending_token);
    return block_best(best, shared);
  }

 private:
  static __device__ __forceinline__ float warp_min(float x) {  // of numbers that are not negative
    return __uint_as_float(__reduce_min_sync(full_mask, __float_as_uint(x)));
  }
};

// Returns the block's token. `for_each_quad(f)` calls f(v, x, inverse_mass) for the quads of tokens of this thread:
// x are the logits of tokens v to v + 3, and inverse_mass is e^-z relative to `max_logit`, the largest logit that may
// be sampled; infinite for a token that may not be.
template <class ForEachQuad>
__device__ __forceinline__ Candidate gumbel_argmax(const SamplingParams& params, float max_logit,
                                                   const ForEachQuad& for_each_quad, SampleShared& shared) {
  const bool has_noise = params.noise && !params.greedy;
  const Candidate best =
      has_noise ? best_of_all(params, for_each_quad) : best_by_bounds(params, max_logit, for_each_quad, shared);
  return block_best(best, shared);
}

}  // namespace
