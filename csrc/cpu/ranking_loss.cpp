// The ranking loss over every ordered pair of each group; kernels/ranking_loss.py says what it means.
//
// A group of K rows has at most K (K - 1) / 2 pairs, each one exponential, one logarithm and two divisions; memory is
// nothing (K scores, K ranks). Row i meets all rows of its group, W at a time, in a copy padded to whole vectors; pairs
// in which i is not the better one are masked out, among them all with the padding, whose rank is better than any.
#include "kernel.h"
#include "simd.h"

namespace {

typedef double f64 __attribute__((vector_size(W * 8)));

struct Pairs {
  float loss, correct, margin;
  int64_t count;
};
static_assert(sizeof(Pairs) == 24, "kernels/ranking_loss.py gives three doubles a group");

// Loss and slopes of one group but for its coefficient. The arrays are padded to a multiple of W.
Pairs run_group(const float* scores, const int32_t* ranks, float* slopes, int64_t K) {
  f32 correct = splat(0.f);
  double loss = 0;
  f64 margins = {};  // those of both signs cancel: what float32 would lose is seen
  i32 count = {};
  for (int64_t j = 0; j < K; j += W) store(slopes + j, splat(0.f));
  for (int64_t i = 0; i < K; ++i) {
    f32 pull = splat(0.f), row_loss = pull;
    for (int64_t j = 0; j < K; j += W) {
      i32 theirs;
      memcpy(&theirs, ranks + j, sizeof theirs);
      const i32 pair = theirs > ranks[i];
      const f32 margin = keep(pair, scores[i] - load(scores + j));
      // log(1 + e^-m) = max(-m, 0) + log1p(e), e = e^-|m|; log1p(e) = log(u) e / (u - 1), u = 1 + e rounded.
      const f32 e = exp(-abs(margin)), u = 1.f + e, gap = u - 1.f;
      const i32 lost = gap == splat(0.f), wrong = margin < splat(0.f);
      const f32 tail = select(lost, e, log(u) * (e / select(lost, splat(1.f), gap)));
      const f32 push = keep(pair, select(wrong, splat(1.f), e) / u);  // sigmoid(-m)
      row_loss += keep(pair, keep(wrong, -margin) + tail);
      correct += keep(pair & (margin > splat(0.f)), splat(1.f));
      margins += __builtin_convertvector(margin, f64);
      count -= pair;
      pull += push;
      store(slopes + j, load(slopes + j) + push);
    }
    slopes[i] -= sum(pull);
    for (int lane = 0; lane < W; ++lane) loss += row_loss[lane];
  }
  int64_t pairs = 0;
  double margin = 0;
  for (int lane = 0; lane < W; ++lane) pairs += count[lane], margin += margins[lane];
  return {(float)loss, sum(correct), (float)margin, pairs};
}

// `padded` holds 3 rows of `stride` >= N + 16 G floats: scores, ranks and slopes of group g from offsets[g] + 16 g on.
void ranking_loss(uintptr_t scores_, uintptr_t offsets_, uintptr_t ranks_, uintptr_t weights_, uintptr_t groups_,
                  uintptr_t padded, uintptr_t loss, uintptr_t stats, uintptr_t slopes_, int64_t G, int64_t N,
                  int64_t stride, int threads) {
  constexpr int64_t room = 16;
  static_assert(W <= room, "a group's padding has room for one vector");
  const float *scores = ptr<const float>(scores_), *weights = ptr<const float>(weights_);
  const int64_t* offsets = ptr<const int64_t>(offsets_);
  const int32_t* ranks = ptr<const int32_t>(ranks_);
  Pairs* groups = ptr<Pairs>(groups_);
  float *own_scores = ptr<float>(padded), *slopes = ptr<float>(slopes_);
  float* own_slopes = own_scores + 2 * stride;
  int32_t* own_ranks = reinterpret_cast<int32_t*>(own_scores + stride);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1 && N > 1024)
  for (int64_t g = 0; g < G; ++g) {
    const int64_t at = offsets[g], K = offsets[g + 1] - at, to = at + room * g;
    memcpy(own_scores + to, scores + at, K * sizeof(float));
    memcpy(own_ranks + to, ranks + at, K * sizeof(int32_t));
    for (int64_t i = K; i % W; ++i) own_scores[to + i] = 0.f, own_ranks[to + i] = INT32_MIN;
    groups[g] = run_group(own_scores + to, own_ranks + to, own_slopes + to, K);
  }
  int64_t with_pair = 0;
  for (int64_t g = 0; g < G; ++g) with_pair += groups[g].count > 0;
  double total = 0, pairs = 0, correct = 0, margin = 0;
  for (int64_t g = 0; g < G; ++g) {
    const Pairs& p = groups[g];
    const float weight = weights ? weights[g] : 1.f / with_pair, coefficient = p.count ? weight / p.count : 0.f;
    if (p.count) total += double(coefficient) * p.loss;
    pairs += p.count, correct += p.correct, margin += p.margin;
    if (slopes)
      for (int64_t i = offsets[g]; i < offsets[g + 1]; ++i)
        slopes[i] = p.count ? coefficient * own_slopes[i + room * g] : 0.f;
  }
  *ptr<float>(loss) = float(total);
  const double out[] = {pairs, correct, margin, double(with_pair), double(G - with_pair)};
  for (int i = 0; i < 5; ++i) ptr<float>(stats)[i] = float(out[i]);
}

KERNEL(ranking_loss)

}  // namespace
