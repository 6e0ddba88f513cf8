// GELU on NVIDIA GPUs; kernels/gelu.py defines it.
//
// Floor: one load and one store of every number. Thread t of the grid takes the vector of 16 bytes t:
//
//     x, out   |  vec 0   |  vec 1   |  ...  |  last: one number at a time if it is not full
//     thread        0          1        ...
//
// Numbers do not depend on one another, so the bits do not depend on the grid.
#include "activation.h"
#include "vec.cuh"

namespace {

constexpr int block_threads = 256;

template <class T, bool TANH>
__global__ void __launch_bounds__(block_threads) gelu_kernel(const T* x, T* out, int64_t count, bool aligned) {
  constexpr int size = vec_size<T>;
  const int64_t start = (int64_t(blockIdx.x) * block_threads + threadIdx.x) * size;
  if (start >= count) return;
  const int num_valid = static_cast<int>(min(int64_t(size), count - start));
  aligned = aligned && num_valid == size;
  float v[size];
  load_floats(x + start, aligned, num_valid, v);
#pragma unroll
  for (int i = 0; i < size; ++i) v[i] = TANH ? gelu_tanh(v[i]) : gelu_erf(v[i]);
  store_floats(out + start, aligned, num_valid, v);
}

const char* gelu(uintptr_t x, int code, uintptr_t out, int64_t count, bool tanh, uintptr_t stream) {
  if (count == 0) return nullptr;
  return dispatch_dtype(code, [&](auto number) {
    using T = decltype(number);
    const unsigned blocks = blocks_for(count, block_threads * vec_size<T>);
    if (!blocks) return "more numbers than a grid has threads";
    return launch(tanh ? gelu_kernel<T, true> : gelu_kernel<T, false>, blocks, block_threads, 0, stream,
                  ptr<const T>(x), ptr<T>(out), count, are_16_byte_aligned(x, out));
  });
}

KERNEL(gelu)

}  // namespace
