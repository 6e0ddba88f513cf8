// Products of linear layers and heads on the CPU, with float32 results. f32_gemm.h, bf16_gemm.h and product.h have the
// algorithms.
//
//     f32_product       float32, any transposes: kernels/linear.py and heads
//     bf16_product      bfloat16, which torch does not have with float32 results; it needs AVX512-BF16
//     decode_product    x W' + b in the decode step's order of sums: kernels/linear.py with decode_order
//
// A thread takes some columns at a time, for all rows or a chunk of them.
#include "bf16_gemm.h"
#include "f32_gemm.h"
#include "kernel.h"
#include "product.h"
#include "team.h"

namespace {

constexpr int64_t MIN_CHUNK_ROWS = 48, CHUNK_BYTES = 384 << 10;  // of the rows of A that stay in the second-level cache
constexpr int64_t DECODE_COLUMNS = 64;

// Rows of A that a thread takes at a time: few enough to stay in the cache and to be shared out evenly, but not fewer
// than MIN_CHUNK_ROWS, as a panel is made anew for each chunk.
int64_t chunk_rows(int64_t rows, int64_t K, int64_t parts, int threads) {
  const int64_t cached = max<int64_t>(96, CHUNK_BYTES / 4 / max<int64_t>(K, 1));
  const int64_t shared = max(MIN_CHUNK_ROWS, (rows * parts + 4 * threads - 1) / (4 * threads));
  const int64_t chunk = min(cached, shared), chunks = max<int64_t>(1, (rows + chunk - 1) / chunk);
  return max<int64_t>(GEMM_ROWS, (rows + chunks * GEMM_ROWS - 1) / (chunks * GEMM_ROWS) * GEMM_ROWS);
}

// Few products are done before other threads are awake.
int useful_threads(int64_t products, int threads) { return products > 1 << 19 ? threads : 1; }

// out (rows, columns) = A B + bias, or with `adds` out += A B + bias. Element (i, k) of A is at i a_stride + k a_k,
// element (k, c) of B at c b_stride + k b_k, of which one is 1; bias (columns,) or null.
void f32_product(uintptr_t a, int64_t a_stride, int64_t a_k, uintptr_t b, int64_t b_stride, int64_t b_k, uintptr_t bias,
                 uintptr_t out, int64_t out_stride, int64_t rows, int64_t columns, int64_t K, bool adds, int threads) {
  const int64_t panels = (columns + GEMM_COLUMNS - 1) / GEMM_COLUMNS;
  const int64_t chunk = chunk_rows(rows, K, panels, threads), chunks = (rows + chunk - 1) / chunk;
  parallel_items(useful_threads(rows * columns * K, threads), chunks * panels, [&](int64_t task, int) {
    const int64_t row = task / panels * chunk, column = task % panels * GEMM_COLUMNS;
    const int64_t n = min(chunk, rows - row), count = min<int64_t>(GEMM_COLUMNS, columns - column);
    float* const to = ptr<float>(out) + row * out_stride + column;
    gemm_columns({ptr<const float>(a) + row * a_stride, a_stride, a_k}, n,
                 {ptr<const float>(b) + column * b_stride, b_stride, b_k}, count, K, adds, to, out_stride);
    if (!bias) return;
    const float* const shift = ptr<const float>(bias) + column;
    for (int64_t r = 0; r < n; ++r)
      for (int64_t c = 0; c < count; ++c) to[r * out_stride + c] += shift[c];
  });
}

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
      bf16_gemm_columns<EmulatedDot>(a, x_stride, rows, b, w_stride, end - begin, after, D, to, out_stride);
    else
      bf16_gemm_columns<MachineDot>(a, x_stride, rows, b, w_stride, end - begin, after, D, to, out_stride);
  }
  return nullptr;
}

// out (rows, columns) = x W' + bias. W is (columns, K), or with `transposed` (K, columns); x_bf16, x rounded, is null
// where the product is in float32. `panels` holds panel_floats for each thread.
void decode_product(uintptr_t x, uintptr_t x_bf16, int64_t x_stride, uintptr_t weight, uintptr_t bias,
                    bool weight_is_bf16, int64_t w_stride, bool transposed, uintptr_t out, int64_t rows,
                    int64_t columns, int64_t K, bool emulate, uintptr_t panels, int64_t panel_floats, int threads) {
  const Matrix matrix = {
      ptr<const void>(weight), ptr<const void>(bias), columns, K, w_stride, weight_is_bf16, transposed};
  const int64_t parts = (columns + DECODE_COLUMNS - 1) / DECODE_COLUMNS;
  const int64_t chunk = chunk_rows(rows, K, parts, threads), chunks = (rows + chunk - 1) / chunk;
  parallel_items(useful_threads(rows * columns * K, threads), chunks * parts, [&](int64_t task, int thread) {
    const int64_t row = task / parts * chunk, begin = task % parts * DECODE_COLUMNS;
    const int64_t n = min(chunk, rows - row), end = min(columns, begin + DECODE_COLUMNS);
    const Activations input = {ptr<const float>(x) + row * x_stride,
                               x_bf16 ? ptr<const uint16_t>(x_bf16) + row * x_stride : nullptr, x_stride, n};
    float* const to = ptr<float>(out) + row * columns + begin;
    float* const panel = ptr<float>(panels) + thread * panel_floats;
    if (emulate)
      multiply<EmulatedDot>(input, matrix, begin, end, to, columns, panel);
    else
      multiply<MachineDot>(input, matrix, begin, end, to, columns, panel);
    for (int64_t r = 0; r < n; ++r) add_bias(matrix, begin, end - begin, to + r * columns);
  });
}

// Writes the panel_floats of decode_product.
void decode_product_panel(int64_t K, uintptr_t size) { *ptr<int64_t>(size) = panel_size(K); }

CONSTANT(vector_lanes, W)
KERNEL(f32_product)
KERNEL(bf16_product)
KERNEL(decode_product)
KERNEL(decode_product_panel)

}  // namespace
