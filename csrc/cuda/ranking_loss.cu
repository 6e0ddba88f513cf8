// The ranking loss over every ordered pair of each group, on NVIDIA GPUs; kernels/ranking_loss.py defines it.
//
// Floor: a score and a rank in and a gradient out per response; one exponential per ordered pair.
//
//     a group    | response 0 | response 1 | ... |     a warp if groups are small, else a block of 256 threads
//     a thread   takes responses t, t + T, ... and compares each with all responses of its group, so it sees every pair
//                from both sides and computes the whole gradient of its responses
//
// Deterministic: a group's sums go to memory in double; a second launch adds up the groups in order. If weights are
// 1 / (groups with a pair), it also scales the gradients, as only then that number is known.
#include <math.h>

#include "reduce.cuh"

namespace {

constexpr int block_threads = 256;
enum GroupSum { LOSS, PAIRS, CORRECT, MARGIN, NUM_GROUP_SUMS };  // rows of group_sums (NUM_GROUP_SUMS, G)

struct RankingJob {
  const float* scores;  // (N,)
  const void* offsets;  // (G + 1,), int64 or int32
  const void* ranks;    // (N,), int64 or int32
  bool offsets_int64, ranks_int64;
  const float* weights;  // (G,), or null: 1 / (groups with a pair)
  int64_t G, N;

  __device__ static int64_t integer_at(const void* p, bool is_int64, int64_t i) {
    return is_int64 ? static_cast<const int64_t*>(p)[i] : static_cast<const int32_t*>(p)[i];
  }
  __device__ int64_t offset(int64_t group) const { return integer_at(offsets, offsets_int64, group); }
  __device__ int64_t rank(int64_t i) const { return integer_at(ranks, ranks_int64, i); }
};

// Writes the sums of a group, and its gradients unless `grads` is null; without weights, they are still to be divided
// by the number of groups with a pair.
__global__ void __launch_bounds__(block_threads) groups_kernel(const RankingJob job, float* grads, double* group_sums) {
  __shared__ double shared[warp_size];
  const int64_t group = blockIdx.x, begin = job.offset(group), end = job.offset(group + 1);
  double loss = 0, pairs = 0, correct = 0, margins = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const float score = job.scores[i];
    const int64_t rank = job.rank(i);
    double grad = 0;
    for (int64_t j = begin; j < end; ++j) {
      const int64_t other_rank = job.rank(j);
      if (other_rank == rank) continue;  // i itself, or a tie
      const bool is_better = rank < other_rank;
      const float other_score = job.scores[j];
      const float margin = is_better ? score - other_score : other_score - score, e = expf(-fabsf(margin));
      const float sigmoid = (margin < 0.f ? 1.f : e) / (1.f + e);  // of -margin
      grad += is_better ? -sigmoid : sigmoid;
      if (!is_better) continue;  // count a pair once
      loss += (margin < 0.f ? -margin : 0.f) + log1pf(e);
      pairs += 1;
      correct += margin > 0.f;
      margins += margin;
    }
    if (grads) grads[i] = static_cast<float>(grad);
  }
  loss = block_reduce<Add>(loss, 0., shared);
  pairs = block_reduce<Add>(pairs, 0., shared);
  correct = block_reduce<Add>(correct, 0., shared);
  margins = block_reduce<Add>(margins, 0., shared);
  if (threadIdx.x == 0) {
    group_sums[LOSS * job.G + group] = loss;
    group_sums[PAIRS * job.G + group] = pairs;
    group_sums[CORRECT * job.G + group] = correct;
    group_sums[MARGIN * job.G + group] = margins;
  }
  if (!grads) return;
  const float coefficient = (job.weights ? job.weights[group] : 1.f) / static_cast<float>(fmax(pairs, 1.));
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x)  // the gradients that this thread wrote
    grads[i] = pairs > 0 ? coefficient * grads[i] : 0.f;
}

// Block 0 adds up the groups. Without weights, every block scales its gradients.
__global__ void __launch_bounds__(block_threads)
    finish_kernel(const RankingJob job, const double* group_sums, float* grads, float* loss, float* stats) {
  __shared__ double shared[warp_size];
  double groups_with_pair = 0, sums[NUM_GROUP_SUMS] = {};
  for (int64_t g = threadIdx.x; g < job.G; g += block_threads) groups_with_pair += group_sums[PAIRS * job.G + g] > 0;
  groups_with_pair = block_reduce<Add>(groups_with_pair, 0., shared);
  const float default_weight = 1.f / static_cast<float>(fmax(groups_with_pair, 1.));
  const int64_t i = int64_t(blockIdx.x) * block_threads + threadIdx.x;
  if (grads && !job.weights && i < job.N) grads[i] *= default_weight;
  if (blockIdx.x) return;
  for (int64_t g = threadIdx.x; g < job.G; g += block_threads) {
    const double pairs = group_sums[PAIRS * job.G + g], weight = job.weights ? job.weights[g] : default_weight;
    if (pairs > 0) sums[LOSS] += weight * group_sums[LOSS * job.G + g] / pairs;
    sums[PAIRS] += pairs;
    sums[CORRECT] += group_sums[CORRECT * job.G + g];
    sums[MARGIN] += group_sums[MARGIN * job.G + g];
  }
#pragma unroll
  for (int k = 0; k < NUM_GROUP_SUMS; ++k) sums[k] = block_reduce<Add>(sums[k], 0., shared);
  if (threadIdx.x) return;
  *loss = static_cast<float>(sums[LOSS]);
  stats[0] = static_cast<float>(sums[PAIRS]);
  stats[1] = static_cast<float>(sums[CORRECT]);
  stats[2] = static_cast<float>(sums[MARGIN]);
  stats[3] = static_cast<float>(groups_with_pair);
  stats[4] = static_cast<float>(job.G - groups_with_pair);
}

// group_sums: memory for double (4, G). weights and grads may be null.
const char* ranking_loss(uintptr_t scores, uintptr_t offsets, bool offsets_int64, uintptr_t ranks, bool ranks_int64,
                         uintptr_t weights, uintptr_t group_sums, uintptr_t loss, uintptr_t stats, uintptr_t grads,
                         int64_t G, int64_t N, uintptr_t stream) {
  RankingJob job;
  job.scores = ptr<const float>(scores);
  job.offsets = ptr<const void>(offsets);
  job.ranks = ptr<const void>(ranks);
  job.offsets_int64 = offsets_int64;
  job.ranks_int64 = ranks_int64;
  job.weights = ptr<const float>(weights);
  job.G = G;
  job.N = N;
  if (!blocks_for(G + N + 1, 1)) return "more groups or rows than a grid has blocks";
  if (G) {
    const int threads = N <= G * warp_size ? warp_size : block_threads;
    const char* error =
        launch(groups_kernel, blocks_for(G, 1), threads, 0, stream, job, ptr<float>(grads), ptr<double>(group_sums));
    if (error) return error;
  }
  const unsigned blocks = grads && !weights && N ? blocks_for(N, block_threads) : 1;
  return launch(finish_kernel, blocks, block_threads, 0, stream, job, ptr<const double>(group_sums), ptr<float>(grads),
                ptr<float>(loss), ptr<float>(stats));
}

KERNEL(ranking_loss)

}  // namespace
