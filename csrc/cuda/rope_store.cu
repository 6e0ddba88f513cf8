// Rotates queries and keys, and stores keys and values in pages, on NVIDIA GPUs; kernels/rope_store.py defines it.
//
// Floor: one load and one store of every number, in one launch. A thread takes 8 columns of a head, or of its rotated
// part 8 columns and their partners, which are `half` columns further: 16 bytes at a time for a 16-bit dtype, twice 16
// for float32. If rows are not made of aligned eights, a thread takes 1 column, or 1 pair.
//
//     a head   | columns 0 ... half-1 | half ... 2 half-1 | 2 half ... width-1 |
//     thread   |   0     1    ...     |  0    1    ...    |  next threads ...  |      rotated pairs, then the rest
//
// The threads of a token go through the heads of q, then k, then v; they load the same cosines and sines, from the L1
// cache. A slot outside the caches stores nothing. Numbers do not depend on one another, so the bits do not depend on
// the grid.
#include "vec.cuh"

namespace {

constexpr int block_threads = 128;

// Heads (N, H, width) of a dtype by its code, with their strides in numbers.
struct Heads {
  const void* data;
  int64_t token_stride, head_stride;
  int H, width, half;  // the first 2 half columns are rotated
};

struct Cache {  // (pages, H, page_size, width)
  void* data;
  int code;
};

struct RopeJob {
  Heads q, k, v;
  int code;
  const void *cos, *sin;
  int cos_code, sin_code;
  void* out;
  Cache k_cache, v_cache;
  const int64_t* slot_mapping;
  int64_t N, num_slots;
  int page_size, blocks_per_token;
};

template <int COUNT, class T>
__device__ __forceinline__ void load(const T* p, float (&x)[COUNT]) {
  if constexpr (COUNT % vec_size<T> == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += vec_size<T>) {
      float vec[vec_size<T>];
      unpack<T>(*reinterpret_cast<const uint4*>(p + i), vec);
#pragma unroll
      for (int j = 0; j < vec_size<T>; ++j) x[i + j] = vec[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) x[i] = to_float(p[i]);
  }
}

template <int COUNT, class T>
__device__ __forceinline__ void store(const float (&x)[COUNT], T* p) {
  if constexpr (COUNT % vec_size<T> == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += vec_size<T>) {
      float vec[vec_size<T>];
#pragma unroll
      for (int j = 0; j < vec_size<T>; ++j) vec[j] = x[i + j];
      *reinterpret_cast<uint4*>(p + i) = pack<T>(vec);
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) from_float(x[i], p[i]);
  }
}

template <int COUNT>
__device__ __forceinline__ void load(const void* p, int code, int64_t index, float (&x)[COUNT]) {
  if (code == 0) return load(static_cast<const float*>(p) + index, x);
  if (code == 1) return load(static_cast<const __nv_bfloat16*>(p) + index, x);
  return load(static_cast<const __half*>(p) + index, x);
}

template <int COUNT>
__device__ __forceinline__ void store(const float (&x)[COUNT], void* p, int code, int64_t index) {
  if (code == 0) return store(x, static_cast<float*>(p) + index);
  if (code == 1) return store(x, static_cast<__nv_bfloat16*>(p) + index);
  return store(x, static_cast<__half*>(p) + index);
}

// Threads per token for some heads. A thread takes COUNT columns, and their partners in the rotated part.
template <int COUNT>
__host__ __device__ int threads_for(const Heads& heads) {
  return heads.H * ((heads.width - heads.half) / COUNT);
}

