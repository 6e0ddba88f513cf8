// Samples a token from a row of logits by the Gumbel argmax, for sample_tokens.cpp and linear_sample_tokens.cpp.
// kernels/_sampling.py defines what is sampled; filters.h finds the cutoff of the filters.
//
//     row     | tile 0: 1024 logits | tile 1 | ...            a tile stays in the first-level cache for two passes:
//     tile    its maximum; then, in blocks of 4 W logits, e^z for the sums and the candidates for the argmax
//
// A token's score is z + gumbel, gumbel = -log(w), w = -log1p(-u): it beats the best score so far iff w < e^(z - best).
// As w >= u, u < e^(z - best) is necessary; e^z is known, for the sums. Only tokens that pass this test, some 15 a row,
// take a logarithm: their scores are computed in float64, and the argmax is that of the float64 reference.
//
// Floor: one read of the row, and the operations that sample_tokens.cpp counts. Tiles are added in their order, so the
// sums have the same bits whether a row is in memory as a whole or a product makes it tile by tile.
#pragma once
#include "filters.h"
#include "philox.h"

namespace {

static_assert(BLOCK % (4 * quads_per_call) == 0, "a block holds whole calls of philox");
constexpr int SAMPLE_TILE = 1024;

// The best token so far of one row. A token can beat it only if floor(word / 2) < p * threshold, where
// p = e^(x / temperature - shift).
struct GumbelArgmax {
  SamplingParams params;
  Candidate best;
  double shift;
  float threshold;
};

INLINE GumbelArgmax start_argmax(const SamplingParams& params) { return {params, no_candidate(), 0, __builtin_inff()}; }

INLINE void update_threshold(GumbelArgmax& argmax) {
  // 1e-4: more than the error of p in float32
  const double bound = exp(argmax.shift - argmax.best.score) * 0x1p31 * (1 + 1e-4);
  argmax.threshold = argmax.best.token < 0 ? __builtin_inff() : (float)bound;
}

// Tokens come in rising order: of equal scores the first one stays.
__attribute__((noinline)) void try_token(GumbelArgmax& argmax, float x, int32_t v, double noise) {
  const double score = x / argmax.params.temperature + noise;
  if (!(score > argmax.best.score)) return;
  argmax.best = {score, x, v};
  update_threshold(argmax);
}

// BLOCK tokens from v on, with their logits x and their p.
INLINE void try_block(GumbelArgmax& argmax, int32_t v, const f32* x, const f32* p) {
  // The smallest u is 2^-33; floor(word / 2) is compared with u 2^31.
  if (!any(max(max(p[0], p[1]), max(p[2], p[3])) * argmax.threshold > 0.25f)) return;
  uint32_t words[BLOCK];
  for (int i = 0; i < W; i += quads_per_call) philox(argmax.params.key, (uint32_t)v / 4 + i, words + 4 * i);
  i32 passes[4], any_passes = {};
  for (int j = 0; j < 4; ++j) {
    u32 word;
    memcpy(&word, words + j * W, sizeof word);
    passes[j] = __builtin_convertvector((i32)(word >> 1), f32) < p[j] * argmax.threshold;
    any_passes |= passes[j];
  }
  if (!any(any_passes)) return;
  int32_t lanes[BLOCK];
  float logits[BLOCK];
  memcpy(lanes, passes, sizeof lanes);
  memcpy(logits, x, sizeof logits);
  for (int i = 0; i < BLOCK; ++i)
    if (lanes[i]) try_token(argmax, logits[i], v + i, gumbel(words[i]));
}

constexpr RowSums no_sums = {-__builtin_inf(), 0, 0, 0};

// Adds a tile's sums to those of the tiles before it. A NaN or +inf in max_logit stays there.
INLINE void add_tile(RowSums& row, const RowSums& tile, double temperature) {
  if (tile.max_logit == -__builtin_inf() || row.max_logit != row.max_logit) return;
  if (row.max_logit == -__builtin_inf() || !(tile.max_logit < __builtin_inf())) {
    row = tile;
    return;
  }
  const bool rises = tile.max_logit > row.max_logit;
  const RowSums &high = rises ? tile : row, &low = rises ? row : tile;
  const double gap = low.max_logit - high.max_logit, z = gap / temperature;
  const double raw_factor = exp(gap), factor = temperature == 1 ? raw_factor : exp(z);
  const double moment = factor > 0 ? factor * (low.moment + z * low.mass) : 0;
  row = {high.max_logit, high.raw_mass + raw_factor * low.raw_mass, high.mass + factor * low.mass,
         high.moment + moment};
}

// Kahan's sum of vectors: it carries the rounding error along. Otherwise many equal small terms beside one of 1 would
// all be rounded the same way.
struct KahanSum {
  f32 sum = {}, carry = {};
  INLINE void add(f32 x) {
    const f32 y = x - carry, next = sum + y;
    carry = (next - sum) - y;
    sum = next;
  }
  INLINE double value() const {
    double total = 0;
    for (int i = 0; i < W; ++i) total += (double)sum[i] - carry[i];
    return total;
  }
};

// The largest of n logits; NaN if one is NaN.
template <class T>
INLINE float find_max(const T* x, int64_t n) {
  f32 largest = splat(-__builtin_inff());
  i32 is_nan = {};
  for (int64_t v = 0; v < n; v += W) {
    const f32 logits = n - v >= W ? load(x + v) : load_partial(x + v, (int)(n - v), -__builtin_inff());
    largest = max(largest, logits);
    is_nan |= logits != logits;
  }
  return any(is_nan) ? __builtin_nanf("") : reduce_max(largest);
}

// The sums of the n <= SAMPLE_TILE logits x of tokens `begin` to `begin + n - 1`, and with SAMPLE the argmax among
// them. TEMPERED: the temperature is not 1.
template <bool TEMPERED, bool SAMPLE, class T>
RowSums visit_tile(GumbelArgmax& argmax, const T* x, int32_t begin, int32_t n) {
  const float max_logit = find_max(x, n);
  if (!(max_logit > -__builtin_inff() && max_logit < __builtin_inff())) return {max_logit, 0, 0, 0};
  if (SAMPLE) {
    argmax.shift = max_logit / argmax.params.temperature;
    update_threshold(argmax);
  }
  KahanSum raw_mass, mass, moment;
  for (int32_t v = 0; v < n; v += BLOCK) {
    f32 logits[4], p[4], terms[4];
    load_block(x, n, v, logits);
    for (int j = 0; j < 4; ++j) {
      const f32 z = TEMPERED ? (logits[j] - max_logit) * argmax.params.inverse_temperature : logits[j] - max_logit;
      p[j] = exp(z);
      terms[j] = p[j] * max(z, splat(-100.f));
    }
    mass.add((p[0] + p[1]) + (p[2] + p[3]));
    moment.add((terms[0] + terms[1]) + (terms[2] + terms[3]));
    if (TEMPERED)
      raw_mass.add((exp(logits[0] - max_logit) + exp(logits[1] - max_logit)) +
                   (exp(logits[2] - max_logit) + exp(logits[3] - max_logit)));
    if (SAMPLE) try_block(argmax, begin + v, logits, p);
  }
  const double total = mass.value();
  return {max_logit, TEMPERED ? raw_mass.value() : total, total, moment.value()};
}

template <bool SAMPLE, class T>
INLINE RowSums visit_tile(GumbelArgmax& argmax, const T* x, int32_t begin, int32_t n) {
  return argmax.params.temperature == 1 ? visit_tile<false, SAMPLE>(argmax, x, begin, n)
                                        : visit_tile<true, SAMPLE>(argmax, x, begin, n);
}

template <bool SAMPLE, class T>
RowSums visit_row(GumbelArgmax& argmax, const T* x, int32_t V) {
  RowSums row = no_sums;
  for (int32_t begin = 0; begin < V; begin += SAMPLE_TILE) {
    const int32_t n = (int32_t)min<int64_t>(SAMPLE_TILE, (int64_t)V - begin);
    add_tile(row, visit_tile<SAMPLE>(argmax, x + begin, begin, n), argmax.params.temperature);
  }
  return row;
}

// The mass of the tokens up to the cutoff, and with SAMPLE the argmax among them.
template <bool SAMPLE, class T>
double visit_kept(const LogitsRow<T>& row, GumbelArgmax& argmax, Cutoff cutoff) {
  double total = 0;
  i32 lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  argmax.shift = row.max_logit / argmax.params.temperature;
  update_threshold(argmax);
  for (int32_t v = 0; v < row.V; v += BLOCK) {
    f32 x[4], p[4];
    load_block(row.x, row.V, v, x);
    if (!any(max(max(x[0], x[1]), max(x[2], x[3])) >= cutoff.logit)) continue;
    for (int j = 0; j < 4; ++j) {
      const i32 kept = (x[j] > cutoff.logit) | ((x[j] == cutoff.logit) & (lane + (v + j * W) <= cutoff.token));
      p[j] = select(kept, row.fast_mass(x[j]), splat(0.f));
    }
    total += reduce_sum((p[0] + p[1]) + (p[2] + p[3]));
    if (SAMPLE) try_block(argmax, v, x, p);
  }
  return total;
}

// The cutoff of all filters; `mass` is that of all tokens.
template <class T>
Cutoff filter_cutoff(const LogitsRow<T>& row, GumbelArgmax& argmax, double mass) {
  const SamplingParams& params = argmax.params;
  Cutoff cutoff = no_cutoff();
  if (params.top_k) cutoff = find_cutoff<false>(row, (double)params.top_k, row.V);
  if (params.top_p < 1) {
    const double kept_mass = params.top_k ? visit_kept<false>(row, argmax, cutoff) : mass;
    cutoff = tighter(cutoff, find_cutoff<true>(row, params.top_p * kept_mass, mass));
  }
  if (params.min_p > 0)
    cutoff = tighter(cutoff, {min_p_threshold(row.max_logit, row.temperature, params.min_p), all_equal});
  return cutoff;
}

// The argmax with the caller's Gumbel values in place of the keyed noise.
template <class T>
void argmax_of_given_noise(const LogitsRow<T>& row, GumbelArgmax& argmax, Cutoff cutoff) {
  for (int32_t v = 0; v < row.V; ++v) {
    const float x = to_float(row.x[v]);
    if (cutoff.keeps(x, v)) try_token(argmax, x, v, argmax.params.noise[v]);
  }
}

// The first of n tokens whose logit is max_logit, if there is one; its score is left to the caller.
template <class T>
void take_largest(Candidate& best, const T* x, int32_t n, float max_logit) {
  int32_t first = 0;
  while (first < n && to_float(x[first]) != max_logit) ++first;
  if (first >= n) return;
  best.token = first;
  best.logit = max_logit;
}

// Samples from a row of logits in memory and writes its outputs. `all_sums`: those of every token, if a ban has
// replaced some logits of x by -inf; else null.
template <class T>
void sample_row(const T* x, int32_t V, int64_t b, const SamplingParams& params, const RowSums* all_sums,
                const Outputs& out) {
  if (!params.valid) return write_invalid(out, b);
  GumbelArgmax argmax = start_argmax(params);
  if (!params.greedy && !params.has_filter() && !params.noise && !all_sums) {
    const RowSums sums = visit_row<true>(argmax, x, V);
    return write_outputs(out, b, params, sums, argmax.best, 0);
  }
  const RowSums sums = visit_row<false>(argmax, x, V);
  if (!(sums.max_logit > -__builtin_inf() && sums.max_logit < __builtin_inf())) return write_invalid(out, b);
  const LogitsRow<T> row = {x, V, (float)sums.max_logit, params.temperature, params.inverse_temperature};
  if (params.greedy) {
    take_largest(argmax.best, x, V, row.max_logit);
    return write_outputs(out, b, params, all_sums ? *all_sums : sums, argmax.best, 0);
  }
  const Cutoff cutoff = params.has_filter() ? filter_cutoff(row, argmax, sums.mass) : no_cutoff();
  const double kept_mass =
      params.noise ? visit_kept<false>(row, argmax, cutoff) : visit_kept<true>(row, argmax, cutoff);
  if (params.noise) argmax_of_given_noise(row, argmax, cutoff);
  double log_kept_mass = params.has_filter() ? min(log(kept_mass / sums.mass), 0.) : 0;
  if (all_sums) {
    const double shift = (sums.max_logit - all_sums->max_logit) / params.temperature;
    log_kept_mass = min(log(kept_mass / all_sums->mass) + shift, 0.);
  }
  write_outputs(out, b, params, all_sums ? *all_sums : sums, argmax.best, log_kept_mass);
}

}  // namespace
