// Draws a token a row, on NVIDIA GPUs; kernels/sample_tokens.py says what it means, sample.cuh and filters.cuh how it
// is done.
//
// Memory is the floor: one read of the logits. Without a filter a block takes a tile of a row, which it keeps in
// registers between the tile's largest logit, its sums and its draw (some 50 operations a token, no logarithm); a warp
// a row then joins the tiles in their order, in float64. With a filter the tiles are summed only; a block a row then
// looks at the row some 3 to 5 times more, mostly in the second-level cache, to find the cut, and once to draw.
// How a row is cut into tiles depends on V alone: its bits are its own.
#include "filters.cuh"

namespace {

constexpr int per_thread = 16;        // tokens of a tile
constexpr int threads_of_tile = 256;  // of a long row; kernels/sample_tokens.py knows both

struct Part {
  double score;
  float largest, raw, mass, moment, logit;
  int token;
};
static_assert(sizeof(Part) == 32, "kernels/sample_tokens.py gives the memory");

// e^-z of a kept token around the largest logit; infinite where a token has no chance.
__device__ __forceinline__ float wait_scale(float x, float top, float inverse) {
  return x == -INFINITY ? INFINITY : fminf(__expf((top - x) * inverse), 3e38f);
}

template <class T, bool DRAWS>
__global__ void __launch_bounds__(threads_of_tile)
    tiles_kernel(const T* logits, int64_t stride, int V, int tiles, Options options, Part* parts) {
  __shared__ DrawMemory memory;
  __shared__ float sums[lanes];
  constexpr int per = per_word<T>, count = per_thread / per;
  const int64_t row = blockIdx.x / tiles;
  const int first = static_cast<int>(blockIdx.x % tiles) * blockDim.x * count;
  const Request r(options, row, V);
  const Words<T> words(logits + row * stride, 0, V);
  float x[count][per], top = -INFINITY;
  uint4 given[count];
#pragma unroll
  for (int u = 0; u < count; ++u) given[u] = words.read(first + u * blockDim.x + threadIdx.x);
#pragma unroll
  for (int u = 0; u < count; ++u) {
    unpack<T>(given[u], x[u]);
#pragma unroll
    for (int i = 0; i < per; ++i) top = fmaxf(top, x[u][i]);
  }
  top = block_reduce<Largest>(top, -INFINITY, sums);
  const float origin = top == -INFINITY ? 0.f : top;
  float raw = 0.f, mass = 0.f, moment = 0.f;
#pragma unroll
  for (int u = 0; u < count; ++u) {
#pragma unroll
    for (int i = 0; i < per; ++i) {
      const float d = x[u][i] - origin, z = d * r.inverse, p = __expf(z);
      mass += p, moment += p * fmaxf(z, -1000.f);
      raw += __expf(d);
    }
  }
  raw = block_reduce<Add>(raw, 0.f, sums), mass = block_reduce<Add>(mass, 0.f, sums);
  moment = block_reduce<Add>(moment, 0.f, sums);
  Drawn best = nobody();
  if (DRAWS && top > -INFINITY) {
    best = draw(
        r, top,
        [&](auto f) {
#pragma unroll
          for (int u = 0; u < count; ++u) {
            const int v = (first + u * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * per;
#pragma unroll
            for (int quad = 0; quad < per; quad += 4) {
              float some[4], scale[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) some[i] = x[u][quad + i], scale[i] = wait_scale(some[i], top, r.inverse);
              f(v + quad, some, scale);
            }
          }
        },
        memory);
  }
  if (threadIdx.x == 0) parts[blockIdx.x] = {best.score, top, raw, mass, moment, best.logit, best.token};
}

// By a warp, whose lanes all get them. A NaN or +inf stays.
__device__ __forceinline__ RowSums joined(const Part* parts, int tiles, double temperature) {
  const int lane = threadIdx.x % lanes;
  float top = -INFINITY;
  for (int i = lane; i < tiles; i += lanes) top = fmaxf(top, parts[i].largest);
  const double largest = warp_reduce<Largest>(top);
  RowSums sums{largest, 0, 0, 0};
  for (int i = lane; i < tiles; i += lanes) {
    const Part part = parts[i];
    const double gap = part.largest == -INFINITY ? 0. : part.largest - largest, z = gap / temperature, by = exp(z);
    sums.raw += (temperature == 1. ? by : exp(gap)) * part.raw, sums.mass += by * part.mass;
    sums.moment += by > 0. ? by * (part.moment + z * part.mass) : 0.;
  }
  sums.raw = warp_reduce<Add>(sums.raw), sums.mass = warp_reduce<Add>(sums.mass);
  sums.moment = warp_reduce<Add>(sums.moment);
  return sums;
}

__global__ void __launch_bounds__(lanes)
    finish_kernel(int V, int tiles, const Part* parts, Options options, Outputs out) {
  const int64_t row = blockIdx.x;
  const Request r(options, row, V);
  parts += row * tiles;
  const RowSums sums = joined(parts, tiles, r.temperature);
  Drawn best = nobody();
  for (int i = threadIdx.x; i < tiles; i += lanes) best.offer(parts[i].score, parts[i].logit, parts[i].token);
  best = warp_best(best);
  if (threadIdx.x == 0) report(out, row, r, sums, best, 0.);
}

template <class T>
struct Kept {
  const Row<T>& row;
  Cut cut;

  // p of a token, 0 if it is not kept
  __device__ __forceinline__ float mass(float x, int v) const {
    return cut.keeps(x, v) ? __expf((x - row.largest) * row.inverse) : 0.f;
  }
  // The sum of p; the same in all threads.
  __device__ __forceinline__ double total(double* memory) const {
    double sum = 0;
    row.each([&](int v, const float (&x)[per_word<T>]) {
      float part = 0.f;
#pragma unroll
      for (int i = 0; i < per_word<T>; ++i) part += mass(x[i], v + i);
      sum += part;
    });
    return block_reduce<Add>(sum, 0., memory);
  }
};

template <class T>
__device__ __forceinline__ Cut choose_cut(const Row<T>& row, const Request& r, double mass, CutMemory& memory,
                                          double* sums) {
  Cut cut{-INFINITY, all_equal};
  if (r.top_k) cut = find_cut<false>(row, static_cast<double>(r.top_k), memory);
  if (r.top_p < 1.f) {
    if (r.top_k) mass = Kept<T>{row, cut}.total(sums);
    cut = stricter(cut, find_cut<true>(row, r.top_p * mass, memory));
  }
  if (r.min_p > 0.f) cut = stricter(cut, {least_of_min_p(row, r.min_p), all_equal});
  return cut;
}

template <class T>
__global__ void __launch_bounds__(most_threads)
    filter_kernel(const T* logits, int64_t stride, int V, int tiles, const Part* parts, Options options, Outputs out) {
  __shared__ DrawMemory drawing;
  __shared__ CutMemory cutting;
  __shared__ double totals[lanes];
  const int64_t index = blockIdx.x;
  const Request r(options, index, V);
  const RowSums sums = joined(parts + index * tiles, tiles, r.temperature);  // every warp: the same numbers
  if (!r.valid || !(sums.largest > -infinite) || !(sums.raw < infinite)) {
    if (threadIdx.x == 0) report(out, index, r, sums, nobody(), 0.);
    return;
  }
  const Row<T> row{Words<T>(logits + index * stride, 0, V), static_cast<float>(sums.largest), r.temperature, r.inverse};
  const bool filters = r.filters() && !r.greedy;
  Kept<T> kept{row, {-INFINITY, all_equal}};
  double log_kept_mass = 0;
  if (filters) {
    kept.cut = choose_cut(row, r, sums.mass, cutting, totals);
    log_kept_mass = min(log(kept.total(totals) / sums.mass), 0.);
  }
  const Drawn best = draw(
      r, row.largest,
      [&](auto f) {
        row.each([&](int v, const float (&x)[per_word<T>]) {
#pragma unroll
          for (int quad = 0; quad < per_word<T>; quad += 4) {
            float some[4], scale[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              some[i] = x[quad + i];
              scale[i] = kept.cut.keeps(some[i], v + quad + i) ? wait_scale(some[i], row.largest, r.inverse) : INFINITY;
            }
            f(v + quad, some, scale);
          }
        });
      },
      drawing);
  if (threadIdx.x == 0) report(out, index, r, sums, best, log_kept_mass);
}

// logits: rows of V, `stride` apart. parts: scratch of a Part a tile. `filtered`: some row may have a filter.
const char* sample_tokens(uintptr_t logits, int dtype, int64_t B, int64_t V, int64_t stride, uintptr_t temperature,
                          uintptr_t top_k, uintptr_t top_p, uintptr_t min_p, int64_t seed, uintptr_t row_ids,
                          uintptr_t steps, uintptr_t noise, uintptr_t tokens, uintptr_t logprobs,
                          uintptr_t raw_logprobs, uintptr_t kept_logprobs, uintptr_t log_kept_mass, uintptr_t entropy,
                          int threads, int64_t tiles, uintptr_t parts, uintptr_t stream) {
  if (B == 0) return nullptr;
  const Options options{
      ptr<const float>(temperature), ptr<const int64_t>(top_k), ptr<const float>(top_p), ptr<const float>(min_p), seed,
      ptr<const int64_t>(row_ids),   ptr<const int64_t>(steps), ptr<const float>(noise)};
  const Outputs out{ptr<int64_t>(tokens),      ptr<float>(logprobs),      ptr<float>(raw_logprobs),
                    ptr<float>(kept_logprobs), ptr<float>(log_kept_mass), ptr<float>(entropy)};
  const bool filtered = top_k || top_p || min_p;
  const unsigned blocks = blocks_for(B * tiles, 1);
  if (!blocks) return "more tiles of rows than a grid has blocks";
  const int columns = static_cast<int>(V), count = static_cast<int>(tiles);
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* const x = ptr<const T>(logits);
    Part* const sums = ptr<Part>(parts);
    const char* error = launch(filtered ? tiles_kernel<T, false> : tiles_kernel<T, true>, blocks, threads, 0, stream, x,
                               stride, columns, count, options, sums);
    if (error) return error;
    if (!filtered) return launch(finish_kernel, blocks_for(B, 1), lanes, 0, stream, columns, count, sums, options, out);
    const int wide = min(most_threads, 2 * threads);
    return launch(filter_kernel<T>, blocks_for(B, 1), wide, 0, stream, x, stride, columns, count, sums, options, out);
  });
}

KERNEL(sample_tokens)

}  // namespace
