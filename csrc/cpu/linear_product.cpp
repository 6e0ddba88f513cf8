// The product of a linear head in bfloat16 with float32 results, which torch does not have on the CPU; bf16_gemm.h has
// the algorithm. It needs AVX512-BF16; on other processors kernels/_cpu_head.py multiplies in float32.
//
// A thread takes 64 columns at a time, for all rows.
#include "bf16_gemm.h"
#include "kernel.h"

namespace {

// out (rows, columns) = x (rows, D) w (columns, D)', strides in elements. With 0 rows it only says whether the
// processor can.
const char* bf16_product(uintptr_t x, uintptr_t w, uintptr_t out, int64_t rows, int64_t columns, int64_t D,
                         int64_t x_stride, int64_t w_stride, int64_t out_stride, bool emulate, int threads) {
  if (!emulate && !has_bf16_dot()) return "this processor has no AVX512-BF16";
  if (!rows) return nullptr;
  const int64_t num_parts = (columns + PANEL_COLUMNS - 1) / PANEL_COLUMNS;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns * D > 1 << 20)
  for (int64_t part = 0; part < num_parts; ++part) {
    const int64_t begin = part * PANEL_COLUMNS, end = min(columns, begin + PANEL_COLUMNS);
    const int64_t after = min<int64_t>(columns - end, PANEL_COLUMNS);
    const auto *const a = ptr<const uint16_t>(x), *const b = ptr<const uint16_t>(w) + begin * w_stride;
    float* const to = ptr<float>(out) + begin;
    if (emulate)
      gemm_columns<EmulatedDot>(a, x_stride, rows, b, w_stride, end - begin, after, D, to, out_stride);
    else
      gemm_columns<MachineDot>(a, x_stride, rows, b, w_stride, end - begin, after, D, to, out_stride);
  }
  return nullptr;
}

KERNEL(bf16_product)

}  // namespace
