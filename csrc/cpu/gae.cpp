// Generalized advantage estimation on the CPU; kernels/gae.py defines it, gae_scan.h has the algorithm.
//
// Floor: 9 bytes a token in (reward, value, mask) and 8 out (16 if a store first reads its cache line); about 3 W
// multiply-adds and log2(W) + 2 shuffles for W tokens.
#include "gae_scan.h"

namespace {

void gae(uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t bootstrap, uintptr_t gammas, uintptr_t lams,
         uintptr_t advantages, uintptr_t returns, int64_t B, int64_t T, float gamma, float lam, int threads) {
  with_discounts(gamma, lam, gammas, lams, [=](const auto& discounts) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && B * T > MIN_TOKENS_TO_THREAD)
    for (int64_t row = 0; row < B; ++row) {
      const int64_t begin = row * T;
      GivenRewards given{ptr<const float>(rewards) + begin};
      scan_row(given, ptr<const float>(values) + begin, ptr<const uint8_t>(mask) + begin,
               ptr<float>(advantages) + begin, ptr<float>(returns) + begin, T,
               bootstrap ? ptr<const float>(bootstrap)[row] : 0.f, discounts.of(row));
    }
  });
}

KERNEL(gae)

}  // namespace
