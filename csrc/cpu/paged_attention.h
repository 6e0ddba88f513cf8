// Attention of the query heads that share one key head over keys in pages; decode_attention.cpp and the decode step use
// it. kernels/decode_attention.py says what it means.
//
// Keys come in splits of SPLIT, cut at its multiples: scores, their exponentials around the split's own maximum, the
// weighted sum of the values. Splits are merged in rising order. A score is one sum along d; the exponentials are
// summed by their place in the split, the values in the order of the keys. So the bits depend on the query and its own
// keys alone: not on the pages, the other rows, nor on which thread took which split. Floor: every key and value is
// read once, and costs 4 d operations a query head. A vector of a key serves up to four heads, one of queries two to
// eight keys; W sums are transposed and added together, with log2(W) shuffled adds.
#pragma once
#include "kernel.h"
#include "softmax.h"

namespace {

constexpr int SPLIT = 256;
static_assert(SPLIT % W == 0, "a split holds whole vectors");

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, i32{__VA_ARGS__})
#endif

// Pages of one layer, one kv head's view of them, and one sequence's row of the block table.
template <class KV>
struct Keys {
  const KV *k, *v;       // (pages, heads, P, d) and (pages, heads, P, dv)
  const int32_t* pages;  // page m holds the positions m P .. m P + P - 1
  int64_t head, heads, P, d, dv;
};

// Of a query head and some keys: the largest score, and the sum of e^(score - largest).
struct Partial {
  float largest, sum;
};

// Blocks of S lanes: the first (or second) half of each block of a, beside that of b.
template <int S, bool second, int... I>
INLINE f32 halves(f32 a, f32 b, Indices<I...>) {
  return SHUFFLE(a, b, (I / S * S + I % (S / 2) + (second ? S / 2 : 0) + (I % S < S / 2 ? 0 : W))...);
}

// The sums of n vectors, stride apart, each added as `sum` adds: W of them fill the lanes in their order.
template <int n, int stride>
INLINE f32 sums(const f32* v) {
  if constexpr (n == 1) {
    return v[0];
  } else {
    constexpr int S = 2 * W / n;
    using Lanes = typename Count<W>::type;
    const f32 a = sums<n / 2, 2 * stride>(v), b = sums<n / 2, 2 * stride>(v + stride);
    return halves<S, false>(a, b, Lanes()) + halves<S, true>(a, b, Lanes());
  }
}

// The products of R queries and K keys, still to be summed over the lanes; PART: d is not a multiple of W.
template <int R, int K, bool PART, class KV>
INLINE void products(const float* q, int64_t q_stride, const KV* const* rows, int64_t d, f32 (*out)[W]) {
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
  if (PART) add(c, [n = (int)(d - c)](const auto* p) { return load_part(p, n, 0.f); });
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) out[r][k] = total[r][k];
}

// Asks for `count` elements of the row of a key that comes AHEAD keys later: rows lie in pages, whose order the
// processor cannot guess.
constexpr int AHEAD = 16;
template <class KV>
INLINE void fetch(const KV* rows, const int64_t* at, int i, int n, int64_t stride, int64_t count) {
  const KV* const row = rows + at[min(i + AHEAD, n - 1)] * stride;
  for (int64_t c = 0; c < count; c += 64 / (int64_t)sizeof(KV)) __builtin_prefetch(row + c);
}

// Scores of R queries with the n keys at rows at[0..n); the last vector is filled up by repeating the last key.
template <int R, bool PART, class KV>
INLINE void score(const float* q, int64_t q_stride, const KV* k, const int64_t* at, int n, int64_t d, float* scores) {
  constexpr int wish = R == 1 ? 8 : R < 4 ? 4 : 2, K = wish < W ? wish : W;
  for (int i = 0; i < n; i += W) {
    f32 partial[R][W];
    const KV* rows[W];
    for (int j = 0; j < W; ++j) rows[j] = k + at[min(i + j, n - 1)] * d;
    for (int j = 0; j < W; ++j) fetch(k, at, i + j, n, d, d);
    for (int j = 0; j < W; j += K) products<R, K, PART>(q, q_stride, rows + j, d, (f32(*)[W])(&partial[0][j]));
    for (int r = 0; r < R; ++r) store(scores + r * SPLIT + i, sums<W, 1>(partial[r]));
  }
}

// Scores of one query into e^(scale * score - largest), and their sum.
INLINE Partial exponentials(float* scores, int n, float scale, float softcap) {
  f32 most = splat(-__builtin_inff()), total = {};
  const float inverse = softcap > 0.f ? scale / softcap : 0.f;
  for (int i = 0; i < n; i += W) {
    const f32 x = load(scores + i);
    const f32 z = softcap > 0.f ? softcap * tanh(x * inverse) : x * scale;
    store(scores + i, z);
    most = max(most, z);
  }
  for (int i = n; i % W; ++i) scores[i] = -__builtin_inff();
  const float from = largest(most);
  for (int i = 0; i < n; i += W) {
    const f32 x = load(scores + i) - from, e = select(x < splat(FAR), splat(0.f), exp_near(x));
    store(scores + i, e);
    total += e;
  }
  return Partial{from, sum(total)};
}

