// varlen_attention with sums in the order of the decode step, on the CPU; kernels/varlen_attention.py defines it,
// paged_attention.h has the algorithm. A token's keys are those that the cache would hold when it is decoded, at the
// same positions: its parent's, then its own sequence up to itself. So the bits are those of decode_attention.
//
// A thread takes an item, a pair of token and key head.
#include "kernel.h"
#include "paged_attention.h"
#include "team.h"

namespace {

// The keys and values that a token of a sequence sees, and one kv head.
struct PackedView {
  using Element = float;
  const float *k, *v;  // (N, kv_heads, d)
  int64_t kv_head, kv_heads, parent_begin, parent_length, begin, d, dv;

  // The rows of positions [from, to) in k seen as rows of d.
  INLINE void key_rows(int64_t from, int64_t to, int64_t* rows) const {
    for (int64_t position = from; position < to; ++position) {
      const int64_t token = position < parent_length ? parent_begin + position : begin + position - parent_length;
      rows[position - from] = token * kv_heads + kv_head;
    }
  }
};

struct DecodeOrderArgs {
  const float *q, *k, *v;            // (N, heads or kv_heads, d)
  const int64_t *offsets, *parents;  // (S + 1,), (S,) or null
  float *out, *lse, *scratch;        // (N, heads, d); (heads, N) or null; attend_scratch floats for each thread
  int64_t N, S, heads, kv_heads, d, window;
  float scale, softcap;

  // The last sequence that begins at or before a token: empty ones end there too, and stand before it.
  int64_t sequence_of(int64_t token) const {
    int64_t first = 0, last = S;
    while (last - first > 1) {
      const int64_t middle = (first + last) / 2;
      (offsets[middle] <= token ? first : last) = middle;
    }
    return first;
  }
};

void attend_token(const DecodeOrderArgs& args, int64_t token, int64_t kv_head, float* scratch) {
  const int64_t s = args.sequence_of(token), parent = args.parents ? args.parents[s] : -1,
                G = args.heads / args.kv_heads;
  const int64_t parent_begin = parent < 0 ? 0 : args.offsets[parent];
  const int64_t parent_length = parent < 0 ? 0 : args.offsets[parent + 1] - parent_begin;
  const PackedView kv = {args.k,        args.v,          kv_head, args.kv_heads, parent_begin,
                         parent_length, args.offsets[s], args.d,  args.d};
  const int64_t end = parent_length + token - args.offsets[s] + 1;
  const int64_t begin = args.window > 0 ? max<int64_t>(0, end - args.window) : 0, head = kv_head * G;
  const int64_t row = (token * args.heads + head) * args.d;
  attend(args.q + row, args.d, G, kv, begin, end, args.scale, args.softcap, args.out + row, args.d, scratch);
  if (!args.lse) return;
  const AttentionState* const states = (const AttentionState*)scratch;
  for (int64_t g = 0; g < G; ++g)
    args.lse[(head + g) * args.N + token] = (float)(states[g].max + log((double)states[g].sum));
}

void varlen_attention_decode_order(uintptr_t out, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t lse,
                                   uintptr_t offsets, uintptr_t parents, uintptr_t scratch, int64_t N, int64_t S,
                                   int64_t heads, int64_t kv_heads, int64_t d, float scale, int64_t window,
                                   float softcap, int threads) {
  DecodeOrderArgs args;
  args.q = ptr<const float>(q);
  args.k = ptr<const float>(k);
  args.v = ptr<const float>(v);
  args.offsets = ptr<const int64_t>(offsets);
  args.parents = ptr<const int64_t>(parents);
  args.out = ptr<float>(out);
  args.lse = ptr<float>(lse);
  args.scratch = ptr<float>(scratch);
  args.N = N;
  args.S = S;
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.d = d;
  args.window = window;
  args.scale = scale;
  args.softcap = softcap;
  const int64_t size = attend_scratch(heads / kv_heads, d);
  parallel_items(threads, N * kv_heads, [&](int64_t i, int thread) {
    attend_token(args, i / kv_heads, i % kv_heads, args.scratch + thread * size);
  });
}

KERNEL(varlen_attention_decode_order)

}  // namespace
