// LayerNorm of rows on NVIDIA GPUs; kernels/layer_norm.py says what it means, norm.cuh how it is done.
#include "norm.cuh"

namespace {

// x, residual (or null) and out: (N, D) of one type; weight and bias (or null): (D,) of another.
const char* layer_norm(uintptr_t x, int code, uintptr_t weight, uintptr_t bias, int weight_code, uintptr_t residual,
                       uintptr_t out, int64_t N, int64_t D, float eps, uintptr_t stream) {
  return launch_norm<true>({ptr<const void>(x), ptr<void>(residual), ptr<const void>(weight), ptr<const void>(bias),
                            weight_code, ptr<void>(out), N, 0, eps, 0.f},
                           D, code, stream);
}

KERNEL(layer_norm)

}  // namespace
