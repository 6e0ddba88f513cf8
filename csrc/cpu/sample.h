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
constexpr int MAX_KEPT_BLOCKS = 1024;  // so many are listed; of more the row is searched again

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

__attribute__((noinline)) void try_token(GumbelArgmax& argmax, float x, int32_t v, double noise) {
  argmax.best.update(x / argmax.params.temperature + noise, x, v);
  update_threshold(argmax);
}

// Token v, of a large logit x. Before any other, it spares the first block from being tried as a whole.
INLINE void try_first(GumbelArgmax& argmax, float x, int32_t v) {
  uint32_t words[4 * quads_per_call];
  philox(argmax.params.key, (uint32_t)v / 4, words);
  try_token(argmax, x, v, gumbel(words[v % 4]));
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

constexpr LogitSums no_sums = {-__builtin_inf(), 0, 0, 0};

INLINE bool is_finite(double x) { return x > -__builtin_inf() && x < __builtin_inf(); }

// True if the sums of the other tokens are so small beside the 1 of the largest logit that they lose digits if they are
// added to it in float32. sums_behind_leader has them.
INLINE bool leads_far(const LogitSums& sums) {
  return is_finite(sums.max_logit) && min(sums.others, sums.raw_others) < 0.5;
}

// The sums of both.
INLINE LogitSums join(const LogitSums& a, const LogitSums& b, double temperature) {
  if (b.max_logit == -__builtin_inf()) return a;
  if (a.max_logit == -__builtin_inf()) return b;
  const bool rises = b.max_logit > a.max_logit;
  const LogitSums &high = rises ? b : a, &low = rises ? a : b;
  const double gap = low.max_logit - high.max_logit, z = gap / temperature;
  const double raw_factor = exp(gap), factor = temperature == 1 ? raw_factor : exp(z);
  const double moment = factor > 0 ? factor * (low.moment + z * low.mass()) : 0;
  return {high.max_logit, high.raw_others + raw_factor * (1. + low.raw_others), high.others + factor * low.mass(),
          high.moment + moment};
}

// The sums of a row's tiles: `leader` those of the first tile with the largest logit, `rest` those of the other tiles,
// so that more exact ones can take the leader's place.
struct TiledSums {
  LogitSums leader = no_sums, rest = no_sums;
  int32_t leading_tile = -1;
};

// Tiles come in rising order. A NaN or +inf in max_logit stays there.
INLINE void add_tile(TiledSums& row, const LogitSums& sums, int32_t tile, double temperature) {
  if (row.leader.max_logit != row.leader.max_logit) return;
  if (sums.max_logit <= row.leader.max_logit) {
    row.rest = join(row.rest, sums, temperature);
    return;
  }
  row.rest = join(row.rest, row.leader, temperature);
  row.leader = sums;
  row.leading_tile = tile;
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
INLINE float find_max(const T* x, int32_t n) {
  f32 largest = splat(-__builtin_inff());
  i32 is_nan = {};
  for (int32_t v = 0; v < n; v += BLOCK) {
    f32 logits[4];
    load_block(x, n, v, logits);
    largest = max(largest, max(max(logits[0], logits[1]), max(logits[2], logits[3])));
    for (const f32& block : logits) is_nan |= block != block;
  }
  return any(is_nan) ? __builtin_nanf("") : reduce_max(largest);
}

// The index of the first of n logits that equals `logit`, or n.
template <class T>
INLINE int32_t find_logit(const T* x, int32_t n, float logit) {
  int32_t v = 0;
  while (v + W <= n && !any(load(x + v) == logit)) v += W;
  while (v < n && to_float(x[v]) != logit) ++v;
  return v;
}

// The sums of a tile whose largest logit leads far. The others' masses are taken relative to the largest of them,
// where float32 keeps their digits.
template <class T>
__attribute__((noinline)) LogitSums sums_behind_leader(const SamplingParams& params, const T* x, int32_t n,
                                                       float max_logit) {
  alignas(64) float others[SAMPLE_TILE];
  for (int32_t v = 0; v < n; v += W)
    store(others + v, n - v >= W ? load(x + v) : load_partial(x + v, (int)(n - v), -__builtin_inff()));
  others[find_logit(x, n, max_logit)] = -__builtin_inff();
  f32 largest = splat(-__builtin_inff());
  for (int32_t v = 0; v < n; v += W) largest = max(largest, load(others + v));
  const float origin = reduce_max(largest);
  if (origin == -__builtin_inff()) return {max_logit, 0, 0, 0};
  const bool is_tempered = params.temperature != 1;
  KahanSum raw_mass, mass, moment;
  for (int32_t v = 0; v < n; v += W) {
    const f32 distance = load(others + v) - origin, z = distance * params.inverse_temperature, p = exp(z);
    if (is_tempered) raw_mass.add(exp(distance));
    mass.add(p);
    moment.add(p * max(z, splat(-100.f)));
  }
  const double raw_lead = (double)max_logit - origin, lead = raw_lead / params.temperature, factor = exp(-lead);
  const double of_mass = mass.value(), of_raw_mass = is_tempered ? raw_mass.value() : of_mass;
  return {max_logit, exp(-raw_lead) * of_raw_mass, factor * of_mass,
          factor > 0 ? factor * (moment.value() - lead * of_mass) : 0};
}

// The sums of the n <= SAMPLE_TILE logits x of tokens `begin` to `begin + n - 1`, and with SAMPLE the argmax among
// them. TEMPERED: the temperature is not 1.
template <bool TEMPERED, bool SAMPLE, class T>
LogitSums visit_tile(GumbelArgmax& argmax, const T* x, int32_t begin, int32_t n) {
  const float max_logit = find_max(x, n);
  if (!(max_logit > -__builtin_inff() && max_logit < __builtin_inff())) return {max_logit, 0, 0, 0};
  if (SAMPLE) {
    argmax.shift = max_logit / argmax.params.temperature;
    if (argmax.best.token < 0)
      try_first(argmax, max_logit, begin + find_logit(x, n, max_logit));
    else
      update_threshold(argmax);
  }
  const f32 lowest = splat(MIN_EXPONENT);
  KahanSum raw_mass, mass, moment;
  for (int32_t v = 0; v < n; v += BLOCK) {
    f32 logits[4], p[4], terms[4], raw[4];
    load_block(x, n, v, logits);
    for (int j = 0; j < 4; ++j) {
      const f32 distance = logits[j] - max_logit;
      const f32 z = max(TEMPERED ? distance * argmax.params.inverse_temperature : distance, lowest);
      p[j] = fast_exp(z);
      terms[j] = p[j] * z;
      if (TEMPERED) raw[j] = fast_exp(max(distance, lowest));
    }
    mass.add((p[0] + p[1]) + (p[2] + p[3]));
    moment.add((terms[0] + terms[1]) + (terms[2] + terms[3]));
    if (TEMPERED) raw_mass.add((raw[0] + raw[1]) + (raw[2] + raw[3]));
    if (SAMPLE) try_block(argmax, begin + v, logits, p);
  }
  const double others = mass.value() - 1.;
  return {max_logit, TEMPERED ? raw_mass.value() - 1. : others, others, moment.value()};
}

template <bool SAMPLE, class T>
INLINE LogitSums visit_tile(GumbelArgmax& argmax, const T* x, int32_t begin, int32_t n) {
  return argmax.params.temperature == 1 ? visit_tile<false, SAMPLE>(argmax, x, begin, n)
                                        : visit_tile<true, SAMPLE>(argmax, x, begin, n);
}

// The sums of a row, and with SAMPLE the argmax.
template <bool SAMPLE, class T>
LogitSums visit_row(GumbelArgmax& argmax, const T* x, int32_t V) {
  const SamplingParams& params = argmax.params;
  TiledSums row;
  const auto tile_size = [&](int32_t begin) { return (int32_t)min<int64_t>(SAMPLE_TILE, (int64_t)V - begin); };
  for (int32_t tile = 0; tile * (int64_t)SAMPLE_TILE < V; ++tile) {
    const int32_t begin = tile * SAMPLE_TILE;
    add_tile(row, visit_tile<SAMPLE>(argmax, x + begin, begin, tile_size(begin)), tile, params.temperature);
  }
  const LogitSums sums = join(row.leader, row.rest, params.temperature);
  if (!leads_far(sums)) return sums;
  const int32_t begin = row.leading_tile * SAMPLE_TILE;
  const LogitSums leader = sums_behind_leader(params, x + begin, tile_size(begin), (float)sums.max_logit);
  return join(leader, row.rest, params.temperature);
}

// BLOCK logits from v on; -inf in place of those beyond the cutoff.
template <class T>
INLINE void load_kept(const LogitsRow<T>& row, Cutoff cutoff, int32_t v, f32* x) {
  const i32 lane = lane_numbers(typename Count<W>::type());
  load_block(row.x, row.V, v, x);
  for (int j = 0; j < 4; ++j) {
    i32 kept = x[j] > cutoff.logit;
    const i32 tied = x[j] == cutoff.logit;
    if (any(tied)) kept |= tied & (lane + (v + j * W) <= cutoff.token);
    x[j] = select(kept, x[j], splat(-__builtin_inff()));
  }
}

// The blocks of a row that have kept tokens.
struct KeptBlocks {
  int32_t count, begins[MAX_KEPT_BLOCKS];

  INLINE void add(int32_t begin) {
    if (count < MAX_KEPT_BLOCKS) begins[count] = begin;
    ++count;
  }
  // Calls visit(begin) for each of them; if not all are listed, for every block of the row.
  template <class Visit>
  INLINE void for_each(int32_t V, Visit visit) const {
    if (count <= MAX_KEPT_BLOCKS)
      for (int i = 0; i < count; ++i) visit(begins[i]);
    else
      for (int32_t v = 0; v < V; v += BLOCK) visit(v);
  }
};

// The mass of the kept tokens behind the largest logit, which one token has, relative to it. As in sums_behind_leader,
// they are taken relative to the largest of them, `origin`.
template <class T>
__attribute__((noinline)) double kept_behind_leader(const LogitsRow<T>& row, Cutoff cutoff, const KeptBlocks& blocks,
                                                    float origin) {
  if (origin == -__builtin_inff()) return 0;
  KahanSum mass;
  blocks.for_each(row.V, [&](int32_t v) {
    f32 x[4];
    load_kept(row, cutoff, v, x);
    for (int j = 0; j < 4; ++j)
      x[j] = select(x[j] < row.max_logit, exp((x[j] - origin) * row.inverse_temperature), splat(0.f));
    mass.add((x[0] + x[1]) + (x[2] + x[3]));
  });
  return exp(((double)origin - row.max_logit) / row.temperature) * mass.value();
}

// The mass of the tokens up to the cutoff but for one with the largest logit, and with SAMPLE the argmax among them.
// Behind a leader the mass keeps its digits if it `is_exact`; a filter adds it to 1.
template <bool SAMPLE, class T>
double visit_kept(const LogitsRow<T>& row, GumbelArgmax& argmax, Cutoff cutoff, bool is_exact = true) {
  KahanSum mass;
  int64_t others_like_it = -1;
  f32 largest_other = splat(-__builtin_inff());
  KeptBlocks blocks;
  blocks.count = 0;
  argmax.shift = row.max_logit / argmax.params.temperature;
  update_threshold(argmax);
  for (int32_t v = 0; v < row.V; v += BLOCK) {
    f32 x[4], p[4];
    load_block(row.x, row.V, v, x);
    const f32 largest = max(max(x[0], x[1]), max(x[2], x[3]));
    if (!any(largest >= cutoff.logit)) continue;
    blocks.add(v);
    load_kept(row, cutoff, v, x);
    for (int j = 0; j < 4; ++j) p[j] = row.fast_mass(x[j]);
    if (SAMPLE) try_block(argmax, v, x, p);
    if (any(largest == row.max_logit)) {
      i32 ties = {};
      for (int j = 0; j < 4; ++j) {
        const i32 is_largest = x[j] == row.max_logit;
        ties -= is_largest;
        p[j] = select(is_largest, splat(0.f), p[j]);
        x[j] = select(is_largest, splat(-__builtin_inff()), x[j]);
      }
      for (int i = 0; i < W; ++i) others_like_it += ties[i];
    }
    largest_other = max(largest_other, max(max(x[0], x[1]), max(x[2], x[3])));
    mass.add((p[0] + p[1]) + (p[2] + p[3]));
  }
  const double others = mass.value() + others_like_it;
  return is_exact && others < 0.5 ? kept_behind_leader(row, cutoff, blocks, reduce_max(largest_other)) : others;
}

// The cutoff of all filters; `mass` is that of all tokens.
template <class T>
Cutoff filter_cutoff(const LogitsRow<T>& row, GumbelArgmax& argmax, double mass) {
  const SamplingParams& params = argmax.params;
  Cutoff cutoff = no_cutoff();
  if (params.top_k) cutoff = top_k_cutoff(row, params.top_k);
  if (params.top_p < 1) {
    const double kept_mass = params.top_k ? 1. + visit_kept<false>(row, argmax, cutoff, false) : mass;
    cutoff = tighter(cutoff, top_p_cutoff(row, params.top_p * kept_mass, mass, cutoff.logit));
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

// Samples from a row of logits in memory and writes its outputs. `all_sums`: those of every token, if a ban has
// replaced some logits of x by -inf; else null.
template <class T>
void sample_row(const T* x, int32_t V, int64_t b, const SamplingParams& params, const LogitSums* all_sums,
                const Outputs& out) {
  if (!params.valid) return write_invalid(out, b);
  GumbelArgmax argmax = start_argmax(params);
  if (!params.greedy && !params.has_filter() && !params.noise && !all_sums) {
    const LogitSums sums = visit_row<true>(argmax, x, V);
    return write_row(out, b, params, sums, argmax.best, sums);
  }
  const LogitSums sums = visit_row<false>(argmax, x, V);
  if (!is_finite(sums.max_logit)) return write_invalid(out, b);
  const LogitsRow<T> row = {x, V, (float)sums.max_logit, params.temperature, params.inverse_temperature};
  LogitSums kept = sums;
  if (params.greedy) {
    argmax.best.token = find_logit(x, V, row.max_logit);
    argmax.best.logit = row.max_logit;
  } else {
    const Cutoff cutoff = params.has_filter() ? filter_cutoff(row, argmax, sums.mass()) : no_cutoff();
    const double others = params.noise ? visit_kept<false>(row, argmax, cutoff) : visit_kept<true>(row, argmax, cutoff);
    if (params.has_filter()) kept.others = min(others, sums.others);
    if (params.noise) argmax_of_given_noise(row, argmax, cutoff);
  }
  write_row(out, b, params, all_sums ? *all_sums : sums, argmax.best, kept);
}

}  // namespace
