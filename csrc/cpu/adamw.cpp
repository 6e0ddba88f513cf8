// The optimizer's step over all parameters, in two passes over memory, on the CPU; rlhf_fast/training/compiled_adamw.py
// calls them; torch.optim.AdamW, fused, is the reference.
//
//     parameters   | w0                          | w1   | w2              | ...
//     chunks       | 0       | 1       | 2       | 3    | 4       | 5     |      of one parameter each, threads share
//     them
//
//     1. sum_squares    reads the gradients; a float64 sum for each chunk, added in order
//     2. adamw_step     reads gradient, weight and moments; writes moments, weight, the model's 16-bit copy, the
//     average
//
// Floor: 4 bytes a weight in pass 1, 28 in pass 2, and 2 for a copy, 8 for an average; a gradient in bfloat16 takes 2
// less in each pass. It is converted as it is read, which is exact: the bits are those of the same gradient in float32.
//
// Chunks depend on the sizes alone, and each element has one formula: the bits do not depend on the number of threads.
#include "intrinsics.h"
#include "kernel.h"
#include "simd.h"

namespace {

constexpr int64_t CHUNK = 16384, MIN_WEIGHTS_TO_THREAD = 65536;

// The arrays have an entry for each parameter; an address may be null where that is said.
struct Parameters {
  int64_t count;
  const int64_t* first_chunks;  // count + 1: parameter i has the chunks first_chunks[i] <= c < first_chunks[i + 1]
  const int64_t* sizes;
  const void* const* grads;       // null: the step leaves weight and moments as they are
  const int64_t* are_grads_bf16;  // 0: the gradient is float32
  float* const* weights;
  float* const* exp_avgs;
  float* const* exp_avg_sqs;
  float* const* steps;     // how many steps the parameter has taken
  bf16* const* copies;     // null: none
  float* const* averages;  // null: none
  const double* weight_decays;
};

struct Settings {
  double lr, beta1, beta2, eps;
  float grad_scale, average_weight;
};

// A chunk's factors, rounded to float32 where torch's fused kernel rounds them.
struct Factors {
  float decay, exp_avg_weight, beta2, exp_avg_sq_weight, negative_step_size, bias_correction2_sqrt, eps;
};

struct Span {
  int64_t parameter, begin, end;
};

INLINE Span find_span(const Parameters& p, int64_t chunk) {
  int64_t low = 0, high = p.count;  // first_chunks[low] <= chunk < first_chunks[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.first_chunks[middle] <= chunk ? low : high) = middle;
  }
  const int64_t begin = (chunk - p.first_chunks[low]) * CHUNK;
  return {low, begin, min(begin + CHUNK, p.sizes[low])};
}

INLINE f32 sqrt(f32 x) {
#if defined(__AVX512F__) && !defined(SIMD_WIDTH)
  return (f32)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__) && !defined(SIMD_WIDTH)
  return (f32)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__) && !defined(SIMD_WIDTH)
  return (f32)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// Returns x, rounded to float32 here: the compiler cannot make one operation of the product x and a sum after it.
INLINE f32 rounded(f32 x) {
#if defined(__x86_64__) && !defined(SIMD_WIDTH)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__) && !defined(SIMD_WIDTH)
  __asm__("" : "+w"(x));
#else
  __asm__("" : "+m"(x));
#endif
  return x;
}

// torch.lerp, which is exact at both ends.
INLINE f32 lerp(f32 from, f32 to, float weight) {
  return weight < 0.5f ? weight * (to - from) + from : (weight - 1.f) * (to - from) + to;
}

Factors make_factors(const Settings& s, double weight_decay, double step) {
  const double correction1 = 1 - __builtin_pow(s.beta1, step), correction2 = 1 - __builtin_pow(s.beta2, step);
  Factors f;
  f.decay = (float)(1 - s.lr * weight_decay);
  f.exp_avg_weight = (float)(1 - s.beta1);
  f.beta2 = (float)s.beta2;
  f.exp_avg_sq_weight = (float)(1 - s.beta2);
  f.negative_step_size = (float)-(s.lr / correction1);
  f.bias_correction2_sqrt = (float)__builtin_sqrt(correction2);
  f.eps = (float)s.eps;
  return f;
}

struct NoGrad {};
template <class Grad>
constexpr bool HAS_GRAD = true;
template <>
constexpr bool HAS_GRAD<NoGrad> = false;

struct FullVector {
  template <class T>
  INLINE f32 read(const T* p) const {
    return load(p);
  }
  template <class T>
  INLINE void write(T* p, f32 x) const {
    store(p, x);
  }
};
struct PartialVector {
  int n;
  template <class T>
  INLINE f32 read(const T* p) const {
    return load_partial(p, n, 0.f);
  }
  template <class T>
  INLINE void write(T* p, f32 x) const {
    store_partial(p, x, n);
  }
};

template <class Grad, bool HAS_COPY, bool HAS_AVERAGE, class Vector>
INLINE void update(const Parameters& p, const Settings& s, const Factors& f, int64_t i, int64_t j, Vector vector) {
  f32 weight = vector.read(p.weights[i] + j);
  if constexpr (HAS_GRAD<Grad>) {
    const f32 grad = rounded(vector.read((const Grad*)p.grads[i] + j) * s.grad_scale);
    const f32 exp_avg = lerp(vector.read(p.exp_avgs[i] + j), grad, f.exp_avg_weight);
    const f32 exp_avg_sq = f.exp_avg_sq_weight * grad * grad + rounded(vector.read(p.exp_avg_sqs[i] + j) * f.beta2);
    const f32 denominator = sqrt(exp_avg_sq) / f.bias_correction2_sqrt + f.eps;
    weight = rounded(weight * f.decay);
    weight = weight + f.negative_step_size * exp_avg / denominator;
    vector.write(p.exp_avgs[i] + j, exp_avg);
    vector.write(p.exp_avg_sqs[i] + j, exp_avg_sq);
    vector.write(p.weights[i] + j, weight);
  }
  if constexpr (HAS_COPY) vector.write(p.copies[i] + j, weight);
  if constexpr (HAS_AVERAGE)
    vector.write(p.averages[i] + j, lerp(vector.read(p.averages[i] + j), weight, s.average_weight));
}

