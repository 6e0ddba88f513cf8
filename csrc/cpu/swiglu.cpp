// silu(gate) * up on the CPU; kernels/swiglu.py defines it. Floor: two reads and one write of memory. A thread takes
// rows, W numbers of them in each vector; each number's result depends on its two inputs alone.
#include "activation.h"
#include "dtypes.h"

namespace {

template <class X>
void swiglu_row(const X* gate, const X* up, X* out, int64_t F) {
  int64_t i = 0;
  for (; i + W <= F; i += W) store(out + i, silu(load(gate + i)) * load(up + i));
  const int n = (int)(F - i);
  if (n) store_partial(out + i, silu(load_partial(gate + i, n, 0.f)) * load_partial(up + i, n, 0.f), n);
}

// N rows of F numbers: gate_stride and up_stride numbers apart; `out` is contiguous.
void swiglu(uintptr_t gate, int64_t gate_stride, uintptr_t up, int64_t up_stride, bool is_bf16, uintptr_t out,
            int64_t N, int64_t F, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && N * F > 16384)
  for (int64_t row = 0; row < N; ++row) {
    if (is_bf16)
      swiglu_row(ptr<const bf16>(gate) + row * gate_stride, ptr<const bf16>(up) + row * up_stride,
                 ptr<bf16>(out) + row * F, F);
    else
      swiglu_row(ptr<const float>(gate) + row * gate_stride, ptr<const float>(up) + row * up_stride,
                 ptr<float>(out) + row * F, F);
  }
}

KERNEL(swiglu)

}  // namespace
