// Generalized advantage estimation on the CPU; kernels/gae.py says what it means, gae_scan.h how it is done.
//
// Per token 9 bytes in (rewards, values, mask) and 8 out: the floor is memory, 17 bytes (25 where stores first read
// their lines). Arithmetic: about 3 W multiply-adds and log2(W) + 2 shuffles for W tokens.
#include "gae_scan.h"

namespace {

void gae(uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t bootstrap, uintptr_t advantages,
         uintptr_t returns, int64_t B, int64_t T, float gamma, float lam, int threads) {
  const Discount d = discount(gamma, lam);
#pragma omp parallel for num_threads(threads) if (threads > 1 && B * T > threaded_tokens)
  for (int64_t row = 0; row < B; ++row) {
    const int64_t at = row * T;
    Stored reward{ptr<const float>(rewards) + at};
    scan_row(reward, ptr<const float>(values) + at, ptr<const uint8_t>(mask) + at, ptr<float>(advantages) + at,
             ptr<float>(returns) + at, T, bootstrap ? ptr<const float>(bootstrap)[row] : 0.f, d);
  }
}

KERNEL(gae)

}  // namespace
