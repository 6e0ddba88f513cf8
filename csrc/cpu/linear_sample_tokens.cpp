// Samples a token from each row of hidden states: the head's product and the Gumbel argmax in one, on the CPU.
// kernels/linear_sample_tokens.py defines it; product.h and sample.h have the algorithms.
//
//                 tile 0 (1024 columns)   tile 1   ...        a thread takes the next tile that is free:
//     row 0       [ LogitSums, argmax ] [      ]              up to ROWS rows of its logits, in the second-level cache,
//     ...                                                     are visited and forgotten
//     row 63      [                   ] [      ]              then a thread joins a row: tiles in order, best argmax
//
// Only rows that a filter or a ban must see as a whole keep their logits. The bits do not depend on the threads: sums
// are joined in the order of the tiles, and of equal scores the smallest token wins.
//
// Floor: the head once from memory, or its 2 B V D operations; sampling adds some 50 operations a logit.
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
  const uint8_t* rows;  // 1: the ban holds for this row
};

// The first tile with the largest logit of those that a thread has seen of a row. Its sums are exact if that logit
// leads far; when the row is joined its logits are no longer there.
struct Leader {
  int32_t tile;
  LogitSums sums;
};

// Buffers and counters of the threads, for up to ROWS rows.
struct Work {
  Activations x;
  float* logits;           // (rows, V), or null if no row is kept
  LogitSums* tiles;        // (rows, tiles)
  GumbelArgmax* argmaxes;  // (threads, ROWS)
  Leader* leaders;         // (threads, ROWS)
};

INLINE int64_t num_tiles(int64_t V) { return (V + SAMPLE_TILE - 1) / SAMPLE_TILE; }
INLINE bool has_ban(const Ban& ban, int64_t b) { return ban.count && ban.rows[b]; }
INLINE bool keeps_logits(const SamplingParams& params, const Ban& ban, int64_t b) {
  return params.has_filter() || has_ban(ban, b);
}

INLINE void finish_logits(const Head& head, int64_t begin, int64_t n, float* x) {
  add_bias(head.matrix, begin, n, x);
  if (!(head.softcap > 0)) return;
  for (int64_t c = 0; c < n; c += W) {
    const int left = (int)min<int64_t>(W, n - c);
    store_partial(x + c, head.softcap * tanh(load_partial(x + c, left, 0.f) / head.softcap), left);
  }
}

// One tile of columns, for the rows first, first + 1, ... of the call.
template <class Dot>
void visit_columns(const Head& head, const Work& work, const Ban& ban, int64_t first, int64_t tile,
                   GumbelArgmax* argmaxes, Leader* leaders, float* buffer, float* panel) {
  const int64_t V = head.matrix.out_features, begin = tile * SAMPLE_TILE, end = min(V, begin + SAMPLE_TILE),
                n = end - begin;
  for (int64_t c = begin; c < end; c += 64)
    multiply<Dot>(work.x, head.matrix, c, min(end, c + 64), buffer + c - begin, SAMPLE_TILE, panel);
  for (int64_t r = 0; r < work.x.rows; ++r) {
    float* const x = buffer + r * SAMPLE_TILE;
    GumbelArgmax& argmax = argmaxes[r];
    LogitSums& sums = work.tiles[r * num_tiles(V) + tile];
    finish_logits(head, begin, n, x);
    if (keeps_logits(argmax.params, ban, first + r)) {
      memcpy(work.logits + r * V + begin, x, n * sizeof(float));
      continue;
    }
    if (argmax.params.greedy) {
      sums = visit_tile<false>(argmax, x, (int32_t)begin, (int32_t)n);
      const float max_logit = (float)sums.max_logit;
      if (max_logit > argmax.best.score)
        argmax.best = {max_logit, max_logit, (int32_t)begin + find_logit(x, (int32_t)n, max_logit)};
    } else {
      sums = visit_tile<true>(argmax, x, (int32_t)begin, (int32_t)n);
    }
    if (!(sums.max_logit > leaders[r].sums.max_logit)) continue;
    leaders[r] = {(int32_t)tile, sums};
    if (leads_far(sums)) leaders[r].sums = sums_behind_leader(argmax.params, x, (int32_t)n, (float)sums.max_logit);
  }
}

