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
  const float decay = gamma * lam;
  const Rows r{ptr<const uint8_t>(mask),
               nullptr,
               ptr<float>(advantages),
               ptr<float>(returns),
               B,
               T,
               gamma,
               decay,
               gamma - decay,
               cut_of(piece),
               ptr<Affine>(folds)};
  if (r.cut < 0) return "a piece must have a power of two of tokens, 1024 at least";
  const Stored source{{ptr<const float>(values), ptr<const float>(rewards)}, ptr<const float>(bootstrap)};
  return launch_rows(r, source, plan(r, T), stream);
}

KERNEL(gae)

}  // namespace
