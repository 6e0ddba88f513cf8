// Samples a token from each row of logits on NVIDIA GPUs; kernels/sample_tokens.py defines it, sample.cuh and
// filters.cuh hold the algorithms.
//
// Floor: one load of the logits; without a filter some 50 operations a token, none of them a logarithm.
//
//     logits of a row        |   tile 0   |   tile 1   |  ...  | last tile |
//     tiles_kernel           block 0      block 1       ...      each keeps its tile in registers
//     finish_kernel          one warp per row merges the tiles' sums and best tokens
//     or filter_kernel       one block per row loads the row 3 to 5 times more, mostly from the L2 cache, to find the
//                            cutoff, and once to sample
//
// Deterministic: tiles depend on V alone and are merged in order, in float64, so a row's bits do not depend on the
// batch.
#include "filters.cuh"

namespace {

constexpr int tokens_per_thread = 16;  // of a tile
constexpr int tile_threads = 256;      // of a long row

// A tile's largest logit, its sums around it, and its best token.
struct TileResult {
  double score;
  float max_logit, raw_mass, mass, moment, logit;
  int token;
};

// e^-z of a token, z relative to the largest logit; infinite if the token cannot be sampled.
__device__ __forceinline__ float inverse_mass(float x, float max_logit, float inverse_temperature) {
  return x == -INFINITY ? INFINITY : fminf(__expf((max_logit - x) * inverse_temperature), 3e38f);
}

template <class T, bool SAMPLE>
__global__ void __launch_bounds__(tile_threads)
    tiles_kernel(const T* logits, int64_t stride, int V, int num_tiles, SampleArgs args, TileResult* tiles) {
  __shared__ SampleShared sample_shared;
  __shared__ float sums_shared[warp_size];
  constexpr int size = vec_size<T>, U = tokens_per_thread / size;
  const int64_t row_index = blockIdx.x / num_tiles;
  const int first = static_cast<int>(blockIdx.x % num_tiles) * blockDim.x * U;
  const SamplingParams params = sampling_params(args, row_index, V);
  const UnalignedRow<T> row(logits + row_index * stride, 0, V);
  float x[U][size], max_logit = -INFINITY;
  uint4 vecs[U];
#pragma unroll
  for (int u = 0; u < U; ++u) vecs[u] = row.load(first + u * blockDim.x + threadIdx.x);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    unpack<T>(vecs[u], x[u]);
#pragma unroll
    for (int i = 0; i < size; ++i) max_logit = fmaxf(max_logit, x[u][i]);
  }
  max_logit = block_reduce<Max>(max_logit, -INFINITY, sums_shared);
  const float origin = max_logit == -INFINITY ? 0.f : max_logit;
  float raw_mass = 0.f, mass = 0.f, moment = 0.f;
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int i = 0; i < size; ++i) {
      const float distance = x[u][i] - origin, z = distance * params.inverse_temperature, p = __expf(z);
      mass += p;
      moment += p * fmaxf(z, -1000.f);
      raw_mass += __expf(distance);
    }
  }
  raw_mass = block_reduce<Add>(raw_mass, 0.f, sums_shared);
  mass = block_reduce<Add>(mass, 0.f, sums_shared);
  moment = block_reduce<Add>(moment, 0.f, sums_shared);
  Candidate best = no_candidate();
  if (SAMPLE && max_logit > -INFINITY) {
    best = gumbel_argmax(
        params, max_logit,
        [&](auto f) {
#pragma unroll
          for (int u = 0; u < U; ++u) {
            const int v = (first + u * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * size;
#pragma unroll
            for (int quad = 0; quad < size; quad += 4) {
              float quad_x[4], inverse_masses[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                quad_x[i] = x[u][quad + i];
                inverse_masses[i] = inverse_mass(quad_x[i], max_logit, params.inverse_temperature);
              }
              f(v + quad, quad_x, inverse_masses);
            }
          }
        },
        sample_shared);
  }
  if (threadIdx.x == 0) tiles[blockIdx.x] = {best.score, max_logit, raw_mass, mass, moment, best.logit, best.token};
}

