// Products of linear layers and heads on the CPU, with float32 results. f32_gemm.h, bf16_gemm.h and product.h have the
// algorithms.
//
//     f32_product       float32, any transposes: kernels/linear.py and heads
//     bf16_product      bfloat16, which torch does not have with float32 results; it needs AVX512-BF16
//     decode_product    x W' + b in the decode step's order of sums: kernels/linear.py with decode_order
//     bf16_linear_gradients    its gradients with a weight in bfloat16; it needs AVX512-BF16
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

// The fewest chunks of at most `limit` rows.
int64_t fewest_chunks(int64_t rows, int64_t limit) { return max<int64_t>(1, (rows + limit - 1) / limit); }

// Rows of a chunk, where rows are divided into chunks of nearly one size, which tiles divide.
int64_t even_chunk(int64_t rows, int64_t chunks) {
  return max<int64_t>(GEMM_ROWS, (rows + chunks * GEMM_ROWS - 1) / (chunks * GEMM_ROWS) * GEMM_ROWS);
}

// Rows of A that a thread takes at a time: few enough to stay in the cache and to be shared out evenly, but not fewer
// than MIN_CHUNK_ROWS, as a panel is made anew for each chunk.
int64_t chunk_rows(int64_t rows, int64_t K, int64_t parts, int threads) {
  const int64_t cached = max<int64_t>(128, CHUNK_BYTES / 4 / max<int64_t>(K, 1));
  const int64_t shared = max(MIN_CHUNK_ROWS, (rows * parts + 4 * threads - 1) / (4 * threads));
  const int64_t chunks = fewest_chunks(rows, min(cached, shared));
  const int64_t even = chunks / threads * threads;  // as many for each thread
  return even_chunk(rows, even && rows <= even * cached ? even : chunks);
}

// Few products are done before other threads are awake.
int useful_threads(int64_t products, int threads) { return products > 1 << 19 ? threads : 1; }

// Calls body(chunk, panel) once for each, on the threads that are free. Threads that write neighbouring lines at one
// time take them from each other's caches: they have different chunks, or panels far apart.
template <class Body>
void parallel_blocks(int threads, int64_t chunks, int64_t panels, Body body) {
  const int64_t parts = chunks == 1 ? threads : 1, size = (panels + parts - 1) / parts;
  parallel_items(threads, chunks * parts * size, [&](int64_t item, int thread) {
    const int64_t step = item / chunks, panel = step % parts * size + step / parts;
    if (panel < panels) body(item % chunks, panel, thread);
  });
}

