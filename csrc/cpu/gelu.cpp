// GELU on the CPU; kernels/gelu.py says what it means. Some 40 operations an element: in memory, it waits for neither.
#include "activation.h"
#include "kernel.h"

namespace {

constexpr int64_t CHUNK = 4096;

template <bool TANH, class X>
void map(const X* x, X* out, int64_t count) {
  const auto f = [](f32 v) { return TANH ? gelu_tanh(v) : gelu(v); };
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, f(load(x + i)));
  const int n = (int)(count - i);
  if (n) store_part(out + i, f(load_part(x + i, n, 0.f)), n);
}

template <class X>
void run(const X* x, X* out, int64_t count, bool tanh, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && count > 16384)
  for (int64_t at = 0; at < count; at += CHUNK) {
    const int64_t n = min(CHUNK, count - at);
    tanh ? map<true>(x + at, out + at, n) : map<false>(x + at, out + at, n);
  }
}

void gelu_map(uintptr_t x, bool half, uintptr_t out, int64_t count, bool tanh, int threads) {
  if (half)
    run(ptr<const bf16>(x), ptr<bf16>(out), count, tanh, threads);
  else
    run(ptr<const float>(x), ptr<float>(out), count, tanh, threads);
}

KERNEL(gelu_map)

}  // namespace
