// Attention of the query heads that share one key head over keys in pages, for decode_attention.cpp and the decode
// step, and over keys of packed sequences, for varlen_decode_order.cpp. kernels/decode_attention.py defines it.
//
//     keys     | split 0: positions 0 ... 255 | split 1: 256 ... 511 | ...     from `begin` to `end`
//     split    scores -> e^(score - largest) -> weighted sum of the values, for up to four query heads at a time
//     merge    split 0, then 1, then 2, ...
//
//     scores   lane l sums the elements l, l + W, ... of q and k; W such sums are transposed and added together, with
//              log2(W) shuffled adds
//     values   lane l has element l of the output; keys are added in their order
//
// A score is one sum along d, exponentials are summed by their position in the split. So the bits depend on the query
// and its own keys alone: not on the pages, the other rows, or the thread that took a split.
//
// Floor: every key and value is read once, and takes 4 d operations for each query head.
#pragma once
#include "kernel.h"
#include "softmax.h"

namespace {

constexpr int SPLIT = 256;
static_assert(SPLIT % W == 0, "a split has whole vectors");

// The keys and values of one sequence and one kv head. The functions below take any view with k, v, d, dv and key_rows.
template <class KV>
struct KvView {
  using Element = KV;
  const KV *k, *v;             // (num_pages, kv_heads, page_size, d) and (..., dv)
  const int32_t* block_table;  // the sequence's row: entry m is the page of positions m page_size ... + page_size - 1
  int64_t kv_head, kv_heads, page_size, d, dv;

  // The rows of positions [begin, end) in the cache seen as rows of d.
  INLINE void key_rows(int64_t begin, int64_t end, int64_t* rows) const {
    for (int64_t position = begin; position < end;) {
      const int64_t m = position / page_size, page_end = min(end, (m + 1) * page_size);
      const int64_t row = (block_table[m] * kv_heads + kv_head) * page_size - m * page_size;
      for (; position < page_end; ++position) rows[position - begin] = row + position;
    }
  }
};

// The softmax state of a query head over some keys: the largest score, and the sum of e^(score - max).
struct AttentionState {
  float max, sum;
};

// In blocks of S lanes: the first (or second) half of each block of a, beside that of b.
template <int S, bool SECOND, int... I>
INLINE f32 interleave_halves(f32 a, f32 b, Indices<I...>) {
  return SHUFFLE(a, b, (I / S * S + I % (S / 2) + (SECOND ? S / 2 : 0) + (I % S < S / 2 ? 0 : W))...);
}

// The reduce_sum of each of n vectors, `stride` apart in v. W of them fill the lanes, in their order.
template <int n, int stride>
INLINE f32 reduce_sums(const f32* v) {
  if constexpr (n == 1) {
    return v[0];
  } else {
    constexpr int S = 2 * W / n;
    using Lanes = typename Count<W>::type;
    const f32 a = reduce_sums<n / 2, 2 * stride>(v), b = reduce_sums<n / 2, 2 * stride>(v + stride);
    return interleave_halves<S, false>(a, b, Lanes()) + interleave_halves<S, true>(a, b, Lanes());
  }
}

// The products of R queries and K keys, not yet summed over the lanes. PARTIAL: d is not a multiple of W.
template <int R, int K, bool PARTIAL, class KV>
INLINE void dot_products(const float* q, int64_t q_stride, const KV* const* rows, int64_t d, f32 (*out)[W]) {
  f32 total[R][K] = {};
  const auto add = [&](int64_t c, auto read) {
    f32 query[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) query[r] = read(q + r * q_stride + c);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const f32 key = read(rows[k] + c);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[r][k] += query[r] * key;
    }
  };
  int64_t c = 0;
  for (; c + W <= d; c += W) add(c, [](const auto* p) { return load(p); });
  if (PARTIAL) add(c, [n = (int)(d - c)](const auto* p) { return load_partial(p, n, 0.f); });
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) out[r][k] = total[r][k];
}

