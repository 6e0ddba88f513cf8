// LayerNorm of rows on the CPU; kernels/layer_norm.py defines it, norm.h has the algorithm. Floor: one read and one
// write of memory.
#include "norm.h"

namespace {

void layer_norm(uintptr_t x, bool is_bf16, uintptr_t weight, uintptr_t bias, bool weight_is_bf16, uintptr_t residual,
                uintptr_t out, int64_t N, int64_t D, float eps, int threads) {
  const NormJob job{x, weight, bias, residual, out, N, D, is_bf16, weight_is_bf16, threads};
  norm_rows(job, [=](const auto* x, const auto* weight, const auto* bias, auto* y) {
    layer_norm_row(x, weight, bias, eps, D, y);
  });
}

KERNEL(layer_norm)

}  // namespace
