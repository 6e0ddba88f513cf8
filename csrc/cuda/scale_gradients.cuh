// Multiplies the gradients that a loss's forward pass made by the gradients of the losses, in place.
//
// Mostly both factors are 1; then each block reads them and ends. The host does not wait for the numbers.
#pragma once
#include "quad.cuh"

namespace {

constexpr int scale_threads = 256, max_scale_blocks = 1024;

struct ScaleJob {
  Output<ANY_DTYPE> grads[2];
  Input<ANY_DTYPE> factors[2];  // of one element
  int64_t N;
};

__global__ void __launch_bounds__(scale_threads) scale_gradients_kernel(const ScaleJob job) {
  const float factors[2] = {job.grads[0].p ? job.factors[0].load(0) : 1.f,
                            job.grads[1].p ? job.factors[1].load(0) : 1.f};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (factors[k] == 1.f) continue;
    const Output<ANY_DTYPE> out = job.grads[k];
    const Input<ANY_DTYPE> in{out.p, out.dtype};
    const bool aligned = out.alignment(0) % 16 == 0;
    const int64_t stride = int64_t(gridDim.x) * scale_threads * 4;
    for (int64_t i = (int64_t(blockIdx.x) * scale_threads + threadIdx.x) * 4; i < job.N; i += stride) {
      if (aligned && i + 4 <= job.N) {
        float x[4];
        in.unpack(in.load4(i), x);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] *= factors[k];
        out.store4(i, x);
      } else {
        for (int64_t j = i; j < i + 4 && j < job.N; ++j) out.store(j, in.load(j) * factors[k]);
      }
    }
  }
}

// Each gradient has N numbers; a null one is left out.
const char* scale_gradients(uintptr_t first, int first_code, uintptr_t first_factor, int first_factor_code,
                            uintptr_t second, int second_code, uintptr_t second_factor, int second_factor_code,
                            int64_t N, uintptr_t stream) {
  if (N == 0) return nullptr;
  const ScaleJob job{
      {{ptr<void>(first), first_code}, {ptr<void>(second), second_code}},
      {{ptr<const void>(first_factor), first_factor_code}, {ptr<const void>(second_factor), second_factor_code}},
      N};
  const int64_t blocks = (N + 4 * scale_threads - 1) / (4 * scale_threads);
  return launch(scale_gradients_kernel, unsigned(blocks < max_scale_blocks ? blocks : max_scale_blocks), scale_threads,
                0, stream, job);
}

KERNEL(scale_gradients)

}  // namespace
