// Finds where the filters of sample_tokens cut off a row of logits, without a sort. Top-k, top-p and min-p each keep a
// prefix of the order (logit falling, index rising); its last token is the cutoff.
//
// A pass over the row adds the tokens of a bracket to a histogram, their number or their mass, and the next pass
// continues in the bin that has the cutoff:
//
//     logit    low                                            high
//               |------|------|------|------|------|------|-----|   bins from the top, of 2^shift order keys each
//                             [ new )  the count or mass down to here reaches the target
//
// When few tokens are left they are sorted; if all that are left are equal, the index decides. Logits are compared as
// they are, not divided by the temperature, so ties are those of the input.
//
// The first bracket leaves most tokens out: of top-p, those whose mass together is too small to matter; of top-k, those
// below the k-th largest of the maxima of groups. A group has the tokens v with the same v % num_groups.
//
// Floor: 2 or 3 passes over the row, from the cache; for a token of the bracket e^z and an addition in memory. Counts
// are exact; masses are added in one fixed order.
#pragma once
#include "intrinsics.h"
#include "sampling.h"

namespace {

constexpr int BLOCK = 4 * W;     // tokens that are visited together: one call of philox, or a few
constexpr int MAX_SORTED = 256;  // a bracket of at most so many tokens is sorted
constexpr int NUM_BINS = 512, MAX_GROUPS = 4096;

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

  INLINE f32 mass(f32 logits) const { return exp((logits - max_logit) * inverse_temperature); }
  // Less exact for small ones, and 0 below e^MIN_EXPONENT.
  INLINE f32 fast_mass(f32 logits) const {
    const f32 z = (logits - max_logit) * inverse_temperature, lowest = splat(MIN_EXPONENT);
    return zero_unless(z > lowest, fast_exp(max(z, lowest)));
  }
  INLINE double exact_mass(float logit) const { return exp(((double)logit - max_logit) / temperature); }
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

// Stores the lanes of x in `mask` at `to`, side by side, where W floats have room. Returns their number.
INLINE int compress(float* to, f32 x, i32 mask) {
#if defined(__AVX512DQ__) && !defined(SIMD_WIDTH)
  const __mmask16 lanes = _mm512_movepi32_mask((__m512i)mask);
  store(to, (f32)_mm512_maskz_compress_ps(lanes, (__m512)x));
  return __builtin_popcount(lanes);
#else
  float values[W];
  int32_t inside[W];
  memcpy(values, &x, sizeof x);
  memcpy(inside, &mask, sizeof mask);
  int n = 0;
  for (int i = 0; i < W; ++i) {
    to[n] = values[i];
    n -= inside[i];
  }
  return n;
#endif
}

// order_key of each lane.
INLINE i32 order_keys(f32 x) {
  const i32 sign = as_int(x) >> 31;
  return ((as_int(x) & 0x7fffffff) ^ sign) - sign;
}

// A bracket of order keys, [low, high), and its tokens' number or mass by bins from the top. Of equal tokens each
// addition to a bin would wait for the one before it, so consecutive tokens have different copies of the bins.
struct Histogram {
  static constexpr int COPIES = 2;
  int64_t low, high;
  int shift;  // a bin has 2^shift keys
  double bins[COPIES][NUM_BINS] = {};

