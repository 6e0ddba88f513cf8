// A warp's part of attention over keys in pages: scores, weights and weighted sums of 32 keys, and how the states of
// several warps and splits merge. decode_attention.cu has the picture.
#pragma once
#include "softmax.cuh"

namespace {

constexpr int split = 256;  // keys
constexpr int num_warps = 8, block_threads = num_warps * warp_size;
constexpr int score_lanes_log2 = 3;  // 8 lanes compute a key's scores
static_assert(split == num_warps * warp_size, "a warp takes 32 keys of a split, one per lane");

// The cache of keys or of values as rows of `width` numbers. 2^lanes_log2 lanes load a row, `vecs_per_lane` vectors of
// 16 bytes each: lane l of them takes vectors l, l + 2^lanes_log2, ...
struct KvView {
  const void* cache;
  int width, lanes_log2, vecs_per_lane;

  __host__ __device__ int lanes_per_row() const { return 1 << lanes_log2; }
  __device__ int rows_log2() const { return 5 - lanes_log2; }  // a warp loads 2^rows_log2 rows in a step
  __device__ int lane_of_row() const { return threadIdx.x & (lanes_per_row() - 1); }
  // Returns which of the warp's 32 keys this lane loads in a step.
  __device__ int key_of_step(int step) const {
    return (step << rows_log2()) + ((threadIdx.x % warp_size) >> lanes_log2);
  }
};

struct AttentionJob {
  const void* q;
  int q_code;
  int64_t q_token_stride, q_head_stride;
  KvView k, v;
  const int32_t* block_table;          // (sequences, max_pages)
  const int32_t *lengths, *sequences;  // (N,): number of keys, and row of block_table, of each token
  void* out;
  float* split_states;  // (N, H, max_splits, 2): max and sum, if num_parts > 1
  float* split_accs;    // (N, H, max_splits, padded_width)
  int64_t N;
  int H, num_kv_heads, page_size, max_pages, window;
  int num_parts, max_splits;  // blocks that share the splits of a token, and how many splits there may be
  int head_groups;            // blocks that share the query heads of a key head
  int quads;                  // groups of 4 output columns that lanes hold
  // A score is x * score_factor, or with softcap tanh(x * softcap_factor) * score_factor, in units of log 2.
  float softcap_factor, score_factor;
  bool has_softcap;

  __device__ int end(int64_t token) const { return min(lengths[token], max_pages * page_size); }
  __device__ int begin(int end) const { return window > 0 ? max(end - window, 0) : 0; }
  __host__ __device__ int padded_width() const { return (v.width + 3) / 4 * 4; }
};

// The state after some keys: the largest score, the sum of 2^(score - max), and that of 2^(score - max) value in four
// columns.
struct AttentionState {
  float max, sum;
  float4 acc;
};

__device__ __forceinline__ AttentionState no_keys() { return {-INFINITY, 0.f, make_float4(0.f, 0.f, 0.f, 0.f)}; }

// a * x + b
__device__ __forceinline__ float4 fma4(float4 a, float x, float4 b) {
  return make_float4(__fmaf_rn(a.x, x, b.x), __fmaf_rn(a.y, x, b.y), __fmaf_rn(a.z, x, b.z), __fmaf_rn(a.w, x, b.w));
}

// a + the a of the lane whose number differs in the bit `distance`.
__device__ __forceinline__ float4 add_xor_lane(float4 a, int distance) {
  return make_float4(a.x + __shfl_xor_sync(full_mask, a.x, distance), a.y + __shfl_xor_sync(full_mask, a.y, distance),
                     a.z + __shfl_xor_sync(full_mask, a.z, distance), a.w + __shfl_xor_sync(full_mask, a.w, distance));
}

// a . b + c
__device__ __forceinline__ float dot4(float4 a, float4 b, float c) {
  return __fmaf_rn(a.w, b.w, __fmaf_rn(a.z, b.z, __fmaf_rn(a.y, b.y, __fmaf_rn(a.x, b.x, c))));
}

// state = the state of its keys and those of `next`, which follow them.
__device__ __forceinline__ void merge_state(AttentionState& state, const AttentionState& next) {
  const float max = fmaxf(state.max, next.max), origin = zero_if_minus_inf(max);
  const float state_factor = fast_exp2(state.max - origin), next_factor = fast_exp2(next.max - origin);
  const float4 next_acc = make_float4(__fmul_rn(next.acc.x, next_factor), __fmul_rn(next.acc.y, next_factor),
                                      __fmul_rn(next.acc.z, next_factor), __fmul_rn(next.acc.w, next_factor));
  state = {max, __fmaf_rn(state.sum, state_factor, __fmul_rn(next.sum, next_factor)),
           fma4(state.acc, state_factor, next_acc)};
}

// Writes four columns, from `column` on, of a query head's output: the weighted mean of the values, or 0 if there are
// no keys. If all scores are -inf it is NaN.
__device__ __forceinline__ void write_output(const AttentionJob& job, int64_t head, int column,
                                             const AttentionState& state, bool has_keys) {
  const float acc[4] = {state.acc.x, state.acc.y, state.acc.z, state.acc.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i >= job.v.width) return;
    const int64_t index = head * job.v.width + column + i;
    const float mean = has_keys ? acc[i] / state.sum : 0.f;
    if (job.q_code == 0)
      from_float(mean, static_cast<float*>(job.out)[index]);
    else if (job.q_code == 1)
      from_float(mean, static_cast<__nv_bfloat16*>(job.out)[index]);
    else
      from_float(mean, static_cast<__half*>(job.out)[index]);
  }
}

