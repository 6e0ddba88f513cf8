// Attention of new tokens over keys in pages, on NVIDIA GPUs; kernels/decode_attention.py defines it.
//
// Floor: every key and value is loaded once for up to 8 query heads that share it. More than 8 take a block for every
// 8, which load the same keys from the L2 cache.
//
//     keys of a token    | split 0: 256 keys | split 1 | ... |     at multiples of 256; a block takes all or every k-th
//     a split            warp w: keys 4 w to 4 w + 3 of every 32, so 32 keys
//     a warp's scores    8 lanes per key: 4 keys in a step
//     their weights      1 lane per key, relative to the warp's largest score
//     weighted values    8 to 32 lanes per value, by its width
//
// Loads are in flight at all times, some 4 vectors of 16 bytes per lane, 48 KiB per SM with 24 warps: a lane loads its
// next vector as soon as it has unpacked one, the first values before the weights, and the next split's first keys
// before the warps' states are merged. By count of instructions, 4 query heads of bfloat16 keep an H100's schedulers
// busy for half of the time that its memory takes: for 512 bytes of keys and as many of values a warp has 64 products,
// 16 steps to unpack and some 50 for addresses, sums over lanes and queries from shared memory.
//
// The splits' states (largest score, sum of weights, weighted sum of values) are merged in order, by the block that
// takes all of them, or, if tokens are too few to fill the GPU, by a second kernel from memory: 4 (dv + 2) bytes per
// split and query head, 1.6 % of what is loaded if four heads share 16-bit keys of width 128.
//
// Deterministic: all products are explicit fused steps in a fixed order, so a token's bits depend on its own keys
// alone. Lengths and pages are read on the device; the grid depends on shapes alone, and a block without keys loads
// nothing. Cache entries that no token sees may be NaN.
#include "paged_attention.cuh"

namespace {

constexpr int merge_threads = 4 * warp_size, merge_unroll = 4;

// Shared memory of a block. `query_size`: numbers of a query, padded with zeros to whole vectors of all lanes.
template <int HEADS>
struct Shared {
  float maxima[num_warps][HEADS], sums[num_warps][HEADS], weights[num_warps][warp_size * HEADS];
  int next_rows[block_threads];  // cache rows of the next split's keys
  float4 memory[1];

