// LayerNorm of rows on NVIDIA GPUs; kernels/layer_norm.py defines it, norm.cuh holds the kernel.
#include "norm.cuh"

namespace {

// x, residual (or null) and out: (N, D) of one dtype; weight and bias (or null): (D,) of another.
const char* layer_norm(uintptr_t x, int code, uintptr_t weight, uintptr_t bias, int weight_code, uintptr_t residual,
                       uintptr_t out, int64_t N, int64_t D, float eps, uintptr_t stream) {
  NormJob job{};
  job.x = ptr<const void>(x);
  job.residual = ptr<void>(residual);
  job.weight = ptr<const void>(weight);
  job.bias = ptr<const void>(bias);
  job.weight_code = weight_code;
  job.out = ptr<void>(out);
  job.N = N;
  job.eps = eps;
  return launch_norm<true>(job, D, code, stream);
}

KERNEL(layer_norm)

}  // namespace
