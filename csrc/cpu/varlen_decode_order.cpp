// varlen_attention with sums in the order of the decode step, on the CPU; kernels/varlen_attention.py defines it. A
// token's keys are those that the cache would hold when it is decoded, at the same positions: its parent's, then its
// own sequence up to itself. Its bits are those of decode_attention, whose order paged_attention.h has.
//
//     a block    W consecutive queries of one sequence, one a lane, of B query heads that share a key head: B vectors
//     score      paged_attention.h adds in W lanes, then over them. A lane's sum there is a vector here, and these
//                are added as the lanes are: W sums of d / W products each, then W - 1 sums
//     sum        of exponentials: W vectors, key i in vector i % W, added over as the lanes are
//     output     as there, key after key
//
// So a key's numbers serve W queries from a register, and nothing is reduced over lanes. Where the window hides a key
// from some query of the block, splits begin at other positions for each query: paged_attention.h takes them one by
// one.
//
// Floor: 4 d + W operations for a query and a key that it sees, and an exponential.
#include "kernel.h"
#include "paged_attention.h"
#include "panel.h"
#include "team.h"

namespace {

constexpr int MAX_HEADS = 3;  // B at most

// Keys of a register tile.
template <int B>
constexpr int tile_keys() {
  return B == 1 ? 4 : 2;
}

// Dimensions of a register tile.
template <int B>
constexpr int tile_columns() {
  return W == 16 || B == 1 ? 8 : 4;
}

// The keys and values that the tokens of a sequence see, of one kv head.
struct PackedView {
  using Element = float;
  const float *k, *v;                                             // of the kv head and token 0
  int64_t token_rows, parent_begin, parent_length, begin, d, dv;  // tokens are token_rows rows of d apart

  // The rows of positions [from, to) in k and v seen as rows of d.
  INLINE void key_rows(int64_t from, int64_t to, int64_t* rows) const {
    for (int64_t position = from; position < to; ++position) {
      const int64_t token = position < parent_length ? parent_begin + position : begin + position - parent_length;
      rows[position - from] = token * token_rows;
    }
  }
};

struct DecodeOrderArgs {
  const float *q, *k, *v;            // (N, heads or kv_heads, d), strided as below
  const int64_t *offsets, *parents;  // (S + 1,), (S,) or null
  int64_t* first_blocks;             // (S + 1,): the number of blocks of the sequences before
  float *out, *lse, *scratch;        // (N, heads, d); (heads, N) or null; scratch_stride floats for each thread
  int64_t q_token, q_head, kv_token, kv_head, N, S, heads, kv_heads, d, window;  // kv_token is a multiple of d
  float scale, softcap;

  int64_t group_size() const { return heads / kv_heads; }
  // The last sequence whose blocks begin at or before `block`: those of empty ones before it would begin there too.
  int64_t sequence_of(int64_t block) const {
    int64_t first = 0, last = S;
    while (last - first > 1) {
      const int64_t middle = (first + last) / 2;
      (first_blocks[middle] <= block ? first : last) = middle;
    }
    return first;
  }
  PackedView view(int64_t s, int64_t head) const {
    const int64_t parent = parents ? parents[s] : -1, parent_begin = parent < 0 ? 0 : offsets[parent];
    const int64_t parent_length = parent < 0 ? 0 : offsets[parent + 1] - parent_begin;
    const int64_t offset = head * kv_head;
    return {k + offset, v + offset, kv_token / d, parent_begin, parent_length, offsets[s], d, d};
  }
};

// The queries of a block: the first one's token and position.
struct Block {
  int64_t token, position;
  int count;

  // Lanes beyond the last query see all keys.
  INLINE i32 sees(int64_t key) const { return lane_numbers(typename Count<W>::type()) >= (int)(key - position); }
};

// Panels of B query heads in scratch memory, in vectors: (d, B), (d, B), (d, B), (SPLIT, B).
template <int B>
struct Panels {
  float *q, *out, *next_out, *weights;

