// GELU on NVIDIA GPUs; kernels/gelu.py says what it means. Floor: one read and one write of memory, of 16 bytes a
// thread.
#include "activation.cuh"
#include "vec.cuh"

namespace {

constexpr int block_threads = 256;

template <class T, bool TANH>
__global__ void __launch_bounds__(block_threads) gelu_kernel(const T* x, T* out, int64_t count, bool whole) {
  constexpr int per = per_word<T>;
  const int64_t at = (int64_t(blockIdx.x) * block_threads + threadIdx.x) * per;
  if (at >= count) return;
  const int here = static_cast<int>(min(int64_t(per), count - at));
  whole = whole && here == per;
  float v[per];
  read_numbers(x + at, whole, here, v);
#pragma unroll
  for (int i = 0; i < per; ++i) v[i] = TANH ? gelu_tanh(v[i]) : gelu(v[i]);
  write_numbers(out + at, whole, here, v);
}

const char* gelu_map(uintptr_t x, int code, uintptr_t out, int64_t count, bool tanh, uintptr_t stream) {
  if (count == 0) return nullptr;
  return with_type(code, [&](auto type) {
    using T = decltype(type);
    const unsigned blocks = blocks_for(count, block_threads * per_word<T>);
    if (!blocks) return "more numbers than a grid has threads";
    return launch(tanh ? gelu_kernel<T, true> : gelu_kernel<T, false>, blocks, block_threads, 0, stream,
                  ptr<const T>(x), ptr<T>(out), count, multiples_of_16(x, out));
  });
}

KERNEL(gelu_map)

}  // namespace
