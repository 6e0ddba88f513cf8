// Where the filters of sample_tokens cut a row of logits. Top-k, top-p and min-p each keep a prefix of the order (logit
// falling, index rising), so a filter is one cut in it, found without a sort: count or weigh what lies above a few
// thresholds, keep the bracket that holds the cut, look again within it, until few tokens are left to be sorted or all
// of them are equal. Logits are compared as they are, so that ties are those of the input whatever the temperature.
#pragma once
#include "simd.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

constexpr int BLOCK = 4 * W;  // tokens visited together: one call of philox, or a few
constexpr int FEW = 256;      // a bracket of so many tokens is sorted
constexpr int THRESHOLDS = 4;
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

// A row of logits and its temperature: z = (x - largest) / temperature.
template <class T>
struct Logits {
  const T* x;
  int32_t V;
  float largest;
  double temperature;
  float inverse;  // of the temperature
};

// BLOCK of the n logits, from `at` on; beyond them -inf.
template <class T>
INLINE void load_block(const T* logits, int32_t n, int32_t at, f32* x) {
  if (n - at >= BLOCK) {
    for (int j = 0; j < 4; ++j) x[j] = load(logits + at + j * W);
    return;
  }
  for (int j = 0; j < 4; ++j, at += W) {
    const int32_t left = n - at;
    x[j] = splat(-__builtin_inff());
    if (left > 0) x[j] = left >= W ? load(logits + at) : load_part(logits + at, left, -__builtin_inff());
  }
}

template <class T>
INLINE double scaled(const Logits<T>& row, int32_t v) {
  return ((double)to_float(row.x[v]) - row.largest) / row.temperature;
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

// Count and weight of the tokens in [threshold, above), for falling thresholds.
struct Above {
  int64_t count[THRESHOLDS];
  double weight[THRESHOLDS];
};

template <bool by_mass, class T>
Above weigh(const Logits<T>& row, float above, const float* thresholds) {
  Above found = {};
  constexpr int n = THRESHOLDS, chunk = 4 * BLOCK;  // short float32 sums, then float64
  for (int32_t begin = 0; begin < row.V; begin += chunk) {
    const int32_t end = (int32_t)min((int64_t)begin + chunk, (int64_t)row.V);
    i32 count[n] = {};
    f32 weight[n] = {};
    bool none = true;
    for (int32_t at = begin; at < end; at += BLOCK) {
      f32 block[4];
      load_block(row.x, row.V, at, block);
      for (const f32& x : block) {
        const i32 below = x < above;
        if (!any(below & (x >= thresholds[n - 1]))) continue;
        none = false;
        const f32 p = by_mass ? exp((x - row.largest) * row.inverse) : f32{};
        for (int j = 0; j < n; ++j) {
          const i32 over = below & (x >= thresholds[j]);
          count[j] -= over;
          if (by_mass) weight[j] += select(over, p, splat(0.f));
        }
      }
    }
    for (int j = 0; j < n && !none; ++j) {
      for (int i = 0; i < W; ++i) found.count[j] += count[j][i];
      found.weight[j] = by_mass ? found.weight[j] + sum(weight[j]) : (double)found.count[j];
    }
  }
  return found;
}

// Calls visit(v) for the tokens in [low, above), by rising index, until it returns false.
template <class T, class Visit>
INLINE void each_between(const Logits<T>& row, float low, float above, Visit visit) {
  for (int32_t at = 0; at < row.V; at += BLOCK) {
    f32 x[4];
    i32 inside[4], some = {};
    load_block(row.x, row.V, at, x);
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
Cut cut_among_few(const Logits<T>& row, float low, float above, double before, double target) {
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
    before += by_mass ? __builtin_exp(scaled(row, cut.index)) : 1;
  }
  return cut;
}

// The same where all tokens of the bracket are equal.
template <bool by_mass, class T>
Cut cut_among_equals(const Logits<T>& row, float low, float above, double before, double target) {
  Cut cut = {low, all_equal};
  each_between(row, low, above, [&](int32_t v) {
    cut.index = v, before += by_mass ? __builtin_exp(scaled(row, v)) : 1;
    return before < target;
  });
  return cut;
}

// Thresholds for the next look at a bracket: first some nats below the maximum; then close around the place where the
// target lies if the weight is spread evenly; in the end even steps in the order of floats, which always get there.
template <class T>
void place_thresholds(const Logits<T>& row, int visit, int64_t low, int64_t high, float fraction, float* thresholds) {
  constexpr float depths[THRESHOLDS] = {1.5f, 4.f, 8.f, 14.f}, offsets[THRESHOLDS] = {-0.12f, -0.02f, 0.02f, 0.12f};
  const float bottom = from_order_key((int32_t)low), top = from_order_key((int32_t)high);
  for (int j = 0; j < THRESHOLDS; ++j) {
    if (visit == 0)
      thresholds[j] = row.largest - (float)row.temperature * depths[j];
    else if (visit < 5 && bottom > -FLT_MAX / 2)
      thresholds[j] = max(top - (top - bottom) * min(max(fraction + offsets[j], 0.02f), 0.98f), bottom);
    else
      thresholds[j] = from_order_key((int32_t)(low + (high - low) * (THRESHOLDS - j) / (THRESHOLDS + 1)));
  }
}

// The cut with which the weight reaches `target`, of the `total` that the row has.
template <bool by_mass, class T>
Cut find_cut(const Logits<T>& row, double target, double total) {
  const int64_t beyond = (int64_t)order_key(row.largest) + 1;
  // The bracket [low, high): its number of tokens and their weight, and the weight above it.
  int64_t low = order_key(-__builtin_inff()), high = beyond, inside = row.V;
  double within = total, before = 0;
  for (int visit = 0;; ++visit) {
    const float bottom = from_order_key((int32_t)low);
    const float above = high == beyond ? __builtin_inff() : from_order_key((int32_t)high);
    if (inside <= FEW) return cut_among_few<by_mass>(row, bottom, above, before, target);
    if (high - low <= 1) return cut_among_equals<by_mass>(row, bottom, above, before, target);
    float thresholds[THRESHOLDS];
    place_thresholds(row, visit, low, high, (float)((target - before) / within), thresholds);
    const Above found = weigh<by_mass>(row, above, thresholds);
    int j = 0;
    while (j < THRESHOLDS && before + found.weight[j] < target) ++j;
    if (j < THRESHOLDS) low = order_key(thresholds[j]), inside = found.count[j], within = found.weight[j];
    if (j) {
      high = order_key(thresholds[j - 1]);
      inside -= found.count[j - 1], within -= found.weight[j - 1], before += found.weight[j - 1];
    }
  }
}

// The least float that is at least min_p times as probable as the largest logit.
template <class T>
float least_of_min_p(const Logits<T>& row, float min_p) {
  const double bound = __builtin_log((double)min_p);
  int64_t below = order_key(-__builtin_inff()), low = order_key(row.largest);
  while (low - below > 1) {
    const int64_t middle = (low + below) >> 1;
    const bool kept = ((double)from_order_key((int32_t)middle) - row.largest) / row.temperature >= bound;
    (kept ? low : below) = middle;
  }
  return from_order_key((int32_t)low);
}

}  // namespace