  Panels(float* scratch, int64_t d)
      : q(scratch), out(q + d * B * W), next_out(out + d * B * W), weights(next_out + d * B * W) {}
};

// The sum over lanes L, L + S, ... of paged_attention.h, lane after lane as reduce_sum adds them.
template <int L, int S, int M, int B>
INLINE void lane_sums(const float* const* keys, const float* q, int64_t d, f32 (&sums)[M][B]) {
  if constexpr (S < W) {
    lane_sums<L, 2 * S>(keys, q, d, sums);
    if (L + S >= d) return;  // the others are 0
    f32 others[M][B];
    lane_sums<L + S, 2 * S>(keys, q, d, others);
    for (int m = 0; m < M; ++m)
      for (int b = 0; b < B; ++b) sums[m][b] += others[m][b];
  } else {
    for (int m = 0; m < M; ++m)
      for (int b = 0; b < B; ++b) sums[m][b] = f32{};
    for (int64_t c = L; c < d; c += W) {
      f32 x[B];
      for (int b = 0; b < B; ++b) x[b] = load(q + (c * B + b) * W);
      for (int m = 0; m < M; ++m) {
        const f32 y = splat(keys[m][c]);
        for (int b = 0; b < B; ++b) sums[m][b] += x[b] * y;
      }
    }
  }
}

// Writes the scaled or capped scores with n keys, those from position `from` on, to panels.weights. The last tile
// repeats the last key, at positions that no query sees.
template <int B>
INLINE void score_block(const Block& block, const PackedView& kv, int64_t from, int n, const int64_t* key_rows,
                        float scale, float softcap, const Panels<B>& panels, f32 (&largest)[B]) {
  constexpr int M = tile_keys<B>();
  const float inverse = softcap > 0.f ? scale / softcap : 0.f;
  for (int i = 0; i < n; i += M) {
    const float* keys[M];
    f32 scores[M][B];
    for (int m = 0; m < M; ++m) keys[m] = kv.k + key_rows[min(i + m, n - 1)] * kv.d;
    lane_sums<0, 1>(keys, panels.q, kv.d, scores);
    const bool all_see = from + i + M - 1 <= block.position;
    for (int m = 0; m < M; ++m)
      for (int b = 0; b < B; ++b) {
        f32 z = softcap > 0.f ? softcap * tanh(scores[m][b] * inverse) : scores[m][b] * scale;
        if (!all_see) z = select(block.sees(from + i + m), z, splat(-__builtin_inff()));
        store(panels.weights + ((i + m) * B + b) * W, z);
        largest[b] = max(largest[b], z);
      }
  }
}

// Replaces the scores by exponentials; `total` are their sums.
template <int B>
INLINE void exponentials_of_block(int n, const Panels<B>& panels, const f32 (&largest)[B], f32 (&total)[B]) {
  f32 sums[W][B], origin[B];
  for (int j = 0; j < W; ++j)
    for (int b = 0; b < B; ++b) sums[j][b] = f32{};
  for (int b = 0; b < B; ++b)  // a query may see no key of the split
    origin[b] = select(largest[b] == splat(-__builtin_inff()), splat(0.f), largest[b]);
  for (int i = 0; i < n; ++i)
    for (int b = 0; b < B; ++b) {
      float* const weight = panels.weights + (i * B + b) * W;
      const f32 x = load(weight) - origin[b], e = select(x < splat(MIN_EXPONENT), splat(0.f), fast_exp(x));
      store(weight, e);
      sums[i % W][b] += e;
    }
  for (int half = W / 2; half; half /= 2)
    for (int j = 0; j < half; ++j)
      for (int b = 0; b < B; ++b) sums[j][b] += sums[j + half][b];
  for (int b = 0; b < B; ++b) total[b] = sums[0][b];
}

// C dimensions from c on of the weighted sums of the values, in `out`.
template <int C, int B>
INLINE void weigh_columns(const Block& block, const PackedView& kv, int64_t from, int n, const int64_t* key_rows,
                          int64_t c, const float* weights, float* out) {
  f32 sums[C][B] = {};
  const int all_see = (int)max<int64_t>(0, min<int64_t>(n, block.position + 1 - from));
  const auto add = [&](int i, auto accumulate) {
    const float* const row = kv.v + key_rows[i] * kv.d + c;
    f32 weight[B];
    for (int b = 0; b < B; ++b) weight[b] = load(weights + (i * B + b) * W);
    for (int j = 0; j < C; ++j) {
      const f32 value = splat(row[j]);
      for (int b = 0; b < B; ++b) sums[j][b] = accumulate(sums[j][b], weight[b], value);
    }
  };
  for (int i = 0; i < all_see; ++i) add(i, [](f32 sum, f32 x, f32 y) { return sum + x * y; });
  for (int i = all_see; i < n; ++i) {  // a value that is not seen may be NaN
    const i32 sees = block.sees(from + i);
    add(i, [&](f32 sum, f32 x, f32 y) { return select(sees, sum + x * y, sum); });
  }
  for (int j = 0; j < C; ++j)
    for (int b = 0; b < B; ++b) store(out + ((c + j) * B + b) * W, sums[j][b]);
}

// B query heads from `head` on, whose keys begin at position 0.
template <int B>
void attend_block(const DecodeOrderArgs& args, const Block& block, const PackedView& kv, int64_t head, float* scratch) {
  constexpr int C = tile_columns<B>();
  const int64_t d = args.d, end = block.position + block.count, row = (block.token * args.heads + head) * d;
  const Panels<B> panels(scratch, d);
  const float* const q = args.q + block.token * args.q_token + head * args.q_head;
  for (int b = 0; b < B; ++b)
    rows_to_panel(q + b * args.q_head, args.q_token, block.count, d, 1.f, panels.q + b * W, B * W);
  f32 max_score[B] = {}, total[B] = {};
  for (int64_t from = 0; from < end; from = split_end(from, end)) {
    const int n = (int)(split_end(from, end) - from);
    int64_t key_rows[SPLIT];
    kv.key_rows(from, from + n, key_rows);
    f32 next_max[B], next_total[B];
    for (int b = 0; b < B; ++b) next_max[b] = splat(-__builtin_inff());
    score_block<B>(block, kv, from, n, key_rows, args.scale, args.softcap, panels, next_max);
    exponentials_of_block<B>(n, panels, next_max, next_total);
    float* const out = from ? panels.next_out : panels.out;
    int64_t c = 0;
    for (; c + C <= d; c += C) weigh_columns<C, B>(block, kv, from, n, key_rows, c, panels.weights, out);
    for (; c < d; ++c) weigh_columns<1, B>(block, kv, from, n, key_rows, c, panels.weights, out);
    for (int b = 0; b < B; ++b) {
      if (!from) {
        max_score[b] = next_max[b];
        total[b] = next_total[b];
        continue;
      }
      const f32 new_max = max(max_score[b], next_max[b]);
      const f32 x = exp(max_score[b] - new_max), y = exp(next_max[b] - new_max);
      max_score[b] = new_max;
      total[b] = total[b] * x + next_total[b] * y;
      for (int64_t c = 0; c < d; ++c) {
        float* const sum = panels.out + (c * B + b) * W;
        store(sum, load(sum) * x + load(panels.next_out + (c * B + b) * W) * y);
      }
    }
  }
  for (int b = 0; b < B; ++b) {
    const f32 factor = 1.f / total[b];
    for (int64_t c = 0; c < d; ++c) {
      float* const sum = panels.out + (c * B + b) * W;
      store(sum, load(sum) * factor);
    }
    panel_to_rows(panels.out + b * W, B * W, 1.f, block.count, d, args.out + row + b * d, args.heads * d);
    if (args.lse)
      store_partial(args.lse + (head + b) * args.N + block.token, max_score[b] + log(total[b]), block.count);
  }
}

// The query heads of one token from `head` on, with a window.
void attend_token(const DecodeOrderArgs& args, int64_t token, int64_t position, const PackedView& kv, int64_t head,
                  float* scratch) {
  const int64_t G = args.group_size(), end = position + 1, begin = max<int64_t>(0, end - args.window);
  attend(args.q + token * args.q_token + head * args.q_head, args.q_head, G, kv, begin, end, args.scale, args.softcap,
         args.out + (token * args.heads + head) * args.d, args.d, scratch);
  if (!args.lse) return;
  const AttentionState* const states = (const AttentionState*)scratch;
  for (int64_t g = 0; g < G; ++g)
    args.lse[(head + g) * args.N + token] = (splat(states[g].max) + log(splat(states[g].sum)))[0];
}

void run_item(const DecodeOrderArgs& args, int64_t item, float* scratch) {
  const int64_t index = item / args.kv_heads, s = args.sequence_of(index), G = args.group_size();
  const int64_t kv_head = item % args.kv_heads, first_head = kv_head * G;
  const PackedView kv = args.view(s, kv_head);
  const int64_t first = (index - args.first_blocks[s]) * W, left = args.offsets[s + 1] - args.offsets[s] - first;
  const Block block = {args.offsets[s] + first, kv.parent_length + first, (int)min<int64_t>(W, left)};
  if (args.window > 0 && args.window < block.position + block.count) {
    for (int i = 0; i < block.count; ++i)
      attend_token(args, block.token + i, block.position + i, kv, first_head, scratch);
    return;
  }
  for (int64_t g = 0; g < G;) {
    const int64_t heads = G - g == 4 ? 2 : min<int64_t>(G - g, MAX_HEADS), head = first_head + g;
    if (heads == 1)
      attend_block<1>(args, block, kv, head, scratch);
    else if (heads == 2)
      attend_block<2>(args, block, kv, head, scratch);
    else
      attend_block<3>(args, block, kv, head, scratch);
    g += heads;
  }
}

// A token or head of q, and of both k and v, is as many floats apart; first_blocks is written.
void varlen_attention_decode_order(uintptr_t out, uintptr_t q, int64_t q_token, int64_t q_head, uintptr_t k,
                                   uintptr_t v, int64_t kv_token, int64_t kv_head, uintptr_t lse, uintptr_t offsets,
                                   uintptr_t parents, uintptr_t first_blocks, uintptr_t scratch, int64_t scratch_stride,
                                   int64_t N, int64_t S, int64_t heads, int64_t kv_heads, int64_t d, float scale,
                                   int64_t window, float softcap, int threads) {
  DecodeOrderArgs args;
  args.q = ptr<const float>(q);
  args.k = ptr<const float>(k);
  args.v = ptr<const float>(v);
  args.offsets = ptr<const int64_t>(offsets);
  args.parents = ptr<const int64_t>(parents);
  args.first_blocks = ptr<int64_t>(first_blocks);
  args.out = ptr<float>(out);
  args.lse = ptr<float>(lse);
  args.scratch = ptr<float>(scratch);
  args.q_token = q_token;
  args.q_head = q_head;
  args.kv_token = kv_token;
  args.kv_head = kv_head;
  args.N = N;
  args.S = S;
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.d = d;
  args.window = window;
  args.scale = scale;
  args.softcap = softcap;
  args.first_blocks[0] = 0;
  for (int64_t s = 0; s < S; ++s)
    args.first_blocks[s + 1] = args.first_blocks[s] + (args.offsets[s + 1] - args.offsets[s] + W - 1) / W;
  parallel_items(threads, args.first_blocks[S] * kv_heads,
                 [&](int64_t i, int thread) { run_item(args, i, args.scratch + thread * scratch_stride); });
}

CONSTANT(decode_order_vectors, MAX_HEADS* W)
KERNEL(varlen_attention_decode_order)

}  // namespace
