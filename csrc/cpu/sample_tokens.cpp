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
#include "kernel.h"
#include "philox.h"

namespace {

constexpr int BLOCK = 4 * W;  // tokens visited together: one call of philox, or a few
constexpr int FEW = 128;      // a bracket of so many tokens is sorted
constexpr int THRESHOLDS = 4;
static_assert(BLOCK % (4 * quads_a_step) == 0, "a block holds whole steps of philox");

INLINE bool any(i32 mask) {
#if defined(__AVX512DQ__) && !defined(SIMD_WIDTH)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__) && !defined(__AVX512F__) && !defined(SIMD_WIDTH)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  uint64_t parts[W / 2], all = 0;
  memcpy(parts, &mask, sizeof parts);
  for (uint64_t part : parts) all |= part;
  return all != 0;
#endif
}

// The last token that a filter keeps: (logit, index).
struct Cut {
  float logit;
  int32_t index;
};
constexpr int32_t all_equal = INT32_MAX;  // as an index: keep every token of that logit

Cut stricter(Cut a, Cut b) {
  if (a.logit != b.logit) return a.logit > b.logit ? a : b;
  return a.index < b.index ? a : b;
}

template <class T>
struct Row {
  const T* x;
  int32_t V;
  float largest;
  double temperature;
  float inverse;  // of the temperature
  Stream stream;
  // The best token so far. A token can beat it only if floor(word / 2) < e^z * bar.
  double best;
  float bar;
  int32_t token;
};

// The BLOCK logits from `at` on; beyond the row -inf.
template <class T>
INLINE void load_block(const Row<T>& row, int32_t at, f32* x) {
  for (int j = 0; j < 4; ++j, at += W) {
    const int32_t left = row.V - at;
    x[j] = left >= W  ? load(row.x + at)
           : left > 0 ? load_part(row.x + at, left, -__builtin_inff())
                      : splat(-__builtin_inff());
  }
}

template <class T>
INLINE double score_without_noise(const Row<T>& row, int32_t v) {
  return ((double)to_float(row.x[v]) - row.largest) / row.temperature;
}

template <class T>
__attribute__((noinline)) void try_token(Row<T>& row, int32_t v, double gumbel) {
  const double score = score_without_noise(row, v) + gumbel;
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

struct Sums {
  double raw, tempered, entropy;  // sum of e^(x - max); of p = e^z; of p z
};

template <bool tempered, bool draws, class T>
Sums visit(Row<T>& row) {
  constexpr int chunk = 32 * BLOCK;  // float32 sums go over so many tokens, float64 sums over the chunks
  Sums sums = {0, 0, 0};
  for (int32_t begin = 0; begin < row.V; begin += chunk) {
    const int32_t end = min((int64_t)begin + chunk, (int64_t)row.V);
    f32 raw = {}, mass = {}, entropy = {};
    for (int32_t at = begin; at < end; at += BLOCK) {
      f32 x[4], p[4];
      load_block(row, at, x);
      for (int j = 0; j < 4; ++j) {
        const f32 shifted = x[j] - row.largest, z = tempered ? shifted * row.inverse : shifted;
        p[j] = exp(z);
        mass += p[j];
        entropy += p[j] * max(z, splat(-100.f));
        if (tempered) raw += exp(shifted);
      }
      if (draws) try_block(row, at, p);
    }
    sums.tempered += sum(mass);
    sums.entropy += sum(entropy);
    sums.raw += sum(tempered ? raw : mass);
  }
  return sums;
}

// The mass of the tokens up to the cut, from which one is drawn if asked.
template <bool draws, class T>
double visit_kept(Row<T>& row, Cut cut) {
  double total = 0;
  i32 lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  for (int32_t at = 0; at < row.V; at += BLOCK) {
    f32 x[4], p[4], mass = {};
    load_block(row, at, x);
    if (!any(max(max(x[0], x[1]), max(x[2], x[3])) >= cut.logit)) continue;
    for (int j = 0; j < 4; ++j) {
      const i32 kept = (x[j] > cut.logit) | ((x[j] == cut.logit) & (lane + (at + j * W) <= cut.index));
      p[j] = select(kept, exp((x[j] - row.largest) * row.inverse), splat(0.f));
      mass += p[j];
    }
    total += sum(mass);
    if (draws) try_block(row, at, p);
  }
  return total;
}

// Floats as integers of the same order.
int32_t order_key(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
float from_order_key(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Count and weight of the tokens in [threshold, above), for falling thresholds. Tokens beyond the row, -inf, have no
// weight; they may be counted where -inf itself is a threshold, which only cut_among_few could notice: it looks again.
struct Above {
  int64_t count[THRESHOLDS + 1];
  double weight[THRESHOLDS + 1];
};

template <bool by_mass, class T>
Above weigh(const Row<T>& row, float above, const float* thresholds) {
  Above found = {};
  constexpr int n = THRESHOLDS + 1, chunk = 32 * BLOCK;
  for (int32_t begin = 0; begin < row.V; begin += chunk) {
    const int32_t end = min((int64_t)begin + chunk, (int64_t)row.V);
    i32 count[n] = {};
    f32 weight[n] = {};
    for (int32_t at = begin; at < end; at += BLOCK) {
      f32 block[4];
      load_block(row, at, block);
      for (const f32& x : block) {
        const i32 inside = (x >= thresholds[n - 1]) & (x < above);
        if (!any(inside)) continue;
        const f32 p = by_mass ? exp((x - row.largest) * row.inverse) : f32{};
        for (int j = 0; j < n; ++j) {
          const i32 over = inside & (x >= thresholds[j]);
          count[j] -= over;
          if (by_mass) weight[j] += select(over, p, splat(0.f));
        }
      }
    }
    for (int j = 0; j < n; ++j) {
      for (int i = 0; i < W; ++i) found.count[j] += count[j][i];
      found.weight[j] = by_mass ? found.weight[j] + sum(weight[j]) : (double)found.count[j];
    }
  }
  return found;
}

// Calls visit(v) for the tokens in [low, above), by rising index, until it returns false.
template <class T, class Visit>
INLINE void each_between(const Row<T>& row, float low, float above, Visit visit) {
  for (int32_t at = 0; at < row.V; at += BLOCK) {
    f32 x[4];
    i32 inside[4], some = {};
    load_block(row, at, x);
    for (int j = 0; j < 4; ++j) inside[j] = (x[j] >= low) & (x[j] < above), some |= inside[j];
    if (!any(some)) continue;
    int32_t lanes[BLOCK];
    memcpy(lanes, inside, sizeof lanes);
    for (int i = 0; i < BLOCK && at + i < row.V; ++i)
      if (lanes[i] && !visit(at + i)) return;
  }
}

// The first token, in falling order, with which the weight reaches `target`; among the few in [low, above), which
// `before` weighs.
template <bool by_mass, class T>
Cut cut_among_few(const Row<T>& row, float low, float above, double before, double target) {
  uint64_t order[FEW];  // falling logit, then rising index, as one integer
  int n = 0;
  each_between(row, low, above, [&](int32_t v) {
    const float x = to_float(row.x[v]) + 0.f;  // -0 is 0
    const uint64_t entry = (uint64_t)(uint32_t)(0x7fffffff - (int64_t)order_key(x)) << 32 | (uint32_t)v;
    int i = n++;
    for (; i && order[i - 1] > entry; --i) order[i] = order[i - 1];
    order[i] = entry;
    return n < FEW;
  });
  Cut cut = {low, all_equal};
  for (int i = 0; i < n && before < target; ++i) {
    cut.index = (int32_t)order[i], cut.logit = to_float(row.x[cut.index]);
    before += by_mass ? __builtin_exp(score_without_noise(row, cut.index)) : 1;
  }
  return cut;
}

// The same where all tokens of the bracket are equal.
template <bool by_mass, class T>
Cut cut_among_equals(const Row<T>& row, float low, float above, double before, double target) {
  Cut cut = {low, all_equal};
  each_between(row, low, above, [&](int32_t v) {
    cut.index = v, before += by_mass ? __builtin_exp(score_without_noise(row, v)) : 1;
    return before < target;
  });
  return cut;
}

template <bool by_mass, class T>
Cut find_cut(const Row<T>& row, double target) {
  const int64_t beyond = (int64_t)order_key(row.largest) + 1;
  int64_t low = order_key(-__builtin_inff()), high = beyond;  // the bracket [low, high)
  double before = 0;                                          // weight of the tokens above it
  for (bool first = true;; first = false) {
    constexpr float depths[THRESHOLDS] = {1.5f, 4.f, 8.f, 14.f};  // nats below the maximum
    float thresholds[THRESHOLDS + 1];
    for (int j = 0; j < THRESHOLDS; ++j) {
      const int64_t key = low + (high - low) * (THRESHOLDS - j) / (THRESHOLDS + 1);
      thresholds[j] = first ? row.largest - (float)row.temperature * depths[j] : from_order_key((int32_t)key);
    }
    thresholds[THRESHOLDS] = from_order_key((int32_t)low);
    float above = high == beyond ? __builtin_inff() : from_order_key((int32_t)high);
    const Above found = weigh<by_mass>(row, above, thresholds);
    int j = 0;
    while (j < THRESHOLDS && before + found.weight[j] < target) ++j;
    const int64_t inside = found.count[j] - (j ? found.count[j - 1] : 0);
    if (j) before += found.weight[j - 1], above = thresholds[j - 1], high = order_key(above);
    low = order_key(thresholds[j]);
    if (inside <= FEW) return cut_among_few<by_mass>(row, thresholds[j], above, before, target);
    if (high - low <= 1) return cut_among_equals<by_mass>(row, thresholds[j], above, before, target);
  }
}

struct Filters {
  int64_t top_k;
  float top_p, min_p;
};

// The least float that is at least min_p times as probable as the largest logit.
template <class T>
float least_of_min_p(const Row<T>& row, float min_p) {
  const double bound = __builtin_log((double)min_p);
  int64_t below = order_key(-__builtin_inff()), low = order_key(row.largest);
  while (low - below > 1) {
    const int64_t middle = (low + below) >> 1;
    const bool kept = ((double)from_order_key((int32_t)middle) - row.largest) / row.temperature >= bound;
    (kept ? low : below) = middle;
  }
  return from_order_key((int32_t)low);
}

// `mass`: of all tokens.
template <class T>
Cut choose_cut(Row<T>& row, const Filters& filters, double mass) {
  Cut cut = {-__builtin_inff(), all_equal};
  if (filters.top_k) {
    cut = find_cut<false>(row, (double)filters.top_k);
    mass = filters.top_p < 1 ? visit_kept<false>(row, cut) : mass;
  }
  if (filters.top_p < 1) cut = stricter(cut, find_cut<true>(row, filters.top_p * mass));
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
  Row<T> row = {logits + b * V, V, find_largest(logits + b * V, V), temperature, 0, {}, -infinity, infinity, -1};
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
  const double log_sum = __builtin_log(sums.tempered), logprob = score_without_noise(row, row.token) - log_sum;
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
