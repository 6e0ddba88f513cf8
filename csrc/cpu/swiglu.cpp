// silu(gate) * up on the CPU, and its gradients; kernels/swiglu.py defines them. Floor: two reads and one write of
// memory; of the gradients three reads and two writes. A thread takes rows, W numbers of them in each vector; each
// number's result depends on its own inputs alone.
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

template <class X>
void swiglu_backward_row(const X* grad, const X* gate, const X* up, X* gate_grad, X* up_grad, int64_t F) {
  int64_t i = 0;
  for (; i + W <= F; i += W) {
    const SwigluGrads<f32> grads = swiglu_grads(load(grad + i), load(gate + i), load(up + i));
    store(gate_grad + i, grads.gate);
    store(up_grad + i, grads.up);
  }
  if (i == F) return;
  const int n = (int)(F - i);
  const SwigluGrads<f32> grads =
      swiglu_grads(load_partial(grad + i, n, 0.f), load_partial(gate + i, n, 0.f), load_partial(up + i, n, 0.f));
  store_partial(gate_grad + i, grads.gate, n);
  store_partial(up_grad + i, grads.up, n);
}

template <class X>
void swiglu_backward_rows(const X* grad, int64_t grad_stride, const X* gate, int64_t gate_stride, const X* up,
                          int64_t up_stride, X* out, int64_t N, int64_t F, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && N * F > 16384)
  for (int64_t row = 0; row < N; ++row)
    swiglu_backward_row(grad + row * grad_stride, gate + row * gate_stride, up + row * up_stride, out + row * 2 * F,
                        out + row * 2 * F + F, F);
}

// `out` is (N, 2 F): the gradients of gate, then those of up.
void swiglu_backward(uintptr_t grad, int64_t grad_stride, uintptr_t gate, int64_t gate_stride, uintptr_t up,
                     int64_t up_stride, bool is_bf16, uintptr_t out, int64_t N, int64_t F, int threads) {
  if (is_bf16)
    swiglu_backward_rows(ptr<const bf16>(grad), grad_stride, ptr<const bf16>(gate), gate_stride, ptr<const bf16>(up),
                         up_stride, ptr<bf16>(out), N, F, threads);
  else
    swiglu_backward_rows(ptr<const float>(grad), grad_stride, ptr<const float>(gate), gate_stride, ptr<const float>(up),
                         up_stride, ptr<float>(out), N, F, threads);
}

KERNEL(swiglu)
KERNEL(swiglu_backward)

}  // namespace
