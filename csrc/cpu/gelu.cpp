// GELU on the CPU, and its gradient; kernels/gelu.py defines them. Floor: one read and one write of memory, or some 40
// operations a number; of the gradient one more read. A thread takes CHUNK numbers at a time, W of them in each vector;
// each number's result depends on its own inputs alone.
#include "activation.h"
#include "dtypes.h"

namespace {

constexpr int64_t CHUNK = 4096;

template <bool TANH, class X>
void gelu_chunk(const X* x, X* out, int64_t count) {
  const auto f = [](f32 v) { return TANH ? gelu_tanh(v) : gelu_erf(v); };
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, f(load(x + i)));
  const int n = (int)(count - i);
  if (n) store_partial(out + i, f(load_partial(x + i, n, 0.f)), n);
}

template <class X>
void gelu_all(const X* x, X* out, int64_t count, bool tanh, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && count > 16384)
  for (int64_t begin = 0; begin < count; begin += CHUNK) {
    const int64_t n = min(CHUNK, count - begin);
    tanh ? gelu_chunk<true>(x + begin, out + begin, n) : gelu_chunk<false>(x + begin, out + begin, n);
  }
}

void gelu(uintptr_t x, bool is_bf16, uintptr_t out, int64_t count, bool tanh, int threads) {
  if (is_bf16)
    gelu_all(ptr<const bf16>(x), ptr<bf16>(out), count, tanh, threads);
  else
    gelu_all(ptr<const float>(x), ptr<float>(out), count, tanh, threads);
}

template <bool TANH, class X>
void gelu_backward_chunk(const X* grad, const X* x, X* out, int64_t count) {
  const auto f = [](f32 g, f32 v) { return g * (TANH ? gelu_tanh_derivative(v) : gelu_erf_derivative(v)); };
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, f(load(grad + i), load(x + i)));
  const int n = (int)(count - i);
  if (n) store_partial(out + i, f(load_partial(grad + i, n, 0.f), load_partial(x + i, n, 0.f)), n);
}

template <class X>
void gelu_backward_all(const X* grad, const X* x, X* out, int64_t count, bool tanh, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && count > 16384)
  for (int64_t begin = 0; begin < count; begin += CHUNK) {
    const int64_t n = min(CHUNK, count - begin);
    tanh ? gelu_backward_chunk<true>(grad + begin, x + begin, out + begin, n)
         : gelu_backward_chunk<false>(grad + begin, x + begin, out + begin, n);
  }
}

void gelu_backward(uintptr_t grad, uintptr_t x, bool is_bf16, uintptr_t out, int64_t count, bool tanh, int threads) {
  if (is_bf16)
    gelu_backward_all(ptr<const bf16>(grad), ptr<const bf16>(x), ptr<bf16>(out), count, tanh, threads);
  else
    gelu_backward_all(ptr<const float>(grad), ptr<const float>(x), ptr<float>(out), count, tanh, threads);
}

KERNEL(gelu)
KERNEL(gelu_backward)

}  // namespace
