// Draws a token from each row of hidden states: the head's product and the draw in one; kernels/linear_sample_tokens.py
// says what it means, product.h and sample.h how the two halves are done.
//
// A thread takes its columns of the head in tiles: up to ROWS rows of logits of one tile lie in the second-level cache
// when they are visited, and are forgotten. A row of logits is kept only where a filter or a ban must see it whole.
//
// Floor: the head once from memory, or its 2 B V D operations; the draw adds some 50 operations a logit.
#include "kernel.h"
#include "product.h"
#include "sample.h"
#include "team.h"

namespace {

constexpr int64_t ROWS = 64;

struct Head {
  Matrix matrix;
  float softcap;
};

struct Ban {
  const int64_t* tokens;
  int64_t count;
  const uint8_t* rows;  // which rows it binds
};

// What the threads work on, for up to ROWS rows.
struct Work {
  Activations x;
  float* logits;   // (rows, V), or null where no row is kept
  RowSums* tiles;  // (rows, tiles)
  Draw* draws;     // (threads, rows)
};

INLINE int64_t tiles_of(int64_t V) { return (V + DRAW_TILE - 1) / DRAW_TILE; }
INLINE bool is_kept(const Options& o, const Ban& ban, int64_t b, int64_t V) {
  return any_filter(filters_of(o, b, V)) || (ban.count && ban.rows[b]);
}

INLINE void finish_logits(const Head& head, int64_t begin, int64_t n, float* x) {
  add_bias(head.matrix, begin, n, x);
  if (!(head.softcap > 0)) return;
  for (int64_t c = 0; c < n; c += W) {
    const int left = (int)min<int64_t>(W, n - c);
    store_part(x + c, head.softcap * tanh(load_part(x + c, left, 0.f) / head.softcap), left);
  }
}

// One tile of columns, for rows first, first + 1, ... of the call.
template <class Dot>
void visit_columns(const Head& head, const Work& work, const Options& o, const Ban& ban, int64_t first, int64_t tile,
                   Draw* draws, float* buffer, float* panel) {
  const int64_t V = head.matrix.out, begin = tile * DRAW_TILE, end = min(V, begin + DRAW_TILE), n = end - begin;
  for (int64_t c = begin; c < end; c += 64)
    multiply<Dot>(work.x, head.matrix, c, min(end, c + 64), buffer + c - begin, DRAW_TILE, panel);
  for (int64_t r = 0; r < work.x.rows; ++r) {
    float* const x = buffer + r * DRAW_TILE;
    RowSums& sums = work.tiles[r * tiles_of(V) + tile];
    finish_logits(head, begin, n, x);
    if (is_kept(o, ban, first + r, V)) {
      memcpy(work.logits + r * V + begin, x, n * sizeof(float));
    } else if (draws[r].temperature == 0) {
      sums = visit_tile<false>(draws[r], x, (int32_t)begin, (int32_t)n);
      if (sums.largest > draws[r].best) {
        draw_largest(draws[r], x, (int32_t)n, (float)sums.largest);
        draws[r].token += (int32_t)begin, draws[r].best = sums.largest;
      }
    } else {
      sums = visit_tile<true>(draws[r], x, (int32_t)begin, (int32_t)n);
    }
  }
}

// The tiles' sums in order; of the threads' draws the best, the lowest index among equals.
void finish_row(const Head& head, const Work& work, const Options& o, const Ban& ban, const Outputs& out, int64_t b,
                int64_t r, int team) {
  const int32_t V = (int32_t)head.matrix.out;
  if (is_kept(o, ban, b, V)) {
    float* const x = work.logits + r * V;
    const bool banned = ban.count && ban.rows[b];
    RowSums all = no_sums;
    if (banned && in_range(o, b)) {
      Draw draw = start_draw(o, b);
      all = visit_row<false>(draw, x, V);
      for (int64_t i = 0; i < ban.count; ++i)
        if (ban.tokens[i] >= 0 && ban.tokens[i] < V && x[ban.tokens[i]] < __builtin_inff())
          x[ban.tokens[i]] = -__builtin_inff();
    }
    return sample_row(x, V, b, o, (const float*)nullptr, banned ? &all : nullptr, out);
  }
  if (!in_range(o, b)) return refuse(out, b);
  Draw best = work.draws[r];
  for (int t = 1; t < team; ++t) {
    const Draw& other = work.draws[t * ROWS + r];
    const bool wins = other.best > best.best || (other.best == best.best && other.token < best.token);
    if (other.token >= 0 && (best.token < 0 || wins)) best = other;
  }
  RowSums sums = no_sums;
  for (int64_t tile = 0; tile < tiles_of(V); ++tile)
    add_tile(sums, work.tiles[r * tiles_of(V) + tile], is_plain(best) ? 1 : best.temperature);
  report(out, b, sums, best, 0);
}

INLINE int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The parts of the workspace; with `base` null only their size is counted.
struct Workspace {
  char* base;
  int64_t used;
  template <class T>
  T* take(int64_t count) {
    T* const part = base ? (T*)(base + used) : nullptr;
    used += aligned(count * (int64_t)sizeof(T));
    return part;
  }
};

struct Parts {
  float *wide, *logits, *buffers, *panels;
  uint16_t* half;
  RowSums* tiles;
  Draw* draws;
  int64_t panel;
};

Parts divide(Workspace& space, int64_t rows, int64_t D, int64_t V, bool keeps, bool halves, int threads) {
  Parts p = {};
  p.panel = max<int64_t>(PANEL, 4 * D);
  p.wide = space.take<float>(rows * D);
  p.half = halves ? space.take<uint16_t>(rows * D) : nullptr;
  p.logits = keeps ? space.take<float>(rows * V) : nullptr;
  p.tiles = space.take<RowSums>(rows * tiles_of(V));
  p.draws = space.take<Draw>(threads * ROWS);
  p.buffers = space.take<float>(threads * rows * DRAW_TILE);
  p.panels = space.take<float>(threads * p.panel);
  return p;
}

template <class Dot>
void sample(const Head& head, const void* hidden, bool hidden_is_bf16, int64_t B, const Options& o, const Ban& ban,
            const Outputs& out, const Parts& parts, int64_t least, int threads) {
  const int64_t V = head.matrix.out, D = head.matrix.in, tiles = tiles_of(V);
  for (int64_t first = 0; first < B; first += ROWS) {
    const int64_t rows = min(ROWS, B - first);
    const Work work = {{parts.wide, parts.half, D, rows}, parts.logits, parts.tiles, parts.draws};
    Shared shared = {};
#pragma omp parallel num_threads(threads) if (threads > 1 && rows * V * (D + 100) / 25 > least)
    {
      const Team team = join_team(&shared);
      share(team, rows, [&](int64_t r) {
        float* const row = parts.wide + r * D;
        const int64_t at = (first + r) * D;
        for (int64_t k = 0; k < D; ++k)
          row[k] = hidden_is_bf16 ? to_float(((const bf16*)hidden)[at + k]) : ((const float*)hidden)[at + k];
        if (parts.half) round_row(row, D, parts.half + r * D);
      });
      Draw* const draws = parts.draws + team.me * ROWS;
      for (int64_t r = 0; r < rows; ++r) draws[r] = start_draw(o, first + r);
      barrier(team);
      share(team, tiles, [&](int64_t tile) {
        visit_columns<Dot>(head, work, o, ban, first, tile, draws, parts.buffers + team.me * rows * DRAW_TILE,
                           parts.panels + team.me * parts.panel);
      });
      barrier(team);
      share(team, rows, [&](int64_t r) { finish_row(head, work, o, ban, out, first + r, r, team.size); });
      barrier(team);
    }
  }
}

// half: 0 never multiplies in bfloat16, 1 where the processor can, 2 by its emulation.
// Threads are called for what takes more than about `least` nanoseconds of one.
// With workspace null it only writes the bytes that it needs to *needed.
void linear_sample_tokens(uintptr_t hidden, bool hidden_is_bf16, int64_t B, uintptr_t weight, uintptr_t bias, int64_t V,
                          int64_t D, int64_t stride, bool weight_is_bf16, float softcap, uintptr_t temperature,
                          uintptr_t top_k, uintptr_t top_p, uintptr_t min_p, int64_t seed, uintptr_t row_ids,
                          uintptr_t steps, uintptr_t banned, int64_t banned_count, uintptr_t ban_rows, uintptr_t tokens,
                          uintptr_t logprobs, uintptr_t raw_logprobs, uintptr_t kept_logprobs, uintptr_t log_kept_mass,
                          uintptr_t entropy, int half, int64_t least, uintptr_t workspace, uintptr_t needed,
                          int threads) {
  const Head head = {{ptr<void>(weight), ptr<void>(bias), V, D, stride, weight_is_bf16, 0}, softcap};
  const Options options = {
      ptr<const float>(temperature), ptr<const int64_t>(top_k), ptr<const float>(top_p), ptr<const float>(min_p), seed,
      ptr<const int64_t>(row_ids),   ptr<const int64_t>(steps)};
  const Ban ban = {ptr<const int64_t>(banned), banned_count, ptr<const uint8_t>(ban_rows)};
  const Outputs out = {ptr<int64_t>(tokens),      ptr<float>(logprobs),      ptr<float>(raw_logprobs),
                       ptr<float>(kept_logprobs), ptr<float>(log_kept_mass), ptr<float>(entropy)};
  const bool keeps = top_k || top_p || min_p || banned_count;
  const bool halves = weight_is_bf16 && (half == 2 || (half == 1 && has_dot()));
  Workspace space = {ptr<char>(workspace), 0};
  const Parts parts = divide(space, min(ROWS, B), D, V, keeps, halves, threads);
  if (!workspace) {
    *ptr<int64_t>(needed) = space.used;
    return;
  }
  if (half == 2)
    sample<EmulatedDot>(head, ptr<void>(hidden), hidden_is_bf16, B, options, ban, out, parts, least, threads);
  else
    sample<MachineDot>(head, ptr<void>(hidden), hidden_is_bf16, B, options, ban, out, parts, least, threads);
}

KERNEL(linear_sample_tokens)

}  // namespace
