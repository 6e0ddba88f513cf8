// Drawing a token from logits on an NVIDIA GPU: the keyed noise, the race of the tokens, what a row writes.
// kernels/_sampling.py says what is drawn.
//
// Token v waits w e^-z, w = -log1p(-u), and the first one is drawn: the argmax of z + gumbel. As w >= u, u e^-z bounds
// the time from below without a logarithm. A block finds the least bound, takes that token's score in float64, and then
// those of the tokens whose bound may still beat it, mostly none: the token is that of the float64 reference.
#pragma once
#include "reduce.cuh"
#include "vec.cuh"

namespace {

constexpr double infinite = INFINITY;

struct Options {  // the first four one a row, or null where switched off
  const float* temperature;
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
  int64_t seed;
  const int64_t* row_ids;
  const int64_t* steps;
  const float* noise;  // (B, V), in place of the keyed noise
};

struct Outputs {
  int64_t* tokens;
  float* logprobs;
  float* raw_logprobs;
  float* kept_logprobs;
  float* log_kept_mass;
  float* entropy;
};

// What a row asks for.
struct Request {
  double temperature;
  float inverse;  // of the temperature
  bool greedy, valid;
  int64_t top_k;  // 0: off
  float top_p, min_p;
  const float* noise;
  unsigned key0, key1, step, row0, row1;

  __device__ Request(const Options& o, int64_t row, int V) {
    const float given = o.temperature ? o.temperature[row] : 1.f;
    top_k = o.top_k ? o.top_k[row] : 0, top_p = o.top_p ? o.top_p[row] : 1.f, min_p = o.min_p ? o.min_p[row] : 0.f;
    valid =
        given >= 0.f && given <= 1e6f && top_k >= 0 && top_p >= 1e-30f && top_p <= 1.f && min_p >= 0.f && min_p <= 1.f;
    if (top_k >= V) top_k = 0;
    greedy = given == 0.f, temperature = greedy ? 1. : given;
    inverse = static_cast<float>(min(1. / temperature, 3e38));
    noise = o.noise ? o.noise + row * V : nullptr;
    const uint64_t id = static_cast<uint64_t>(o.row_ids[row]), seed = static_cast<uint64_t>(o.seed);
    key0 = static_cast<unsigned>(seed), key1 = static_cast<unsigned>(seed >> 32);
    step = static_cast<unsigned>(o.steps[row]);
    row0 = static_cast<unsigned>(id), row1 = static_cast<unsigned>(id >> 32);
  }
  __device__ bool filters() const { return top_k || top_p < 1.f || min_p > 0.f; }
};

// Philox4x32-10 (Salmon et al. 2011): the words of tokens 4 quad to 4 quad + 3.
__device__ __forceinline__ uint4 philox(const Request& r, unsigned quad) {
  unsigned a = quad, b = r.step, c = r.row0, d = r.row1, k0 = r.key0, k1 = r.key1;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned left = 0xD2511F53u * a, left_high = __umulhi(0xD2511F53u, a);
    const unsigned right = 0xCD9E8D57u * c, right_high = __umulhi(0xCD9E8D57u, c);
    a = right_high ^ b ^ k0, b = right, c = left_high ^ d ^ k1, d = left;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return make_uint4(a, b, c, d);
}

// What a token is drawn by, in float64: x / temperature + gumbel, or the logit itself.
__device__ __forceinline__ double exact_score(const Request& r, float x, int token) {
  if (r.greedy) return x;
  const double z = x / r.temperature;
  if (r.noise) return z + r.noise[token];
  const uint4 four = philox(r, static_cast<unsigned>(token) / 4);
  const unsigned word = token % 4 == 0 ? four.x : token % 4 == 1 ? four.y : token % 4 == 2 ? four.z : four.w;
  return z - log(-log1p(-(word + 0.5) * 0x1p-32));
}

struct Drawn {
  double score;
  float logit;
  int token;

  __device__ __forceinline__ void offer(double its_score, float its_logit, int its_token) {
    if (its_score > score || (its_score == score && its_token < token && score > -infinite))
      score = its_score, logit = its_logit, token = its_token;
  }
};

__device__ __forceinline__ Drawn nobody() { return {-infinite, 0.f, -1}; }

__device__ __forceinline__ Drawn warp_best(Drawn best) {
#pragma unroll
  for (int apart = lanes / 2; apart; apart /= 2) {
    const double score = __shfl_xor_sync(all_lanes, best.score, apart);
    const float logit = __shfl_xor_sync(all_lanes, best.logit, apart);
    const int token = __shfl_xor_sync(all_lanes, best.token, apart);
    best.offer(score, logit, token);
  }
  return best;
}

struct DrawMemory {
  Drawn best[lanes];
  float bound[lanes];
  double score[lanes];
};

struct Least {
  __device__ float operator()(float a, float b) const { return fminf(a, b); }
};
struct Greatest {
  __device__ double operator()(double a, double b) const { return fmax(a, b); }
};

// The two least bounds that a thread has seen, and whose the least one is.
struct Race {
  float least, second, logit;
  int token;

