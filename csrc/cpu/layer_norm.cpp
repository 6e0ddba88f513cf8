// LayerNorm of rows on the CPU; kernels/layer_norm.py says what it means. A row is read from memory once, its further
// visits and the weight's from the first-level cache.
#include "kernel.h"
#include "norm.h"

namespace {

struct Rows {
  uintptr_t x, weight, bias, residual, out;
  int64_t N, D;
  float eps;
  int threads;
};

template <class X, class Wt>
void run(const Rows& r) {
  norm_rows<X>(r.x, r.residual, r.out, r.N, r.D, r.threads, [&](const X* x, X* y) {
    layer_norm_row(x, ptr<const Wt>(r.weight), ptr<const Wt>(r.bias), r.eps, r.D, y);
  });
}

// x, residual (or null) and out: (N, D) of one type; weight and bias (or null): (D,) of another.
void layer_norm(uintptr_t x, bool half, uintptr_t weight, uintptr_t bias, bool half_weight, uintptr_t residual,
                uintptr_t out, int64_t N, int64_t D, float eps, int threads) {
  const Rows r{x, weight, bias, residual, out, N, D, eps, threads};
  if (half)
    half_weight ? run<bf16, bf16>(r) : run<bf16, float>(r);
  else
    half_weight ? run<float, bf16>(r) : run<float, float>(r);
}

KERNEL(layer_norm)

}  // namespace
