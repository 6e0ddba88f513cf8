// The ranking loss over every ordered pair of each group, on the CPU; kernels/ranking_loss.py defines it.
//
//     group    K rows, copied and padded to whole vectors; one thread
//     row i    is compared with all rows of its group, W at a time: lane l has row j + l
//
// Floor: at most K (K - 1) / 2 pairs a group, each one exponential, one logarithm and two divisions; memory is nothing.
// Pairs in which i is not the better one are masked out, and with them the padding, whose rank is better than any.
// Pairs are summed in one order, groups joined in theirs: the bits do not depend on the threads.
#include "kernel.h"
#include "simd.h"

namespace {

typedef double f64 __attribute__((vector_size(W * 8)));

struct GroupSums {
  float loss, correct, margin;
  int64_t pairs;
};
static_assert(sizeof(GroupSums) == 24, "kernels/ranking_loss.py gives three doubles a group");

// Loss and gradient of one group, without its coefficient. The arrays are padded to a multiple of W.
GroupSums run_group(const float* scores, const int32_t* ranks, float* grad, int64_t K) {
  f32 correct = splat(0.f);
  double loss = 0;
  f64 margins = {};  // in double: margins of both signs cancel
  i32 count = {};
  for (int64_t j = 0; j < K; j += W) store(grad + j, splat(0.f));
  for (int64_t i = 0; i < K; ++i) {
    f32 row_grad = splat(0.f), row_loss = row_grad;
    for (int64_t j = 0; j < K; j += W) {
      i32 other_ranks;
      memcpy(&other_ranks, ranks + j, sizeof other_ranks);
      const i32 is_pair = other_ranks > ranks[i];
      const f32 margin = zero_unless(is_pair, scores[i] - load(scores + j));
      // log(1 + e^-m) = max(-m, 0) + log1p(e), e = e^-|m|; log1p(e) = log(u) e / (u - 1), u = 1 + e rounded.
      const f32 e = exp(-abs(margin)), u = 1.f + e, gap = u - 1.f;
      const i32 is_tiny = gap == splat(0.f), is_wrong = margin < splat(0.f);
      const f32 log1p_e = select(is_tiny, e, log(u) * (e / select(is_tiny, splat(1.f), gap)));
      const f32 pair_grad = zero_unless(is_pair, select(is_wrong, splat(1.f), e) / u);  // sigmoid(-m)
      row_loss += zero_unless(is_pair, zero_unless(is_wrong, -margin) + log1p_e);
      correct += zero_unless(is_pair & (margin > splat(0.f)), splat(1.f));
      margins += __builtin_convertvector(margin, f64);
      count -= is_pair;
      row_grad += pair_grad;
      store(grad + j, load(grad + j) + pair_grad);
    }
    grad[i] -= reduce_sum(row_grad);
    for (int lane = 0; lane < W; ++lane) loss += row_loss[lane];
  }
  int64_t pairs = 0;
  double margin = 0;
  for (int lane = 0; lane < W; ++lane) {
    pairs += count[lane];
    margin += margins[lane];
  }
  return {(float)loss, reduce_sum(correct), (float)margin, pairs};
}

constexpr int64_t PADDING = 16;  // floats that a group's padding may take
static_assert(W <= PADDING, "a group's padding is at most a vector");

// `padded` has 3 rows of `stride` >= N + PADDING G floats: scores, ranks and gradients. Group g is at offsets[g] +
// PADDING g of each.
void ranking_loss(uintptr_t scores, uintptr_t offsets, uintptr_t ranks, uintptr_t weights, uintptr_t group_sums,
                  uintptr_t padded, uintptr_t loss, uintptr_t stats, uintptr_t grad, int64_t G, int64_t N,
                  int64_t stride, int threads) {
  const int64_t* const begins = ptr<const int64_t>(offsets);
  const float* const group_weights = ptr<const float>(weights);
  GroupSums* const groups = ptr<GroupSums>(group_sums);
  float* const padded_scores = ptr<float>(padded);
  float* const padded_grad = padded_scores + 2 * stride;
  int32_t* const padded_ranks = reinterpret_cast<int32_t*>(padded_scores + stride);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1 && N > 1024)
  for (int64_t g = 0; g < G; ++g) {
    const int64_t begin = begins[g], K = begins[g + 1] - begin, to = begin + PADDING * g;
    memcpy(padded_scores + to, ptr<const float>(scores) + begin, K * sizeof(float));
    memcpy(padded_ranks + to, ptr<const int32_t>(ranks) + begin, K * sizeof(int32_t));
    for (int64_t i = K; i % W; ++i) {
      padded_scores[to + i] = 0.f;
      padded_ranks[to + i] = INT32_MIN;
    }
    groups[g] = run_group(padded_scores + to, padded_ranks + to, padded_grad + to, K);
  }
  int64_t num_with_pairs = 0;
  for (int64_t g = 0; g < G; ++g) num_with_pairs += groups[g].pairs > 0;
  double total = 0, pairs = 0, correct = 0, margin = 0;
  for (int64_t g = 0; g < G; ++g) {
    const GroupSums& sums = groups[g];
    const float weight = group_weights ? group_weights[g] : 1.f / num_with_pairs;
    const float coefficient = sums.pairs ? weight / sums.pairs : 0.f;
    if (sums.pairs) total += double(coefficient) * sums.loss;
    pairs += sums.pairs;
    correct += sums.correct;
    margin += sums.margin;
    if (!grad) continue;
    for (int64_t i = begins[g]; i < begins[g + 1]; ++i)
      ptr<float>(grad)[i] = sums.pairs ? coefficient * padded_grad[i + PADDING * g] : 0.f;
  }
  *ptr<float>(loss) = float(total);
  const double out[] = {pairs, correct, margin, double(num_with_pairs), double(G - num_with_pairs)};
  for (int i = 0; i < 5; ++i) ptr<float>(stats)[i] = float(out[i]);
}

CONSTANT(ranking_loss_padding, PADDING)
KERNEL(ranking_loss)

}  // namespace
