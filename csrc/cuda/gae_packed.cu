// Generalized advantage estimation over segments on NVIDIA GPUs; kernels/gae_packed.py says what it means, gae_scan.cuh
// how it is done, gae.cu counts the cost. The host does not know the lengths: teams are sized for the mean, and blocks
// find the pieces of a cut segment by themselves.
#include "gae_scan.cuh"

namespace {

const char* gae_packed(uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t offsets, uintptr_t bootstrap,
                       uintptr_t advantages, uintptr_t returns, uintptr_t folds, int64_t piece, int64_t S, int64_t N,
                       float gamma, float lam, uintptr_t stream) {
  if (S == 0 || N == 0) return nullptr;
  const Rows r = rows_of(mask, offsets, advantages, returns, folds, piece, S, N, gamma, lam);
  if (r.cut < 0) return no_piece;
  const Stored source{{ptr<const float>(values), ptr<const float>(rewards)}, ptr<const float>(bootstrap)};
  return launch_rows(r, source, plan(r, N / S), stream);
}

KERNEL(gae_packed)

}  // namespace
