// Generalized advantage estimation over segments; kernels/gae_packed.py says what it means, gae.cpp counts the cost.
#include "gae_scan.h"

namespace {

void gae_packed(uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t offsets, uintptr_t bootstrap,
                uintptr_t advantages, uintptr_t returns, int64_t S, int64_t N, float gamma, float lam, int threads) {
  const Discount d = discount(gamma, lam);
  const int64_t* ends = ptr<const int64_t>(offsets);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1 && S > 1 && N > threaded_tokens)
  for (int64_t s = 0; s < S; ++s) {
    const int64_t at = ends[s];
    Stored reward{ptr<const float>(rewards) + at};
    scan_row(reward, ptr<const float>(values) + at, ptr<const uint8_t>(mask) + at, ptr<float>(advantages) + at,
             ptr<float>(returns) + at, ends[s + 1] - at, bootstrap ? ptr<const float>(bootstrap)[s] : 0.f, d);
  }
}

KERNEL(gae_packed)

}  // namespace
