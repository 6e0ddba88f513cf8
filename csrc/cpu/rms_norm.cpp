// RMSNorm of rows on the CPU; kernels/rms_norm.py defines it, norm.h has the algorithm. Floor: one read and one write
// of memory.
#include "norm.h"

namespace {

void rms_norm(uintptr_t x, bool is_bf16, uintptr_t weight, bool weight_is_bf16, uintptr_t residual, uintptr_t out,
              int64_t N, int64_t D, float eps, float offset, int threads) {
  const NormJob job{x, weight, 0, residual, out, N, D, is_bf16, weight_is_bf16, threads};
  norm_rows(job, [=](const auto* x, const auto* weight, const auto*, auto* y) {
    rms_norm_row(x, weight, offset, eps, D, y);
  });
}

KERNEL(rms_norm)

}  // namespace