__device__ __forceinline__ float load_query(const AttentionJob& job, int64_t index) {
  if (job.q_code == 0) return static_cast<const float*>(job.q)[index];
  if (job.q_code == 1) return to_float(static_cast<const __nv_bfloat16*>(job.q)[index]);
  return to_float(static_cast<const __half*>(job.q)[index]);
}

// Loads vector k of a row. ALIGNED: rows are made of aligned vectors, and a vector beyond the row is its last one;
// otherwise numbers beyond the row are 0.
template <bool ALIGNED, class T>
__device__ __forceinline__ uint4 load_vec(const KvView& view, int row, int k) {
  constexpr int size = vec_size<T>;
  if constexpr (ALIGNED) {
    const int num_vecs = view.width / size;
    return static_cast<const uint4*>(view.cache)[int64_t(row) * num_vecs + min(k, num_vecs - 1)];
  } else {
    const T* const p = static_cast<const T*>(view.cache) + int64_t(row) * view.width + k * size;
    T x[size];
#pragma unroll
    for (int i = 0; i < size; ++i) {
      if (k * size + i < view.width)
        x[i] = p[i];
      else
        from_float(0.f, x[i]);
    }
    uint4 vec;
    memcpy(&vec, x, 16);
    return vec;
  }
}

// Numbers 4 i to 4 i + 3 of a vector.
template <class T>
__device__ __forceinline__ float4 quad_of(const uint4& vec, int i) {
  float x[vec_size<T>];
  unpack<T>(vec, x);
  return make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
}

// One round of `sums_over_8_lanes`, for m numbers: a lane keeps one half of them and gives its partner the other half.
// Returns the index of the first number that it keeps.
template <int m, int n>
__device__ __forceinline__ int exchange_half(float (&x)[n], int distance) {
  constexpr int half = m / 2;
  const bool upper = threadIdx.x & distance;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const float given = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
    x[i] = kept + __shfl_xor_sync(full_mask, given, distance);
  }
  return upper ? half : 0;
}

// Adds up n numbers over groups of 8 lanes. Afterwards x[0] to x[n / 8 - 1] are the lane's totals, whose first index is
// returned.
template <int n>
__device__ __forceinline__ int sums_over_8_lanes(float (&x)[n]) {
  int first = exchange_half<n>(x, 1);
  first += exchange_half<n / 2>(x, 2);
  return first + exchange_half<n / 4>(x, 4);
}

