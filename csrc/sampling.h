// CPU and CUDA share this part of sampling a token from a row of logits: its parameters, the noise of a random word,
// the order of logits, the cutoff of a filter, and a row's outputs. kernels/_sampling.py is the reference.
#pragma once
#include <stdint.h>
#include <string.h>

#include "dialect.h"

namespace {

// Arguments of a call. The first four have an element for each row, or are null if the option is off.
struct SampleArgs {
  const float* temperature;
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
  int64_t seed;
  const int64_t* row_ids;
  const int64_t* steps;
  const float* noise;  // null, or Gumbel values (B, V) in place of Philox's
};

struct Outputs {
  int64_t* tokens;
  float* logprobs;
  float* raw_logprobs;
  float* kept_logprobs;
  float* log_kept_mass;
  float* entropy;
};

// Key and counter of Philox; the counter's first word is the number of the quad of tokens.
struct NoiseKey {
  uint32_t seed[2], step, row_id[2];
};

// The sampling parameters of one row.
struct SamplingParams {
  double temperature;  // 1 if greedy
  float inverse_temperature;
  bool greedy, valid;
  int64_t top_k;       // 0: off
  float top_p, min_p;  // 1 and 0: off
  const float* noise;
  NoiseKey key;

  INLINE bool has_filter() const { return top_k || top_p < 1.f || min_p > 0.f; }
};

INLINE bool in_range(float temperature, int64_t top_k, float top_p, float min_p) {
  return temperature >= 0.f && temperature <= 1e6f && top_k >= 0 && top_p >= 1e-30f && top_p <= 1.f && min_p >= 0.f &&
         min_p <= 1.f;
}

INLINE SamplingParams sampling_params(const SampleArgs& args, int64_t row, int64_t V) {
  SamplingParams params;
  const float temperature = args.temperature ? args.temperature[row] : 1.f;
  params.top_k = args.top_k ? args.top_k[row] : 0;
  params.top_p = args.top_p ? args.top_p[row] : 1.f;
  params.min_p = args.min_p ? args.min_p[row] : 0.f;
  params.valid = in_range(temperature, params.top_k, params.top_p, params.min_p);
  if (params.top_k >= V) params.top_k = 0;
  params.greedy = temperature == 0.f;
  params.temperature = params.greedy ? 1. : temperature;
  params.inverse_temperature = static_cast<float>(min(1. / params.temperature, 3e38));
  params.noise = args.noise ? args.noise + row * V : nullptr;
  const uint64_t row_id = static_cast<uint64_t>(args.row_ids[row]), seed = static_cast<uint64_t>(args.seed);
  params.key.seed[0] = static_cast<uint32_t>(seed);
  params.key.seed[1] = static_cast<uint32_t>(seed >> 32);
  params.key.step = static_cast<uint32_t>(args.steps[row]);
  params.key.row_id[0] = static_cast<uint32_t>(row_id);
  params.key.row_id[1] = static_cast<uint32_t>(row_id >> 32);
  return params;
}

// The Gumbel value of a random word: -log(-log(1 - u)), u = (word + 1/2) / 2^32.
INLINE double gumbel(uint32_t word) { return -log(-log1p(-(word + 0.5) * 0x1p-32)); }

// The token with the largest score, x / temperature + gumbel, so far; of equal scores the smallest token.
struct Candidate {
  double score;
  float logit;
  int32_t token;

  INLINE void update(double new_score, float new_logit, int32_t new_token) {
    if (new_score > score || (new_score == score && new_token < token && score > -__builtin_inf())) {
      score = new_score;
      logit = new_logit;
      token = new_token;
    }
  }
};

INLINE Candidate no_candidate() { return {-__builtin_inf(), 0.f, -1}; }

// Floats as integers of the same order, one for each value: -0 has the key of 0.
INLINE int64_t order_key(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits < 0 ? -static_cast<int64_t>(bits & 0x7fffffff) : bits;
}
INLINE float from_order_key(int64_t key) {
  const uint32_t bits = key < 0 ? 0x80000000u | static_cast<uint32_t>(-key) : static_cast<uint32_t>(key);
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The last token that a filter keeps, in the order (logit falling, token rising).
struct Cutoff {
  float logit;
  int32_t token;

  INLINE bool keeps(float x, int32_t v) const { return x > logit || (x == logit && v <= token); }
};
constexpr int32_t all_equal = INT32_MAX;  // as a cutoff's token: keep every token of that logit

INLINE Cutoff no_cutoff() { return {-__builtin_inff(), all_equal}; }

INLINE Cutoff tighter(const Cutoff& a, const Cutoff& b) {
  if (a.logit != b.logit) return a.logit > b.logit ? a : b;
  return a.token < b.token ? a : b;
}

// The smallest logit whose probability is at least min_p times that of the largest.
INLINE float min_p_threshold(float max_logit, double temperature, float min_p) {
  const double log_min_p = log(static_cast<double>(min_p));
  int64_t rejected = order_key(-__builtin_inff()), kept = order_key(max_logit);
  while (kept - rejected > 1) {
    const int64_t middle = (kept + rejected) >> 1;
    const double z = (static_cast<double>(from_order_key(middle)) - max_logit) / temperature;
    if (z >= log_min_p)
      kept = middle;
    else
      rejected = middle;
  }
  return from_order_key(kept);
}

// The largest logit of a row, and relative to it the sums of e^(x - max_logit), of p = e^z, z = (x - max_logit) /
// temperature, and of p z. The first two leave out the 1 of one token with the largest logit: beside it those of a row
// whose best token is far ahead would be lost, and with them its log-probability. A NaN or +inf among the logits makes
// max_logit or raw_others NaN or infinite.
struct LogitSums {
  double max_logit, raw_others, others, moment;

  INLINE double mass() const { return 1. + others; }
};

INLINE void write_invalid(const Outputs& out, int64_t row) {
  const float nan = __builtin_nanf("");
  out.tokens[row] = -1;
  out.logprobs[row] = nan;
  out.raw_logprobs[row] = nan;
  out.kept_logprobs[row] = nan;
  out.log_kept_mass[row] = nan;
  out.entropy[row] = nan;
}

// Writes a row's outputs. `sums` are those of every token, `kept` those of the tokens that filters and a ban keep.
INLINE void write_row(const Outputs& out, int64_t row, const SamplingParams& params, const LogitSums& sums,
                      const Candidate& best, const LogitSums& kept) {
  const double infinity = __builtin_inf();
  const bool finite = sums.max_logit > -infinity && sums.max_logit < infinity && sums.raw_others < infinity;
  if (!params.valid || best.token < 0 || !finite) return write_invalid(out, row);
  const double relative_logit = best.logit - sums.max_logit, log_sum = log1p(sums.others);
  const double logprob = relative_logit / params.temperature - log_sum;
  const double kept_logprob = (best.logit - kept.max_logit) / params.temperature - log1p(kept.others);
  out.tokens[row] = best.token;
  out.raw_logprobs[row] = static_cast<float>(relative_logit - log1p(sums.raw_others));
  out.logprobs[row] = params.greedy ? 0.f : static_cast<float>(logprob);
  out.kept_logprobs[row] = params.greedy ? 0.f : static_cast<float>(max(kept_logprob, logprob));
  out.log_kept_mass[row] = params.greedy ? 0.f : static_cast<float>(min(logprob - kept_logprob, 0.));
  out.entropy[row] = params.greedy ? 0.f : static_cast<float>(log_sum - sums.moment / sums.mass());
}

}  // namespace
