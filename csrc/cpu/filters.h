// Finds where the filters of sample_tokens cut off a row of logits, without a sort. Top-k, top-p and min-p each keep a
// prefix of the order (logit falling, index rising); its last token is the cutoff.
//
// A pass over the row counts, or sums the mass of, the tokens above 4 thresholds within a bracket, and the next pass
// continues in the part of the bracket that has the cutoff:
//
//     logit    low         t3       t2        t1      t0        high
//               |----------|--------|---------|-------|-----------|
//                                   [ new bracket ): count or mass above t2 reaches the target, above t1 it does not
//
// When few tokens are left they are sorted; if all that are left are equal, the index decides. Logits are compared as
// they are, not divided by the temperature, so ties are those of the input.
//
// Floor: 2 to 5 passes over the row, mostly from the cache. Counts are exact; masses are summed in one fixed order.
#pragma once
#include "intrinsics.h"
#include "sampling.h"

namespace {

constexpr int BLOCK = 4 * W;     // tokens that are visited together: one call of philox, or a few
constexpr int MAX_SORTED = 256;  // a bracket of at most so many tokens is sorted
constexpr int NUM_THRESHOLDS = 4;

INLINE bool any(i32 mask) {
#if defined(__AVX512DQ__) && !defined(SIMD_WIDTH)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__) && !defined(__AVX512F__) && !defined(SIMD_WIDTH)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  uint64_t words[W / 2], all = 0;
  memcpy(words, &mask, sizeof words);
  for (uint64_t word : words) all |= word;
  return all != 0;
#endif
}

// A row of logits x; z = (x - max_logit) / temperature, and a token's mass is e^z.
template <class T>
struct LogitsRow {
  const T* x;
  int32_t V;
  float max_logit;
  double temperature;
  float inverse_temperature;

