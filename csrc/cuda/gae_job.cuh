// The rows and chunks that gae_scan.cuh scans: arguments of a call, and which block takes which tokens.
#pragma once
#include "quad.cuh"
#include "reduce.cuh"

namespace {

constexpr int tokens_per_lane = 4, tile = warp_size * tokens_per_lane;  // a warp takes a tile of 128 tokens
constexpr int max_warps = 8;                                            // of a block

struct Affine {  // x -> a x + b
  float a, b;
};
__device__ __forceinline__ float apply(const Affine& f, float x) { return fmaf(f.a, x, f.b); }
// The map that applies `right` first, then `left`.
__device__ __forceinline__ Affine compose(const Affine& left, const Affine& right) {
  return {left.a * right.a, fmaf(left.a, right.b, left.b)};
}
// Returns the maps of the lanes from this one to the last, composed.
__device__ __forceinline__ Affine compose_later_lanes(Affine f) {
  const int lane = threadIdx.x % warp_size;
#pragma unroll
  for (int d = 1; d < warp_size; d *= 2) {
    const Affine right{__shfl_down_sync(full_mask, f.a, d), __shfl_down_sync(full_mask, f.b, d)};
    if (lane + d < warp_size) f = compose(f, right);
  }
  return f;
}

// int32 or int64.
struct Offsets {
  const void* p;
  bool is_int32;

  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    return is_int32 ? static_cast<const int32_t*>(p)[i] : static_cast<const int64_t*>(p)[i];
  }
  __host__ __device__ __forceinline__ explicit operator bool() const { return p; }
};

// gamma, and the numbers that a scan makes of it and of lam.
struct Discount {
  float gamma, decay, gamma_minus_decay;  // decay = gamma * lam
};

// B rows of T tokens; or, if `offsets` (B + 1,) is given, B segments in one array of T tokens.
struct GaeJob {
  const uint8_t* mask;
  Offsets offsets;
  float *advantages, *returns;
  int64_t B, T;
  Discount discount;           // of all rows
  float lam;                   // read, as gammas and lams are, by sources of which per_row is true
  const float *gammas, *lams;  // null, or one number for each row, in place of gamma or lam
  int chunk_log2;              // a chunk has 2^chunk_log2 tokens; 0: rows are not split
  Affine* chunk_maps;          // the map of each chunk
  bool waits_for_masks;        // before the first tokens are loaded
};

// Without fused products, as the host computes the discount of all rows: equal numbers give equal bits.
template <bool per_row>
__device__ __forceinline__ Discount row_discount(const GaeJob& job, int64_t row) {
  if constexpr (per_row) {
    const float gamma = job.gammas ? job.gammas[row] : job.discount.gamma, lam = job.lams ? job.lams[row] : job.lam;
    const float decay = __fmul_rn(gamma, lam);
    return {gamma, decay, __fadd_rn(gamma, -decay)};
  } else {
    return job.discount;
  }
}

// The tokens that a team of warps scans: a row, or a chunk of it.
struct Span {
  int64_t row, begin, length;
  int64_t index, num_later;  // index among all spans, and number of spans to its right in the same row
  bool is_first;             // of its row
};

__host__ __device__ __forceinline__ int64_t num_chunks(const GaeJob& job, int64_t length) {
  return (length + (int64_t(1) << job.chunk_log2) - 1) >> job.chunk_log2;
}

// Chunk `chunk` of a row of `length` tokens from `begin` on.
__device__ __forceinline__ Span chunk_span(const GaeJob& job, int64_t row, int64_t begin, int64_t length, int64_t index,
                                           int64_t chunk) {
  const int64_t chunk_length = int64_t(1) << job.chunk_log2, start = chunk << job.chunk_log2, left = length - start;
  const int64_t num_later = num_chunks(job, length) - 1 - chunk;
  return {row, begin + start, left < chunk_length ? left : chunk_length, index, num_later, chunk == 0};
}

