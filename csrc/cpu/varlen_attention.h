// Causal attention of one block of queries over the keys of its sequence and of its parent, forward and backward, for
// varlen_attention.cpp; kernels/varlen_attention.py defines it.
//
//     a block        W consecutive queries, one a lane, of B query heads that share a key head: B vectors
//     panels         a number for each dimension c or key, and each lane: [c or key][b][lane]
//
//     scores         panel[key] = sum over c of k[key][c] * q[c]       key_products: a register tile of keys
//     output         panel[c] += sum over keys of v[key][c] * p[key]   value_products: a register tile of dimensions
//     dk, dv         row[key] += sum over lanes of ds[key][lane] * q[lane]    row_products: vectors over dimensions
//
// So nothing is reduced over lanes, and keys and values stay rows. Keys come in tiles of TILE_KEYS, whose scores stay
// in the first-level cache. Tiles that no query of the block sees are skipped; in those that only some see, an element
// that is not seen is never multiplied, as it may be NaN.
//
// Exponents are powers of 2: log2(e) is a factor of the query's panel. Sums over keys are in their order, so a token's
// bits depend on its own sequence, its parent and its place in them alone.
//
// Floor: 4 d operations for a query and a key it sees, 10 d with the gradient, and an exponential for each.
#pragma once
#include "softmax.h"

namespace {

constexpr int TILE_KEYS = 64;
constexpr int MAX_HEADS = 3;            // B at most
constexpr int ROWS = 8;                 // numbers of rows of panels are multiples
constexpr float LOWEST_POWER = -126.f;  // 2^x below is taken as 0
constexpr int MAX_WINDOW = 1 << 30;

// Keys or dimensions of a register tile: with B vectors each its sums fill the registers.
template <int B>
constexpr int tile_rows() {
  return W == 16 || B == 1 ? 8 : 4;
}

// 2^x for x <= 0, or a rounding above.
INLINE f32 exp2_below(f32 x) {
  const f32 clamped = max(splat(LOWEST_POWER), x), shifted = clamped + ROUND;  // a NaN stays a NaN
  return select(x < splat(LOWEST_POWER), splat(0.f), power_of_two(shifted, clamped - (shifted - ROUND)));
}

// The queries of a block: their positions, and which keys they see.
struct Block {
  int first, count, window;  // position of lane 0, number of queries, and of keys that each sees
  i32 position;              // of each lane; those beyond the last query are as it is

  Block(int first, int count, int window) : first(first), count(count), window(window) {
    for (int i = 0; i < W; ++i) position[i] = first + min(i, count - 1);
  }
  INLINE i32 sees(int key) const { return (position >= key) & (position < key + window); }
  // Keys [any_begin, any_end) are seen by a query, [all_begin, all_end) by all.
  int any_begin() const { return max(0, first - window + 1); }
  int any_end() const { return first + count; }
  int all_begin() const { return max(0, first + count - window); }
  int all_end() const { return first + 1; }
  // Lanes [lane_begin, lane_end) see a key.
  int lane_begin(int key) const { return max(0, key - first); }
  int lane_end(int key) const { return min(count, key + window - first); }
};

// Rows of keys and values in float32, for positions [begin, end) of a sequence, and of their gradients' sums.
struct Segment {
  int begin, end;
  const float *k, *v;  // rows of `narrow` floats
  float *dk, *dv;      // rows of `padded` floats, or null
};

// Sizes and numbers of a call.
struct Shape {
  int64_t d, narrow, padded;  // the head size, and filled up to ROWS and to whole vectors
  float scale, softcap;
  int window;

  // The factor of queries in a panel, and of a soft cap's tanh: scores are powers of 2.
  float query_factor() const { return softcap > 0.f ? scale / softcap : scale * (float)LOG2_E; }
  float cap() const { return softcap * (float)LOG2_E; }
};

// A tile: keys [begin, end) of a segment, of which all queries see [all_begin, all_end), counted from its first.
struct KeyTile {
  int begin, count, all_begin, all_end;
  const float *k, *v;
  float *dk, *dv;

