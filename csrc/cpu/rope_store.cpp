// Rotates queries and keys, and writes keys and values into their pages, on the CPU; kernels/rope_store.py defines it.
// A thread takes tokens, W elements of a head in each vector. Floor: one read and one write of every tensor. A token's
// results depend on that token alone.
#include "dtypes.h"
#include "rope.h"

namespace {

struct RopeStoreArgs {
  uintptr_t q, k, v;            // (N, heads, d), (N, kv_heads, d), (N, kv_heads, dv)
  uintptr_t k_cache, v_cache;   // (num_pages, kv_heads, page_size, d or dv)
  uintptr_t out;                // (N, heads, d)
  const float *cos, *sin;       // (N, half_dim)
  const int64_t* slot_mapping;  // token n's place: page * page_size + offset
  int64_t N, heads, kv_heads, d, dv, half_dim, page_size;
  int threads;
};

template <class X, class KV>
void rope_store_tokens(const RopeStoreArgs& args) {
  const int64_t d = args.d, dv = args.dv;
#pragma omp parallel for num_threads(args.threads) if (args.threads > 1 && args.N * args.heads * d > 32768)
  for (int64_t n = 0; n < args.N; ++n) {
    const float *const cos = args.cos + n * args.half_dim, *const sin = args.sin + n * args.half_dim;
    for (int64_t h = 0; h < args.heads; ++h) {
      const int64_t head = n * args.heads + h;
      rope_head(ptr<const X>(args.q) + head * d, cos, sin, args.half_dim, d, ptr<X>(args.out) + head * d);
    }
    const int64_t page = args.slot_mapping[n] / args.page_size, offset = args.slot_mapping[n] % args.page_size;
    for (int64_t h = 0; h < args.kv_heads; ++h) {
      const int64_t row = (page * args.kv_heads + h) * args.page_size + offset, head = n * args.kv_heads + h;
      rope_head(ptr<const X>(args.k) + head * d, cos, sin, args.half_dim, d, ptr<KV>(args.k_cache) + row * d);
      rope_head(ptr<const X>(args.v) + head * dv, cos, sin, 0, dv, ptr<KV>(args.v_cache) + row * dv);
    }
  }
}

const char* rope_store(uintptr_t q, uintptr_t k, uintptr_t v, bool is_bf16, uintptr_t cos, uintptr_t sin,
                       uintptr_t k_cache, uintptr_t v_cache, bool cache_is_bf16, uintptr_t slot_mapping, uintptr_t out,
                       int64_t N, int64_t heads, int64_t kv_heads, int64_t d, int64_t dv, int64_t half_dim,
                       int64_t num_pages, int64_t page_size, int threads) {
  RopeStoreArgs args;
  args.q = q;
  args.k = k;
  args.v = v;
  args.k_cache = k_cache;
  args.v_cache = v_cache;
  args.out = out;
  args.cos = ptr<const float>(cos);
  args.sin = ptr<const float>(sin);
  args.slot_mapping = ptr<const int64_t>(slot_mapping);
  args.N = N;
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.d = d;
  args.dv = dv;
  args.half_dim = half_dim;
  args.page_size = page_size;
  args.threads = threads;
  for (int64_t n = 0; n < N; ++n)
    if (args.slot_mapping[n] < 0 || args.slot_mapping[n] >= num_pages * page_size) return "a slot is out of range";
  if (is_bf16)
    cache_is_bf16 ? rope_store_tokens<bf16, bf16>(args) : rope_store_tokens<bf16, float>(args);
  else
    cache_is_bf16 ? rope_store_tokens<float, bf16>(args) : rope_store_tokens<float, float>(args);
  return nullptr;
}

KERNEL(rope_store)

}  // namespace
