// Generalized advantage estimation on the CPU; kernels/gae.py and kernels/gae_packed.py say what it means.
//
// Per token 13 bytes in and 8 out. A row is a dependent chain of two multiply-adds a token, so rows are walked right to
// left, W of them at a time where there are that many: the chain's latency is then shared by W rows.
#include "kernel.h"
#include "simd.h"

namespace {

struct Scan {
  const float* rewards;
  const float* values;
  const uint8_t* mask;
  const float* bootstrap;  // one a row, or null for 0
  float* advantages;
  float* returns;
  float gamma, decay;
};

void scan_row(const Scan& s, int64_t row, int64_t begin, int64_t end) {
  float next = s.bootstrap ? s.bootstrap[row] : 0.f, last = 0.f;
  for (int64_t t = end - 1; t >= begin; --t) {
    const bool here = s.mask[t];
    if (here) {
      last = (s.rewards[t] + s.gamma * next - s.values[t]) + s.decay * last;
      next = s.values[t];
    }
    s.advantages[t] = here ? last : 0.f;
    s.returns[t] = here ? last + s.values[t] : 0.f;
  }
}

// W rows side by side; lanes are gathered and scattered by plain loads, which cost less than the chain they hide.
void scan_rows(const Scan& s, int64_t row, int64_t T) {
  float lanes[W] = {};
  if (s.bootstrap) memcpy(lanes, s.bootstrap + row, sizeof lanes);
  f32 next = load(lanes), last = splat(0.f);
  for (int64_t t = T - 1; t >= 0; --t) {
    float reward[W], value[W], advantage[W], ret[W];
    int32_t here[W];
    for (int i = 0; i < W; ++i) {
      const int64_t at = (row + i) * T + t;
      reward[i] = s.rewards[at], value[i] = s.values[at], here[i] = s.mask[at] ? -1 : 0;
    }
    i32 mask;
    memcpy(&mask, here, sizeof mask);
    const f32 v = load(value);
    last = select(mask, (load(reward) + s.gamma * next - v) + s.decay * last, last);
    next = select(mask, v, next);
    store(advantage, select(mask, last, splat(0.f)));
    store(ret, select(mask, last + v, splat(0.f)));
    for (int i = 0; i < W; ++i) {
      const int64_t at = (row + i) * T + t;
      s.advantages[at] = advantage[i], s.returns[at] = ret[i];
    }
  }
}

void gae(uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t bootstrap, uintptr_t advantages,
         uintptr_t returns, int64_t B, int64_t T, float gamma, float lam, int threads) {
  const Scan s{ptr<const float>(rewards),
               ptr<const float>(values),
               ptr<const uint8_t>(mask),
               ptr<const float>(bootstrap),
               ptr<float>(advantages),
               ptr<float>(returns),
               gamma,
               gamma * lam};
  const int64_t groups = (B + W - 1) / W;
#pragma omp parallel for num_threads(threads) if (threads > 1 && B * T > 16384)
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * W;
    if (first + W <= B) {
      scan_rows(s, first, T);
    } else {
      for (int64_t row = first; row < B; ++row) scan_row(s, row, row * T, (row + 1) * T);
    }
  }
}

KERNEL(gae)

}  // namespace