template <class Grad, bool HAS_COPY, bool HAS_AVERAGE>
void update_span(const Parameters& p, const Settings& s, Span span) {
  const int64_t i = span.parameter;
  const Factors f = HAS_GRAD<Grad> ? make_factors(s, p.weight_decays[i], *p.steps[i]) : Factors{};
  int64_t j = span.begin;
  for (; j + W <= span.end; j += W) update<Grad, HAS_COPY, HAS_AVERAGE>(p, s, f, i, j, FullVector{});
  if (j < span.end) update<Grad, HAS_COPY, HAS_AVERAGE>(p, s, f, i, j, PartialVector{(int)(span.end - j)});
}

template <class Grad>
void update_span(const Parameters& p, const Settings& s, Span span) {
  const bool has_copy = p.copies[span.parameter], has_average = p.averages[span.parameter];
  if (has_copy && has_average)
    update_span<Grad, true, true>(p, s, span);
  else if (has_copy)
    update_span<Grad, true, false>(p, s, span);
  else if (has_average)
    update_span<Grad, false, true>(p, s, span);
  else if (HAS_GRAD<Grad>)
    update_span<Grad, false, false>(p, s, span);
}

// Returns the sum of the squares of a chunk's gradients.
template <class Grad>
double chunk_sum_squares(const Grad* grad, Span span) {
  DoubleSums squares[2];
  int64_t j = span.begin;
  for (; j + 2 * W <= span.end; j += 2 * W) {
    squares[0].add_square(load(grad + j));
    squares[1].add_square(load(grad + j + W));
  }
  for (; j < span.end; j += W) squares[0].add_square(load_partial(grad + j, (int)min<int64_t>(W, span.end - j), 0.f));
  return squares[0].total() + squares[1].total();
}

// Writes to *sums the sum of the squares of all gradients. sums: room for one number a chunk, whose sums are added in
// order.
void sum_squares(int64_t count, uintptr_t first_chunks, uintptr_t sizes, uintptr_t grads, uintptr_t are_grads_bf16,
                 uintptr_t sums, int threads) {
  Parameters p = {};
  p.count = count;
  p.first_chunks = ptr<const int64_t>(first_chunks);
  p.sizes = ptr<const int64_t>(sizes);
  p.grads = ptr<const void* const>(grads);
  p.are_grads_bf16 = ptr<const int64_t>(are_grads_bf16);
  const int64_t num_chunks = p.first_chunks[count];
  double* const out = ptr<double>(sums);
#pragma omp parallel for schedule(dynamic, 8) \
    num_threads(threads) if (threads > 1 && num_chunks * CHUNK > MIN_WEIGHTS_TO_THREAD)
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const Span span = find_span(p, chunk);
    const void* const grad = p.grads[span.parameter];
    if (!grad)
      out[chunk] = 0;
    else if (p.are_grads_bf16[span.parameter])
      out[chunk] = chunk_sum_squares((const bf16*)grad, span);
    else
      out[chunk] = chunk_sum_squares((const float*)grad, span);
  }
  for (int64_t chunk = 1; chunk < num_chunks; ++chunk) out[0] += out[chunk];
}

// One step of AdamW with decoupled weight decay, on gradients that are multiplied by grad_scale. A parameter without
// gradient is skipped; its copy and average are written all the same.
void adamw_step(int64_t count, uintptr_t first_chunks, uintptr_t sizes, uintptr_t grads, uintptr_t are_grads_bf16,
                uintptr_t weights, uintptr_t steps, uintptr_t exp_avgs, uintptr_t exp_avg_sqs, uintptr_t copies,
                uintptr_t averages, uintptr_t weight_decays, double lr, double beta1, double beta2, double eps,
                float grad_scale, float average_weight, int threads) {
  const Parameters p = {count,
                        ptr<const int64_t>(first_chunks),
                        ptr<const int64_t>(sizes),
                        ptr<const void* const>(grads),
                        ptr<const int64_t>(are_grads_bf16),
                        ptr<float* const>(weights),
                        ptr<float* const>(exp_avgs),
                        ptr<float* const>(exp_avg_sqs),
                        ptr<float* const>(steps),
                        ptr<bf16* const>(copies),
                        ptr<float* const>(averages),
                        ptr<const double>(weight_decays)};
  const Settings s = {lr, beta1, beta2, eps, grad_scale, average_weight};
  const int64_t num_chunks = p.first_chunks[count];
  for (int64_t i = 0; i < count; ++i)
    if (p.grads[i]) *p.steps[i] += 1;
#pragma omp parallel for schedule(dynamic, 8) \
    num_threads(threads) if (threads > 1 && num_chunks * CHUNK > MIN_WEIGHTS_TO_THREAD)
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const Span span = find_span(p, chunk);
    if (!p.grads[span.parameter])
      update_span<NoGrad>(p, s, span);
    else if (p.are_grads_bf16[span.parameter])
      update_span<bf16>(p, s, span);
    else
      update_span<float>(p, s, span);
  }
}

CONSTANT(adamw_chunk, CHUNK)
KERNEL(sum_squares)
KERNEL(adamw_step)

}  // namespace
