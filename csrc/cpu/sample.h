// Drawing a token from a row of logits; kernels/_sampling.py says what is drawn, sample_tokens.cpp and
// linear_sample_tokens.cpp call it.
//
// A row is visited once, in tiles that stay in the first-level cache between their maximum and everything else: sums
// relative to the tile's maximum, and the draw itself. Tiles are added in order, so that the sums are the same whether
// a row lies in memory as a whole or comes tile by tile out of a product.
//
// No logarithm is taken where the token cannot win. Token v beats the best score so far iff -log(1 - u_v) < e^(z_v -
// best), and -log(1 - u) >= u, so u_v < e^(z_v - best) is necessary; e^z_v is there already, for the sum. That leaves
// some 15 tokens a row, whose scores are computed in float64: the argmax is that of the float64 reference.
//
// Filters keep a prefix of the order (logit falling, index rising): filters.h finds where it ends.
#pragma once
#include "filters.h"
#include "philox.h"

namespace {

static_assert(BLOCK % (4 * quads_a_step) == 0, "a block holds whole steps of philox");
constexpr int DRAW_TILE = 1024;

// The best token so far of one row, and the noise it is drawn with.
struct Draw {
  Stream stream;
  double temperature, best;  // the best score, x / temperature + gumbel
  float inverse;             // of the temperature
  float chosen;              // its logit
  int32_t token;
  // A token can beat the best only if floor(word / 2) < p * bar, p = e^(x / temperature - shift).
  double shift;
  float bar;
};

INLINE void raise_bar(Draw& draw) {
  // 1e-4: more than the error of the float32 p
  draw.bar = draw.token < 0 ? __builtin_inff() : (float)(__builtin_exp(draw.shift - draw.best) * 0x1p31 * (1 + 1e-4));
}

__attribute__((noinline)) void try_token(Draw& draw, float x, int32_t v, double gumbel) {
  const double score = x / draw.temperature + gumbel;
  if (!(score > draw.best)) return;
  draw.best = score, draw.token = v, draw.chosen = x;
  raise_bar(draw);
}

// BLOCK tokens from `at` on, with their logits x and p.
INLINE void try_block(Draw& draw, int32_t at, const f32* x, const f32* p) {
  // The least u is 2^-33; floor(word / 2) stands for u 2^31.
  if (!any(max(max(p[0], p[1]), max(p[2], p[3])) * draw.bar > 0.25f)) return;
  uint32_t words[BLOCK];
  for (int i = 0; i < W; i += quads_a_step) philox(draw.stream, (uint32_t)at / 4 + i, words + 4 * i);
  i32 wins[4], some = {};
  for (int j = 0; j < 4; ++j) {
    u32 word;
    memcpy(&word, words + j * W, sizeof word);
    wins[j] = __builtin_convertvector((i32)(word >> 1), f32) < p[j] * draw.bar;
    some |= wins[j];
  }
  if (!any(some)) return;
  int32_t won[BLOCK];
  float logits[BLOCK];
  memcpy(won, wins, sizeof won);
  memcpy(logits, x, sizeof logits);
  for (int i = 0; i < BLOCK; ++i)
    if (won[i]) try_token(draw, logits[i], at + i, -__builtin_log(-__builtin_log1p(-(words[i] + 0.5) * 0x1p-32)));
}

// Relative to the largest logit: the sum of e^(x - largest); of p = e^z, z = (x - largest) / temperature; of p z.
struct RowSums {
  double largest, raw, tempered, entropy;
};
constexpr RowSums no_sums = {-__builtin_inf(), 0, 0, 0};

// A tile's sums to those of the tiles before it. Where it has a NaN or +inf, `largest` says so ever after.
INLINE void add_tile(RowSums& row, const RowSums& tile, double temperature) {
  if (tile.largest == -__builtin_inf() || row.largest != row.largest) return;
  if (row.largest == -__builtin_inf() || !(tile.largest < __builtin_inf())) {
    row = tile;
    return;
  }
  const bool rises = tile.largest > row.largest;
  const RowSums &high = rises ? tile : row, &low = rises ? row : tile;
  const double gap = low.largest - high.largest, z = gap / temperature;
  const double by = __builtin_exp(gap), tempered_by = temperature == 1 ? by : __builtin_exp(z);
  const double moment = tempered_by > 0 ? tempered_by * (low.entropy + z * low.tempered) : 0;
  row = {high.largest, high.raw + by * low.raw, high.tempered + tempered_by * low.tempered, high.entropy + moment};
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
  INLINE double value() const {
    double total = 0;
    for (int i = 0; i < W; ++i) total += (double)sum[i] - carry[i];
    return total;
  }
};

// The largest of n logits; NaN where one is NaN.
template <class T>
INLINE float find_largest(const T* x, int64_t n) {
  f32 largest = splat(-__builtin_inff());
  i32 poison = {};
  for (int64_t v = 0; v < n; v += W) {
    const f32 here = n - v >= W ? load(x + v) : load_part(x + v, (int)(n - v), -__builtin_inff());
    largest = max(largest, here);
    poison |= here != here;
  }
  return any(poison) ? __builtin_nanf("") : ::largest(largest);
}

// The n <= DRAW_TILE logits x of the columns from `begin` on.
template <bool tempered, bool draws, class T>
RowSums visit_tile(Draw& draw, const T* x, int32_t begin, int32_t n) {
  const float top = find_largest(x, n);
  if (!(top > -__builtin_inff() && top < __builtin_inff())) return {top, 0, 0, 0};
  if (draws) draw.shift = top / draw.temperature, raise_bar(draw);
  Total raw, mass, entropy;
  for (int32_t at = 0; at < n; at += BLOCK) {
    f32 logits[4], p[4], terms[4];
    load_block(x, n, at, logits);
    for (int j = 0; j < 4; ++j) {
      const f32 z = tempered ? (logits[j] - top) * draw.inverse : logits[j] - top;
      p[j] = exp(z);
      terms[j] = p[j] * max(z, splat(-100.f));
    }
    mass.add((p[0] + p[1]) + (p[2] + p[3]));
    entropy.add((terms[0] + terms[1]) + (terms[2] + terms[3]));
    if (tempered)
      raw.add((exp(logits[0] - top) + exp(logits[1] - top)) + (exp(logits[2] - top) + exp(logits[3] - top)));
    if (draws) try_block(draw, begin + at, logits, p);
  }
  const double total = mass.value();
  return {top, tempered ? raw.value() : total, total, entropy.value()};
}

INLINE bool is_plain(const Draw& draw) { return draw.temperature == 1 || draw.temperature == 0; }

template <bool draws, class T>
INLINE RowSums visit_tile(Draw& draw, const T* x, int32_t begin, int32_t n) {
  return is_plain(draw) ? visit_tile<false, draws>(draw, x, begin, n) : visit_tile<true, draws>(draw, x, begin, n);
}

template <bool draws, class T>
RowSums visit_row(Draw& draw, const T* x, int32_t V) {
  RowSums row = no_sums;
  for (int32_t begin = 0; begin < V; begin += DRAW_TILE)
    add_tile(row, visit_tile<draws>(draw, x + begin, begin, (int32_t)min<int64_t>(DRAW_TILE, (int64_t)V - begin)),
             is_plain(draw) ? 1 : draw.temperature);
  return row;
}

// The mass of the tokens up to the cut, from which one is drawn if asked.
template <bool draws, class T>
double visit_kept(const Logits<T>& row, Draw& draw, Cut cut) {
  double total = 0;
  i32 lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  draw.shift = row.largest / draw.temperature, raise_bar(draw);
  for (int32_t at = 0; at < row.V; at += BLOCK) {
    f32 x[4], p[4];
    load_block(row.x, row.V, at, x);
    if (!any(max(max(x[0], x[1]), max(x[2], x[3])) >= cut.logit)) continue;
    for (int j = 0; j < 4; ++j) {
      const i32 kept = (x[j] > cut.logit) | ((x[j] == cut.logit) & (lane + (at + j * W) <= cut.index));
      p[j] = select(kept, exp((x[j] - row.largest) * row.inverse), splat(0.f));
    }
    total += sum((p[0] + p[1]) + (p[2] + p[3]));
    if (draws) try_block(draw, at, x, p);
  }
  return total;
}

struct Filters {
  int64_t top_k;
  float top_p, min_p;
};
INLINE bool any_filter(const Filters& f) { return f.top_k || f.top_p < 1 || f.min_p > 0; }

// `total`: the mass of all tokens.
template <class T>
Cut choose_cut(const Logits<T>& row, Draw& draw, const Filters& filters, double total) {
  Cut cut = {-__builtin_inff(), all_equal};
  if (filters.top_k) cut = find_cut<false>(row, (double)filters.top_k, row.V);
  if (filters.top_p < 1) {
    const double mass = filters.top_k ? visit_kept<false>(row, draw, cut) : total;
    cut = stricter(cut, find_cut<true>(row, filters.top_p * mass, total));
  }
  if (filters.min_p > 0) cut = stricter(cut, {least_of_min_p(row, filters.min_p), all_equal});
  return cut;
}

// What a call asks for; the first four one a row, or null where switched off.
struct Options {
  const float* temperature;
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
  int64_t seed;
  const int64_t* row_ids;
  const int64_t* steps;
};
struct Outputs {
  int64_t* tokens;
  float* logprobs;
  float* raw_logprobs;
  float* kept_logprobs;
  float* log_kept_mass;
  float* entropy;
};

INLINE Filters filters_of(const Options& o, int64_t b, int64_t V) {
  const int64_t top_k = o.top_k ? o.top_k[b] : 0;
  return {top_k >= V ? 0 : top_k, o.top_p ? o.top_p[b] : 1.f, o.min_p ? o.min_p[b] : 0.f};
}
INLINE bool in_range(const Options& o, int64_t b) {
  const float temperature = o.temperature ? o.temperature[b] : 1.f;
  const Filters f = filters_of(o, b, INT64_MAX);
  return temperature >= 0 && temperature <= 1e6f && f.top_k >= 0 && f.top_p >= 1e-30f && f.top_p <= 1 && f.min_p >= 0 &&
         f.min_p <= 1;
}
INLINE Draw start_draw(const Options& o, int64_t b) {
  const double temperature = o.temperature ? o.temperature[b] : 1;
  const uint64_t id = (uint64_t)o.row_ids[b], seed = (uint64_t)o.seed;
  const Stream stream = {
      {(uint32_t)seed, (uint32_t)(seed >> 32)}, (uint32_t)o.steps[b], {(uint32_t)id, (uint32_t)(id >> 32)}};
  const float inverse = (float)min(1 / temperature, 3e38);
  return {stream, temperature, -__builtin_inf(), inverse, 0, -1, 0, __builtin_inff()};
}

INLINE void refuse(const Outputs& out, int64_t b) {
  out.tokens[b] = -1;
  out.logprobs[b] = out.raw_logprobs[b] = out.kept_logprobs[b] = out.log_kept_mass[b] = out.entropy[b] =
      __builtin_nanf("");
}

// The row's sums before any filter, its draw, and the log of the mass that the filters keep.
INLINE void report(const Outputs& out, int64_t b, const RowSums& sums, const Draw& draw, double log_kept_mass) {
  refuse(out, b);
  if (draw.token < 0 || !(sums.largest < __builtin_inf())) return;
  const double above = draw.chosen - sums.largest;
  out.tokens[b] = draw.token;
  out.raw_logprobs[b] = (float)(above - __builtin_log(sums.raw));
  if (draw.temperature == 0) {
    out.logprobs[b] = out.kept_logprobs[b] = out.log_kept_mass[b] = out.entropy[b] = 0;
    return;
  }
  const double log_sum = __builtin_log(sums.tempered), logprob = above / draw.temperature - log_sum;
  out.logprobs[b] = (float)logprob;
  out.kept_logprobs[b] = (float)(logprob - log_kept_mass);
  out.log_kept_mass[b] = (float)log_kept_mass;
  out.entropy[b] = (float)(log_sum - sums.entropy / sums.tempered);
}

// Gumbel values of the caller in place of the keyed noise.
template <class T>
void draw_injected(const Logits<T>& row, Draw& draw, Cut cut, const float* noise) {
  for (int32_t v = 0; v < row.V; ++v) {
    const float x = to_float(row.x[v]);
    if (x > cut.logit || (x == cut.logit && v <= cut.index)) try_token(draw, x, v, noise[v]);
  }
}

template <class T>
void draw_largest(Draw& draw, const T* x, int32_t V, float largest) {
  int32_t first = 0;
  while (first < V && to_float(x[first]) != largest) ++first;
  if (first < V) draw.token = first, draw.chosen = largest;
}

// One row of logits in memory. `sums`: of the tokens that may be drawn, or null: then they are those of the row.
// `all`: of every token, where a ban has taken some out of x; else null.
template <class T>
void sample_row(const T* x, int32_t V, int64_t b, const Options& o, const float* noise, const RowSums* all,
                const Outputs& out) {
  if (!in_range(o, b)) return refuse(out, b);
  Draw draw = start_draw(o, b);
  const Filters filters = filters_of(o, b, V);
  if (draw.temperature > 0 && !any_filter(filters) && !noise && !all) {
    const RowSums sums = visit_row<true>(draw, x, V);
    return report(out, b, sums, draw, 0);
  }
  const RowSums sums = visit_row<false>(draw, x, V);
  if (!(sums.largest > -__builtin_inf() && sums.largest < __builtin_inf())) return refuse(out, b);
  const Logits<T> row = {x, V, (float)sums.largest, draw.temperature, draw.inverse};
  if (draw.temperature == 0) {
    draw_largest(draw, x, V, row.largest);
    return report(out, b, all ? *all : sums, draw, 0);
  }
  const Cut none = {-__builtin_inff(), all_equal};
  const Cut cut = any_filter(filters) ? choose_cut(row, draw, filters, sums.tempered) : none;
  const double kept = noise ? visit_kept<false>(row, draw, cut) : visit_kept<true>(row, draw, cut);
  if (noise) draw_injected(row, draw, cut, noise);
  double log_kept_mass = any_filter(filters) ? min(__builtin_log(kept / sums.tempered), 0.) : 0;
  if (all)
    log_kept_mass = min(__builtin_log(kept / all->tempered) + (sums.largest - all->largest) / draw.temperature, 0.);
  report(out, b, all ? *all : sums, draw, log_kept_mass);
}

}  // namespace