// Merges the sums of a row's tiles by a warp, all of whose lanes get them. A NaN or +inf stays.
__device__ __forceinline__ RowSums merge_tiles(const TileResult* tiles, int num_tiles, double temperature) {
  const int lane = threadIdx.x % warp_size;
  float lane_max = -INFINITY;
  for (int i = lane; i < num_tiles; i += warp_size) lane_max = fmaxf(lane_max, tiles[i].max_logit);
  const double max_logit = warp_reduce<Max>(lane_max);
  RowSums sums{max_logit, 0, 0, 0};
  for (int i = lane; i < num_tiles; i += warp_size) {
    const TileResult tile = tiles[i];
    const double distance = tile.max_logit == -INFINITY ? 0. : tile.max_logit - max_logit;
    const double z = distance / temperature, factor = exp(z);
    sums.raw_mass += (temperature == 1. ? factor : exp(distance)) * tile.raw_mass;
    sums.mass += factor * tile.mass;
    sums.moment += factor > 0. ? factor * (tile.moment + z * tile.mass) : 0.;
  }
  sums.raw_mass = warp_reduce<Add>(sums.raw_mass);
  sums.mass = warp_reduce<Add>(sums.mass);
  sums.moment = warp_reduce<Add>(sums.moment);
  return sums;
}

__global__ void __launch_bounds__(warp_size)
    finish_kernel(int V, int num_tiles, const TileResult* tiles, SampleArgs args, Outputs out) {
  const int64_t row = blockIdx.x;
  const SamplingParams params = sampling_params(args, row, V);
  tiles += row * num_tiles;
  const RowSums sums = merge_tiles(tiles, num_tiles, params.temperature);
  Candidate best = no_candidate();
  for (int i = threadIdx.x; i < num_tiles; i += warp_size) best.update(tiles[i].score, tiles[i].logit, tiles[i].token);
  best = warp_best(best);
  if (threadIdx.x == 0) write_outputs(out, row, params, sums, best, 0.);
}

// The tokens of a row that the filters keep.
template <class T>
struct KeptTokens {
  const LogitsRow<T>& logits;
  Cutoff cutoff;

  // The sum of their masses; the same in all threads.
  __device__ __forceinline__ double mass(double* shared) const {
    double sum = 0;
    logits.for_each_vec([&](int v, const float (&x)[vec_size<T>]) {
      float vec_sum = 0.f;
#pragma unroll
      for (int i = 0; i < vec_size<T>; ++i) vec_sum += cutoff.keeps(x[i], v + i) ? logits.fast_mass(x[i]) : 0.f;
      sum += vec_sum;
    });
    return block_reduce<Add>(sum, 0., shared);
  }
};

// Returns the cutoff of top-k, top-p and min-p together; `mass` is that of all tokens.
template <class T>
__device__ __forceinline__ Cutoff choose_cutoff(const LogitsRow<T>& logits, const SamplingParams& params, double mass,
                                                FilterShared& shared, double* sums_shared) {
  Cutoff cutoff = no_cutoff();
  if (params.top_k) cutoff = find_cutoff<false>(logits, static_cast<double>(params.top_k), shared);
  if (params.top_p < 1.f) {
    if (params.top_k) mass = KeptTokens<T>{logits, cutoff}.mass(sums_shared);
    cutoff = tighter(cutoff, find_cutoff<true>(logits, params.top_p * mass, shared));
  }
  if (params.min_p > 0.f)
    cutoff = tighter(cutoff, {min_p_threshold(logits.max_logit, logits.temperature, params.min_p), all_equal});
  return cutoff;
}