// Loads a number of each query head from shared memory.
template <int HEADS>
__device__ __forceinline__ void load_heads(const float* p, float (&x)[HEADS]) {
  if constexpr (HEADS % 4 == 0) {
#pragma unroll
    for (int h = 0; h < HEADS; h += 4) {
      const float4 four = *reinterpret_cast<const float4*>(p + h);
      x[h] = four.x;
      x[h + 1] = four.y;
      x[h + 2] = four.z;
      x[h + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int h = 0; h < HEADS; ++h) x[h] = p[h];
  }
}

// Returns the cache row of this lane's key of the split that starts at key `start`, or -1 if the token does not see it.
// A warp takes four consecutive keys of every 32.
__device__ __forceinline__ int row_of_key(const AttentionJob& job, int sequence, int kv_head, int start, int end) {
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const int key = start + lane / 4 * (4 * num_warps) + warp * 4 + lane % 4;
  if (key < job.begin(end) || key >= end) return -1;
  const int page = job.block_table[int64_t(sequence) * job.max_pages + key / job.page_size];
  return (page * job.num_kv_heads + kv_head) * job.page_size + key % job.page_size;
}

// The 32 keys of a warp: each lane holds the cache row of one. Steps before the first valid key and after the last are
// skipped. In the others, a lane whose key is not valid holds the row of a valid one, so that every load is in bounds.
struct WarpKeys {
  int row;
  unsigned valid;  // a bit for each key

  __device__ explicit WarpKeys(int row) : row(row), valid(__ballot_sync(full_mask, row >= 0)) {
    const int first_valid_row = __shfl_sync(full_mask, row, __ffs(valid) - 1);
    if (row < 0) this->row = first_valid_row;
  }
  __device__ bool is_valid(int key) const { return valid >> key & 1; }
  // The steps with valid keys, rounded to groups of U; the range is empty if there are none.
  template <int U>
  __device__ int first_step(const KvView& view) const {
    return ((__ffs(valid) - 1) >> view.rows_log2()) / U * U;
  }
  __device__ int end_step(const KvView& view) const { return ((warp_size - 1 - __clz(valid)) >> view.rows_log2()) + 1; }

  // Loads the lane's vector i of the row that its group of lanes takes in `step`.
  template <bool ALIGNED, class T>
  __device__ __forceinline__ uint4 load(const KvView& view, int step, int i) const {
    const int step_row = __shfl_sync(full_mask, row, view.key_of_step(step));
    return load_vec<ALIGNED, T>(view, step_row, (i << view.lanes_log2) + view.lane_of_row());
  }
};

// Loads the lane's vector i of the first U steps.
template <bool ALIGNED, class T, int U>
__device__ __forceinline__ void load_first_steps(uint4 (&vecs)[U], const KvView& view, const WarpKeys& keys,
                                                 int i = 0) {
  if (!keys.valid) return;
  const int first = keys.first_step<U>(view);
#pragma unroll
  for (int u = 0; u < U; ++u) vecs[u] = keys.load<ALIGNED, T>(view, first + u, i);
}

// Writes the scores of a warp's keys to `scores` (32, HEADS). `vecs` are those of load_first_steps.
template <int HEADS, bool ALIGNED, class T, int U>
__device__ __forceinline__ void compute_scores(uint4 (&vecs)[U], const KvView& k, const WarpKeys& keys,
                                               const float4* queries, float* scores) {
  constexpr int quads_per_vec = vec_size<T> / 4, n = U * HEADS;
  const KvView view{k.cache, k.width, score_lanes_log2, k.vecs_per_lane};  // lanes_log2 as a constant
  const int lane_of_row = view.lane_of_row(), end_step = keys.end_step(view);
  queries += lane_of_row;
#pragma unroll 1
  for (int step = keys.first_step<U>(view); step < end_step; step += U) {
    float products[n];
#pragma unroll
    for (int i = 0; i < n; ++i) products[i] = 0.f;
#pragma unroll 1
    for (int vec = 0; vec < view.vecs_per_lane; ++vec) {
      const bool is_last = vec + 1 == view.vecs_per_lane, has_next = !is_last || step + U < end_step;
      const int next_step = is_last ? step + U : step, next_vec = is_last ? 0 : vec + 1;
      if (((vec << view.lanes_log2) + lane_of_row) * vec_size<T> >= view.width) {  // beyond the row
#pragma unroll
        for (int u = 0; u < U; ++u) vecs[u] = make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int u = 0; u < U; u += 2) {
#pragma unroll
        for (int i = 0; i < quads_per_vec; ++i) {
          const float4 x = quad_of<T>(vecs[u], i), y = quad_of<T>(vecs[u + 1], i);
#pragma unroll
          for (int h = 0; h < HEADS; ++h) {
            const float4 q = queries[((vec * HEADS + h) * quads_per_vec + i) << view.lanes_log2];
            products[u * HEADS + h] = dot4(q, x, products[u * HEADS + h]);
            products[(u + 1) * HEADS + h] = dot4(q, y, products[(u + 1) * HEADS + h]);
          }
        }
        if (has_next) {
          vecs[u] = keys.load<ALIGNED, T>(view, next_step + u, next_vec);
          vecs[u + 1] = keys.load<ALIGNED, T>(view, next_step + u + 1, next_vec);
        }
      }
    }
    const int first = sums_over_8_lanes(products), key = view.key_of_step(step + first / HEADS);
#pragma unroll
    for (int i = 0; i < n / 8; ++i) scores[key * HEADS + first % HEADS + i] = products[i];
  }
}

// Replaces the scores (32, HEADS) by 2^(score - max), a lane per key. Writes the warp's maxima and sums (HEADS,).
template <int HEADS>
__device__ __forceinline__ void compute_weights(const AttentionJob& job, const WarpKeys& keys, float* weights,
                                                float* maxima, float* sums) {
  const int lane = threadIdx.x % warp_size;
  const bool valid = keys.is_valid(lane);
  float scores[HEADS];
  load_heads(weights + lane * HEADS, scores);
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    const float x = job.has_softcap ? tanhf(scores[h] * job.softcap_factor) : scores[h];
    const float max = warp_reduce<Max>(valid ? __fmul_rn(x, job.score_factor) : -INFINITY);
    const float weight = valid ? fast_exp2(__fmaf_rn(x, job.score_factor, -zero_if_minus_inf(max))) : 0.f;
    const float sum = warp_reduce<Add>(weight);
    weights[lane * HEADS + h] = weight;
    if (lane == 0) {
      maxima[h] = max;
      sums[h] = sum;
    }
  }
}

