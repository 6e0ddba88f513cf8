// RMSNorm of rows on NVIDIA GPUs; kernels/rms_norm.py says what it means, norm.cuh how it is done.
#include "norm.cuh"

namespace {

// x, residual (or null) and out: (N, D) of one type; weight (D,).
const char* rms_norm(uintptr_t x, int code, uintptr_t weight, int weight_code, uintptr_t residual, uintptr_t out,
                     int64_t N, int64_t D, float eps, float offset, uintptr_t stream) {
  return launch_norm<false>({ptr<const void>(x), ptr<void>(residual), ptr<const void>(weight), nullptr, weight_code,
                             ptr<void>(out), N, 0, eps, offset},
                            D, code, stream);
}

KERNEL(rms_norm)

}  // namespace
