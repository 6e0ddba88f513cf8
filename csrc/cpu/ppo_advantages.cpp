// KL-shaped rewards, advantages, returns and their moments in one pass, on the CPU; kernels/ppo_advantages.py defines
// them, gae_scan.h has the scan. A thread takes a row: the scan, then the moments of its outputs, which are in the
// cache.
//
// Floor: 13 bytes a token in (two log-probabilities, value, mask) and 8 out.
//
// Squares are summed around the row's mean, which keeps their digits even if the mean is large beside the spread. Rows
// are joined in their order by Chan's rule, in double: the bits do not depend on the threads.
#include "gae_scan.h"
#include "ppo_terms.h"

namespace {

// score at a row's last valid token, and -coef times the KL estimate at every one. Sums them up on the way: vectors and
// single tokens apart.
template <KlEstimator E>
struct KlRewards {
  const float* logprobs;
  const float* ref_logprobs;
  float coef;
  float score;
  bool is_last = true;  // the next token, from the right, is the row's last
  f32 kl = {}, advantages = {}, returns = {};
  float scalar_kl = 0.f, scalar_advantages = 0.f, scalar_returns = 0.f;
  int64_t count = 0;

  INLINE f32 vector(int64_t t) {
    const f32 token_kl = kl_estimate<E>(load(logprobs + t) - load(ref_logprobs + t));
    kl += token_kl;
    f32 reward = -coef * token_kl;
    if (is_last) reward[W - 1] = score + reward[W - 1];
    is_last = false;
    return reward;
  }
  INLINE float scalar(int64_t t) {
    const float token_kl = kl_estimate<E>(splat(logprobs[t] - ref_logprobs[t]))[0];
    scalar_kl += token_kl;
    const float reward = is_last ? score - coef * token_kl : -coef * token_kl;
    is_last = false;
    return reward;
  }
  INLINE void on_result(f32 advantage, f32 ret) {
    advantages += advantage;
    returns += ret;
    count += W;
  }
  INLINE void on_result(float advantage, float ret) {
    scalar_advantages += advantage;
    scalar_returns += ret;
    ++count;
  }
};

// m2: the sum of squared distances from the mean.
struct Moments {
  double count, mean, m2;
};

// Moments of the valid numbers of x, whose sum is known up to rounding. The sum of the distances from the rounded mean
// corrects mean and m2 (the two-pass algorithm with correction).
INLINE Moments compute_moments(const float* x, const uint8_t* mask, int64_t n, int64_t count, float total) {
  if (!count) return {0, 0, 0};
  const float center = total / count;
  f32 sums = splat(0.f), squares = splat(0.f);
  float scalar_sum = 0.f, scalar_squares = 0.f;
  for (int64_t t = 0; t < n; t += W) {
    const Valid valid = t + W <= n ? load_valid(mask + t) : SOME;
    if (valid == ALL) {
      const f32 e = load(x + t) - center;
      sums += e;
      squares += e * e;
    } else if (valid == SOME) {
      for (int64_t i = t; i < min(t + W, n); ++i) {
        const float e = mask[i] ? x[i] - center : 0.f;
        scalar_sum += e;
        scalar_squares += e * e;
      }
    }
  }
  const double shift = (double(reduce_sum(sums)) + scalar_sum) / count;
  return {double(count), center + shift, double(reduce_sum(squares)) + scalar_squares - shift * shift * count};
}

// Chan's rule.
void merge(Moments* a, const Moments& b) {
  const double n = a->count + b.count;
  if (!(b.count > 0)) return;
  const double gap = b.mean - a->mean;
  a->mean += gap * (b.count / n);
  a->m2 += b.m2 + gap * gap * (a->count * b.count / n);
  a->count = n;
}

struct AdvantageArgs {
  const float *logprobs, *ref_logprobs, *values, *scores, *bootstrap;
  const uint8_t* mask;
  float *advantages, *returns, *stats, *kl;
  Moments (*row_moments)[2];  // of each row's advantages and returns
  int64_t B, T;
  float coef, score_clip;
  int threads;
};

template <KlEstimator E>
void run_row(const AdvantageArgs& args, int64_t row, const Discount& discount) {
  const int64_t begin = row * args.T;
  const uint8_t* const mask = args.mask + begin;
  float *const advantages = args.advantages + begin, *const returns = args.returns + begin;
  float score = args.scores[row];
  if (args.score_clip > 0.f) score = max(min(score, args.score_clip), -args.score_clip);
  KlRewards<E> rewards{args.logprobs + begin, args.ref_logprobs + begin, args.coef, score};
  scan_row(rewards, args.values + begin, mask, advantages, returns, args.T, args.bootstrap ? args.bootstrap[row] : 0.f,
           discount);
  args.kl[row] = reduce_sum(rewards.kl) + rewards.scalar_kl;
  const float advantage_sum = reduce_sum(rewards.advantages) + rewards.scalar_advantages;
  const float return_sum = reduce_sum(rewards.returns) + rewards.scalar_returns;
  args.row_moments[row][0] = compute_moments(advantages, mask, args.T, rewards.count, advantage_sum);
  args.row_moments[row][1] = compute_moments(returns, mask, args.T, rewards.count, return_sum);
}

template <KlEstimator E, class Discounts>
void run(const AdvantageArgs& args, const Discounts& discounts) {
#pragma omp parallel for num_threads(args.threads) if (args.threads > 1 && args.B * args.T > MIN_TOKENS_TO_THREAD)
  for (int64_t row = 0; row < args.B; ++row) run_row<E>(args, row, discounts.of(row));
  Moments advantages{0, 0, 0}, returns{0, 0, 0};
  for (int64_t row = 0; row < args.B; ++row) {
    merge(&advantages, args.row_moments[row][0]);
    merge(&returns, args.row_moments[row][1]);
  }
  const double stats[] = {advantages.count, advantages.mean, advantages.m2, returns.mean, returns.m2};
  for (int i = 0; i < 5; ++i) args.stats[i] = float(stats[i]);
}

// row_moments: memory for 6 doubles a row. score_clip 0: off.
void ppo_advantages(uintptr_t logprobs, uintptr_t ref_logprobs, uintptr_t values, uintptr_t scores, uintptr_t mask,
                    uintptr_t bootstrap, uintptr_t gammas, uintptr_t lams, uintptr_t advantages, uintptr_t returns,
                    uintptr_t stats, uintptr_t kl, uintptr_t row_moments, int64_t B, int64_t T, float coef,
                    int estimator, float gamma, float lam, float score_clip, int threads) {
  AdvantageArgs args;
  args.logprobs = ptr<const float>(logprobs);
  args.ref_logprobs = ptr<const float>(ref_logprobs);
  args.values = ptr<const float>(values);
  args.scores = ptr<const float>(scores);
  args.bootstrap = ptr<const float>(bootstrap);
  args.mask = ptr<const uint8_t>(mask);
  args.advantages = ptr<float>(advantages);
  args.returns = ptr<float>(returns);
  args.stats = ptr<float>(stats);
  args.kl = ptr<float>(kl);
  args.row_moments = ptr<Moments[2]>(row_moments);
  args.B = B;
  args.T = T;
  args.coef = coef;
  args.score_clip = score_clip;
  args.threads = threads;
  with_discounts(gamma, lam, gammas, lams, [&](const auto& discounts) {
    switch (KlEstimator(estimator)) {
      case KlEstimator::K1:
        return run<KlEstimator::K1>(args, discounts);
      case KlEstimator::K2:
        return run<KlEstimator::K2>(args, discounts);
      case KlEstimator::K3:
        return run<KlEstimator::K3>(args, discounts);
      case KlEstimator::ABS:
        return run<KlEstimator::ABS>(args, discounts);
    }
  });
}

KERNEL(ppo_advantages)

}  // namespace
