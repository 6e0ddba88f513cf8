// RMSNorm of rows on the CPU, and its gradients; kernels/rms_norm.py defines it, norm.h and norm_backward.h have the
// algorithms. Floor: one read and one write of memory; of the gradients two reads and one write, and
// one more read with a residual gradient.
#include "norm_backward.h"

namespace {

void rms_norm(uintptr_t x, bool is_bf16, uintptr_t weight, bool weight_is_bf16, uintptr_t residual, uintptr_t out,
              int64_t N, int64_t D, float eps, float offset, int threads) {
  const NormJob job{x, weight, 0, residual, out, N, D, is_bf16, weight_is_bf16, threads};
  norm_rows(job, [=](const auto* x, const auto* weight, const auto*, auto* y) {
    rms_norm_row(x, weight, offset, eps, D, y);
  });
}

void rms_norm_backward(uintptr_t x, uintptr_t grad, uintptr_t residual_grad, bool is_bf16, uintptr_t weight,
                       bool weight_is_bf16, uintptr_t x_grad, uintptr_t weight_grad, uintptr_t sums, int64_t N,
                       int64_t D, float eps, float offset, int threads) {
  norm_backward<false>({x, grad, residual_grad, weight, x_grad, weight_grad, 0, sums, N, D, is_bf16, weight_is_bf16,
                        false, eps, offset, threads});
}

CONSTANT(rms_norm_block_rows, BLOCK_ROWS)
KERNEL(rms_norm)
KERNEL(rms_norm_backward)

}  // namespace