template <class T>
__global__ void __launch_bounds__(max_threads) filter_kernel(const T* logits, int64_t stride, int V, int num_tiles,
                                                             const TileResult* tiles, SampleArgs args, Outputs out) {
  __shared__ SampleShared sample_shared;
  __shared__ FilterShared filter_shared;
  __shared__ double sums_shared[warp_size];
  const int64_t row_index = blockIdx.x;
  const SamplingParams params = sampling_params(args, row_index, V);
  // Every warp merges the tiles and gets the same sums.
  const RowSums sums = merge_tiles(tiles + row_index * num_tiles, num_tiles, params.temperature);
  if (!params.valid || !(sums.max_logit > -infinity) || !(sums.raw_mass < infinity)) {
    if (threadIdx.x == 0) write_invalid(out, row_index);
    return;
  }
  const LogitsRow<T> row{UnalignedRow<T>(logits + row_index * stride, 0, V), static_cast<float>(sums.max_logit),
                         params.temperature, params.inverse_temperature};
  KeptTokens<T> kept{row, no_cutoff()};
  double log_kept_mass = 0;
  if (params.has_filter() && !params.greedy) {
    kept.cutoff = choose_cutoff(row, params, sums.mass, filter_shared, sums_shared);
    log_kept_mass = min(log(kept.mass(sums_shared) / sums.mass), 0.);
  }
  const Candidate best = gumbel_argmax(
      params, row.max_logit,
      [&](auto f) {
        row.for_each_vec([&](int v, const float (&x)[vec_size<T>]) {
#pragma unroll
          for (int quad = 0; quad < vec_size<T>; quad += 4) {
            float quad_x[4], inverse_masses[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              quad_x[i] = x[quad + i];
              inverse_masses[i] = kept.cutoff.keeps(quad_x[i], v + quad + i)
                                      ? inverse_mass(quad_x[i], row.max_logit, params.inverse_temperature)
                                      : INFINITY;
            }
            f(v + quad, quad_x, inverse_masses);
          }
        });
      },
      sample_shared);
  if (threadIdx.x == 0) write_outputs(out, row_index, params, sums, best, log_kept_mass);
}

// logits: rows of V numbers, `stride` apart. tiles: memory for B x num_tiles TileResults.
const char* sample_tokens(uintptr_t logits, int dtype, int64_t B, int64_t V, int64_t stride, uintptr_t temperature,
                          uintptr_t top_k, uintptr_t top_p, uintptr_t min_p, int64_t seed, uintptr_t row_ids,
                          uintptr_t steps, uintptr_t noise, uintptr_t tokens, uintptr_t logprobs,
                          uintptr_t raw_logprobs, uintptr_t kept_logprobs, uintptr_t log_kept_mass, uintptr_t entropy,
                          int threads, int64_t num_tiles, uintptr_t tiles, uintptr_t stream) {
  if (B == 0) return nullptr;
  SampleArgs args;
  args.temperature = ptr<const float>(temperature);
  args.top_k = ptr<const int64_t>(top_k);
  args.top_p = ptr<const float>(top_p);
  args.min_p = ptr<const float>(min_p);
  args.seed = seed;
  args.row_ids = ptr<const int64_t>(row_ids);
  args.steps = ptr<const int64_t>(steps);
  args.noise = ptr<const float>(noise);
  Outputs out;
  out.tokens = ptr<int64_t>(tokens);
  out.logprobs = ptr<float>(logprobs);
  out.raw_logprobs = ptr<float>(raw_logprobs);
  out.kept_logprobs = ptr<float>(kept_logprobs);
  out.log_kept_mass = ptr<float>(log_kept_mass);
  out.entropy = ptr<float>(entropy);

  const bool may_filter = top_k || top_p || min_p;
  const unsigned blocks = blocks_for(B * num_tiles, 1);
  if (!blocks) return "more tiles of rows than a grid has blocks";
  const int num_columns = static_cast<int>(V), tiles_per_row = static_cast<int>(num_tiles);
  return dispatch_dtype(dtype, [&](auto number) {
    using T = decltype(number);
    const T* const x = ptr<const T>(logits);
    TileResult* const results = ptr<TileResult>(tiles);
    const auto kernel = may_filter ? tiles_kernel<T, false> : tiles_kernel<T, true>;
    const char* error =
        launch(kernel, blocks, threads, 0, stream, x, stride, num_columns, tiles_per_row, args, results);
    if (error) return error;
    if (!may_filter)
      return launch(finish_kernel, blocks_for(B, 1), warp_size, 0, stream, num_columns, tiles_per_row, results, args,
                    out);
    const int filter_threads = min(max_threads, 2 * threads);
    return launch(filter_kernel<T>, blocks_for(B, 1), filter_threads, 0, stream, x, stride, num_columns, tiles_per_row,
                  results, args, out);
  });
}

CONSTANT(sample_tokens_per_thread, tokens_per_thread)
CONSTANT(sample_tokens_max_threads, tile_threads)
CONSTANT(sample_tokens_tile_bytes, sizeof(TileResult))
KERNEL(sample_tokens)

}  // namespace