// Prefetches `count` elements of the row that is used PREFETCH_DISTANCE keys later: the processor cannot guess the
// order of the pages.
constexpr int PREFETCH_DISTANCE = 16;
template <class KV>
INLINE void prefetch(const KV* rows, const int64_t* key_rows, int i, int n, int64_t stride, int64_t count) {
  const KV* const row = rows + key_rows[min(i + PREFETCH_DISTANCE, n - 1)] * stride;
  for (int64_t c = 0; c < count; c += 64 / (int64_t)sizeof(KV)) __builtin_prefetch(row + c);
}

// Keys, or vectors of values, that R queries share: their sums fill the registers.
template <int R>
constexpr int shared_by() {
  if (R == 1) return 8;
  return R < 4 ? 4 : 2;
}

// Scores of R queries with the n keys in the rows `key_rows` of k. The last vector repeats the last key.
template <int R, bool PARTIAL, class KV>
INLINE void compute_scores(const float* q, int64_t q_stride, const KV* k, const int64_t* key_rows, int n, int64_t d,
                           float* scores) {
  constexpr int K = shared_by<R>() < W ? shared_by<R>() : W;
  for (int i = 0; i < n; i += W) {
    f32 partial[R][W];
    const KV* rows[W];
    for (int j = 0; j < W; ++j) rows[j] = k + key_rows[min(i + j, n - 1)] * d;
    for (int j = 0; j < W; ++j) prefetch(k, key_rows, i + j, n, d, d);
    for (int j = 0; j < W; j += K) dot_products<R, K, PARTIAL>(q, q_stride, rows + j, d, (f32(*)[W])(&partial[0][j]));
    for (int r = 0; r < R; ++r) store(scores + r * SPLIT + i, reduce_sums<W, 1>(partial[r]));
  }
}

// Replaces the scores of one query by e^(z - max), z = scale * score or its softcap, and returns max and their sum.
INLINE AttentionState exponentials(float* scores, int n, float scale, float softcap) {
  f32 largest = splat(-__builtin_inff()), total = {};
  const float inverse = softcap > 0.f ? scale / softcap : 0.f;
  for (int i = 0; i < n; i += W) {
    const f32 x = load(scores + i);
    const f32 z = softcap > 0.f ? softcap * tanh(x * inverse) : x * scale;
    store(scores + i, z);
    largest = max(largest, z);
  }
  for (int i = n; i % W; ++i) scores[i] = -__builtin_inff();
  const float max_score = reduce_max(largest);
  for (int i = 0; i < n; i += W) {
    const f32 x = load(scores + i) - max_score, e = select(x < splat(MIN_EXPONENT), splat(0.f), fast_exp(x));
    store(scores + i, e);
    total += e;
  }
  return AttentionState{max_score, reduce_sum(total)};
}

// C vectors of the weighted sums of the values, for R queries. PARTIAL: a single one, of `num_lanes` lanes.
template <int R, int C, bool PARTIAL, class KV>
INLINE void weighted_values(const float* weights, const KV* v, const int64_t* key_rows, int n, int64_t dv,
                            int num_lanes, float* out, int64_t out_stride) {
  f32 total[R][C] = {};
  for (int i = 0; i < n; ++i) {
    const KV* const row = v + key_rows[i] * dv;
    prefetch(v, key_rows, i, n, dv, C * W);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const f32 value = PARTIAL ? load_partial(row, num_lanes, 0.f) : load(row + c * W);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[r][c] += weights[r * SPLIT + i] * value;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      if (PARTIAL)
        store_partial(out + r * out_stride, total[r][c], num_lanes);
      else
        store(out + r * out_stride + c * W, total[r][c]);
    }
}

