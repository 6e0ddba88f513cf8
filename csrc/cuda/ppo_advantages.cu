// KL-shaped rewards, advantages, returns and their moments on NVIDIA GPUs; kernels/ppo_advantages.py defines them,
// gae_scan.cuh holds the scan.
//
// Floor: 13 bytes in (two log-probabilities, value, mask; 7 in 16 bits) and 8 out per token, in one launch. A few long
// rows load their tokens twice, in two launches.
//
//     a warp     moments of a tile while it is in registers, merged into the warp's own in shared memory
//     a block    merges its warps' moments into column blockIdx.x of `partials`
//     finish     the block that ends last merges the columns
//
// A tile's moments are computed from distances to one of its own numbers, so they keep their digits when the mean is
// large beside the spread. Moments merge by Chan's rule, in double, in an order that depends on the shapes alone, so
// the bits repeat.
#include "gae_scan.cuh"
#include "ppo_terms.h"

namespace {

// Number of tokens; of their advantages and of their returns the mean, and the sum of squared distances from it.
struct Moments {
  double count, mean[2], m2[2];
};

// a = the moments of both.
__device__ __forceinline__ void merge(Moments& a, const Moments& b) {
  if (!(b.count > 0)) return;
  if (!(a.count > 0)) {
    a = b;
    return;
  }
  const double count = a.count + b.count, b_share = float(b.count) / float(count);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const double distance = b.mean[k] - a.mean[k];
    a.mean[k] += distance * b_share;
    a.m2[k] += b.m2[k] + distance * distance * (a.count * b_share);
  }
  a.count = count;
}

// Lane 0 gets the moments of the first n lanes.
template <int n>
__device__ __forceinline__ void merge_lanes(Moments& m) {
#pragma unroll
  for (int d = n / 2; d; d /= 2) {
    const Moments other{__shfl_down_sync(full_mask, m.count, d),
                        {__shfl_down_sync(full_mask, m.mean[0], d), __shfl_down_sync(full_mask, m.mean[1], d)},
                        {__shfl_down_sync(full_mask, m.m2[0], d), __shfl_down_sync(full_mask, m.m2[1], d)}};
    merge(m, other);
  }
}

// Thread 0 gets the moments of all warps of its block.
template <int num_warps>
__device__ __forceinline__ Moments merge_warps(const Moments* warp_moments) {
  __syncthreads();
  Moments m = threadIdx.x < num_warps ? warp_moments[threadIdx.x] : Moments{};
  if (threadIdx.x < warp_size) merge_lanes<num_warps>(m);
  return m;
}

// partials: double (6, num_blocks). Rows 0 to 4 have the blocks' moments, row 5 the KL of each chunk.
__device__ __forceinline__ void store_moments(double* partials, int64_t num_blocks, const Moments& m) {
  partials[0] = m.count;
  partials[num_blocks] = m.mean[0];
  partials[2 * num_blocks] = m.m2[0];
  partials[3 * num_blocks] = m.mean[1];
  partials[4 * num_blocks] = m.m2[1];
}
__device__ __forceinline__ Moments load_moments(const double* partials, int64_t num_blocks) {
  return {__ldcg(partials),
          {__ldcg(partials + num_blocks), __ldcg(partials + 3 * num_blocks)},
          {__ldcg(partials + 2 * num_blocks), __ldcg(partials + 4 * num_blocks)}};
}

// The source of ppo_advantages: the reward is -kl_coef times the KL estimate; the row's score comes in with the carry.
// IS_K3: k3 takes an exponential, and so many registers that it has a kernel of its own.
template <bool IS_K3, int DTYPE, bool PER_ROW = false>
struct KlRewards {
  static constexpr bool per_row = PER_ROW;
  static constexpr int num_inputs = 3, blocks_per_sm = IS_K3 ? 3 : 4;
  struct Shared {
    Moments warp_moments[max_warps];  // not in registers: they would take too many
    float warp_kl[max_warps];
  };
  Input<DTYPE> input[num_inputs];  // values, logprobs, ref_logprobs
  Input<ANY_DTYPE> scores, bootstrap;
  float *kl, *stats;  // (B,), (5,)
  double* partials;
  unsigned* ticket;        // of `is_last_block`
  int64_t chunks_per_row;  // 0 if rows are not split
  int64_t B;
  float kl_coef, score_clip;
  KlEstimator estimator;

