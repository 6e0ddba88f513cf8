// Generalized advantage estimation on NVIDIA GPUs; kernels/gae.py says what it means, gae_scan.cuh how it is done.
//
// Per token 9 bytes in (rewards, values, mask) and 8 out, in one launch; of a few long rows the 9 are read twice, in
// two.
#include "gae_scan.cuh"

namespace {

const char* gae(uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t bootstrap, uintptr_t advantages,
                uintptr_t returns, uintptr_t folds, int64_t piece, int64_t B, int64_t T, float gamma, float lam,
                uintptr_t stream) {
  if (T == 0) return nullptr;
  const Rows r = rows_of(mask, 0, advantages, returns, folds, piece, B, T, gamma, lam);
  if (r.cut < 0) return no_piece;
  const Stored source{{ptr<const float>(values), ptr<const float>(rewards)}, ptr<const float>(bootstrap)};
  return launch_rows(r, source, plan(r, T), stream);
}

KERNEL(gae)

}  // namespace