  __device__ __forceinline__ void offer(float bound, float x, int its_token) {
    if (bound < least)
      second = least, least = bound, logit = x, token = its_token;
    else if (bound < second)
      second = bound;
  }
};

// The block's token. `each(f)` calls f(v, x, scale) for the quads of tokens v to v + 3 of this thread: their logits,
// and e^-z around `top`, the largest logit that may be drawn; infinite where a token may not.
template <class Each>
__device__ __forceinline__ Drawn draw(const Request& r, float top, const Each& each, DrawMemory& memory) {
  Drawn best = nobody();
  if (r.noise && !r.greedy) {
    each([&](int v, const float (&x)[4], const float (&scale)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (scale[i] < INFINITY) best.offer(exact_score(r, x[i], v + i), x[i], v + i);
    });
  } else {
    const auto bounds = [&](int v, const float (&x)[4], const float (&scale)[4], float (&bound)[4]) {
      const float least = fminf(fminf(scale[0], scale[1]), fminf(scale[2], scale[3]));
      uint4 word = make_uint4(0, 0, 0, 0);
      if (!r.greedy && least < INFINITY) word = philox(r, static_cast<unsigned>(v) / 4);
      const unsigned words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float u = (static_cast<float>(words[i]) + 0.5f) * 0x1p-32f;
        bound[i] = scale[i] == INFINITY ? INFINITY : r.greedy ? top - x[i] : u * scale[i];
      }
    };
    Race race{INFINITY, INFINITY, 0.f, -1};
    each([&](int v, const float (&x)[4], const float (&scale)[4]) {
      float bound[4];
      bounds(v, x, scale, bound);
#pragma unroll
      for (int i = 0; i < 4; ++i) race.offer(bound[i], x[i], v + i);
    });
    const float first = block_reduce<Least>(race.least, INFINITY, memory.bound);
    const bool leads = race.least == first && race.token >= 0;
    if (leads) best.offer(exact_score(r, race.logit, race.token), race.logit, race.token);
    const double score = block_reduce<Greatest>(best.score, -infinite, memory.score);
    // 1e-4: more than the error of a bound in float32
    const float bar = r.greedy ? first : static_cast<float>(exp(top / r.temperature - score) * (1 + 1e-4));
    if (race.second <= bar) {
      each([&](int v, const float (&x)[4], const float (&scale)[4]) {
        float bound[4];
        bounds(v, x, scale, bound);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (bound[i] <= bar && scale[i] < INFINITY) best.offer(exact_score(r, x[i], v + i), x[i], v + i);
      });
    } else if (race.least <= bar && !leads && race.token >= 0) {
      best.offer(exact_score(r, race.logit, race.token), race.logit, race.token);
    }
  }
  best = warp_best(best);
  __syncthreads();  // what a call before this one left there has been read
  if (threadIdx.x % lanes == 0) memory.best[threadIdx.x / lanes] = best;
  __syncthreads();
  return warp_best(threadIdx.x % lanes < blockDim.x / lanes ? memory.best[threadIdx.x % lanes] : nobody());
}

// Of a row: the largest logit, and around it the sums of e^(x - largest), of p = e^z, z = (x - largest) / temperature,
// and of p z. A NaN or +inf among the logits shows in `raw`.
struct RowSums {
  double largest, raw, mass, moment;
};

// By one thread, or by several with the same arguments.
__device__ __forceinline__ void report(const Outputs& out, int64_t row, const Request& r, const RowSums& sums,
                                       const Drawn& drawn, double log_kept_mass) {
  const bool fine = r.valid && drawn.token >= 0 && sums.raw > 0. && sums.raw < infinite;
  const double above = drawn.logit - sums.largest, log_sum = log(sums.mass), logprob = above / r.temperature - log_sum;
  const bool sure = r.greedy;
  out.tokens[row] = fine ? drawn.token : -1;
  out.raw_logprobs[row] = fine ? static_cast<float>(above - log(sums.raw)) : NAN;
  out.logprobs[row] = !fine ? NAN : sure ? 0.f : static_cast<float>(logprob);
  out.kept_logprobs[row] = !fine ? NAN : sure ? 0.f : static_cast<float>(logprob - log_kept_mass);
  out.log_kept_mass[row] = !fine ? NAN : sure ? 0.f : static_cast<float>(log_kept_mass);
  out.entropy[row] = !fine ? NAN : sure ? 0.f : static_cast<float>(log_sum - sums.moment / sums.mass);
}

}  // namespace