  __device__ __forceinline__ float carry_into_row(int64_t row, const Discount& discount) const {
    float score = scores.load(row);
    if (score_clip > 0.f) score = clamp(score, -score_clip, score_clip);
    return bootstrap.p ? fmaf(discount.gamma, bootstrap.load(row), score) : score;
  }
  __device__ __forceinline__ float estimate(float log_ratio) const {
    if (IS_K3) return kl_estimate<KlEstimator::K3>(log_ratio);
    if (estimator == KlEstimator::K2) return kl_estimate<KlEstimator::K2>(log_ratio);
    if (estimator == KlEstimator::K1) return kl_estimate<KlEstimator::K1>(log_ratio);
    return kl_estimate<KlEstimator::ABS>(log_ratio);
  }
  __device__ __forceinline__ float reward(const float (&x)[num_inputs], float& kl_sum) const {
    const float token_kl = estimate(x[1] - x[2]);
    kl_sum += token_kl;
    return -kl_coef * token_kl;
  }
  __device__ __forceinline__ void on_block_start(Shared& shared) const {
    if (threadIdx.x % warp_size == 0) shared.warp_moments[threadIdx.x / warp_size] = {};
  }
  // Merges a tile's moments. Distances are taken from a pivot, the tile's first valid number, so that the mean keeps
  // its digits and the squares lose few.
  __device__ __forceinline__ void on_tile(Shared& shared, unsigned mask, const float (&advantage)[tokens_per_lane],
                                          const float (&ret)[tokens_per_lane]) const {
    const unsigned valid_lanes = __ballot_sync(full_mask, mask != 0);
    if (!valid_lanes) return;
    const float (*x[2])[tokens_per_lane] = {&advantage, &ret};
    const int count = __reduce_add_sync(full_mask, __popc(mask));
    float pivot[2], sum[2] = {}, square[2] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      pivot[k] = 0.f;
#pragma unroll
      for (int i = tokens_per_lane - 1; i >= 0; --i) pivot[k] = mask >> i & 1 ? (*x[k])[i] : pivot[k];
      pivot[k] = __shfl_sync(full_mask, pivot[k], __ffs(valid_lanes) - 1);
#pragma unroll
      for (int i = 0; i < tokens_per_lane; ++i) {
        const float distance = mask >> i & 1 ? (*x[k])[i] - pivot[k] : 0.f;
        sum[k] += distance;
        square[k] = fmaf(distance, distance, square[k]);
      }
      sum[k] = warp_reduce<Add>(sum[k]);
      square[k] = warp_reduce<Add>(square[k]);
    }
    if (threadIdx.x % warp_size) return;
    Moments tile_moments{double(count), {}, {}};
    const float inverse_count = 1.f / float(count);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float mean_distance = sum[k] * inverse_count;
      const float m2 = fmaf(-sum[k], mean_distance, square[k]);
      tile_moments.mean[k] = double(pivot[k]) + mean_distance;
      tile_moments.m2[k] = m2 < 0.f ? 0.f : m2;  // NaN stays
    }
    merge(shared.warp_moments[threadIdx.x / warp_size], tile_moments);
  }
  template <int W>
  __device__ __forceinline__ void on_span_end(Shared& shared, const GaeJob& job, const Span& span,
                                              float span_kl) const {
    span_kl = warp_reduce<Add>(span_kl);
    if (W > 1) {
      if (threadIdx.x % warp_size == 0) shared.warp_kl[threadIdx.x / warp_size] = span_kl;
      __syncthreads();
      if (threadIdx.x) return;
      span_kl = 0.f;
      for (int w = 0; w < W; ++w) span_kl += shared.warp_kl[w];
    }
    if (threadIdx.x % warp_size) return;
    if (job.chunk_log2) {
      partials[5 * int64_t(gridDim.x) + span.index] = span_kl;
    } else {
      kl[span.index] = span_kl;  // a span is a row
    }
  }
  template <int num_warps>
  __device__ __forceinline__ void on_block_end(Shared& shared) const {
    const Moments block_moments = merge_warps<num_warps>(shared.warp_moments);
    if (threadIdx.x == 0) store_moments(partials + blockIdx.x, gridDim.x, block_moments);
    if (is_last_block(ticket)) finish<num_warps>(shared);
  }
  // All threads of one block merge the blocks' moments into `stats`. If rows are split, they add up the KL of each
  // row's chunks.
  template <int num_warps>
  __device__ __forceinline__ void finish(Shared& shared) const {
    const int64_t num_blocks = gridDim.x;
    Moments moments = {};
    for (int64_t i = threadIdx.x; i < num_blocks; i += blockDim.x)
      merge(moments, load_moments(partials + i, num_blocks));
    for (int64_t row = threadIdx.x; chunks_per_row && row < B; row += blockDim.x) {
      double sum = 0;
      for (int64_t i = 0; i < chunks_per_row; ++i) sum += __ldcg(partials + 5 * num_blocks + row * chunks_per_row + i);
      kl[row] = float(sum);
    }
    merge_lanes<warp_size>(moments);
    if (threadIdx.x % warp_size == 0) shared.warp_moments[threadIdx.x / warp_size] = moments;
    moments = merge_warps<num_warps>(shared.warp_moments);
    if (threadIdx.x) return;
    stats[0] = float(moments.count);
    stats[1] = float(moments.mean[0]);
    stats[2] = float(moments.m2[0]);
    stats[3] = float(moments.mean[1]);
    stats[4] = float(moments.m2[1]);
  }
};

