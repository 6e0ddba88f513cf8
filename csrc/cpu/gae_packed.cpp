// Generalized advantage estimation over segments, on the CPU; kernels/gae_packed.py defines it, gae_scan.h has the
// algorithm, gae.cpp the floor. A thread takes segments.
#include "gae_scan.h"

namespace {

// Segment s has the tokens offsets[s] ... offsets[s + 1] - 1.
void gae_packed(uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t offsets, uintptr_t bootstrap,
                uintptr_t gammas, uintptr_t lams, uintptr_t advantages, uintptr_t returns, int64_t S, int64_t N,
                float gamma, float lam, int threads) {
  const int64_t* const begins = ptr<const int64_t>(offsets);
  with_discounts(gamma, lam, gammas, lams, [=](const auto& discounts) {
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1 && S > 1 && N > MIN_TOKENS_TO_THREAD)
    for (int64_t s = 0; s < S; ++s) {
      const int64_t begin = begins[s];
      GivenRewards given{ptr<const float>(rewards) + begin};
      scan_row(given, ptr<const float>(values) + begin, ptr<const uint8_t>(mask) + begin,
               ptr<float>(advantages) + begin, ptr<float>(returns) + begin, begins[s + 1] - begin,
               bootstrap ? ptr<const float>(bootstrap)[s] : 0.f, discounts.of(s));
    }
  });
}

KERNEL(gae_packed)

}  // namespace