// out (rows, columns) = A B + bias, or with `adds` out += A B + bias. Element (i, k) of A is at i a_stride + k a_k,
// element (k, c) of B at c b_stride + k b_k, of which one is 1; bias (columns,) or null.
void f32_product(uintptr_t a, int64_t a_stride, int64_t a_k, uintptr_t b, int64_t b_stride, int64_t b_k, uintptr_t bias,
                 uintptr_t out, int64_t out_stride, int64_t rows, int64_t columns, int64_t K, bool adds, int threads) {
  const int64_t panels = (columns + GEMM_COLUMNS - 1) / GEMM_COLUMNS;
  const int64_t chunk = chunk_rows(rows, K, panels, threads), chunks = (rows + chunk - 1) / chunk;
  parallel_blocks(useful_threads(rows * columns * K, threads), chunks, panels, [&](int64_t c, int64_t panel, int) {
    const int64_t row = c * chunk, column = panel * GEMM_COLUMNS;
    const int64_t n = min(chunk, rows - row), count = min<int64_t>(GEMM_COLUMNS, columns - column);
    float* const to = ptr<float>(out) + row * out_stride + column;
    gemm_columns({ptr<const float>(a) + row * a_stride, a_stride, a_k}, n,
                 {ptr<const float>(b) + column * b_stride, b_stride, b_k}, count, columns - column - count, K, adds, to,
                 out_stride);
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

// out (rows, columns) = x W' + bias of x (rows, K), dense. W is (columns, K), or with `transposed` (K, columns).
// x_bf16, of x's shape or null, receives x rounded, which is what is multiplied with `in_bf16`. `panels` holds
// panel_floats for each thread.
void decode_product(uintptr_t x, uintptr_t x_bf16, bool in_bf16, uintptr_t weight, uintptr_t bias, bool weight_is_bf16,
                    int64_t w_stride, bool transposed, uintptr_t out, int64_t rows, int64_t columns, int64_t K,
                    bool emulate, uintptr_t panels, int64_t panel_floats, int threads) {
  const Matrix matrix = {
      ptr<const void>(weight), ptr<const void>(bias), columns, K, w_stride, weight_is_bf16, transposed};
  const int64_t parts = (columns + DECODE_COLUMNS - 1) / DECODE_COLUMNS;
  const int64_t chunk = chunk_rows(rows, K, parts, threads), chunks = (rows + chunk - 1) / chunk;
  const int team = useful_threads(rows * columns * K, threads);
  if (x_bf16)
    parallel_items(team, chunks, [&](int64_t c, int) {
      const int64_t begin = c * chunk * K, end = min(rows, (c + 1) * chunk) * K;
      round_row(ptr<const float>(x) + begin, end - begin, ptr<uint16_t>(x_bf16) + begin);
    });
  parallel_blocks(team, chunks, parts, [&](int64_t c, int64_t part, int thread) {
    const int64_t row = c * chunk, begin = part * DECODE_COLUMNS;
    const int64_t n = min(chunk, rows - row), end = min(columns, begin + DECODE_COLUMNS);
    const Activations input = {ptr<const float>(x) + row * K, in_bf16 ? ptr<const uint16_t>(x_bf16) + row * K : nullptr,
                               K, n};
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

// out (rows, columns) = A B, dense; `rounded`, of its shape or null, receives it in bfloat16. bf16_gemm.h says what B
// is.
template <class Dot>
void multiply_pairs(const PairRows& a, const uint16_t* b, int64_t b_stride, bool by_rows, int64_t rows, int64_t columns,
                    int64_t K, float* out, uint16_t* rounded, int threads) {
  const int64_t parts = (columns + PANEL_COLUMNS - 1) / PANEL_COLUMNS;
  const int team = useful_threads(rows * columns * K, threads);
  const int64_t cached = CHUNK_BYTES / (4 * PANEL_PAIRS);  // rows of A, of a panel's elements
  const int64_t shared = max<int64_t>(2 * MIN_CHUNK_ROWS, (rows * parts + 2 * team - 1) / (2 * team));
  const int64_t chunk = even_chunk(rows, fewest_chunks(rows, team > 1 ? min(cached, shared) : cached));
  const int64_t chunks = (rows + chunk - 1) / chunk;
  parallel_blocks(team, chunks, parts, [&](int64_t c, int64_t part, int) {
    const int64_t row = c * chunk, column = part * PANEL_COLUMNS;
    const int64_t n = min(chunk, rows - row), count = min<int64_t>(PANEL_COLUMNS, columns - column);
    float* const to = out + row * columns + column;
    bf16_gemm_columns<Dot>(a.from(row, 0), n, b + column * (by_rows ? b_stride : 1), b_stride, by_rows, count, K, to,
                           columns);
    for (int64_t r = 0; r < n && rounded; ++r)
      round_row(to + r * columns, count, rounded + (row + r) * columns + column);
  });
}

// These are the arguments of bf16_linear_gradients.
struct LinearGradients {
  const float* grad;
  const uint16_t *x, *weight;
  float *x_grad, *sums, *pairs;
  uint16_t *weight_grad, *grad_rows;  // x_grad or weight_grad is null where it is not needed
  int64_t grad_stride, x_stride, w_stride, rows, in, out;
  bool transposed;
};

template <class Dot>
void find_gradients(const LinearGradients& g, int threads) {
  const int64_t out = g.out, in = g.in, width = g.transposed ? in : out, num_pairs = (g.rows + 1) / 2;
  constexpr int64_t chunk = MIN_CHUNK_ROWS / 2;  // of pairs of rows
  parallel_items(useful_threads(g.rows * out * in, threads), (num_pairs + chunk - 1) / chunk, [&](int64_t c, int) {
    for (int64_t p = c * chunk; p < min(num_pairs, (c + 1) * chunk); ++p) {
      const int64_t count = min<int64_t>(2, g.rows - 2 * p);
      for (int64_t r = 2 * p; r < 2 * p + count; ++r) {
        const float* const from = g.grad + r * g.grad_stride;
        uint16_t* const to = g.grad_rows + r * out;
        int64_t k = 0;
        for (; k + 16 <= out; k += 16) Dot::round(load<16>(from + k), to + k);
        round_row(from + k, out - k, to + k);
      }
      if (!g.weight_grad) continue;
      const int64_t stride = g.transposed ? g.x_stride : out;
      const uint16_t* const first = (g.transposed ? g.x : g.grad_rows) + 2 * p * stride;
      float* const to = g.pairs + p * width;  // pairs of bfloat16, moved as floats
      for (int64_t k = 0; k < width; k += W) {
        const u32 pairs = interleave(first + k, count == 2 ? first + stride + k : nullptr, width - k);
        if (width - k >= W)
          store(to + k, (f32)pairs);
        else
          store_partial(to + k, (f32)pairs, (int)(width - k));
      }
    }
  });
  if (g.x_grad)
    multiply_pairs<Dot>({g.grad_rows, out, 2}, g.weight, g.w_stride, g.transposed, g.rows, in, out, g.x_grad, nullptr,
                        threads);
  if (g.weight_grad)
    multiply_pairs<Dot>({(const uint16_t*)g.pairs, 2, 2 * width}, g.transposed ? g.grad_rows : g.x,
                        g.transposed ? out : g.x_stride, false, width, g.transposed ? out : in, g.rows, g.sums,
                        g.weight_grad, threads);
}

// The gradients of x (rows, in) and of the weight, (out, in) or with `transposed` (in, out), given that of the output,
// (rows, out): x_grad in float32, weight_grad in bfloat16, or null. x and weight are in bfloat16, grad is in float32,
// and is rounded. Scratch memory: grad_rows (rows, out) and pairs, 2 ceil(rows / 2) by the rows of the weight, in
// bfloat16; sums, of the weight's shape, in float32.
void bf16_linear_gradients(uintptr_t grad, int64_t grad_stride, uintptr_t x, int64_t x_stride, uintptr_t weight,
                           int64_t w_stride, bool transposed, uintptr_t x_grad, uintptr_t weight_grad,
                           uintptr_t grad_rows, uintptr_t pairs, uintptr_t sums, int64_t rows, int64_t in, int64_t out,
                           bool emulate, int threads) {
  const LinearGradients g = {ptr<const float>(grad),
                             ptr<const uint16_t>(x),
                             ptr<const uint16_t>(weight),
                             ptr<float>(x_grad),
                             ptr<float>(sums),
                             ptr<float>(pairs),
                             ptr<uint16_t>(weight_grad),
                             ptr<uint16_t>(grad_rows),
                             grad_stride,
                             x_stride,
                             w_stride,
                             rows,
                             in,
                             out,
                             transposed};
  emulate ? find_gradients<EmulatedDot>(g, threads) : find_gradients<MachineDot>(g, threads);
}

CONSTANT(vector_lanes, W)
KERNEL(f32_product)
KERNEL(bf16_product)
KERNEL(decode_product)
KERNEL(bf16_linear_gradients)
KERNEL(decode_product_panel)

}  // namespace
