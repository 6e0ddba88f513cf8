// Rotates queries and keys, and writes keys and values into pages, on NVIDIA GPUs; kernels/rope_store.py says what it
// means.
//
// Memory is the floor: every number is read once and written once, in one launch. A thread takes eight numbers, or of
// a part that is rotated eight and the eight that they are paired with: 16 bytes of a 16-bit type at once, twice 16 of
// float32. Where rows cannot be cut into eights it takes one number, or one pair. The threads of a token read the same
// cosines and sines, out of the first-level cache. A slot that is no place of the caches writes nothing.
#include "vec.cuh"

namespace {

constexpr int block_threads = 128;

// Heads (N, H, width) as they lie, of a dtype by its code.
struct Heads {
  const void* at;
  int64_t token, head;  // numbers apart
  int H, width, half;   // 2 half numbers are rotated
};

struct Cache {  // (pages, H, P, width)
  void* at;
  int type;
};

struct Tokens {
  Heads q, k, v;
  int type;
  const void *cos, *sin;
  int cos_type, sin_type;
  void* out;
  Cache k_cache, v_cache;
  const int64_t* slots;
  int64_t N, places;
  int P, blocks;  // of a token
};

template <int n, class T>
__device__ __forceinline__ void read(const T* at, float (&x)[n]) {
  if constexpr (n % per_word<T> == 0) {
#pragma unroll
    for (int i = 0; i < n; i += per_word<T>) {
      float some[per_word<T>];
      unpack<T>(*reinterpret_cast<const uint4*>(at + i), some);
#pragma unroll
      for (int j = 0; j < per_word<T>; ++j) x[i + j] = some[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = widened(at[i]);
  }
}

template <int n, class T>
__device__ __forceinline__ void write(const float (&x)[n], T* at) {
  if constexpr (n % per_word<T> == 0) {
#pragma unroll
    for (int i = 0; i < n; i += per_word<T>) {
      float some[per_word<T>];
#pragma unroll
      for (int j = 0; j < per_word<T>; ++j) some[j] = x[i + j];
      *reinterpret_cast<uint4*>(at + i) = packed<T>(some);
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) narrow(x[i], at[i]);
  }
}

template <int n>
__device__ __forceinline__ void read(const void* from, int type, int64_t at, float (&x)[n]) {
  if (type == 0) return read(static_cast<const float*>(from) + at, x);
  if (type == 1) return read(static_cast<const __nv_bfloat16*>(from) + at, x);
  return read(static_cast<const __half*>(from) + at, x);
}

template <int n>
__device__ __forceinline__ void write(const float (&x)[n], void* to, int type, int64_t at) {
  if (type == 0) return write(x, static_cast<float*>(to) + at);
  if (type == 1) return write(x, static_cast<__nv_bfloat16*>(to) + at);
  return write(x, static_cast<__half*>(to) + at);
}

// Threads of a token for some heads: n numbers each, and their partners.
template <int n>
__host__ __device__ int threads_for(const Heads& heads) {
  return heads.H * ((heads.width - heads.half) / n);
}

template <int n>
__global__ void __launch_bounds__(block_threads) rope_store_kernel(const Tokens t) {
  const int64_t token = blockIdx.x / t.blocks;
  int task = blockIdx.x % t.blocks * block_threads + threadIdx.x;
  const int queries = threads_for<n>(t.q), keys = threads_for<n>(t.k), values = threads_for<n>(t.v);
  if (task >= queries + keys + values) return;
  const bool query = task < queries, key = !query && task < queries + keys;
  const Heads& x = query ? t.q : key ? t.k : t.v;
  task -= query ? 0 : key ? queries : queries + keys;
  const int each = (x.width - x.half) / n, head = task / each, first = task % each * n;
  const bool rotated = first < x.half;
  const int column = rotated ? first : first + x.half;

  int64_t to = (token * x.H + head) * x.width;
  if (!query) {
    const int64_t slot = t.slots[token];
    if (slot < 0 || slot >= t.places) return;
    to = ((slot / t.P * x.H + head) * t.P + slot % t.P) * x.width;
  }
  void* const out = query ? t.out : key ? t.k_cache.at : t.v_cache.at;
  const int type = query ? t.type : key ? t.k_cache.type : t.v_cache.type;
  const int64_t from = token * x.token + head * x.head + column;
  float a[n];
  read(x.at, t.type, from, a);
  if (!rotated) return write(a, out, type, to + column);
  float b[n], cos[n], sin[n];
  read(x.at, t.type, from + x.half, b);
  read(t.cos, t.cos_type, token * x.half + column, cos);
  read(t.sin, t.sin_type, token * x.half + column, sin);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float one = a[i];
    a[i] = __fmaf_rn(one, cos[i], -__fmul_rn(b[i], sin[i]));
    b[i] = __fmaf_rn(b[i], cos[i], __fmul_rn(one, sin[i]));
  }
  write(a, out, type, to + column);
  write(b, out, type, to + column + x.half);
}

template <int n>
const char* run(Tokens t, uintptr_t stream) {
  const int64_t tasks = int64_t(threads_for<n>(t.q)) + threads_for<n>(t.k) + threads_for<n>(t.v);
  t.blocks = static_cast<int>((tasks + block_threads - 1) / block_threads);
  if (tasks == 0) return nullptr;
  const unsigned blocks = blocks_for(t.N * t.blocks, 1);
  if (!blocks) return "more tokens than a grid has blocks";
  return launch(rope_store_kernel<n>, blocks, block_threads, 0, stream, t);
}

bool in_eights(const Heads& x) {
  return (x.token | x.head | x.width | x.half) % 8 == 0 && reinterpret_cast<uintptr_t>(x.at) % 16 == 0;
}

// q, k, v: numbers of one dtype, `_token` and `_head` apart; cosines and sines (N, rotated) of dtypes of their own.
const char* rope_store(uintptr_t q, uintptr_t k, uintptr_t v, int type, int64_t q_token, int64_t q_head,
                       int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head, uintptr_t cos, int cos_type,
                       uintptr_t sin, int sin_type, uintptr_t k_cache, uintptr_t v_cache, int cache_type,
                       uintptr_t slots, uintptr_t out, int64_t N, int64_t H, int64_t kv_heads, int64_t d, int64_t dv,
                       int64_t rotated, int64_t pages, int64_t P, uintptr_t stream) {
  if (N == 0) return nullptr;
  const auto heads = [](uintptr_t at, int64_t token, int64_t head, int64_t count, int64_t width, int64_t half) {
    return Heads{ptr<const void>(at),   token, head, static_cast<int>(count), static_cast<int>(width),
                 static_cast<int>(half)};
  };
  const Tokens t{heads(q, q_token, q_head, H, d, rotated),
                 heads(k, k_token, k_head, kv_heads, d, rotated),
                 heads(v, v_token, v_head, kv_heads, dv, 0),
                 type,
                 ptr<const void>(cos),
                 ptr<const void>(sin),
                 cos_type,
                 sin_type,
                 ptr<void>(out),
                 {ptr<void>(k_cache), cache_type},
                 {ptr<void>(v_cache), cache_type},
                 ptr<const int64_t>(slots),
                 N,
                 pages * P,
                 static_cast<int>(P),
                 0};
  const bool eights = in_eights(t.q) && in_eights(t.k) && in_eights(t.v) && (cos | sin | k_cache | v_cache) % 16 == 0;
  return eights ? run<8>(t, stream) : run<1>(t, stream);
}

KERNEL(rope_store)

}  // namespace
