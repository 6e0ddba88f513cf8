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
#pragma omp parallel for num_threads(r.threads) if (r.threads > 1 && r.N * r.D > 32768)
  for (int64_t row = 0; row < r.N; ++row) {
    const X* x = ptr<const X>(r.x) + row * r.D;
    if (r.residual) {
      X* const stream = ptr<X>(r.residual) + row * r.D;
      add_row(stream, x, r.D);
      x = stream;
    }
    rms_norm_row(x, ptr<const Wt>(r.weight), r.offset, r.eps, r.D, ptr<X>(r.out) + row * r.D);
  }
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
