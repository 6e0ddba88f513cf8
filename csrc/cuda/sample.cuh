// Samples a token from a row of logits on NVIDIA GPUs: the noise and the Gumbel argmax. kernels/_sampling.py defines
// them, sampling.h has what CPU and CUDA share.
//
// The token is the argmax of z + gumbel, gumbel = -log(w), w = -log1p(-u): the one with the smallest arrival time
// w e^-z. As u <= w, and w <= u + u^2 where u < 0.68, the time has bounds without a logarithm:
//
//     1. each lane       the bounds of four tokens
//     2. the warp        `limit`, the smallest upper bound so far: a token whose lower bound is above it has lost
//     3. each lane       remembers one token that has not lost. Only if it would have to remember a second one, mostly
//                        never, it computes a score, z + gumbel in float64, at once
//     4. the block       the scores of the remembered tokens that are within the block's limit: mostly one or two; then
//                        the largest score, of equal scores the smallest token
//
// Floor: 10 rounds of Philox for four tokens, some 15 operations a token. The result is deterministic: it is the argmax
// of the float64 scores, whatever the order of the tokens.
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
};

__device__ __forceinline__ Candidate block_best(Candidate best, SampleShared& shared) {
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  best = warp_best(best);
  __syncthreads();  // until all threads have read the results of the call before
  if (lane == 0) shared.best[warp] = best;
  __syncthreads();
  return warp_best(lane < blockDim.x / warp_size ? shared.best[lane] : no_candidate());
}

// e^-z of a token, z relative to the largest logit; infinite if the token cannot be sampled.
__device__ __forceinline__ float inverse_mass(float x, float max_logit, float inverse_temperature) {
  return x == -INFINITY ? INFINITY : fminf(fast_exp((max_logit - x) * inverse_temperature), 3e38f);
}

// The search for the best token of a block. Each warp offers its tokens, four per lane at a time, in any order.
template <class T>
struct GumbelArgmax {
  static constexpr float no_limit = 3.4028235e38f;  // finite: a token with an infinite bound does not take part
  const SamplingParams& params;
  const T* const logits;  // of the row
  const NoiseKey key;
  const bool has_bounds;  // not if sampling is greedy, nor with the caller's noise
  Candidate best = no_candidate();
  float limit = no_limit, pending_bound = INFINITY;
  int pending = -1;

  __device__ GumbelArgmax(const SamplingParams& params, const T* logits)
      : params(params), logits(logits), key(params.key), has_bounds(!params.greedy && !params.noise) {}

  // Computes the score of a token.
  __device__ __forceinline__ void score(int token) {
    const float x = to_float(logits[token]);
    best.update(exact_score(params, x, token), x, token);
  }
  // Offers tokens v to v + 3; inverse_mass is infinite for those that may not be sampled. All lanes of the warp call it
  // together. Returns, as bits, the tokens that the caller must score.
  __device__ __forceinline__ unsigned offer(int v, const float (&inverse_mass)[4]) {
    unsigned candidates = 0;
    if (!has_bounds) {
#pragma unroll
      for (int i = 0; i < 4; ++i) candidates |= inverse_mass[i] < INFINITY ? 1u << i : 0u;
      return candidates;
    }
    const uint4 random = philox(key, static_cast<unsigned>(v) / 4);
    const unsigned words[4] = {random.x, random.y, random.z, random.w};
    float bound[4], upper = no_limit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float u = (static_cast<float>(words[i]) + 0.5f) * 0x1p-32f;
      bound[i] = u * inverse_mass[i];
      if (u < 0.68f) upper = fminf(upper, fmaf(bound[i], u, bound[i]));  // there w <= u + u^2
    }
    if (upper > 1e25f) upper = no_limit;  // an inverse mass may be at its largest value, less than it should be
    limit = warp_min(fminf(limit, upper * (1 + 1e-4f)));  // 1e-4: more than the error of a bound in float32
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!(bound[i] <= limit)) continue;
      if (pending >= 0 && pending_bound <= limit) {
        candidates |= 1u << i;
      } else {
        pending_bound = bound[i];
        pending = v + i;
      }
    }
    return candidates;
  }
  // Returns the block's token.
  __device__ __forceinline__ Candidate finish(SampleShared& shared) {
    const float block_limit = block_reduce<Min>(limit, no_limit, shared.bound);
    if (pending >= 0 && pending_bound <= block_limit) score(pending);
    return block_best(best, shared);
  }

 private:
  static __device__ __forceinline__ float warp_min(float x) {  // of numbers that are not negative
    return __uint_as_float(__reduce_min_sync(full_mask, __float_as_uint(x)));
  }
};

}  // namespace