  KeyTile(const Segment& segment, const Block& block, const Shape& shape, int begin, int end)
      : begin(begin), count(end - begin) {
    all_begin = min(max(block.all_begin() - begin, 0), count);
    all_end = max(min(block.all_end() - begin, count), all_begin);
    const int64_t row = begin - segment.begin;
    k = segment.k + row * shape.narrow;
    v = segment.v + row * shape.narrow;
    dk = segment.dk ? segment.dk + row * shape.padded : nullptr;
    dv = segment.dv ? segment.dv + row * shape.padded : nullptr;
  }
  bool all_see(int i, int n) const { return i >= all_begin && i + n <= all_end; }
  INLINE i32 sees(const Block& block, int i) const { return i < count ? block.sees(begin + i) : i32{}; }
};

// Calls f(tile) for the tiles of keys that some query of the block sees.
template <class F>
INLINE void for_each_tile(const Segment* segments, int num_segments, const Block& block, const Shape& shape, F f) {
  for (int s = 0; s < num_segments; ++s) {
    const int end = min(block.any_end(), segments[s].end);
    for (int begin = max(block.any_begin(), segments[s].begin); begin < end; begin += TILE_KEYS)
      f(KeyTile(segments[s], block, shape, begin, min(begin + TILE_KEYS, end)));
  }
}

// sums[m][b] = sum over c of rows[m][c] * panel[c][b].
template <int M, int B>
INLINE void key_products(const float* rows, const Shape& shape, const float* panel, f32 (&sums)[M][B]) {
  for (int m = 0; m < M; ++m)
    for (int b = 0; b < B; ++b) sums[m][b] = splat(0.f);
  for (int64_t c = 0; c < shape.d; ++c) {
    f32 x[B];
    for (int b = 0; b < B; ++b) x[b] = load(panel + (c * B + b) * W);
    for (int m = 0; m < M; ++m) {
      const f32 y = splat(rows[m * shape.narrow + c]);
      for (int b = 0; b < B; ++b) sums[m][b] += x[b] * y;
    }
  }
}

// sums[m][b] += sum over keys [begin, end) of a tile of rows[key][m] * panel[key][b], where the lane sees the key.
template <bool MASKED, int M, int B>
INLINE void value_products(const float* rows, const Shape& shape, const float* panel, int begin, int end,
                           const KeyTile& tile, const Block& block, f32 (&sums)[M][B]) {
  for (int i = begin; i < end; ++i) {
    f32 x[B];
    for (int b = 0; b < B; ++b) x[b] = load(panel + (i * B + b) * W);
    const i32 seen = MASKED ? tile.sees(block, i) : i32{};
    for (int m = 0; m < M; ++m) {
      const f32 y = splat(rows[i * shape.narrow + m]);
      for (int b = 0; b < B; ++b)
        sums[m][b] = MASKED ? select(seen, sums[m][b] + x[b] * y, sums[m][b]) : sums[m][b] + x[b] * y;
    }
  }
}

// out[c] += sum over the tile's keys of rows[key][c] * panel[key], for each lane.
template <int B>
INLINE void add_values(const float* rows, const Shape& shape, const float* panel, const KeyTile& tile,
                       const Block& block, float* out) {
  constexpr int M = tile_rows<B>();
  for (int64_t c = 0; c < shape.narrow; c += M) {
    f32 sums[M][B];
    for (int m = 0; m < M; ++m)
      for (int b = 0; b < B; ++b) sums[m][b] = load(out + ((c + m) * B + b) * W);
    value_products<true>(rows + c, shape, panel, 0, tile.all_begin, tile, block, sums);
    value_products<false>(rows + c, shape, panel, tile.all_begin, tile.all_end, tile, block, sums);
    value_products<true>(rows + c, shape, panel, tile.all_end, tile.count, tile, block, sums);
    for (int m = 0; m < M; ++m)
      for (int b = 0; b < B; ++b) store(out + ((c + m) * B + b) * W, sums[m][b]);
  }
}

// M rows of C vectors: out[m] += sum over lanes [begin, end) of panel[m][lane] * rows[lane].
template <int M, int C>
INLINE void row_products(const float* panel, int64_t panel_stride, const float* rows, int64_t padded, int begin,
                         int end, float* out) {
  f32 sums[M][C];
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < C; ++c) sums[m][c] = load(out + m * padded + c * W);
  for (int i = begin; i < end; ++i) {
    f32 x[C];
    for (int c = 0; c < C; ++c) x[c] = load(rows + i * padded + c * W);
    for (int m = 0; m < M; ++m) {
      const f32 y = splat(panel[m * panel_stride + i]);
      for (int c = 0; c < C; ++c) sums[m][c] += x[c] * y;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int c = 0; c < C; ++c) store(out + m * padded + c * W, sums[m][c]);
}

template <int C, int B>
INLINE void add_columns_of_rows(const float* panel, const float* rows, const Shape& shape, const KeyTile& tile,
                                const Block& block, float* out) {
  constexpr int M = C == 1 ? 8 : 4;
  const int64_t padded = shape.padded;
  const auto masked = [&](int i) {
    for (int b = 0; b < B; ++b)
      row_products<1, C>(panel + i * B * W, B * W, rows, padded, b * W + block.lane_begin(tile.begin + i),
                         b * W + block.lane_end(tile.begin + i), out + i * padded);
  };
  int i = 0;
  for (; i < tile.all_begin; ++i) masked(i);
  for (; i + M <= tile.all_end; i += M)
    row_products<M, C>(panel + i * B * W, B * W, rows, padded, 0, B * W, out + i * padded);
  for (; i < tile.count; ++i) masked(i);
}

// out[key] += sum over lanes that see the key of panel[key][lane] * rows[lane].
template <int B>
INLINE void add_rows(const float* panel, const float* rows, const Shape& shape, const KeyTile& tile, const Block& block,
                     float* out) {
  constexpr int C = W == 16 ? 4 : 2;
  int64_t c = 0;
  for (; c + C * W <= shape.padded; c += C * W) add_columns_of_rows<C, B>(panel, rows + c, shape, tile, block, out + c);
  for (; c < shape.padded; c += W) add_columns_of_rows<1, B>(panel, rows + c, shape, tile, block, out + c);
}

// Panels of the forward pass of a block, in scratch memory.
struct ForwardPanels {
  float *q, *out, *scores;  // (narrow, B), (narrow, B), (TILE_KEYS, B) vectors
};

// The outputs of a block in panels.out, and the log-sum-exp of each lane, from the queries times query_factor.
template <int B, bool SOFTCAP>
void attend_block(const Segment* segments, int num_segments, const Block& block, const Shape& shape,
                  const ForwardPanels& panels, f32 (&lse)[B]) {
  constexpr int M = tile_rows<B>();
  const f32 minus_infinity = splat(-__builtin_inff());
  f32 largest[B], total[B];
  for (int b = 0; b < B; ++b) {
    largest[b] = minus_infinity;
    total[b] = splat(0.f);
  }
  memset(panels.out, 0, shape.narrow * B * W * sizeof(float));
  bool is_first = true;
  for_each_tile(segments, num_segments, block, shape, [&](const KeyTile& tile) {
    f32 next[B];
    for (int b = 0; b < B; ++b) next[b] = largest[b];
    for (int i = 0; i < tile.count; i += M) {
      f32 score[M][B];
      key_products(tile.k + i * shape.narrow, shape, panels.q, score);
      const bool all_see = tile.all_see(i, M);
      for (int m = 0; m < M; ++m)
        for (int b = 0; b < B; ++b) {
          f32 x = SOFTCAP ? tanh(score[m][b]) * shape.cap() : score[m][b];
          if (!all_see) x = select(tile.sees(block, i + m), x, minus_infinity);
          store(panels.scores + ((i + m) * B + b) * W, x);
          next[b] = max(next[b], x);
        }
    }
    f32 origin[B];  // a lane that has seen no key yet has none
    for (int b = 0; b < B; ++b) origin[b] = select(next[b] == minus_infinity, splat(0.f), next[b]);
    if (!is_first) {
      f32 factor[B];
      for (int b = 0; b < B; ++b) {
        factor[b] = exp2_below(largest[b] - origin[b]);
        total[b] *= factor[b];
      }
      for (int64_t c = 0; c < shape.narrow; ++c)
        for (int b = 0; b < B; ++b) {
          float* const out = panels.out + (c * B + b) * W;
          store(out, load(out) * factor[b]);
        }
    }
    is_first = false;
    for (int b = 0; b < B; ++b) largest[b] = next[b];
    for (int i = 0; i < tile.count; ++i)
      for (int b = 0; b < B; ++b) {
        float* const score = panels.scores + (i * B + b) * W;
        const f32 p = exp2_below(load(score) - origin[b]);
        total[b] += p;
        store(score, p);
      }
    add_values<B>(tile.v, shape, panels.scores, tile, block, panels.out);
  });
  for (int b = 0; b < B; ++b) {
    const f32 inverse = splat(1.f) / total[b];
    for (int64_t c = 0; c < shape.d; ++c) {
      float* const out = panels.out + (c * B + b) * W;
      store(out, load(out) * inverse);
    }
    lse[b] = largest[b] * (float)(1. / LOG2_E) + log(total[b]);
  }
}

// Panels and rows of the backward pass of a block, in scratch memory.
struct BackwardPanels {
  float *q, *grad_out, *dq;   // (narrow, B) vectors; q is times query_factor
  float *q_rows, *grad_rows;  // (B, W) rows of `padded` floats
  float *p, *ds, *cap_grad;   // (keys, B) vectors, the keys of each segment filled up to ROWS; the last for a soft cap
};

// Adds a block's part to the gradients of keys, without the scale, and values; its own dq, without the scale, is in
// panels.dq. The sums of p, which is 1 but for the rounding of lse, and of p dp, which is that of grad_out * out but
// for the rounding of out, are made anew from all keys.
template <int B, bool SOFTCAP>
void differentiate_block(const Segment* segments, int num_segments, const Block& block, const Shape& shape,
                         const BackwardPanels& panels, const f32 (&lse)[B]) {
  constexpr int M = tile_rows<B>();
  memset(panels.dq, 0, shape.narrow * B * W * sizeof(float));
  f32 origin[B], total[B], delta[B];
  for (int b = 0; b < B; ++b) {
    origin[b] = lse[b] * (float)LOG2_E;
    total[b] = splat(0.f);
    delta[b] = splat(0.f);
  }
  int64_t at = 0;  // the tile's place in the panels of keys
  for_each_tile(segments, num_segments, block, shape, [&](const KeyTile& tile) {
    for (int i = 0; i < tile.count; i += M, at += M * B * W) {
      const bool all_see = tile.all_see(i, M);
      f32 score[M][B], dp[M][B];
      key_products(tile.k + i * shape.narrow, shape, panels.q, score);
      for (int m = 0; m < M; ++m)
        for (int b = 0; b < B; ++b) {
          const int64_t place = at + (m * B + b) * W;
          f32 x = score[m][b];
          if (SOFTCAP) {
            const f32 y = tanh(x);
            store(panels.cap_grad + place, 1.f - y * y);
            x = y * shape.cap();
          }
          const f32 p = exp2_below(x - origin[b]);
          total[b] += all_see ? p : select(tile.sees(block, i + m), p, splat(0.f));
          store(panels.p + place, p);
        }
      key_products(tile.v + i * shape.narrow, shape, panels.grad_out, dp);
      for (int m = 0; m < M; ++m)
        for (int b = 0; b < B; ++b) {
          const int64_t place = at + (m * B + b) * W;
          const f32 product = load(panels.p + place) * dp[m][b];
          delta[b] += all_see ? product : select(tile.sees(block, i + m), product, splat(0.f));
          store(panels.ds + place, dp[m][b]);
        }
    }
  });
  for (int b = 0; b < B; ++b) {
    total[b] = splat(1.f) / total[b];
    delta[b] *= total[b];
  }
  at = 0;
  for_each_tile(segments, num_segments, block, shape, [&](const KeyTile& tile) {
    float *const p = panels.p + at, *const ds = panels.ds + at;
    for (int i = 0; i < tile.count; ++i)
      for (int b = 0; b < B; ++b) {
        const int64_t place = (i * B + b) * W;
        const f32 weight = load(p + place) * total[b];
        f32 x = weight * (load(ds + place) - delta[b]);
        store(p + place, weight);
        if (SOFTCAP) x = x * load(panels.cap_grad + at + place);
        store(ds + place, x);
      }
    add_values<B>(tile.k, shape, ds, tile, block, panels.dq);
    add_rows<B>(p, panels.grad_rows, shape, tile, block, tile.dv);
    add_rows<B>(ds, panels.q_rows, shape, tile, block, tile.dk);
    at += (tile.count + M - 1) / M * M * B * W;
  });
}

}  // namespace
