// Rotates queries and keys, and writes keys and values into pages; kernels/rope_store.py says what it means.
#include "kernel.h"
#include "rope.h"

namespace {

struct Tokens {
  uintptr_t q, k, v, k_cache, v_cache, out;
  const float *cos, *sin;
  const int64_t* slots;
  int64_t N, H, heads, d, dv, half, P;
  int threads;
};

template <class X, class KV>
void run(const Tokens& t) {
#pragma omp parallel for num_threads(t.threads) if (t.threads > 1 && t.N * t.H * t.d > 32768)
  for (int64_t n = 0; n < t.N; ++n) {
    const float *const cos = t.cos + n * t.half, *const sin = t.sin + n * t.half;
    const X* const q = ptr<const X>(t.q) + n * t.H * t.d;
    for (int64_t h = 0; h < t.H; ++h) rope(q + h * t.d, cos, sin, t.half, t.d, ptr<X>(t.out) + (n * t.H + h) * t.d);
    for (int64_t h = 0; h < t.heads; ++h) {
      const int64_t row = (t.slots[n] / t.P * t.heads + h) * t.P + t.slots[n] % t.P, from = n * t.heads + h;
      rope(ptr<const X>(t.k) + from * t.d, cos, sin, t.half, t.d, ptr<KV>(t.k_cache) + row * t.d);
      rope(ptr<const X>(t.v) + from * t.dv, cos, sin, 0, t.dv, ptr<KV>(t.v_cache) + row * t.dv);
    }
  }
}

const char* rope_store(uintptr_t q, uintptr_t k, uintptr_t v, bool half, uintptr_t cos, uintptr_t sin,
                       uintptr_t k_cache, uintptr_t v_cache, bool half_cache, uintptr_t slots, uintptr_t out, int64_t N,
                       int64_t H, int64_t heads, int64_t d, int64_t dv, int64_t rotated, int64_t pages, int64_t P,
                       int threads) {
  const Tokens t{q,
                 k,
                 v,
                 k_cache,
                 v_cache,
                 out,
                 ptr<const float>(cos),
                 ptr<const float>(sin),
                 ptr<const int64_t>(slots),
                 N,
                 H,
                 heads,
                 d,
                 dv,
                 rotated,
                 P,
                 threads};
  for (int64_t n = 0; n < N; ++n)
    if (t.slots[n] < 0 || t.slots[n] >= pages * P) return "a slot is out of range";
  if (half)
    half_cache ? run<bf16, bf16>(t) : run<bf16, float>(t);
  else
    half_cache ? run<float, bf16>(t) : run<float, float>(t);
  return nullptr;
}

KERNEL(rope_store)

}  // namespace
