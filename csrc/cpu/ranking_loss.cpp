// The ranking loss over every ordered pair of each group; kernels/ranking_loss.py says what it means.
//
// A group of K rows has at most K (K - 1) / 2 pairs, each one exponential and one logarithm; memory is nothing (K
// scores, K ranks). Row i meets all rows of its group, W at a time; pairs in which i is not the better one are masked
// out.
#include "kernel.h"
#include "simd.h"

namespace {

struct Pairs {
  float loss, correct, margin;
  int64_t count;
};
static_assert(sizeof(Pairs) == 24, "kernels/ranking_loss.py gives three doubles a group");

// Loss and gradient of one group but for its coefficient; slope may be null.
Pairs run_group(const float* scores, const int32_t* ranks, float* slope, int64_t K) {
  if (slope) memset(slope, 0, K * sizeof(float));
  f32 loss = splat(0.f), correct = splat(0.f), margins = splat(0.f);
  i32 count = {};
  for (int64_t i = 0; i < K; ++i) {
    f32 pull = splat(0.f);
    for (int64_t j = 0; j < K; j += W) {
      const int n = min<int64_t>(W, K - j);
      i32 theirs = {}, slots;
      for (int lane = 0; lane < W; ++lane) slots[lane] = lane;
      memcpy(&theirs, ranks + j, n * sizeof(int32_t));
      const i32 pair = (theirs > ranks[i]) & (slots < n);
      const f32 margin = as_float(as_int(scores[i] - load_part(scores + j, n, 0.f)) & pair);
      // log(1 + e^-m) = max(-m, 0) + log1p(e), e = e^-|m|; log1p(e) = log(u) e / (u - 1), u = 1 + e rounded.
      const f32 e = exp(-abs(margin)), u = 1.f + e, gap = u - 1.f;
      const f32 tail = select(gap == splat(0.f), e, log(u) * (e / select(gap == splat(0.f), splat(1.f), gap)));
      const i32 wrong = margin < splat(0.f);
      loss += as_float(as_int(select(wrong, -margin, splat(0.f)) + tail) & pair);
      correct += as_float(as_int(splat(1.f)) & pair & (margin > splat(0.f)));
      margins += margin;
      count -= pair;
      if (slope) {
        const f32 push = as_float(as_int(select(wrong, splat(1.f), e) / u) & pair);  // sigmoid(-m)
        pull += push;
        store_part(slope + j, load_part(slope + j, n, 0.f) + push, n);
      }
    }
    if (slope) slope[i] -= sum(pull);
  }
  int64_t pairs = 0;
  for (int lane = 0; lane < W; ++lane) pairs += count[lane];
  return {sum(loss), sum(correct), sum(margins), pairs};
}

void ranking_loss(uintptr_t scores_, uintptr_t offsets_, uintptr_t ranks_, uintptr_t weights_, uintptr_t groups_,
                  uintptr_t loss, uintptr_t stats, uintptr_t slope_, int64_t G, int64_t N, int threads) {
  const float *scores = ptr<const float>(scores_), *weights = ptr<const float>(weights_);
  const int64_t* offsets = ptr<const int64_t>(offsets_);
  const int32_t* ranks = ptr<const int32_t>(ranks_);
  Pairs* groups = ptr<Pairs>(groups_);
  float* slope = ptr<float>(slope_);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1 && N > 1024)
  for (int64_t g = 0; g < G; ++g) {
    const int64_t at = offsets[g];
    groups[g] = run_group(scores + at, ranks + at, slope ? slope + at : nullptr, offsets[g + 1] - at);
  }
  int64_t with_pair = 0;
  for (int64_t g = 0; g < G; ++g) with_pair += groups[g].count > 0;
  double total = 0, pairs = 0, correct = 0, margin = 0;
  for (int64_t g = 0; g < G; ++g) {
    if (!groups[g].count) continue;  // its slope is 0 already
    const float weight = weights ? weights[g] : 1.f / with_pair, coefficient = weight / groups[g].count;
    total += double(coefficient) * groups[g].loss;
    pairs += groups[g].count, correct += groups[g].correct, margin += groups[g].margin;
    if (slope)
      for (int64_t i = offsets[g]; i < offsets[g + 1]; ++i) slope[i] *= coefficient;
  }
  *ptr<float>(loss) = float(total);
  const double out[] = {pairs, correct, margin, double(with_pair), double(G - with_pair)};
  for (int i = 0; i < 5; ++i) ptr<float>(stats)[i] = float(out[i]);
}

KERNEL(ranking_loss)

}  // namespace