  // (HEADS, quads): the merged states, if the block takes all splits.
  __device__ AttentionState* states() { return reinterpret_cast<AttentionState*>(memory); }
  __device__ float* queries(int quads) { return reinterpret_cast<float*>(states() + HEADS * quads); }
  // (num_warps, HEADS, quads)
  __device__ float4* accs(int quads, int query_size) {
    return reinterpret_cast<float4*>(queries(quads) + HEADS * query_size);
  }
  static size_t bytes(int quads, int query_size) {
    return sizeof(Shared) +
           HEADS * (quads * sizeof(AttentionState) + sizeof(float) * (query_size + num_warps * 4 * size_t(quads)));
  }
};

// Numbers of a query that the lanes of a key hold.
template <class T>
__host__ __device__ int query_size_of(const AttentionJob& job) {
  return job.k.vecs_per_lane * job.k.lanes_per_row() * vec_size<T>;
}

// Loads `num_heads` queries into shared memory, in the order in which `compute_scores` reads them: (vecs_per_lane,
// HEADS, quads of a vector, lanes of a row, 4).
template <class T, int HEADS>
__device__ __forceinline__ void load_queries(const AttentionJob& job, int64_t token, int64_t first_head, int num_heads,
                                             int query_size, float* queries) {
  constexpr int size = vec_size<T>, quads_per_vec = size / 4;
  for (int i = threadIdx.x; i < HEADS * query_size; i += block_threads) {
    const int h = i / query_size, column = i % query_size, vec = column / size;
    const int lane = vec & (job.k.lanes_per_row() - 1);
    const int quad = ((vec >> job.k.lanes_log2) * HEADS + h) * quads_per_vec + column % size / 4;
    const bool exists = h < num_heads && column < job.k.width;
    const int64_t head_of_token = first_head - token * job.H + h;
    queries[((quad << job.k.lanes_log2) + lane) * 4 + column % 4] =
        exists ? load_query(job, token * job.q_token_stride + head_of_token * job.q_head_stride + column) : 0.f;
  }
}

template <class T, int HEADS, bool ALIGNED>
__global__ void __launch_bounds__(block_threads, HEADS > 4 || !ALIGNED ? 2 : 3) attend_kernel(const AttentionJob job) {
  constexpr int U = HEADS == 1 ? 8 : 4;
  int token = blockIdx.x;  // the grid is (N, num_kv_heads, num_parts, head_groups)
  const int head_group = token % job.head_groups;
  token /= job.head_groups;
  const int part = token % job.num_parts;
  token /= job.num_parts;
  const int kv_head = token % job.num_kv_heads;
  token /= job.num_kv_heads;

  const int end = job.end(token), begin = job.begin(end), first_split = begin / split;
  if (job.num_parts > 1 && (first_split + part) * split >= end) return;
  const int heads_per_kv = job.H / job.num_kv_heads;
  const int first_head = token * job.H + kv_head * heads_per_kv + head_group * HEADS;
  const int num_heads = min(HEADS, heads_per_kv - head_group * HEADS);
  const int warp = threadIdx.x / warp_size, query_size = query_size_of<T>(job);
  Shared<HEADS>& shared = *shared_memory<Shared<HEADS>>();
  load_queries<T, HEADS>(job, token, first_head, begin < end ? num_heads : 0, query_size, shared.queries(job.quads));
  for (int i = threadIdx.x; i < HEADS * job.quads; i += block_threads) shared.states()[i] = no_keys();
  __syncthreads();

  const int sequence = job.sequences[token];
  WarpKeys keys(row_of_key(job, sequence, kv_head, (first_split + part) * split, end));
  uint4 vecs[U];
  load_first_steps<ALIGNED, T>(vecs, job.k, keys);
  for (int s = first_split + part; s * split < end; s += job.num_parts) {
    shared.next_rows[threadIdx.x] = row_of_key(job, sequence, kv_head, (s + job.num_parts) * split, end);
    float* const weights = shared.weights[warp];
    compute_scores<HEADS, ALIGNED, T>(vecs, job.k, keys, reinterpret_cast<const float4*>(shared.queries(job.quads)),
                                      weights);
    load_first_steps<ALIGNED, T>(vecs, job.v, keys);
    __syncwarp();
    compute_weights<HEADS>(job, keys, weights, shared.maxima[warp], shared.sums[warp]);
    __syncwarp();
    compute_accs<HEADS, ALIGNED, T>(vecs, job.v, keys, weights,
                                    shared.accs(job.quads, query_size) + warp * HEADS * job.quads, job.quads);
    keys = WarpKeys(shared.next_rows[threadIdx.x]);
    load_first_steps<ALIGNED, T>(vecs, job.k, keys);
    __syncthreads();
    for (int i = threadIdx.x; i < num_heads * job.quads; i += block_threads) {
      const int h = i / job.quads, column = 4 * (i % job.quads);
      if (column >= job.v.width) continue;
      const AttentionState state = merge_warps<HEADS>(&shared.maxima[0][h], &shared.sums[0][h],
                                                      shared.accs(job.quads, query_size) + i, job.quads);
      if (job.num_parts == 1) {
        merge_state(shared.states()[i], state);
      } else {
        const int64_t index = int64_t(first_head + h) * job.max_splits + s - job.begin(end) / split;
        if (column == 0) {
          job.split_states[2 * index] = state.max;
          job.split_states[2 * index + 1] = state.sum;
        }
        *reinterpret_cast<float4*>(job.split_accs + index * job.padded_width() + column) = state.acc;
      }
    }
    __syncthreads();
  }
  if (job.num_parts > 1) return;
  for (int i = threadIdx.x; i < num_heads * job.quads; i += block_threads)
    write_output(job, first_head + i / job.quads, 4 * (i % job.quads), shared.states()[i], job.begin(end) < end);
}

// A warp merges the splits of a query head.
__global__ void __launch_bounds__(merge_threads) merge_kernel(const AttentionJob job) {
  const int64_t head = int64_t(blockIdx.x) * (merge_threads / warp_size) + threadIdx.x / warp_size;
  if (head >= job.N * job.H) return;
  const int end = job.end(head / job.H), begin = job.begin(end), width = job.padded_width();
  const int num_splits = begin < end ? (end + split - 1) / split - begin / split : 0;
  const float* const split_states = job.split_states + head * job.max_splits * 2;
  const float* const split_accs = job.split_accs + head * job.max_splits * width;
  for (int column = threadIdx.x % warp_size * 4; column < width; column += 4 * warp_size) {
    AttentionState state = no_keys();
    for (int first = 0; first < num_splits; first += merge_unroll) {
      AttentionState next[merge_unroll];
#pragma unroll
      for (int i = 0; i < merge_unroll; ++i) {
        const int s = first + i;
        next[i] = no_keys();
        if (s >= num_splits) continue;
        next[i].max = split_states[2 * s];
        next[i].sum = split_states[2 * s + 1];
        next[i].acc = *reinterpret_cast<const float4*>(split_accs + int64_t(s) * width + column);
      }
#pragma unroll
      for (int i = 0; i < merge_unroll; ++i)
        if (first + i < num_splits) merge_state(state, next[i]);
    }
    write_output(job, head, column, state, begin < end);
  }
}

KvView view_of(uintptr_t cache, int64_t width, int size, int lanes_log2) {
  const int num_vecs = static_cast<int>((width + size - 1) / size), lanes = 1 << lanes_log2;
  return {ptr<const void>(cache), static_cast<int>(width), lanes_log2, (num_vecs + lanes - 1) >> lanes_log2};
}

template <class T, int HEADS, bool ALIGNED>
const char* attend(AttentionJob job, uintptr_t stream) {
  job.head_groups = (job.H / job.num_kv_heads + HEADS - 1) / HEADS;
  const unsigned blocks = blocks_for(job.N * job.num_kv_heads * job.head_groups * job.num_parts, 1);
  if (!blocks || job.N * job.H > 0x7fffffff) return "more tokens than a grid has blocks";
  const size_t bytes = Shared<HEADS>::bytes(job.quads, query_size_of<T>(job));
  const char* error = launch(attend_kernel<T, HEADS, ALIGNED>, blocks, block_threads, bytes, stream, job);
  if (error || job.num_parts == 1) return error;
  return launch(merge_kernel, blocks_for(job.N * job.H, merge_threads / warp_size), merge_threads, 0, stream, job);
}

// Lanes for a value of `num_vecs` vectors of 16 bytes.
int value_lanes_log2(int64_t num_vecs) {
  if (num_vecs <= 8) return 3;
  return num_vecs <= 16 ? 4 : 5;
}

// q: strides in numbers. split_states and split_accs: memory as AttentionJob describes it, if num_parts > 1. Limits:
// heads of 256 numbers, fewer than 2^31 rows in a cache, max_pages * page_size at most 2^30.
const char* decode_attention(uintptr_t q, int q_code, int64_t q_token_stride, int64_t q_head_stride, uintptr_t k_cache,
                             uintptr_t v_cache, int cache_code, uintptr_t block_table, uintptr_t lengths,
                             uintptr_t sequences, uintptr_t out, uintptr_t split_states, uintptr_t split_accs,
                             int64_t N, int64_t H, int64_t num_kv_heads, int64_t d, int64_t dv, int64_t page_size,
                             int64_t max_pages, int64_t num_parts, int64_t max_splits, float scale, int64_t window,
                             float softcap, uintptr_t stream) {
  if (N == 0 || H == 0 || dv == 0) return nullptr;
  return dispatch_dtype(cache_code, [&](auto number) {
    using T = decltype(number);
    constexpr int size = vec_size<T>;
    AttentionJob job{};
    job.q = ptr<const void>(q);
    job.q_code = q_code;
    job.q_token_stride = q_token_stride;
    job.q_head_stride = q_head_stride;
    job.k = view_of(k_cache, d, size, score_lanes_log2);
    job.v = view_of(v_cache, dv, size, value_lanes_log2((dv + size - 1) / size));
    job.block_table = ptr<const int32_t>(block_table);
    job.lengths = ptr<const int32_t>(lengths);
    job.sequences = ptr<const int32_t>(sequences);
    job.out = ptr<void>(out);
    job.split_states = ptr<float>(split_states);
    job.split_accs = ptr<float>(split_accs);
    job.N = N;
    job.H = static_cast<int>(H);
    job.num_kv_heads = static_cast<int>(num_kv_heads);
    job.page_size = static_cast<int>(page_size);
    job.max_pages = static_cast<int>(max_pages);
    job.window = static_cast<int>(min(window, int64_t(1) << 30));
    job.num_parts = static_cast<int>(num_parts);
    job.max_splits = static_cast<int>(max_splits);
    job.quads = job.v.vecs_per_lane * job.v.lanes_per_row() * size / 4;
    job.has_softcap = softcap > 0.f;
    job.score_factor = (job.has_softcap ? softcap : scale) * log2_e;
    job.softcap_factor = job.has_softcap ? scale / softcap : 1.f;
    const int64_t heads_per_kv = H / num_kv_heads;
    if (d % size || dv % size || (k_cache | v_cache) % 16) return attend<T, 4, false>(job, stream);
    if (heads_per_kv == 1) return attend<T, 1, true>(job, stream);
    return heads_per_kv <= 4 ? attend<T, 4, true>(job, stream) : attend<T, 8, true>(job, stream);
  });
}

CONSTANT(decode_attention_split, split)
KERNEL(decode_attention)

}  // namespace
