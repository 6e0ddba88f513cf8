// Attention of new tokens over keys in pages, on the CPU; kernels/decode_attention.py defines it, paged_attention.h has
// the algorithm and its floor. A thread takes an item, a pair of token and key head, or, if there are few items, one
// split of an item: the same sums, so the same bits.
#include "kernel.h"
#include "paged_attention.h"
#include "team.h"

namespace {

struct AttentionArgs {
  const float* q;                               // (N, heads, d)
  uintptr_t k, v;                               // (num_pages, kv_heads, page_size, d or dv)
  const int32_t *block_table, *lengths, *rows;  // (num_rows, table_width), (N,), (N,): token n has row rows[n]
  float *out, *scratch;                         // (N, heads, dv)
  int64_t N, heads, kv_heads, d, dv, num_pages, page_size, num_rows, table_width, num_splits, window;
  float scale, softcap;
  int threads;

  int64_t group_size() const { return heads / kv_heads; }
  int64_t num_items() const { return N * kv_heads; }
  int64_t end(int64_t n) const { return lengths[n]; }
  int64_t begin(int64_t n) const { return window > 0 ? max<int64_t>(0, end(n) - window) : 0; }
  float* scratch_of(int64_t i) const { return scratch + i * attend_scratch(group_size(), dv); }

  template <class KV>
  KvView<KV> kv(int64_t item) const {
    const int32_t* const pages = block_table + rows[item / kv_heads] * table_width;
    return {ptr<const KV>(k), ptr<const KV>(v), pages, item % kv_heads, kv_heads, page_size, d, dv};
  }

  const char* check() const {
    for (int64_t n = 0; n < N; ++n) {
      if (rows[n] < 0 || rows[n] >= num_rows) return "a row is out of range";
      if (lengths[n] < 0 || lengths[n] > table_width * page_size) return "a length is out of range";
      for (int64_t m = begin(n) / page_size; m * page_size < end(n); ++m) {
        const int32_t page = block_table[rows[n] * table_width + m];
        if (page < 0 || page >= num_pages) return "a page is out of range";
      }
    }
    return nullptr;
  }
};

template <class KV>
void attend_items(const AttentionArgs& args) {
  const int64_t G = args.group_size();
  parallel_items(args.threads, args.num_items(), [&](int64_t item, int thread) {
    const int64_t n = item / args.kv_heads;
    attend(args.q + item * G * args.d, args.d, G, args.kv<KV>(item), args.begin(n), args.end(n), args.scale,
           args.softcap, args.out + item * G * args.dv, args.dv, args.scratch_of(thread));
  });
}

// Merges the splits of query head g of an item, whose results are in scratch memory.
void merge_splits(const AttentionArgs& args, int64_t item, int64_t g) {
  const int64_t G = args.group_size(), n = item / args.kv_heads, begin = args.begin(n), end = args.end(n);
  float* const out = args.out + (item * G + g) * args.dv;
  if (begin >= end) {
    memset(out, 0, args.dv * sizeof(float));
    return;
  }
  AttentionState state = {};
  int64_t task = item * args.num_splits;
  for (int64_t from = begin; from < end; from = split_end(from, end), ++task) {
    const AttentionState next = ((const AttentionState*)args.scratch_of(task))[g];
    const float* const next_out = args.scratch_of(task) + STATE_FLOATS * G + g * args.dv;
    if (from == begin) {
      state = next;
      memcpy(out, next_out, args.dv * sizeof(float));
    } else {
      merge(state, out, next, next_out, args.dv);
    }
  }
  normalize(state, out, args.dv);
}

// The same as attend_items, by tasks of one split.
template <class KV>
void attend_splits(const AttentionArgs& args) {
  const int64_t G = args.group_size(), num_tasks = args.num_items() * args.num_splits;
#pragma omp parallel for schedule(dynamic) num_threads(args.threads) if (args.threads > 1)
  for (int64_t task = 0; task < num_tasks; ++task) {
    const int64_t item = task / args.num_splits, n = item / args.kv_heads, end = args.end(n);
    const int64_t split = args.begin(n) / SPLIT + task % args.num_splits, begin = max(args.begin(n), split * SPLIT);
    if (begin >= end) continue;
    float* const scratch = args.scratch_of(task);
    attend_split(args.q + item * G * args.d, args.d, G, args.kv<KV>(item), begin, split_end(begin, end), args.scale,
                 args.softcap, scratch + STATE_FLOATS * G, args.dv, (AttentionState*)scratch);
  }
  for (int64_t item = 0; item < args.num_items(); ++item)
    for (int64_t g = 0; g < G; ++g) merge_splits(args, item, g);
}

// scratch: attend_scratch floats for each thread, or, with num_splits > 1, for each split of each item.
const char* decode_attention(uintptr_t q, uintptr_t k, uintptr_t v, bool is_bf16, uintptr_t block_table,
                             uintptr_t lengths, uintptr_t rows, uintptr_t out, uintptr_t scratch, int64_t N,
                             int64_t heads, int64_t kv_heads, int64_t d, int64_t dv, int64_t num_pages,
                             int64_t page_size, int64_t num_rows, int64_t table_width, int64_t num_splits, float scale,
                             int64_t window, float softcap, int threads) {
  AttentionArgs args;
  args.q = ptr<const float>(q);
  args.k = k;
  args.v = v;
  args.block_table = ptr<const int32_t>(block_table);
  args.lengths = ptr<const int32_t>(lengths);
  args.rows = ptr<const int32_t>(rows);
  args.out = ptr<float>(out);
  args.scratch = ptr<float>(scratch);
  args.N = N;
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.d = d;
  args.dv = dv;
  args.num_pages = num_pages;
  args.page_size = page_size;
  args.num_rows = num_rows;
  args.table_width = table_width;
  args.num_splits = num_splits;
  args.window = window;
  args.scale = scale;
  args.softcap = softcap;
  args.threads = threads;
  if (const char* error = args.check()) return error;
  if (num_splits > 1)
    is_bf16 ? attend_splits<bf16>(args) : attend_splits<float>(args);
  else
    is_bf16 ? attend_items<bf16>(args) : attend_items<float>(args);
  return nullptr;
}

CONSTANT(decode_attention_split, SPLIT)
CONSTANT(decode_attention_state_floats, STATE_FLOATS)
KERNEL(decode_attention)

}  // namespace
