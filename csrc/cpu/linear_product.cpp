// The product of a linear head in bfloat16 with float32 results, which torch does not have on the CPU; half_product.h
// says how. It answers on processors with AVX512-BF16; elsewhere kernels/_blocks.py takes float32 products instead.
//
// Floor: 2 rows columns D operations at 64 a cycle and instruction port.
#include "half_product.h"
#include "kernel.h"

namespace {

// out (rows, columns) = x (rows, D) w (columns, D)', strides in elements. With nothing to do it only says whether it
// can.
const char* half_product(uintptr_t x, uintptr_t w, uintptr_t out, int64_t rows, int64_t columns, int64_t D,
                         int64_t x_stride, int64_t w_stride, int64_t out_stride, bool emulate, int threads) {
  if (!emulate && !has_dot()) return "this processor has no AVX512-BF16";
  constexpr int64_t width = 64;  // columns a thread takes at a time
  const int64_t parts = (columns + width - 1) / width;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns * D > 1 << 20)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = part * width, end = min(columns, begin + width);
    const auto *const a = ptr<const uint16_t>(x), *const b = ptr<const uint16_t>(w);
    if (emulate)
      half_columns<EmulatedDot>(a, x_stride, b, w_stride, ptr<float>(out), out_stride, rows, begin, end, D);
    else
      half_columns<MachineDot>(a, x_stride, b, w_stride, ptr<float>(out), out_stride, rows, begin, end, D);
  }
  return nullptr;
}

KERNEL(half_product)

}  // namespace