template <int COUNT>
__global__ void __launch_bounds__(block_threads) rope_store_kernel(const RopeJob job) {
  const int64_t token = blockIdx.x / job.blocks_per_token;
  int thread = blockIdx.x % job.blocks_per_token * block_threads + threadIdx.x;
  const int q_end = threads_for<COUNT>(job.q);
  const int k_end = q_end + threads_for<COUNT>(job.k);
  const int v_end = k_end + threads_for<COUNT>(job.v);
  if (thread >= v_end) return;
  const bool is_q = thread < q_end, is_k = !is_q && thread < k_end;
  const Heads& key_or_value = is_k ? job.k : job.v;
  const Heads& heads = is_q ? job.q : key_or_value;
  const Cache& cache = is_k ? job.k_cache : job.v_cache;
  if (!is_q) thread -= is_k ? q_end : k_end;
  const int threads_per_head = (heads.width - heads.half) / COUNT, head = thread / threads_per_head;
  const int first = thread % threads_per_head * COUNT;
  const bool rotated = first < heads.half;
  const int column = rotated ? first : first + heads.half;

  int64_t out_row = (token * heads.H + head) * heads.width;
  if (!is_q) {
    const int64_t slot = job.slot_mapping[token];
    if (slot < 0 || slot >= job.num_slots) return;
    const int64_t page = slot / job.page_size, position = slot % job.page_size;
    out_row = ((page * heads.H + head) * job.page_size + position) * heads.width;
  }
  void* const out = is_q ? job.out : cache.data;
  const int out_code = is_q ? job.code : cache.code;
  const int64_t source = token * heads.token_stride + head * heads.head_stride + column;
  float a[COUNT];
  load(heads.data, job.code, source, a);
  if (!rotated) return store(a, out, out_code, out_row + column);
  float b[COUNT], cos[COUNT], sin[COUNT];
  load(heads.data, job.code, source + heads.half, b);
  load(job.cos, job.cos_code, token * heads.half + column, cos);
  load(job.sin, job.sin_code, token * heads.half + column, sin);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const float old_a = a[i];
    a[i] = __fmaf_rn(old_a, cos[i], -__fmul_rn(b[i], sin[i]));
    b[i] = __fmaf_rn(b[i], cos[i], __fmul_rn(old_a, sin[i]));
  }
  store(a, out, out_code, out_row + column);
  store(b, out, out_code, out_row + column + heads.half);
}

template <int COUNT>
const char* launch_rope_store(RopeJob job, uintptr_t stream) {
  const int64_t threads = int64_t(threads_for<COUNT>(job.q)) + threads_for<COUNT>(job.k) + threads_for<COUNT>(job.v);
  if (threads == 0) return nullptr;
  job.blocks_per_token = static_cast<int>((threads + block_threads - 1) / block_threads);
  const unsigned blocks = blocks_for(job.N * job.blocks_per_token, 1);
  if (!blocks) return "more tokens than a grid has blocks";
  return launch(rope_store_kernel<COUNT>, blocks, block_threads, 0, stream, job);
}

Heads make_heads(uintptr_t data, int64_t token_stride, int64_t head_stride, int64_t H, int64_t width, int64_t half) {
  Heads heads;
  heads.data = ptr<const void>(data);
  heads.token_stride = token_stride;
  heads.head_stride = head_stride;
  heads.H = static_cast<int>(H);
  heads.width = static_cast<int>(width);
  heads.half = static_cast<int>(half);
  return heads;
}

bool has_aligned_eights(const Heads& heads) {
  const int64_t sizes = heads.token_stride | heads.head_stride | heads.width | heads.half;
  return sizes % 8 == 0 && reinterpret_cast<uintptr_t>(heads.data) % 16 == 0;
}

// q, k and v have one dtype, and strides in numbers; cos and sin (N, half) have dtypes of their own.
const char* rope_store(uintptr_t q, uintptr_t k, uintptr_t v, int code, int64_t q_token_stride, int64_t q_head_stride,
                       int64_t k_token_stride, int64_t k_head_stride, int64_t v_token_stride, int64_t v_head_stride,
                       uintptr_t cos, int cos_code, uintptr_t sin, int sin_code, uintptr_t k_cache, uintptr_t v_cache,
                       int cache_code, uintptr_t slot_mapping, uintptr_t out, int64_t N, int64_t H, int64_t kv_heads,
                       int64_t d, int64_t dv, int64_t half, int64_t num_pages, int64_t page_size, uintptr_t stream) {
  if (N == 0) return nullptr;
  RopeJob job{};
  job.q = make_heads(q, q_token_stride, q_head_stride, H, d, half);
  job.k = make_heads(k, k_token_stride, k_head_stride, kv_heads, d, half);
  job.v = make_heads(v, v_token_stride, v_head_stride, kv_heads, dv, 0);
  job.code = code;
  job.cos = ptr<const void>(cos);
  job.sin = ptr<const void>(sin);
  job.cos_code = cos_code;
  job.sin_code = sin_code;
  job.out = ptr<void>(out);
  job.k_cache = {ptr<void>(k_cache), cache_code};
  job.v_cache = {ptr<void>(v_cache), cache_code};
  job.slot_mapping = ptr<const int64_t>(slot_mapping);
  job.N = N;
  job.num_slots = num_pages * page_size;
  job.page_size = static_cast<int>(page_size);
  const bool eights = has_aligned_eights(job.q) && has_aligned_eights(job.k) && has_aligned_eights(job.v) &&
                      are_16_byte_aligned(cos, sin, k_cache, v_cache);
  return eights ? launch_rope_store<8>(job, stream) : launch_rope_store<1>(job, stream);
}

KERNEL(rope_store)

}  // namespace
