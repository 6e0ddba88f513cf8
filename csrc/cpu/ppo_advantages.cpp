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
  bool pending;
  f32 kl_tiles;
  float kl_ones;

  static INLINE f32 estimate(f32 d) {
    if (E == k1) return d;
    if (E == k2) return 0.5f * d * d;
    if (E == k3) return exp(select(-d > 20.f, splat(20.f), -d)) - 1.f + d;
    return abs(d);
  }
  INLINE f32 tile(int64_t t) {
    const f32 kl = estimate(load(logprobs + t) - load(ref_logprobs + t));
    kl_tiles += kl;
    f32 reward = -coef * kl;
    if (pending) reward[W - 1] = score + reward[W - 1], pending = false;
    return reward;
  }
  INLINE float one(int64_t t) {
    const float kl = estimate(splat(logprobs[t] - ref_logprobs[t]))[0];
    kl_ones += kl;
    const float reward = pending ? score - coef * kl : -coef * kl;
    pending = false;
    return reward;
  }
};

// Mean and sum of squared distances from it.
struct Moments {
  double count, mean, m2;
};

INLINE i32 load_flags(const uint8_t* p) {
  typedef uint8_t bytes __attribute__((vector_size(W)));
  bytes flags;
  memcpy(&flags, p, W);
  return __builtin_convertvector(flags, i32) != 0;
}

INLINE i32 flags_of(const uint8_t* p, int n) {
  uint8_t part[W] = {};
  memcpy(part, p, n);
  return load_flags(part);
}

INLINE f32 zero_unless(i32 on, f32 x) { return as_float(as_int(x) & on); }

// Moments of a row's two outputs. The first pass finds means, the second the distances; what the rounding of the mean
// leaves of their plain sum corrects both (two-pass algorithm with correction).
INLINE void row_moments(const float* x, const float* y, const uint8_t* mask, int64_t n, Moments* mx, Moments* my) {
  f32 sx = splat(0.f), sy = splat(0.f);
  i32 kept = {};
  const int64_t whole = n / W * W;
  const int rest = n - whole;
  for (int64_t t = 0; t < whole; t += W) {
    sx += load(x + t), sy += load(y + t);  // outputs are 0 outside the mask
    kept -= load_flags(mask + t);
  }
  int64_t count = 0;
  for (int i = 0; i < W; ++i) count += kept[i];
  for (int64_t t = whole; t < n; ++t) sx[0] += x[t], sy[0] += y[t], count += mask[t];
  *mx = *my = Moments{double(count), 0, 0};
  if (!count) return;
  const f32 cx = splat(sum(sx) / count), cy = splat(sum(sy) / count);
  f32 dx = splat(0.f), dy = dx, qx = dx, qy = dx;
  for (int64_t t = 0; t < whole + (rest ? W : 0); t += W) {
    const bool full = t < whole;
    const i32 on = full ? load_flags(mask + t) : flags_of(mask + t, rest);
    const f32 ex = zero_unless(on, (full ? load(x + t) : load_part(x + t, rest, 0.f)) - cx);
    const f32 ey = zero_unless(on, (full ? load(y + t) : load_part(y + t, rest, 0.f)) - cy);
    dx += ex, dy += ey, qx += ex * ex, qy += ey * ey;
  }
  const double left_x = double(sum(dx)) / count, left_y = double(sum(dy)) / count;
  mx->mean = cx[0] + left_x, mx->m2 = double(sum(qx)) - left_x * left_x * count;
  my->mean = cy[0] + left_y, my->m2 = double(sum(qy)) - left_y * left_y * count;
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
#pragma omp parallel for num_threads(b.threads) if (b.threads > 1 && b.B * b.T > 16384)
  for (int64_t row = 0; row < b.B; ++row) {
    const int64_t at = row * b.T;
    float score = b.scores[row];
    if (b.clip > 0.f) score = score > b.clip ? b.clip : score < -b.clip ? -b.clip : score;
    Shaped<E> reward{b.logprobs + at, b.ref_logprobs + at, b.coef, score, true, splat(0.f), 0.f};
    scan_row(reward, b.values + at, b.mask + at, b.advantages + at, b.returns + at, b.T,
             b.bootstrap ? b.bootstrap[row] : 0.f, d);
    b.kl[row] = sum(reward.kl_tiles) + reward.kl_ones;
    row_moments(b.advantages + at, b.returns + at, b.mask + at, b.T, &b.rows[row][0], &b.rows[row][1]);
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
