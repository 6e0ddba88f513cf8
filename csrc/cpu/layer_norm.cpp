// LayerNorm of rows on the CPU, and its gradients; kernels/layer_norm.py defines it, norm.h and norm_backward.h have
// the algorithms. Floor: one read and one write of memory; of the gradients two reads and one write,
// and one more read with a residual gradient.
#include "norm_backward.h"

namespace {

void layer_norm(uintptr_t x, bool is_bf16, uintptr_t weight, uintptr_t bias, bool weight_is_bf16, uintptr_t residual,
                uintptr_t out, int64_t N, int64_t D, float eps, int threads) {
  const NormJob job{x, weight, bias, residual, out, N, D, is_bf16, weight_is_bf16, threads};
  norm_rows(job, [=](const auto* x, const auto* weight, const auto* bias, auto* y) {
    layer_norm_row(x, weight, bias, eps, D, y);
  });
}

void layer_norm_backward(uintptr_t x, uintptr_t grad, uintptr_t residual_grad, bool is_bf16, uintptr_t weight,
                         bool weight_is_bf16, uintptr_t x_grad, uintptr_t weight_grad, uintptr_t bias_grad,
                         bool bias_is_bf16, uintptr_t sums, int64_t N, int64_t D, float eps, int threads) {
  norm_backward<true>({x, grad, residual_grad, weight, x_grad, weight_grad, bias_grad, sums, N, D, is_bf16,
                       weight_is_bf16, bias_is_bf16, eps, 0.f, threads});
}

CONSTANT(layer_norm_block_rows, BLOCK_ROWS)
KERNEL(layer_norm)
KERNEL(layer_norm_backward)

}  // namespace
