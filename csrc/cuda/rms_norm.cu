// RMSNorm of rows on NVIDIA GPUs; kernels/rms_norm.py defines it, norm.cuh holds the kernel.
#include "norm.cuh"

namespace {

// x, residual (or null) and out: (N, D) of one dtype; weight: (D,).
const char* rms_norm(uintptr_t x, int code, uintptr_t weight, int weight_code, uintptr_t residual, uintptr_t out,
                     int64_t N, int64_t D, float eps, float offset, uintptr_t stream) {
  NormJob job{};
  job.x = ptr<const void>(x);
  job.residual = ptr<void>(residual);
  job.weight = ptr<const void>(weight);
  job.weight_code = weight_code;
  job.out = ptr<void>(out);
  job.N = N;
  job.eps = eps;
  job.offset = offset;
  return launch_norm<false>(job, D, code, stream);
}

KERNEL(rms_norm)

}  // namespace