// R query heads with the n keys in the rows `key_rows`.
template <int R, class View>
void attend_heads(const float* q, int64_t q_stride, const View& kv, const int64_t* key_rows, int n, float scale,
                  float softcap, float* out, int64_t out_stride, AttentionState* states) {
  constexpr int C = shared_by<R>();
  alignas(64) float scores[R * SPLIT];
  if (kv.d % W)
    compute_scores<R, true>(q, q_stride, kv.k, key_rows, n, kv.d, scores);
  else
    compute_scores<R, false>(q, q_stride, kv.k, key_rows, n, kv.d, scores);
  for (int r = 0; r < R; ++r) states[r] = exponentials(scores + r * SPLIT, n, scale, softcap);
  const auto columns_from = [&](int64_t c, auto compute) {
    compute(scores, kv.v + c, key_rows, n, kv.dv, (int)(kv.dv - c), out + c, out_stride);
  };
  int64_t c = 0;
  using KV = typename View::Element;
  for (; c + C * W <= kv.dv; c += C * W) columns_from(c, weighted_values<R, C, false, KV>);
  for (; c + W <= kv.dv; c += W) columns_from(c, weighted_values<R, 1, false, KV>);
  if (c < kv.dv) columns_from(c, weighted_values<R, 1, true, KV>);
}

// G query heads with the keys [begin, end) of one split: out (G, dv) = sums of e^(score - max) * value.
template <class View>
INLINE void attend_split(const float* q, int64_t q_stride, int64_t G, const View& kv, int64_t begin, int64_t end,
                         float scale, float softcap, float* out, int64_t out_stride, AttentionState* states) {
  int64_t key_rows[SPLIT];
  const int n = (int)(end - begin);
  kv.key_rows(begin, end, key_rows);
  constexpr decltype(&attend_heads<1, View>) by_heads[] = {attend_heads<1, View>, attend_heads<2, View>,
                                                           attend_heads<3, View>, attend_heads<4, View>};
  for (int64_t g = 0; g < G;) {
    const int64_t R = min<int64_t>(G - g, 4);
    by_heads[R - 1](q + g * q_stride, q_stride, kv, key_rows, n, scale, softcap, out + g * out_stride, out_stride,
                    states + g);
    g += R;
  }
}

// Merges the next split's state and output into `state` and `out`.
INLINE void merge(AttentionState& state, float* out, const AttentionState& next, const float* next_out, int64_t dv) {
  const float new_max = max(state.max, next.max);
  const float a = scalar_exp(state.max - new_max), b = scalar_exp(next.max - new_max);
  state = AttentionState{new_max, state.sum * a + next.sum * b};
  for (int64_t c = 0; c < dv; ++c) out[c] = out[c] * a + next_out[c] * b;
}

INLINE void normalize(const AttentionState& state, float* out, int64_t dv) {
  const float factor = 1.f / state.sum;
  for (int64_t c = 0; c < dv; ++c) out[c] *= factor;
}

// The end of the split with position `begin`, or of the keys.
INLINE int64_t split_end(int64_t begin, int64_t end) { return min(end, (begin / SPLIT + 1) * SPLIT); }

// Floats of scratch memory that attend needs: for each query head the states of all splits so far and of the next, and
// the next's output.
constexpr int STATE_FLOATS = 2 * sizeof(AttentionState) / sizeof(float);
INLINE int64_t attend_scratch(int64_t G, int64_t dv) { return G * (STATE_FLOATS + dv); }

// G query heads with the keys [begin, end): out (G, dv); 0 if there are no keys. The states over all keys are the first
// G in scratch memory.
template <class View>
void attend(const float* q, int64_t q_stride, int64_t G, const View& kv, int64_t begin, int64_t end, float scale,
            float softcap, float* out, int64_t out_stride, float* scratch) {
  AttentionState *const states = (AttentionState*)scratch, *const next = states + G;
  float* const next_out = scratch + STATE_FLOATS * G;
  if (begin >= end)
    for (int64_t g = 0; g < G; ++g) memset(out + g * out_stride, 0, kv.dv * sizeof(float));
  for (int64_t from = begin; from < end; from = split_end(from, end)) {
    const int64_t to = split_end(from, end);
    if (from == begin) {
      attend_split(q, q_stride, G, kv, from, to, scale, softcap, out, out_stride, states);
    } else {
      attend_split(q, q_stride, G, kv, from, to, scale, softcap, next_out, kv.dv, next);
      for (int64_t g = 0; g < G; ++g) merge(states[g], out + g * out_stride, next[g], next_out + g * kv.dv, kv.dv);
    }
  }
  if (begin < end)
    for (int64_t g = 0; g < G; ++g) normalize(states[g], out + g * out_stride, kv.dv);
}

}  // namespace
