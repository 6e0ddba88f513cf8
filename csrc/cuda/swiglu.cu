// silu(gate) * up on NVIDIA GPUs; kernels/swiglu.py defines it.
//
// Floor: two loads and a store of every number. Blocks form a grid of (rows, columns); a thread takes a vector of 16
// bytes if all rows are aligned vectors, else one number:
//
//     gate, up   |  vec 0   |  vec 1   |  ...      row blockIdx.x, columns from blockIdx.y * block_threads vectors on
//     thread          0          1        ...
//
// Numbers do not depend on one another, so the bits do not depend on the grid.
#include "activation.h"
#include "vec.cuh"

namespace {

constexpr int block_threads = 256;

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(block_threads)
    swiglu_kernel(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, T* out, int64_t F) {
  constexpr int size = ALIGNED ? vec_size<T> : 1;
  const int64_t row = blockIdx.x, column = (int64_t(blockIdx.y) * block_threads + threadIdx.x) * size;
  if (column >= F) return;
  gate += row * gate_stride + column;
  up += row * up_stride + column;
  out += row * F + column;
  if constexpr (ALIGNED) {
    float a[size], b[size];
    load_floats(gate, true, size, a);
    load_floats(up, true, size, b);
#pragma unroll
    for (int i = 0; i < size; ++i) a[i] = silu(a[i]) * b[i];
    store_floats(out, true, size, a);
  } else {
    from_float(silu(to_float(*gate)) * to_float(*up), *out);
  }
}

// gate and up: N rows of F numbers, gate_stride and up_stride apart; out: contiguous.
const char* swiglu(uintptr_t gate, int64_t gate_stride, uintptr_t up, int64_t up_stride, int code, uintptr_t out,
                   int64_t N, int64_t F, uintptr_t stream) {
  if (N == 0 || F == 0) return nullptr;
  return dispatch_dtype(code, [&](auto number) {
    using T = decltype(number);
    constexpr int size = vec_size<T>;
    const bool aligned = are_16_byte_aligned(gate, up, out) && ((F | gate_stride | up_stride) % size) == 0;
    const int64_t column_blocks = blocks_for(F, block_threads * (aligned ? size : 1));
    if (N > 0x7fffffff || column_blocks > 65535) return "more rows or columns than a grid has blocks";
    const dim3 grid(static_cast<unsigned>(N), static_cast<unsigned>(column_blocks));
    return launch(aligned ? swiglu_kernel<T, true> : swiglu_kernel<T, false>, grid, block_threads, 0, stream,
                  ptr<const T>(gate), gate_stride, ptr<const T>(up), up_stride, ptr<T>(out), F);
  });
}

KERNEL(swiglu)

}  // namespace
