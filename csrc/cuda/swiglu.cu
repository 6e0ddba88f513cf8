// silu(gate) * up on NVIDIA GPUs; kernels/swiglu.py says what it means. Floor: two reads and a write of memory, each of
// 16 bytes a thread where all rows are whole words, else of one number.
#include "activation.cuh"
#include "vec.cuh"

namespace {

constexpr int block_threads = 256;

template <class T, bool WHOLE>
__global__ void __launch_bounds__(block_threads)
    swiglu_kernel(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, T* out, int64_t F) {
  constexpr int each = WHOLE ? per_word<T> : 1;
  const int64_t row = blockIdx.x, at = (int64_t(blockIdx.y) * block_threads + threadIdx.x) * each;
  if (at >= F) return;
  gate += row * gate_stride + at, up += row * up_stride + at, out += row * F + at;
  if constexpr (WHOLE) {
    float a[each], b[each];
    read_numbers(gate, true, each, a), read_numbers(up, true, each, b);
#pragma unroll
    for (int i = 0; i < each; ++i) a[i] = silu(a[i]) * b[i];
    write_numbers(out, true, each, a);
  } else {
    narrow(silu(widened(*gate)) * widened(*up), *out);
  }
}

// Rows of F, gate_stride and up_stride elements apart; out is dense.
const char* swiglu(uintptr_t gate, int64_t gate_stride, uintptr_t up, int64_t up_stride, int code, uintptr_t out,
                   int64_t N, int64_t F, uintptr_t stream) {
  if (N == 0 || F == 0) return nullptr;
  return with_type(code, [&](auto type) {
    using T = decltype(type);
    constexpr int per = per_word<T>;
    const bool whole = multiples_of_16(gate, up, out) && ((F | gate_stride | up_stride) % per) == 0;
    const int64_t blocks = blocks_for(F, block_threads * (whole ? per : 1));
    if (N > 0x7fffffff || blocks > 65535) return "more rows or columns than a grid has blocks";
    const dim3 grid(static_cast<unsigned>(N), static_cast<unsigned>(blocks));
    return launch(whole ? swiglu_kernel<T, true> : swiglu_kernel<T, false>, grid, block_threads, 0, stream,
                  ptr<const T>(gate), gate_stride, ptr<const T>(up), up_stride, ptr<T>(out), F);
  });
}

KERNEL(swiglu)

}  // namespace