// A row whose logits were kept.
void finish_kept_row(float* x, int32_t V, const SamplingParams& params, const Ban& ban, const Outputs& out, int64_t b) {
  LogitSums all_sums = no_sums;
  if (has_ban(ban, b) && params.valid) {
    GumbelArgmax argmax = start_argmax(params);
    all_sums = visit_row<false>(argmax, x, V);
    for (int64_t i = 0; i < ban.count; ++i) {
      const int64_t token = ban.tokens[i];
      if (token >= 0 && token < V && x[token] < __builtin_inff()) x[token] = -__builtin_inff();
    }
  }
  sample_row(x, V, b, params, has_ban(ban, b) ? &all_sums : nullptr, out);
}

// Joins row r of the threads' work and writes row b of the outputs.
void finish_row(const Head& head, const Work& work, const Ban& ban, const Outputs& out, int64_t b, int64_t r,
                int num_threads) {
  const int32_t V = (int32_t)head.matrix.out_features;
  const SamplingParams& params = work.argmaxes[r].params;
  if (keeps_logits(params, ban, b)) return finish_kept_row(work.logits + r * V, V, params, ban, out, b);
  Candidate best = no_candidate();
  for (int t = 0; t < num_threads; ++t) {
    const Candidate& candidate = work.argmaxes[t * ROWS + r].best;
    best.update(candidate.score, candidate.logit, candidate.token);
  }
  TiledSums tiles;
  for (int64_t tile = 0; tile < num_tiles(V); ++tile)
    add_tile(tiles, work.tiles[r * num_tiles(V) + tile], (int32_t)tile, params.temperature);
  LogitSums sums = join(tiles.leader, tiles.rest, params.temperature);
  for (int t = 0; t < num_threads && leads_far(sums); ++t) {
    const Leader& leader = work.leaders[t * ROWS + r];
    if (leader.tile != tiles.leading_tile) continue;
    sums = join(leader.sums, tiles.rest, params.temperature);
    break;
  }
  write_row(out, b, params, sums, best, sums);
}

// Divides a workspace; if `base` is null, it only counts the bytes.
struct Workspace {
  char* base;
  int64_t used;
  template <class T>
  T* take(int64_t count) {
    T* const part = base ? (T*)(base + used) : nullptr;
    used += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    return part;
  }
};

struct Buffers {
  float *x, *logits, *tile_logits, *panels;
  uint16_t* x_bf16;
  LogitSums* tiles;
  GumbelArgmax* argmaxes;
  Leader* leaders;
  int64_t panel_size;
};

Buffers divide(Workspace& space, int64_t rows, int64_t D, int64_t V, bool keeps_logits, bool uses_bf16, int threads) {
  Buffers buffers = {};
  buffers.panel_size = panel_size(D);
  buffers.x = space.take<float>(rows * D);
  buffers.x_bf16 = uses_bf16 ? space.take<uint16_t>(rows * D) : nullptr;
  buffers.logits = keeps_logits ? space.take<float>(rows * V) : nullptr;
  buffers.tiles = space.take<LogitSums>(rows * num_tiles(V));
  buffers.argmaxes = space.take<GumbelArgmax>(threads * ROWS);
  buffers.leaders = space.take<Leader>(threads * ROWS);
  buffers.tile_logits = space.take<float>(threads * rows * SAMPLE_TILE);
  buffers.panels = space.take<float>(threads * buffers.panel_size);
  return buffers;
}