  INLINE Histogram(int64_t low, int64_t high) : low(low), high(high), shift(0) {
    while ((high - low - 1) >> shift >= NUM_BINS) ++shift;
  }
  INLINE double bin(int i) const { return bins[0][i] + bins[1][i]; }
  INLINE int64_t bin_low(int bin) const { return max(low, high - ((int64_t)(bin + 1) << shift)); }
  INLINE int64_t bin_high(int bin) const { return high - ((int64_t)bin << shift); }
};

template <bool BY_MASS, class T>
void fill(Histogram& histogram, const LogitsRow<T>& row) {
  constexpr int chunk = 16 * BLOCK;
  const float bottom = from_order_key(histogram.low), highest = from_order_key(histogram.high - 1);
  const u32 highest_key = u32{} + (uint32_t)(histogram.high - 1);
  for (int32_t begin = 0; begin < row.V; begin += chunk) {
    float x[chunk + W], p[chunk + W];  // of the chunk's tokens in the bracket
    int32_t bin[chunk + W];
    int n = 0;
    for (int32_t v = begin; v < min(begin + chunk, row.V); v += BLOCK) {
      f32 block[4];
      load_block(row.x, row.V, v, block);
      for (const f32& logits : block) {
        const i32 inside = (logits >= bottom) & (logits <= highest);
        if (any(inside)) n += compress(x + n, logits, inside);
      }
    }
    for (int i = 0; i < n; i += W) {
      const f32 logits = load(x + i);
      const u32 steps = (highest_key - (u32)order_keys(logits)) >> histogram.shift;
      memcpy(bin + i, &steps, sizeof steps);
      if (BY_MASS) store(p + i, row.mass(logits));
    }
    for (int i = 0; i < n; ++i) histogram.bins[i % Histogram::COPIES][bin[i]] += BY_MASS ? (double)p[i] : 1.;
  }
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

// Finds the cutoff among the tokens in [low, high): the first one at which the count or mass, `mass_before` of the
// tokens before them included, reaches `target`. Returns false if there are more than MAX_SORTED.
template <bool BY_MASS, class T>
bool cutoff_by_rank(const LogitsRow<T>& row, float low, float high, double mass_before, double target, Cutoff* cutoff) {
  uint64_t order[MAX_SORTED];  // falling logit, then rising index, as one integer
  int n = 0;
  for_each_between(row, low, high, [&](int32_t v) {
    if (n < MAX_SORTED) order[n] = (uint64_t)(0x7fffffff - order_key(to_float(row.x[v]))) << 32 | (uint32_t)v;
    return n++ < MAX_SORTED;
  });
  if (n > MAX_SORTED) return false;
  for (int end = 1; end < n; ++end) {
    const uint64_t entry = order[end];
    int i = end;
    for (; i && order[i - 1] > entry; --i) order[i] = order[i - 1];
    order[i] = entry;
  }
  *cutoff = {low, all_equal};
  for (int i = 0; i < n && mass_before < target; ++i) {
    cutoff->token = (int32_t)order[i];
    cutoff->logit = to_float(row.x[cutoff->token]);
    mass_before += BY_MASS ? row.exact_mass(cutoff->logit) : 1;
  }
  return true;
}

// The same if all tokens of the bracket are equal.
template <bool BY_MASS, class T>
Cutoff cutoff_among_ties(const LogitsRow<T>& row, float low, float high, double mass_before, double target) {
  Cutoff cutoff = {low, all_equal};
  const double mass = BY_MASS ? row.exact_mass(low) : 1;
  for_each_between(row, low, high, [&](int32_t v) {
    cutoff.token = v;
    mass_before += mass;
    return mass_before < target;
  });
  return cutoff;
}

// Returns the cutoff at which the number of tokens, or with BY_MASS the sum of their masses, reaches `target`. It is
// first looked for among the logits from `bottom` on.
template <bool BY_MASS, class T>
Cutoff find_cutoff(const LogitsRow<T>& row, double target, float bottom) {
  const int64_t lowest = order_key(-FLT_MAX), end_key = order_key(row.max_logit) + 1;
  int64_t low = max(order_key(bottom), lowest), high = end_key;
  double mass_before = 0;  // count or mass above the bracket
  while (true) {
    Histogram histogram(low, high);
    fill<BY_MASS>(histogram, row);
    int bin = 0;
    while (bin < NUM_BINS && mass_before + histogram.bin(bin) < target) mass_before += histogram.bin(bin++);
    if (bin < NUM_BINS) {
      low = histogram.bin_low(bin);
      high = histogram.bin_high(bin);
    } else if (low > lowest) {  // the guess was too high, or rounding makes the sum too small
      high = low;
      low = lowest;
    } else {
      return no_cutoff();
    }
    const float lowest_logit = from_order_key(low), end = high == end_key ? __builtin_inff() : from_order_key(high);
    Cutoff cutoff;
    if (cutoff_by_rank<BY_MASS>(row, lowest_logit, end, mass_before, target, &cutoff)) return cutoff;
    if (high - low == 1) return cutoff_among_ties<BY_MASS>(row, lowest_logit, end, mass_before, target);
  }
}

// Returns the cutoff of the k largest logits. At least k tokens have a logit from the k-th largest of the groups'
// maxima on. With fewer groups the smallest maximum is a guess.
template <class T>
Cutoff top_k_cutoff(const LogitsRow<T>& row, int64_t k) {
  int32_t num_groups = BLOCK;
  while (num_groups < 2 * k && num_groups < MAX_GROUPS) num_groups *= 2;
  if (row.V <= num_groups) return find_cutoff<false>(row, (double)k, -__builtin_inff());
  float maxima[MAX_GROUPS];
  for (int i = 0; i < num_groups; i += W) store(maxima + i, splat(-__builtin_inff()));
  for (int32_t v = 0; v < row.V; v += BLOCK) {
    f32 x[4];
    load_block(row.x, row.V, v, x);
    float* const group = maxima + v % num_groups;
    for (int j = 0; j < 4; ++j) store(group + j * W, max(load(group + j * W), x[j]));
  }
  f32 smallest = splat(__builtin_inff());
  for (int i = 0; i < num_groups; i += W) smallest = min(smallest, load(maxima + i));
  float bottom = -reduce_max(-smallest);
  const LogitsRow<float> groups = {maxima, num_groups, row.max_logit, row.temperature, row.inverse_temperature};
  if (k < num_groups) bottom = find_cutoff<false>(groups, (double)k, bottom).logit;
  return find_cutoff<false>(row, (double)k, bottom);
}

// Returns the cutoff of the largest logits whose mass reaches `target`, of the `total` of the row; it is not below
// `lowest`. Tokens below `bottom` have at most half of the mass that may be left out.
template <class T>
Cutoff top_p_cutoff(const LogitsRow<T>& row, double target, double total, float lowest) {
  const double depth = target < total ? log(2. * row.V / (total - target)) : __builtin_inf();
  const float bottom = (float)(row.max_logit - row.temperature * depth);
  return find_cutoff<true>(row, target, max(bottom, lowest));
}

}  // namespace