// partials: memory for 6 numbers of each of `max_partials` blocks.
const char* ppo_advantages(uintptr_t logprobs, int logprobs_code, uintptr_t ref_logprobs, int ref_logprobs_code,
                           uintptr_t values, int values_code, uintptr_t scores, int scores_code, uintptr_t mask,
                           uintptr_t gammas, uintptr_t lams, uintptr_t bootstrap, int bootstrap_code,
                           uintptr_t advantages, uintptr_t returns, uintptr_t stats, uintptr_t kl, uintptr_t partials,
                           int64_t max_partials, uintptr_t ticket, uintptr_t chunk_maps, int64_t chunk_length,
                           int64_t B, int64_t T, float kl_coef, int estimator, float gamma, float lam, float score_clip,
                           uintptr_t stream) {
  GaeJob job =
      make_job(mask, Offsets{}, advantages, returns, chunk_maps, B ? chunk_length : 0, B, T, gamma, lam, gammas, lams);
  if (job.chunk_log2 < 0) return invalid_chunk;
  LaunchPlan plan = plan_launch(job, T, max_partials);
  if (B == 0) plan.blocks = 1;  // it writes the statistics
  if (plan.blocks > max_partials) return "there are more blocks than memory for their moments";
  const auto scan = [&](auto source) {
    source.input[0] = {ptr<const void>(values), values_code};
    source.input[1] = {ptr<const void>(logprobs), logprobs_code};
    source.input[2] = {ptr<const void>(ref_logprobs), ref_logprobs_code};
    source.scores = {ptr<const void>(scores), scores_code};
    source.bootstrap = {ptr<const void>(bootstrap), bootstrap_code};
    source.kl = ptr<float>(kl);
    source.stats = ptr<float>(stats);
    source.partials = ptr<double>(partials);
    source.ticket = ptr<unsigned>(ticket);
    source.chunks_per_row = job.chunk_log2 ? num_chunks(job, T) : 0;
    source.B = B;
    source.kl_coef = kl_coef;
    source.score_clip = score_clip;
    source.estimator = KlEstimator(estimator);
    return launch_rows(job, source, plan, stream);
  };
  const bool is_k3 = KlEstimator(estimator) == KlEstimator::K3;
  if (job.gammas || job.lams)
    return is_k3 ? scan(KlRewards<true, ANY_DTYPE, true>{}) : scan(KlRewards<false, ANY_DTYPE, true>{});
  CommonDtype common;
  common.add(ptr<void>(values), values_code);
  common.add(ptr<void>(logprobs), logprobs_code);
  common.add(ptr<void>(ref_logprobs), ref_logprobs_code);
  if (common.dtype == FLOAT32) return is_k3 ? scan(KlRewards<true, FLOAT32>{}) : scan(KlRewards<false, FLOAT32>{});
  if (common.dtype == BFLOAT16) return is_k3 ? scan(KlRewards<true, BFLOAT16>{}) : scan(KlRewards<false, BFLOAT16>{});
  return is_k3 ? scan(KlRewards<true, ANY_DTYPE>{}) : scan(KlRewards<false, ANY_DTYPE>{});
}

KERNEL(ppo_advantages)

}  // namespace
