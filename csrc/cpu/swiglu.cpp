// silu(gate) * up on the CPU; kernels/swiglu.py says what it means. Floor: two reads and a write of memory.
#include "activation.h"
#include "kernel.h"

namespace {

template <class X>
void gate_row(const X* gate, const X* up, X* out, int64_t F) {
  int64_t i = 0;
  for (; i + W <= F; i += W) store(out + i, silu(load(gate + i)) * load(up + i));
  const int n = (int)(F - i);
  if (n) store_part(out + i, silu(load_part(gate + i, n, 0.f)) * load_part(up + i, n, 0.f), n);
}

// Rows of F, gate_stride and up_stride elements apart; out is dense.
void swiglu(uintptr_t gate, int64_t gate_stride, uintptr_t up, int64_t up_stride, bool half, uintptr_t out, int64_t N,
            int64_t F, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && N * F > 16384)
  for (int64_t row = 0; row < N; ++row) {
    if (half)
      gate_row(ptr<const bf16>(gate) + row * gate_stride, ptr<const bf16>(up) + row * up_stride,
               ptr<bf16>(out) + row * F, F);
    else
      gate_row(ptr<const float>(gate) + row * gate_stride, ptr<const float>(up) + row * up_stride,
               ptr<float>(out) + row * F, F);
  }
}

KERNEL(swiglu)

}  // namespace
