// Attention of new tokens over keys in pages; kernels/decode_attention.py says what it means, paged_attention.h how it
// is computed. Threads share the pairs of token and key head, or, where those are few, their splits: the same sums.
#include "kernel.h"
#include "paged_attention.h"

namespace {

struct Tokens {
  const float* q;
  uintptr_t k, v;
  const int32_t *table, *lengths, *rows;
  float *out, *scratch;
  int64_t N, H, heads, d, dv, pages, P, S, M, splits, window;
  float scale, softcap;
  int threads;

  int64_t G() const { return H / heads; }
  int64_t end(int64_t n) const { return lengths[n]; }
  int64_t begin(int64_t n) const { return window > 0 ? max<int64_t>(0, end(n) - window) : 0; }
  float* place(int64_t i) const { return scratch + i * attend_scratch(G(), dv); }

  template <class KV>
  Keys<KV> keys(int64_t item) const {
    return {ptr<const KV>(k), ptr<const KV>(v), table + rows[item / heads] * M, item % heads, heads, P, d, dv};
  }

  const char* check() const {
    for (int64_t n = 0; n < N; ++n) {
      if (rows[n] < 0 || rows[n] >= S) return "a row is out of range";
      if (lengths[n] < 0 || lengths[n] > M * P) return "a length is out of range";
      for (int64_t m = begin(n) / P; m * P < end(n); ++m)
        if (table[rows[n] * M + m] < 0 || table[rows[n] * M + m] >= pages) return "a page is out of range";
    }
    return nullptr;
  }
};

template <class KV>
void by_item(const Tokens& t) {
  const int64_t G = t.G();
  int next = 0;
#pragma omp parallel num_threads(t.threads) if (t.threads > 1)
  {
    int mine;
#pragma omp atomic capture
    mine = next++;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < t.N * t.heads; ++item) {
      const int64_t n = item / t.heads;
      attend_all(t.q + item * G * t.d, t.d, G, t.keys<KV>(item), t.begin(n), t.end(n), t.scale, t.softcap,
                 t.out + item * G * t.dv, t.dv, t.place(mine));
    }
  }
}

// What attend_all does, a split a task, and then an item a task.
template <class KV>
void by_split(const Tokens& t) {
  const int64_t G = t.G(), items = t.N * t.heads;
#pragma omp parallel for schedule(dynamic) num_threads(t.threads) if (t.threads > 1)
  for (int64_t task = 0; task < items * t.splits; ++task) {
    const int64_t item = task / t.splits, n = item / t.heads, end = t.end(n);
    const int64_t first = t.begin(n) / SPLIT, from = max(t.begin(n), (first + task % t.splits) * SPLIT);
    if (from >= end) continue;
    float* const place = t.place(task);
    attend(t.q + item * G * t.d, t.d, G, t.keys<KV>(item), from, split_end(from, end), t.scale, t.softcap,
           place + 4 * G, t.dv, (Partial*)place);
  }
  for (int64_t item = 0; item < items; ++item) {
    const int64_t n = item / t.heads, begin = t.begin(n), end = t.end(n);
    for (int64_t g = 0; g < G; ++g) {
      float* const out = t.out + (item * G + g) * t.dv;
      Partial whole = {};
      int64_t task = item * t.splits;
      if (begin >= end) memset(out, 0, t.dv * sizeof(float));
      for (int64_t from = begin; from < end; from = split_end(from, end), ++task) {
        const Partial next = ((const Partial*)t.place(task))[g];
        const float* const part = t.place(task) + 4 * G + g * t.dv;
        if (from == begin) {
          whole = next;
          memcpy(out, part, t.dv * sizeof(float));
        } else {
          merge(whole, out, next, part, t.dv);
        }
      }
      if (begin < end) normalise(whole, out, t.dv);
    }
  }
}

// scratch: attend_scratch floats a thread, or, where splits > 1, a split of each pair of token and key head.
const char* decode_attention(uintptr_t q, uintptr_t k, uintptr_t v, bool half, uintptr_t table, uintptr_t lengths,
                             uintptr_t rows, uintptr_t out, uintptr_t scratch, int64_t N, int64_t H, int64_t heads,
                             int64_t d, int64_t dv, int64_t pages, int64_t P, int64_t S, int64_t M, int64_t splits,
                             float scale, int64_t window, float softcap, int threads) {
  const Tokens t{ptr<const float>(q),
                 k,
                 v,
                 ptr<const int32_t>(table),
                 ptr<const int32_t>(lengths),
                 ptr<const int32_t>(rows),
                 ptr<float>(out),
                 ptr<float>(scratch),
                 N,
                 H,
                 heads,
                 d,
                 dv,
                 pages,
                 P,
                 S,
                 M,
                 splits,
                 window,
                 scale,
                 softcap,
                 threads};
  if (const char* error = t.check()) return error;
  if (splits > 1)
    half ? by_split<bf16>(t) : by_split<float>(t);
  else
    half ? by_item<bf16>(t) : by_item<float>(t);
  return nullptr;
}

KERNEL(decode_attention)

}  // namespace
