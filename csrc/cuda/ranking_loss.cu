// The ranking loss over every ordered pair of each group, on NVIDIA GPUs; kernels/ranking_loss.py says what it means.
//
// Memory is nothing: a score and a rank a response, a slope back. A team takes a group, a warp where the groups are
// small, else a block of 256 threads; a thread meets each of its rows with all rows of the group, so that every pair is
// seen from both sides and a slope is the sum of one thread. What a group adds to the loss and the stats waits in
// double for a second launch, which joins the groups in their order and, where the weights are 1 / (groups with a
// pair), scales the slopes by what only then is known.
#include <math.h>

#include "reduce.cuh"

namespace {

constexpr int block_threads = 256;
enum Part { LOSS, PAIRS, CORRECT, MARGIN, PARTS };  // rows of `parts` (PARTS, G)

struct Ranked {
  const float* scores;
  const void *offsets, *ranks;
  bool wide_offsets, wide_ranks;
  const float* weights;
  int64_t G, N;

  __device__ static int64_t integer(const void* at, bool wide, int64_t i) {
    return wide ? static_cast<const int64_t*>(at)[i] : static_cast<const int32_t*>(at)[i];
  }
  __device__ int64_t offset(int64_t g) const { return integer(offsets, wide_offsets, g); }
  __device__ int64_t rank(int64_t i) const { return integer(ranks, wide_ranks, i); }
};

// slopes: null, or (N,): with weights the gradient, without them its multiple by the number of groups with a pair.
__global__ void __launch_bounds__(block_threads) groups_kernel(const Ranked x, float* slopes, double* parts) {
  __shared__ double memory[lanes];
  const int64_t g = blockIdx.x, begin = x.offset(g), end = x.offset(g + 1);
  double loss = 0, pairs = 0, correct = 0, margins = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const float ours = x.scores[i];
    const int64_t our_rank = x.rank(i);
    double pull = 0;
    for (int64_t j = begin; j < end; ++j) {
      const int64_t their_rank = x.rank(j);
      if (their_rank == our_rank) continue;  // itself, or a tie
      const bool better = our_rank < their_rank;
      const float theirs = x.scores[j], margin = better ? ours - theirs : theirs - ours, e = expf(-fabsf(margin));
      const float push = (margin < 0.f ? 1.f : e) / (1.f + e);  // sigmoid(-margin)
      pull += better ? -push : push;
      if (!better) continue;
      loss += (margin < 0.f ? -margin : 0.f) + log1pf(e);
      pairs += 1, correct += margin > 0.f, margins += margin;
    }
    if (slopes) slopes[i] = static_cast<float>(pull);
  }
  loss = block_reduce<Add>(loss, 0., memory), pairs = block_reduce<Add>(pairs, 0., memory);
  correct = block_reduce<Add>(correct, 0., memory), margins = block_reduce<Add>(margins, 0., memory);
  if (threadIdx.x == 0) {
    parts[LOSS * x.G + g] = loss, parts[PAIRS * x.G + g] = pairs;
    parts[CORRECT * x.G + g] = correct, parts[MARGIN * x.G + g] = margins;
  }
  if (!slopes) return;
  const float coefficient = (x.weights ? x.weights[g] : 1.f) / static_cast<float>(fmax(pairs, 1.));
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x)  // its own rows
    slopes[i] = pairs > 0 ? coefficient * slopes[i] : 0.f;
}

// The first block adds the groups up; every block scales its slopes where there are no weights.
__global__ void __launch_bounds__(block_threads)
    join_kernel(const Ranked x, const double* parts, float* slopes, float* loss, float* stats) {
  __shared__ double memory[lanes];
  double with_pair = 0, sums[PARTS] = {};
  for (int64_t g = threadIdx.x; g < x.G; g += block_threads) with_pair += parts[PAIRS * x.G + g] > 0;
  with_pair = block_reduce<Add>(with_pair, 0., memory);
  const float share = 1.f / static_cast<float>(fmax(with_pair, 1.));
  const int64_t i = int64_t(blockIdx.x) * block_threads + threadIdx.x;
  if (slopes && !x.weights && i < x.N) slopes[i] *= share;
  if (blockIdx.x) return;
  for (int64_t g = threadIdx.x; g < x.G; g += block_threads) {
    const double pairs = parts[PAIRS * x.G + g], weight = x.weights ? x.weights[g] : share;
    if (pairs > 0) sums[LOSS] += weight * parts[LOSS * x.G + g] / pairs;
    sums[PAIRS] += pairs, sums[CORRECT] += parts[CORRECT * x.G + g], sums[MARGIN] += parts[MARGIN * x.G + g];
  }
#pragma unroll
  for (int part = 0; part < PARTS; ++part) sums[part] = block_reduce<Add>(sums[part], 0., memory);
  if (threadIdx.x) return;
  *loss = static_cast<float>(sums[LOSS]);
  const double out[] = {sums[PAIRS], sums[CORRECT], sums[MARGIN], with_pair, x.G - with_pair};
  for (int stat = 0; stat < 5; ++stat) stats[stat] = static_cast<float>(out[stat]);
}

// parts: (4, G) of double; weights or slopes may be null.
const char* ranking_loss(uintptr_t scores, uintptr_t offsets, bool wide_offsets, uintptr_t ranks, bool wide_ranks,
                         uintptr_t weights, uintptr_t parts, uintptr_t loss, uintptr_t stats, uintptr_t slopes,
                         int64_t G, int64_t N, uintptr_t stream) {
  const Ranked x{ptr<const float>(scores),
                 ptr<const void>(offsets),
                 ptr<const void>(ranks),
                 wide_offsets,
                 wide_ranks,
                 ptr<const float>(weights),
                 G,
                 N};
  if (!blocks_for(G + N + 1, 1)) return "more groups or rows than a grid has blocks";
  if (G) {
    const int threads = N <= G * lanes ? lanes : block_threads;
    const char* error =
        launch(groups_kernel, blocks_for(G, 1), threads, 0, stream, x, ptr<float>(slopes), ptr<double>(parts));
    if (error) return error;
  }
  const unsigned blocks = slopes && !weights && N ? blocks_for(N, block_threads) : 1;
  return launch(join_kernel, blocks, block_threads, 0, stream, x, ptr<const double>(parts), ptr<float>(slopes),
                ptr<float>(loss), ptr<float>(stats));
}

KERNEL(ranking_loss)

}  // namespace