// Returns span `index`; its row is -1 if there is none. All lanes of a warp must call it. Only the device knows the
// lengths of segments: lanes add up the chunks of 32 segments at a time, until they exceed `index`.
__device__ __forceinline__ Span find_span(const GaeJob& job, int64_t index) {
  if (!job.chunk_log2) {
    const int64_t begin = job.offsets ? job.offsets[index] : index * job.T;
    return {index, begin, job.offsets ? job.offsets[index + 1] - begin : job.T, index, 0, true};
  }
  if (!job.offsets) {
    const int64_t chunks = num_chunks(job, job.T), row = index / chunks;
    return chunk_span(job, row, row * job.T, job.T, index, index % chunks);
  }
  const int lane = threadIdx.x % warp_size;
  int64_t before = 0;  // chunks of the segments before `first`
  for (int64_t first = 0; first < job.B; first += warp_size) {
    const int64_t segment = first + lane;
    const int64_t chunks = segment < job.B ? num_chunks(job, job.offsets[segment + 1] - job.offsets[segment]) : 0;
    int64_t end = before + chunks;  // chunks up to and including this segment
    for (int d = 1; d < warp_size; d *= 2) {
      const int64_t left = __shfl_up_sync(full_mask, end, d);
      if (lane >= d) end += left - before;
    }
    const unsigned beyond = __ballot_sync(full_mask, index < end);
    if (beyond) {
      const int owner = __ffs(beyond) - 1;
      const int64_t row = first + owner, begin = job.offsets[row];
      const int64_t chunk = index - __shfl_sync(full_mask, end - chunks, owner);
      return chunk_span(job, row, begin, job.offsets[row + 1] - begin, index, chunk);
    }
    before = __shfl_sync(full_mask, end, warp_size - 1);
  }
  return {-1, 0, 0, 0, 0, false};
}

// Fills any GPU several times over; blocks loop over the rest of the rows.
constexpr int64_t max_blocks = 2048;
// More than an H100 has at once. With so many, others hide a block's first two trips to memory.
constexpr int64_t full_gpu_blocks = 1024;

struct LaunchPlan {
  int warps_per_span;
  int64_t num_spans;
  unsigned blocks;  // 0: too many
};

// A warp for each tile of a row of T tokens, up to 8.
inline int warps_for(int64_t T) {
  if (T <= 2 * tile) return 1;
  if (T <= 4 * tile) return 4;
  return max_warps;
}

// `T` is the length of a typical row.
inline LaunchPlan plan_launch(const GaeJob& job, int64_t T, int64_t block_limit = max_blocks) {
  if (job.chunk_log2) {
    // An upper bound for segments, whose lengths the host does not know: some blocks may find no chunk.
    const int64_t chunks = job.offsets ? num_chunks(job, job.T) + job.B : job.B * num_chunks(job, job.T);
    return {max_warps, chunks, blocks_for(chunks, 1)};
  }
  const int warps_per_span = warps_for(T);
  const int64_t blocks = warps_per_span == 1 ? (job.B + 3) / 4 : job.B;
  return {warps_per_span, job.B, unsigned(blocks < block_limit ? blocks : block_limit)};
}

// Returns the exponent of a chunk's length; 0 if it is 0, -1 if it is no power of two or too short for 8 warps.
inline int chunk_log2_of(int64_t chunk_length) {
  if (!chunk_length) return 0;
  for (int exponent = 10; exponent < 62; ++exponent)
    if (chunk_length == int64_t(1) << exponent) return exponent;
  return -1;
}

// `offsets` are null if all rows have T tokens; `chunk_length` is 0 if rows are not split.
inline GaeJob make_job(uintptr_t mask, const Offsets& offsets, uintptr_t advantages, uintptr_t returns,
                       uintptr_t chunk_maps, int64_t chunk_length, int64_t B, int64_t T, float gamma, float lam,
                       uintptr_t gammas, uintptr_t lams) {
  GaeJob job;
  job.mask = ptr<const uint8_t>(mask);
  job.offsets = offsets;
  job.advantages = ptr<float>(advantages);
  job.returns = ptr<float>(returns);
  job.B = B;
  job.T = T;
  job.discount.gamma = gamma;
  job.discount.decay = gamma * lam;
  job.discount.gamma_minus_decay = gamma - job.discount.decay;
  job.lam = lam;
  job.gammas = ptr<const float>(gammas);
  job.lams = ptr<const float>(lams);
  job.chunk_log2 = chunk_log2_of(chunk_length);
  job.chunk_maps = ptr<Affine>(chunk_maps);
  job.waits_for_masks = B > full_gpu_blocks;
  return job;
}

constexpr const char* invalid_chunk = "a chunk must have a power of two of tokens, 1024 at least";

}  // namespace
