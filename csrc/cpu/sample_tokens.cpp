// Draws a token a row; kernels/sample_tokens.py says what it means.
//
// Two visits of the row, which stays in the second-level cache: its maximum, then everything else. Floor per token: one
// read from memory; about 16 operations for e^z (32 where the temperature is not 1), 18 for Philox.
//
// No logarithm is taken where the token cannot win. Token v beats the best score so far iff -log(1 - u_v) < e^(z_v -
// best), and -log(1 - u) >= u, so u_v < e^(z_v - best) is necessary; e^z_v is there already, for the sum. That leaves
// some 15 tokens a row, whose scores are computed in float64: the argmax is that of the float64 reference.
//
// Filters keep a prefix of the order (logit falling, index rising), so each is one cut in it. It is found without a
// sort: count or weigh what lies above a few thresholds, keep the bracket that holds the cut, and again within it,
// until few tokens are left to be sorted or all of them are equal.
#include "filters.h"
#include "kernel.h"
#include "philox.h"

namespace {

static_assert(BLOCK % (4 * quads_a_step) == 0, "a block holds whole steps of philox");

template <class T>
struct Row : Logits<T> {
  Stream stream;
  // The best token so far. A token can beat it only if floor(word / 2) < e^z * bar.
  double best;
  float bar;
  int32_t token;
};

template <class T>
__attribute__((noinline)) void try_token(Row<T>& row, int32_t v, double gumbel) {
  const double score = scaled(row, v) + gumbel;
  if (!(score > row.best)) return;
  row.best = score, row.token = v;
  row.bar = (float)(__builtin_exp(-score) * 0x1p31 * (1 + 1e-4));  // 1e-4: more than the error of the float32 e^z
}

template <class T>
INLINE void try_block(Row<T>& row, int32_t at, const f32* p) {
  // The least u is 2^-33; floor(word / 2) stands for u 2^31.
  if (!any(max(max(p[0], p[1]), max(p[2], p[3])) * row.bar > 0.25f)) return;
  uint32_t words[BLOCK];
  for (int i = 0; i < W; i += quads_a_step) philox(row.stream, (uint32_t)at / 4 + i, words + 4 * i);
  i32 wins[4], some = {};
  for (int j = 0; j < 4; ++j) {
    u32 word;
    memcpy(&word, words + j * W, sizeof word);
    wins[j] = __builtin_convertvector((i32)(word >> 1), f32) < p[j] * row.bar;
    some |= wins[j];
  }
  if (!any(some)) return;
  int32_t won[BLOCK];
  memcpy(won, wins, sizeof won);
  for (int i = 0; i < BLOCK; ++i)
    if (won[i]) try_token(row, at + i, -__builtin_log(-__builtin_log1p(-(words[i] + 0.5) * 0x1p-32)));
}

// A sum of vectors with the rounding carried along (Kahan): many equal small terms beside one of 1 would else be
// rounded to its unit, all the same way.
struct Total {
  f32 sum = {}, carry = {};
  INLINE void add(f32 x) {
    const f32 y = x - carry, next = sum + y;
    carry = (next - sum) - y;
    sum = next;
  }
  double value() const {
    double total = 0;
    for (int i = 0; i < W; ++i) total += (double)sum[i] - carry[i];
    return total;
  }
};

struct Sums {
  double raw, tempered, entropy;  // sum of e^(x - max); of p = e^z; of p z
};

template <bool tempered, bool draws, class T>
Sums visit(Row<T>& row) {
  Total raw, mass, entropy;
  for (int32_t at = 0; at < row.V; at += BLOCK) {
    f32 x[4], p[4], terms[4];
    load_block(row, at, x);
    for (int j = 0; j < 4; ++j) {
      x[j] = x[j] - row.largest;
      const f32 z = tempered ? x[j] * row.inverse : x[j];
      p[j] = exp(z);
      terms[j] = p[j] * max(z, splat(-100.f));
    }
    mass.add((p[0] + p[1]) + (p[2] + p[3]));
    entropy.add((terms[0] + terms[1]) + (terms[2] + terms[3]));
    if (tempered) raw.add((exp(x[0]) + exp(x[1])) + (exp(x[2]) + exp(x[3])));
    if (draws) try_block(row, at, p);
  }
  return {tempered ? raw.value() : mass.value(), mass.value(), entropy.value()};
}

// The mass of the tokens up to the cut, from which one is drawn if asked.
template <bool draws, class T>
double visit_kept(Row<T>& row, Cut cut) {
  double total = 0;
  i32 lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  for (int32_t at = 0; at < row.V; at += BLOCK) {
    f32 x[4], p[4];
    load_block(row, at, x);
    if (!any(max(max(x[0], x[1]), max(x[2], x[3])) >= cut.logit)) continue;
    for (int j = 0; j < 4; ++j) {
      const i32 kept = (x[j] > cut.logit) | ((x[j] == cut.logit) & (lane + (at + j * W) <= cut.index));
      p[j] = select(kept, exp((x[j] - row.largest) * row.inverse), splat(0.f));
    }
    total += sum((p[0] + p[1]) + (p[2] + p[3]));
    if (draws) try_block(row, at, p);
  }
  return total;
}

struct Filters {
  int64_t top_k;
  float top_p, min_p;
};

// `total`: the mass of all tokens.
template <class T>
Cut choose_cut(Row<T>& row, const Filters& filters, double total) {
  Cut cut = {-__builtin_inff(), all_equal};
  if (filters.top_k) cut = find_cut<false>(row, (double)filters.top_k, row.V);
  if (filters.top_p < 1) {
    const double mass = filters.top_k ? visit_kept<false>(row, cut) : total;
    cut = stricter(cut, find_cut<true>(row, filters.top_p * mass, total));
  }
  if (filters.min_p > 0) cut = stricter(cut, {least_of_min_p(row, filters.min_p), all_equal});
  return cut;
}

// Gumbel values of the caller in place of the keyed noise.
template <class T>
void draw_injected(Row<T>& row, Cut cut, const float* noise) {
  for (int32_t v = 0; v < row.V; ++v) {
    const float x = to_float(row.x[v]);
    if (x > cut.logit || (x == cut.logit && v <= cut.index)) try_token(row, v, noise[v]);
  }
}

// The largest logit; NaN where one is NaN.
template <class T>
float find_largest(const T* x, int32_t V) {
  f32 largest = splat(-__builtin_inff());
  i32 poison = {};
  for (int32_t v = 0; v < V; v += W) {
    const f32 here = V - v >= W ? load(x + v) : load_part(x + v, V - v, -__builtin_inff());
    largest = max(largest, here);
    poison |= here != here;
  }
  return any(poison) ? __builtin_nanf("") : ::largest(largest);
}

struct Options {
  const float* temperature;  // these four one a row, or null where switched off
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
  const int64_t* row_ids;
  const int64_t* steps;
  const float* noise;
  int64_t seed;
};
struct Outputs {
  int64_t* tokens;
  float* logprobs;
  float* raw_logprobs;
  float* kept_logprobs;
  float* log_kept_mass;
  float* entropy;
};

template <class T>
void sample_row(const T* logits, int32_t V, int64_t b, const Options& o, const Outputs& out) {
  const float nan = __builtin_nanf(""), infinity = __builtin_inff();
  out.tokens[b] = -1;
  out.logprobs[b] = out.raw_logprobs[b] = out.kept_logprobs[b] = out.log_kept_mass[b] = out.entropy[b] = nan;
  const float temperature = o.temperature ? o.temperature[b] : 1.f;
  Filters filters = {o.top_k ? o.top_k[b] : 0, o.top_p ? o.top_p[b] : 1.f, o.min_p ? o.min_p[b] : 0.f};
  Row<T> row = {{logits + b * V, V, find_largest(logits + b * V, V), temperature, 0}, {}, -infinity, infinity, -1};
  const bool valid = row.largest > -infinity && row.largest < infinity && temperature >= 0 && temperature <= 1e6f &&
                     filters.top_k >= 0 && filters.top_p >= 1e-30f && filters.top_p <= 1 && filters.min_p >= 0 &&
                     filters.min_p <= 1;
  if (!valid) return;
  if (temperature == 0) {
    int32_t first = 0;
    while (to_float(row.x[first]) != row.largest) ++first;
    out.tokens[b] = first;
    out.raw_logprobs[b] = (float)-__builtin_log(visit<false, false>(row).raw);
    out.logprobs[b] = out.kept_logprobs[b] = out.log_kept_mass[b] = out.entropy[b] = 0;
    return;
  }
  row.inverse = (float)min(1 / row.temperature, 3e38);
  const uint64_t id = (uint64_t)o.row_ids[b], seed = (uint64_t)o.seed;
  row.stream = {{(uint32_t)seed, (uint32_t)(seed >> 32)}, (uint32_t)o.steps[b], {(uint32_t)id, (uint32_t)(id >> 32)}};
  if (filters.top_k >= V) filters.top_k = 0;
  const bool filtered = filters.top_k || filters.top_p < 1 || filters.min_p > 0;
  const bool draws = !filtered && !o.noise;
  const Sums sums = temperature == 1 ? (draws ? visit<false, true>(row) : visit<false, false>(row))
                                     : (draws ? visit<true, true>(row) : visit<true, false>(row));
  double log_kept_mass = 0;
  if (!draws) {
    const Cut cut = filtered ? choose_cut(row, filters, sums.tempered) : Cut{-infinity, all_equal};
    const double kept = o.noise ? visit_kept<false>(row, cut) : visit_kept<true>(row, cut);
    if (filtered) log_kept_mass = min(__builtin_log(kept / sums.tempered), 0.);
    if (o.noise) draw_injected(row, cut, o.noise + b * V);
  }
  if (row.token < 0) return;
  const double log_sum = __builtin_log(sums.tempered), logprob = scaled(row, row.token) - log_sum;
  out.tokens[b] = row.token;
  out.logprobs[b] = (float)logprob;
  out.raw_logprobs[b] = (float)((double)to_float(row.x[row.token]) - row.largest - __builtin_log(sums.raw));
  out.kept_logprobs[b] = (float)(logprob - log_kept_mass);
  out.log_kept_mass[b] = (float)log_kept_mass;
  out.entropy[b] = (float)(log_sum - sums.entropy / sums.tempered);
}

void sample_tokens(uintptr_t logits, int is_bf16, int64_t B, int32_t V, uintptr_t temperature, uintptr_t top_k,
                   uintptr_t top_p, uintptr_t min_p, int64_t seed, uintptr_t row_ids, uintptr_t steps, uintptr_t noise,
                   uintptr_t tokens, uintptr_t logprobs, uintptr_t raw_logprobs, uintptr_t kept_logprobs,
                   uintptr_t log_kept_mass, uintptr_t entropy, int threads) {
  const Options options = {
      ptr<const float>(temperature), ptr<const int64_t>(top_k), ptr<const float>(top_p), ptr<const float>(min_p),
      ptr<const int64_t>(row_ids),   ptr<const int64_t>(steps), ptr<const float>(noise), seed};
  const Outputs out = {ptr<int64_t>(tokens),      ptr<float>(logprobs),      ptr<float>(raw_logprobs),
                       ptr<float>(kept_logprobs), ptr<float>(log_kept_mass), ptr<float>(entropy)};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1 && B > 1 && B * V > 4096)
  for (int64_t b = 0; b < B; ++b) {
    if (is_bf16)
      sample_row(ptr<const bf16>(logits), V, b, options, out);
    else
      sample_row(ptr<const float>(logits), V, b, options, out);
  }
}

KERNEL(sample_tokens)

}  // namespace