  INLINE f32 fast_mass(f32 logits) const { return exp((logits - max_logit) * inverse_temperature); }
  INLINE double exact_mass(int32_t v) const { return exp(((double)to_float(x[v]) - max_logit) / temperature); }
};

// BLOCK of the n logits, from `begin` on; beyond the n they are -inf.
template <class T>
INLINE void load_block(const T* logits, int32_t n, int32_t begin, f32* x) {
  if (n - begin >= BLOCK) {
    for (int j = 0; j < 4; ++j) x[j] = load(logits + begin + j * W);
    return;
  }
  for (int j = 0; j < 4; ++j, begin += W) {
    const int32_t left = n - begin;
    x[j] = splat(-__builtin_inff());
    if (left > 0) x[j] = left >= W ? load(logits + begin) : load_partial(logits + begin, left, -__builtin_inff());
  }
}

// Number and mass of the tokens in [thresholds[j], high), for each j. With BY_MASS false, the mass is the number.
struct AboveThresholds {
  int64_t count[NUM_THRESHOLDS];
  double mass[NUM_THRESHOLDS];
};

// The thresholds fall.
template <bool BY_MASS, class T>
AboveThresholds mass_above(const LogitsRow<T>& row, float high, const float* thresholds) {
  AboveThresholds above = {};
  constexpr int n = NUM_THRESHOLDS, chunk = 4 * BLOCK;  // a chunk is summed in float32, chunks in float64
  for (int32_t begin = 0; begin < row.V; begin += chunk) {
    const int32_t end = (int32_t)min((int64_t)begin + chunk, (int64_t)row.V);
    i32 count[n] = {};
    f32 mass[n] = {};
    bool none = true;
    for (int32_t v = begin; v < end; v += BLOCK) {
      f32 block[4];
      load_block(row.x, row.V, v, block);
      for (const f32& x : block) {
        const i32 below_high = x < high;
        if (!any(below_high & (x >= thresholds[n - 1]))) continue;
        none = false;
        const f32 p = BY_MASS ? row.fast_mass(x) : f32{};
        for (int j = 0; j < n; ++j) {
          const i32 inside = below_high & (x >= thresholds[j]);
          count[j] -= inside;
          if (BY_MASS) mass[j] += select(inside, p, splat(0.f));
        }
      }
    }
    for (int j = 0; j < n && !none; ++j) {
      for (int i = 0; i < W; ++i) above.count[j] += count[j][i];
      above.mass[j] = BY_MASS ? above.mass[j] + reduce_sum(mass[j]) : (double)above.count[j];
    }
  }
  return above;
}

// Calls visit(v) for the tokens in [low, high), by rising index, until it returns false.
template <class T, class Visit>
INLINE void for_each_between(const LogitsRow<T>& row, float low, float high, Visit visit) {
  for (int32_t begin = 0; begin < row.V; begin += BLOCK) {
    f32 x[4];
    i32 inside[4], any_inside = {};
    load_block(row.x, row.V, begin, x);
    for (int j = 0; j < 4; ++j) {
      inside[j] = (x[j] >= low) & (x[j] < high);
      any_inside |= inside[j];
    }
    if (!any(any_inside)) continue;
    int32_t lanes[BLOCK];
    memcpy(lanes, inside, sizeof lanes);
    for (int i = 0; i < BLOCK && begin + i < row.V; ++i)
      if (lanes[i] && !visit(begin + i)) return;
  }
}

// Returns the cutoff among the tokens in [low, high), at most MAX_SORTED: the first one at which the count or mass,
// `mass_before` of the tokens before them included, reaches `target`.
template <bool BY_MASS, class T>
Cutoff cutoff_by_rank(const LogitsRow<T>& row, float low, float high, double mass_before, double target) {
  uint64_t order[MAX_SORTED];  // falling logit, then rising index, as one integer
  int n = 0;
  for_each_between(row, low, high, [&](int32_t v) {
    const uint64_t entry = (uint64_t)(0x7fffffff - order_key(to_float(row.x[v]))) << 32 | (uint32_t)v;
    int i = n++;
    for (; i && order[i - 1] > entry; --i) order[i] = order[i - 1];
    order[i] = entry;
    return n < MAX_SORTED;
  });
  Cutoff cutoff = {low, all_equal};
  for (int i = 0; i < n && mass_before < target; ++i) {
    cutoff.token = (int32_t)order[i];
    cutoff.logit = to_float(row.x[cutoff.token]);
    mass_before += BY_MASS ? row.exact_mass(cutoff.token) : 1;
  }
  return cutoff;
}

// The same if all tokens of the bracket are equal.
template <bool BY_MASS, class T>
Cutoff cutoff_among_ties(const LogitsRow<T>& row, float low, float high, double mass_before, double target) {
  Cutoff cutoff = {low, all_equal};
  for_each_between(row, low, high, [&](int32_t v) {
    cutoff.token = v;
    mass_before += BY_MASS ? row.exact_mass(v) : 1;
    return mass_before < target;
  });
  return cutoff;
}

// The thresholds of a round, in a bracket [low, high) of order keys. First at fixed distances, in nats, below the
// largest logit; then close around the logit that has the target if the mass is spread evenly (`fraction` of the
// bracket's mass from the top); from round 5 on in even steps of the order keys, which always narrow the bracket.
template <class T>
void place_thresholds(const LogitsRow<T>& row, int round, int64_t low, int64_t high, float fraction,
                      float* thresholds) {
  constexpr float depths[NUM_THRESHOLDS] = {1.5f, 4.f, 8.f, 14.f};
  constexpr float offsets[NUM_THRESHOLDS] = {-0.12f, -0.02f, 0.02f, 0.12f};
  const float bottom = from_order_key(low), top = from_order_key(high);
  for (int j = 0; j < NUM_THRESHOLDS; ++j) {
    if (round == 0)
      thresholds[j] = row.max_logit - (float)row.temperature * depths[j];
    else if (round < 5 && bottom > -FLT_MAX / 2)
      thresholds[j] = max(top - (top - bottom) * min(max(fraction + offsets[j], 0.02f), 0.98f), bottom);
    else
      thresholds[j] = from_order_key(low + (high - low) * (NUM_THRESHOLDS - j) / (NUM_THRESHOLDS + 1));
  }
}

// Returns the cutoff at which the number of tokens, or with BY_MASS the sum of their masses, reaches `target`, of the
// `total` of the row.
template <bool BY_MASS, class T>
Cutoff find_cutoff(const LogitsRow<T>& row, double target, double total) {
  const int64_t end_key = order_key(row.max_logit) + 1;
  int64_t low = order_key(-__builtin_inff()), high = end_key;  // the bracket [low, high)
  int64_t num_left = row.V;                                    // tokens in it
  double mass_left = total, mass_before = 0;                   // count or mass in it and above it
  for (int round = 0;; ++round) {
    const float bottom = from_order_key(low), top = high == end_key ? __builtin_inff() : from_order_key(high);
    if (num_left <= MAX_SORTED) return cutoff_by_rank<BY_MASS>(row, bottom, top, mass_before, target);
    if (high - low <= 1) return cutoff_among_ties<BY_MASS>(row, bottom, top, mass_before, target);
    float thresholds[NUM_THRESHOLDS];
    place_thresholds(row, round, low, high, (float)((target - mass_before) / mass_left), thresholds);
    const AboveThresholds above = mass_above<BY_MASS>(row, top, thresholds);
    int j = 0;
    while (j < NUM_THRESHOLDS && mass_before + above.mass[j] < target) ++j;
    if (j < NUM_THRESHOLDS) {
      low = order_key(thresholds[j]);
      num_left = above.count[j];
      mass_left = above.mass[j];
    }
    if (j) {
      high = order_key(thresholds[j - 1]);
      num_left -= above.count[j - 1];
      mass_left -= above.mass[j - 1];
      mass_before += above.mass[j - 1];
    }
  }
}

}  // namespace