// C vectors of the weighted sums of the values, for R queries; PART: a single one of `last` lanes.
template <int R, int C, bool PART, class KV>
INLINE void weigh(const float* weights, const KV* v, const int64_t* at, int n, int64_t dv, int last, float* out,
                  int64_t out_stride) {
  f32 total[R][C] = {};
  for (int i = 0; i < n; ++i) {
    const KV* const row = v + at[i] * dv;
    fetch(v, at, i, n, dv, C * W);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const f32 value = PART ? load_part(row, last, 0.f) : load(row + c * W);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[r][c] += weights[r * SPLIT + i] * value;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      if (PART)
        store_part(out + r * out_stride, total[r][c], last);
      else
        store(out + r * out_stride + c * W, total[r][c]);
    }
}

template <int R, class KV>
void attend_heads(const float* q, int64_t q_stride, const Keys<KV>& keys, const int64_t* at, int n, float scale,
                  float softcap, float* out, int64_t out_stride, Partial* partials) {
  constexpr int C = R == 1 ? 8 : R < 4 ? 4 : 2;
  alignas(64) float scores[R * SPLIT];
  if (keys.d % W)
    score<R, true>(q, q_stride, keys.k, at, n, keys.d, scores);
  else
    score<R, false>(q, q_stride, keys.k, at, n, keys.d, scores);
  for (int r = 0; r < R; ++r) partials[r] = exponentials(scores + r * SPLIT, n, scale, softcap);
  const auto columns = [&](int64_t c, auto weighed) {
    weighed(scores, keys.v + c, at, n, keys.dv, (int)(keys.dv - c), out + c, out_stride);
  };
  int64_t c = 0;
  for (; c + C * W <= keys.dv; c += C * W) columns(c, weigh<R, C, false, KV>);
  for (; c + W <= keys.dv; c += W) columns(c, weigh<R, 1, false, KV>);
  if (c < keys.dv) columns(c, weigh<R, 1, true, KV>);
}

// G query heads with the keys [begin, end) of one split: out (G, dv) are sums of e^(score - largest) * value.
template <class KV>
INLINE void attend(const float* q, int64_t q_stride, int64_t G, const Keys<KV>& keys, int64_t begin, int64_t end,
                   float scale, float softcap, float* out, int64_t out_stride, Partial* partials) {
  int64_t at[SPLIT];  // the rows of the keys, in a tensor of rows of d
  const int n = (int)(end - begin);
  for (int64_t position = begin; position < end;) {
    const int64_t page = position / keys.P, next = min(end, (page + 1) * keys.P);
    const int64_t row = (keys.pages[page] * keys.heads + keys.head) * keys.P - page * keys.P;
    for (; position < next; ++position) at[position - begin] = row + position;
  }
  for (int64_t g = 0; g < G;) {
    const int64_t R = min<int64_t>(G - g, 4);
    const auto call = R == 4   ? &attend_heads<4, KV>
                      : R == 3 ? &attend_heads<3, KV>
                      : R == 2 ? &attend_heads<2, KV>
                               : &attend_heads<1, KV>;
    call(q + g * q_stride, q_stride, keys, at, n, scale, softcap, out + g * out_stride, out_stride, partials + g);
    g += R;
  }
}

// Adds the split that follows: `into` and `out` are then those of both.
INLINE void merge(Partial& into, float* out, const Partial& next, const float* part, int64_t dv) {
  const float most = max(into.largest, next.largest);
  const float a = scalar_exp(into.largest - most), b = scalar_exp(next.largest - most);
  into = Partial{most, into.sum * a + next.sum * b};
  for (int64_t c = 0; c < dv; ++c) out[c] = out[c] * a + part[c] * b;
}

INLINE void normalise(const Partial& whole, float* out, int64_t dv) {
  const float factor = 1.f / whole.sum;
  for (int64_t c = 0; c < dv; ++c) out[c] *= factor;
}

// The end of the split that holds `begin`, or of the keys.
INLINE int64_t split_end(int64_t begin, int64_t end) { return min(end, (begin / SPLIT + 1) * SPLIT); }

// What attend_all needs beside its output: floats.
INLINE int64_t attend_scratch(int64_t G, int64_t dv) { return G * (dv + 4); }

// G query heads with all the keys [begin, end), split by split: out (G, dv), normalised; 0 where there are no keys.
template <class KV>
void attend_all(const float* q, int64_t q_stride, int64_t G, const Keys<KV>& keys, int64_t begin, int64_t end,
                float scale, float softcap, float* out, int64_t out_stride, float* scratch) {
  Partial *const whole = (Partial*)scratch, *const next = whole + G;
  float* const part = scratch + 4 * G;
  if (begin >= end)
    for (int64_t g = 0; g < G; ++g) memset(out + g * out_stride, 0, keys.dv * sizeof(float));
  for (int64_t from = begin; from < end; from = split_end(from, end)) {
    const int64_t to = split_end(from, end);
    if (from == begin) {
      attend(q, q_stride, G, keys, from, to, scale, softcap, out, out_stride, whole);
    } else {
      attend(q, q_stride, G, keys, from, to, scale, softcap, part, keys.dv, next);
      for (int64_t g = 0; g < G; ++g) merge(whole[g], out + g * out_stride, next[g], part + g * keys.dv, keys.dv);
    }
  }
  if (begin < end)
    for (int64_t g = 0; g < G; ++g) normalise(whole[g], out + g * out_stride, keys.dv);
}

#undef SHUFFLE

}  // namespace
