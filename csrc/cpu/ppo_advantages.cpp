// KL-shaped rewards, advantages, returns and their moments in one visit; kernels/ppo_advantages.py says what they mean.
//
// Per token 13 bytes in (two log-probabilities, value, mask) and 8 out. The moments take a second look at a row's
// outputs while they are in the cache: squared distances from a mean that is known keep their digits where the mean is
// large beside the spread, as sums of squares would not. Rows join in their order by Chan's rule, in double.
#include "gae_scan.h"

namespace {

enum Estimator { k1, k2, k3, absolute };

template <Estimator E>
struct Shaped {
  const float* logprobs;
  const float* ref_logprobs;
  float coef;
  float score;  // waits for the last token
  bool pending = true;
  f32 kl = {}, advantages = {}, returns = {};  // sums
  float kl_ones = 0.f, advantage_ones = 0.f, return_ones = 0.f;
  int64_t count = 0;

  static INLINE f32 estimate(f32 d) {
    if (E == k1) return d;
    if (E == k2) return 0.5f * d * d;
    if (E == k3) return exp(select(-d > splat(20.f), splat(20.f), -d)) - 1.f + d;
    return abs(d);
  }
  INLINE f32 tile(int64_t t) {
    const f32 now = estimate(load(logprobs + t) - load(ref_logprobs + t));
    kl += now;
    f32 reward = -coef * now;
    if (pending) reward[W - 1] = score + reward[W - 1], pending = false;
    return reward;
  }
  INLINE float one(int64_t t) {
    const float now = estimate(splat(logprobs[t] - ref_logprobs[t]))[0];
    kl_ones += now;
    const float reward = pending ? score - coef * now : -coef * now;
    pending = false;
    return reward;
  }
  INLINE void made(f32 a, f32 r) { advantages += a, returns += r, count += W; }
  INLINE void made(float a, float r) { advantage_ones += a, return_ones += r, ++count; }
};

// Mean and sum of squared distances from it.
struct Moments {
  double count, mean, m2;
};

// Moments of what lies at x inside the mask, whose sum is known, with rounding. What the rounding of the mean leaves of
// the distances' plain sum corrects both (the two-pass algorithm with correction).
INLINE Moments moments(const float* x, const uint8_t* mask, int64_t n, int64_t count, float total) {
  if (!count) return {0, 0, 0};
  const float center = total / count;
  f32 apart = splat(0.f), square = splat(0.f);
  float ones = 0.f, square_ones = 0.f;
  for (int64_t t = 0; t < n; t += W) {
    const Flags flags = t + W <= n ? look(mask + t) : some;
    if (flags == all) {
      const f32 e = load(x + t) - center;
      apart += e, square += e * e;
    } else if (flags == some) {
      for (int64_t i = t; i < min(t + W, n); ++i) {
        const float e = mask[i] ? x[i] - center : 0.f;
        ones += e, square_ones += e * e;
      }
    }
  }
  const double left = (double(sum(apart)) + ones) / count;
  return {double(count), center + left, double(sum(square)) + square_ones - left * left * count};
}

void join(Moments* a, const Moments& b) {
  const double n = a->count + b.count;
  if (!(b.count > 0)) return;
  const double gap = b.mean - a->mean;
  a->mean += gap * (b.count / n);
  a->m2 += b.m2 + gap * gap * (a->count * b.count / n);
  a->count = n;
}

struct Batch {
  const float *logprobs, *ref_logprobs, *values, *scores, *bootstrap;
  const uint8_t* mask;
  float *advantages, *returns, *stats, *kl;
  Moments (*rows)[2];  // of each row's advantages and returns
  int64_t B, T;
  float coef, clip;
  int threads;
};

template <Estimator E>
void run(const Batch& b, const Discount& d) {
#pragma omp parallel for num_threads(b.threads) if (b.threads > 1 && b.B * b.T > threaded_tokens)
  for (int64_t row = 0; row < b.B; ++row) {
    const int64_t at = row * b.T;
    float score = b.scores[row];
    if (b.clip > 0.f) score = score > b.clip ? b.clip : score < -b.clip ? -b.clip : score;
    Shaped<E> shaped{b.logprobs + at, b.ref_logprobs + at, b.coef, score};
    scan_row(shaped, b.values + at, b.mask + at, b.advantages + at, b.returns + at, b.T,
             b.bootstrap ? b.bootstrap[row] : 0.f, d);
    b.kl[row] = sum(shaped.kl) + shaped.kl_ones;
    const float advantages = sum(shaped.advantages) + shaped.advantage_ones;
    const float returns = sum(shaped.returns) + shaped.return_ones;
    b.rows[row][0] = moments(b.advantages + at, b.mask + at, b.T, shaped.count, advantages);
    b.rows[row][1] = moments(b.returns + at, b.mask + at, b.T, shaped.count, returns);
  }
  Moments advantage{0, 0, 0}, ret{0, 0, 0};
  for (int64_t row = 0; row < b.B; ++row) join(&advantage, b.rows[row][0]), join(&ret, b.rows[row][1]);
  const double stats[] = {advantage.count, advantage.mean, advantage.m2, ret.mean, ret.m2};
  for (int i = 0; i < 5; ++i) b.stats[i] = float(stats[i]);
}

void ppo_advantages(uintptr_t logprobs, uintptr_t ref_logprobs, uintptr_t values, uintptr_t scores, uintptr_t mask,
                    uintptr_t bootstrap, uintptr_t advantages, uintptr_t returns, uintptr_t stats, uintptr_t kl,
                    uintptr_t rows, int64_t B, int64_t T, float coef, int estimator, float gamma, float lam, float clip,
                    int threads) {
  const Batch b{ptr<const float>(logprobs),
                ptr<const float>(ref_logprobs),
                ptr<const float>(values),
                ptr<const float>(scores),
                ptr<const float>(bootstrap),
                ptr<const uint8_t>(mask),
                ptr<float>(advantages),
                ptr<float>(returns),
                ptr<float>(stats),
                ptr<float>(kl),
                ptr<Moments[2]>(rows),
                B,
                T,
                coef,
                clip,
                threads};
  const Discount d = discount(gamma, lam);
  if (estimator == k1) return run<k1>(b, d);
  if (estimator == k2) return run<k2>(b, d);
  if (estimator == k3) return run<k3>(b, d);
  run<absolute>(b, d);
}

KERNEL(ppo_advantages)

}  // namespace