template <class Dot>
void sample(const Head& head, const void* hidden, bool hidden_is_bf16, int64_t B, const SampleArgs& args,
            const Ban& ban, const Outputs& out, const Buffers& buffers, int64_t min_nanoseconds, int threads) {
  const int64_t V = head.matrix.out_features, D = head.matrix.in_features;
  for (int64_t first = 0; first < B; first += ROWS) {
    const int64_t rows = min(ROWS, B - first);
    const Work work = {
        {buffers.x, buffers.x_bf16, D, rows}, buffers.logits, buffers.tiles, buffers.argmaxes, buffers.leaders};
    TeamState state = {};
#pragma omp parallel num_threads(threads) if (threads > 1 && rows * V * (D + 100) / 25 > min_nanoseconds)
    {
      const Team team = join_team(&state);
      parallel_for(team, rows, [&](int64_t r) {
        float* const row = buffers.x + r * D;
        const int64_t begin = (first + r) * D;
        for (int64_t k = 0; k < D; ++k)
          row[k] = hidden_is_bf16 ? to_float(((const bf16*)hidden)[begin + k]) : ((const float*)hidden)[begin + k];
        if (buffers.x_bf16) round_row(row, D, buffers.x_bf16 + r * D);
      });
      GumbelArgmax* const argmaxes = buffers.argmaxes + team.thread * ROWS;
      Leader* const leaders = buffers.leaders + team.thread * ROWS;
      for (int64_t r = 0; r < rows; ++r) {
        argmaxes[r] = start_argmax(sampling_params(args, first + r, V));
        leaders[r] = {-1, no_sums};
      }
      barrier(team);
      parallel_for(team, num_tiles(V), [&](int64_t tile) {
        visit_columns<Dot>(head, work, ban, first, tile, argmaxes, leaders,
                           buffers.tile_logits + team.thread * rows * SAMPLE_TILE,
                           buffers.panels + team.thread * buffers.panel_size);
      });
      barrier(team);
      parallel_for(team, rows, [&](int64_t r) { finish_row(head, work, ban, out, first + r, r, team.num_threads); });
      barrier(team);
    }
  }
}

// bf16_mode: 0 never multiplies in bfloat16, 1 does if the processor can, 2 does by emulation.
// Threads are used if one of them would take more than about `min_nanoseconds`.
// With workspace 0 it only writes the bytes that it needs to *workspace_size.
void linear_sample_tokens(uintptr_t hidden, bool hidden_is_bf16, int64_t B, uintptr_t weight, uintptr_t bias, int64_t V,
                          int64_t D, int64_t stride, bool weight_is_bf16, float softcap, uintptr_t temperature,
                          uintptr_t top_k, uintptr_t top_p, uintptr_t min_p, int64_t seed, uintptr_t row_ids,
                          uintptr_t steps, uintptr_t banned, int64_t banned_count, uintptr_t ban_rows, uintptr_t tokens,
                          uintptr_t logprobs, uintptr_t raw_logprobs, uintptr_t kept_logprobs, uintptr_t log_kept_mass,
                          uintptr_t entropy, int bf16_mode, int64_t min_nanoseconds, uintptr_t workspace,
                          uintptr_t workspace_size, int threads) {
  const Head head = {{ptr<void>(weight), ptr<void>(bias), V, D, stride, weight_is_bf16, 0}, softcap};
  const SampleArgs args = {ptr<const float>(temperature),
                           ptr<const int64_t>(top_k),
                           ptr<const float>(top_p),
                           ptr<const float>(min_p),
                           seed,
                           ptr<const int64_t>(row_ids),
                           ptr<const int64_t>(steps),
                           nullptr};
  const Ban ban = {ptr<const int64_t>(banned), banned_count, ptr<const uint8_t>(ban_rows)};
  const Outputs out = {ptr<int64_t>(tokens),      ptr<float>(logprobs),      ptr<float>(raw_logprobs),
                       ptr<float>(kept_logprobs), ptr<float>(log_kept_mass), ptr<float>(entropy)};
  const bool keeps_logits = top_k || top_p || min_p || banned_count;
  const bool uses_bf16 = weight_is_bf16 && (bf16_mode == 2 || (bf16_mode == 1 && has_bf16_dot()));
  Workspace space = {ptr<char>(workspace), 0};
  const Buffers buffers = divide(space, min(ROWS, B), D, V, keeps_logits, uses_bf16, threads);
  if (!workspace) {
    *ptr<int64_t>(workspace_size) = space.used;
    return;
  }
  const void* const rows = ptr<void>(hidden);
  if (bf16_mode == 2)
    sample<EmulatedDot>(head, rows, hidden_is_bf16, B, args, ban, out, buffers, min_nanoseconds, threads);
  else
    sample<MachineDot>(head, rows, hidden_is_bf16, B, args, ban, out, buffers, min_nanoseconds, threads);
}

KERNEL(linear_sample_tokens)

}  // namespace