// Writes the sums of weight * value over a warp's keys to `accs` (HEADS, num_quads). `vecs` are those of
// load_first_steps.
template <int HEADS, bool ALIGNED, class T, int U>
__device__ __forceinline__ void compute_accs(uint4 (&vecs)[U], const KvView& view, const WarpKeys& keys,
                                             const float* weights, float4* accs, int num_quads) {
  constexpr int quads_per_vec = vec_size<T> / 4, n = HEADS * quads_per_vec;
  const int lane = threadIdx.x % warp_size, end_step = keys.end_step(view);
#pragma unroll 1
  for (int vec = 0; vec < view.vecs_per_lane; ++vec) {
    if (vec) load_first_steps<ALIGNED, T>(vecs, view, keys, vec);
    float4 acc[n];
#pragma unroll
    for (int i = 0; i < n; ++i) acc[i] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
    for (int step = keys.first_step<U>(view); step < end_step; step += U) {
      if (keys.valid != full_mask) {  // 0 times the value that lanes hold for an invalid key may be NaN
#pragma unroll
        for (int u = 0; u < U; ++u)
          if (!keys.is_valid(view.key_of_step(step + u))) vecs[u] = make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        float w[HEADS];
        load_heads(weights + view.key_of_step(step + u) * HEADS, w);
#pragma unroll
        for (int i = 0; i < quads_per_vec; ++i) {
          const float4 x = quad_of<T>(vecs[u], i);
#pragma unroll
          for (int h = 0; h < HEADS; ++h) acc[h * quads_per_vec + i] = fma4(x, w[h], acc[h * quads_per_vec + i]);
        }
        if (step + U < end_step) vecs[u] = keys.load<ALIGNED, T>(view, step + U + u, vec);
      }
    }
    for (int distance = view.lanes_per_row(); distance < warp_size; distance *= 2)
#pragma unroll
      for (int i = 0; i < n; ++i) acc[i] = add_xor_lane(acc[i], distance);
    if (lane < view.lanes_per_row())
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const int head = i / quads_per_vec, quad = ((vec << view.lanes_log2) + lane) * quads_per_vec;
        accs[head * num_quads + quad + i % quads_per_vec] = acc[i];
      }
  }
}

// Merges what the warps of a block have of one query head and quad, in the order of the warps.
template <int HEADS>
__device__ __forceinline__ AttentionState merge_warps(const float* maxima, const float* sums, const float4* accs,
                                                      int num_quads) {
  float max = -INFINITY;
#pragma unroll
  for (int w = 0; w < num_warps; ++w) max = fmaxf(max, maxima[w * HEADS]);
  AttentionState state{max, 0.f, make_float4(0.f, 0.f, 0.f, 0.f)};
#pragma unroll
  for (int w = 0; w < num_warps; ++w) {
    const float factor = fast_exp2(maxima[w * HEADS] - zero_if_minus_inf(max));
    state.sum = __fmaf_rn(sums[w * HEADS], factor, state.sum);
    state.acc = fma4(accs[w * HEADS * num_quads], factor, state.acc);
  }
  return state;
}

}  // namespace
