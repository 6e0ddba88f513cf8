// RMSNorm of rows on the CPU; kernels/rms_norm.py says what it means. A row is read from memory once, its second visit
// and the weight's from the first-level cache.
#include "kernel.h"
#include "norm.h"

namespace {

struct Rows {
  uintptr_t x, weight, residual, out;
  int64_t N, D;
  float eps, offset;
  int threads;
};

template <class X, class Wt>
void run(const Rows& r) {
  norm_rows<X>(r.x, r.residual, r.out, r.N, r.D, r.threads,
               [&](const X* x, X* y) { rms_norm_row(x, ptr<const Wt>(r.weight), r.offset, r.eps, r.D, y); });
}

// x, residual (or null) and out: (N, D) of one type; weight (D,).
void rms_norm(uintptr_t x, bool half, uintptr_t weight, bool half_weight, uintptr_t residual, uintptr_t out, int64_t N,
              int64_t D, float eps, float offset, int threads) {
  const Rows r{x, weight, residual, out, N, D, eps, offset, threads};
  if (half)
    half_weight ? run<bf16, bf16>(r) : run<bf16, float>(r);
  else
    half_weight ? run<float, bf16>(r) : run<float, float>(r);
}

KERNEL(rms_norm)

}  // namespace
