// Samples a token from each row of logits on NVIDIA GPUs; kernels/sample_tokens.py defines it, sample.cuh and
// filters.cuh hold the algorithms.
//
// Floor: one load of the logits; without a filter some 60 operations a token, mostly without a logarithm. With
// filters two loads more.
//
//     logits of a row        |   tile 0   |   tile 1   |  ...  | last tile |
//     tiles_kernel           block 0      block 1       ...      each keeps its tile in registers
//     finish_kernel          one warp per row merges the tiles' sums and best tokens
//
//     or with filters, after the tiles' sums (filters.cuh):
//     prepare_filter_kernel  one warp per row merges the tiles' sums
//     histogram_kernel       several blocks per row count its logits in bins
//     bracket_kernel         one block per row chooses the bracket of bins that has the cutoff
//     sample_kept_kernel     several blocks per row sum and sample the tokens above the bracket, list those in it
//     finish_filter_kernel   one block per row finds the cutoff among those listed
//
// Deterministic: tiles depend on V alone and are merged in order, in float64; what the blocks of a row add is integers.
// So a row's bits do not depend on the batch.
#include "cutoff.cuh"

namespace {

constexpr int tokens_per_thread = 32;  // of a tile
constexpr int tile_threads = 256;      // of a long row

// A tile's largest logit, the largest of the others (equal to it in a tie), the `LogitSums` of the others around this,
// and the tile's best token.
struct TileResult {
  double score;
  float max_logit, second, raw_others, others, moment, logit;
  int token;
};

// Sums three numbers over the block; the first thread gets the sums.
__device__ __forceinline__ void sum_in_first_thread(float& a, float& b, float& c, float (&shared)[3][warp_size]) {
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  float* const numbers[3] = {&a, &b, &c};
  __syncthreads();  // until all threads have read what is in `shared`
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const float sum = warp_reduce<Add>(*numbers[i]);
    if (lane == 0) shared[i][warp] = sum;
  }
  __syncthreads();
  if (warp) return;
  const bool has_warp = lane < static_cast<int>(blockDim.x) / warp_size;
#pragma unroll
  for (int i = 0; i < 3; ++i) *numbers[i] = warp_reduce<Add>(has_warp ? shared[i][lane] : 0.f);
}

template <class T, bool SAMPLE>
__global__ void __launch_bounds__(tile_threads, SAMPLE ? 3 : 5)
    tiles_kernel(const T* logits, int64_t stride, int V, int num_tiles, SampleArgs args, TileResult* tiles) {
  __shared__ SampleShared sample_shared;
  __shared__ float sums_shared[3][warp_size];
  constexpr int size = vec_size<T>, U = tokens_per_thread / size;
  const int64_t row_index = blockIdx.x / num_tiles;
  const int first = static_cast<int>(blockIdx.x % num_tiles) * blockDim.x * U;
  const SamplingParams params = sampling_params(args, row_index, V);
  const UnalignedRow<T> row(logits + row_index * stride, 0, V);
  float x[U][size], max_logit = -INFINITY, second = -INFINITY;
  uint4 vecs[U];
#pragma unroll
  for (int u = 0; u < U; ++u) vecs[u] = row.load(first + u * blockDim.x + threadIdx.x);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    unpack<T>(vecs[u], x[u]);
#pragma unroll
    for (int i = 0; i < size; ++i) {
      second = fmaxf(second, fminf(max_logit, x[u][i]));
      max_logit = fmaxf(max_logit, x[u][i]);
    }
  }
  const float thread_max = max_logit;
  max_logit = block_reduce<Max>(max_logit, -INFINITY, sums_shared[0]);
  const int threads_with_max = __syncthreads_count(thread_max == max_logit);
  second = block_reduce<Max>(thread_max == max_logit ? second : thread_max, -INFINITY, sums_shared[0]);
  if (threads_with_max > 1) second = max_logit;
  // Sums of the logits up to the second, which a tie makes the largest.
  const float origin = second == -INFINITY ? 0.f : second;
  float raw_others = 0.f, others = 0.f, moment = 0.f;
#pragma unroll
  for (int u = 0; u < U; ++u) {
#pragma unroll
    for (int i = 0; i < size; ++i) {
      const float distance = x[u][i] - origin;
      const float z = distance > 0.f ? -INFINITY : distance * params.inverse_temperature, p = fast_exp(z);
      others += p;
      moment += p * fmaxf(z, -1000.f);
    }
  }
  if (params.temperature != 1.) {
    const float same_origin = __shfl_sync(full_mask, origin, 0);  // hidden: no distance waits in a register
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int i = 0; i < size; ++i) {
        const float distance = x[u][i] - same_origin;
        raw_others += distance > 0.f ? 0.f : fast_exp(distance);
      }
    }
  }
  if (params.temperature == 1.) raw_others = others;  // an else here costs registers
  sum_in_first_thread(raw_others, others, moment, sums_shared);
  if (threadIdx.x == 0) {  // now, so that they take no registers in what follows
    const float own = max_logit > -INFINITY && second == max_logit ? 1.f : 0.f;  // one of those that tie stays out
    tiles[blockIdx.x] = {0., max_logit, second, raw_others - own, others - own, moment, 0.f, 0};
  }
  Candidate best = no_candidate();
  if (SAMPLE && max_logit > -INFINITY) {
    GumbelArgmax<T> argmax(params, row.base);
    const auto token_at = [&](int u) {
      return (first + u * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * size;
    };
    unsigned candidates = 0;  // bit u * size + i: token i of vector u
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int quad = 0; quad < size; quad += 4) {
        float inverse_masses[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          inverse_masses[i] = inverse_mass(x[u][quad + i], max_logit, params.inverse_temperature);
        candidates |= argmax.offer(token_at(u) + quad, inverse_masses) << (u * size + quad);
      }
    }
    for (; candidates; candidates &= candidates - 1) {
      const int bit = __ffs(static_cast<int>(candidates)) - 1;
      argmax.score(token_at(bit / size) + bit % size);
    }
    best = argmax.finish(sample_shared);
  }
  if (threadIdx.x) return;
  tiles[blockIdx.x].score = best.score;
  tiles[blockIdx.x].logit = best.logit;
  tiles[blockIdx.x].token = best.token;
}

// Merges the sums of a row's tiles by a warp, all of whose lanes get them. A NaN or +inf stays: also that of a tile
// with no second logit, whose sums count 0 times.
__device__ __forceinline__ LogitSums merge_tiles(const TileResult* tiles, int num_tiles, double temperature) {
  const int lane = threadIdx.x % warp_size;
  float lane_max = -INFINITY;
  for (int i = lane; i < num_tiles; i += warp_size) lane_max = fmaxf(lane_max, tiles[i].max_logit);
  const double max_logit = warp_reduce<Max>(lane_max);
  LogitSums sums{max_logit, 0, 0, 0};
  double num_tops = 0;
  const auto add = [&](float logit, double raw_mass, double mass, double moment) {
    const double distance = logit - max_logit, z = distance / temperature, factor = exp(z);
    sums.raw_others += (temperature == 1. ? factor : exp(distance)) * raw_mass;
    sums.others += factor * mass;
    sums.moment += factor > 0. ? factor * (moment + z * mass) : 0.;
  };
#pragma unroll 1
  for (int i = lane; i < num_tiles; i += warp_size) {
    const TileResult tile = tiles[i];
    if (tile.max_logit == max_logit)
      num_tops += 1.;
    else
      add(tile.max_logit, 1., 1., 0.);
    add(tile.second, tile.raw_others, tile.others, tile.moment);
  }
  const double put_back = max(warp_reduce<Add>(num_tops) - 1., 0.);
  sums.raw_others = warp_reduce<Add>(sums.raw_others) + put_back;
  sums.others = warp_reduce<Add>(sums.others) + put_back;
  sums.moment = warp_reduce<Add>(sums.moment);
  return sums;
}

// Returns the largest logit of a row but one that is max_logit, in all lanes of a warp.
__device__ __forceinline__ float second_largest(const TileResult* tiles, int num_tiles, float max_logit) {
  float second = -INFINITY;
  int num_tops = 0;
#pragma unroll 1
  for (int i = threadIdx.x % warp_size; i < num_tiles; i += warp_size) {
    const bool is_top = tiles[i].max_logit == max_logit;
    num_tops += is_top;
    second = fmaxf(second, is_top ? tiles[i].second : tiles[i].max_logit);
  }
  second = warp_reduce<Max>(second);
  return warp_reduce<Add>(num_tops) > 1 ? max_logit : second;
}

__global__ void __launch_bounds__(warp_size)
    finish_kernel(int V, int num_tiles, const TileResult* tiles, SampleArgs args, Outputs out) {
  const int64_t row = blockIdx.x;
  const SamplingParams params = sampling_params(args, row, V);
  tiles += row * num_tiles;
  const LogitSums sums = merge_tiles(tiles, num_tiles, params.temperature);
  Candidate best = no_candidate();
  for (int i = threadIdx.x; i < num_tiles; i += warp_size) best.update(tiles[i].score, tiles[i].logit, tiles[i].token);
  best = warp_best(best);
  if (threadIdx.x == 0) write_row(out, row, params, sums, best, sums);
}

__global__ void __launch_bounds__(warp_size)
    prepare_filter_kernel(int V, int num_tiles, const TileResult* tiles, SampleArgs args, FilterState* states) {
  const int64_t row = blockIdx.x;
  FilterState& state = states[row];
  for (int i = threadIdx.x; i < num_bins / 4; i += warp_size)
    reinterpret_cast<uint4*>(state.counts)[i] = make_uint4(0, 0, 0, 0);
  const SamplingParams params = sampling_params(args, row, V);
  tiles += row * num_tiles;
  const LogitSums sums = merge_tiles(tiles, num_tiles, params.temperature);
  const float max_logit = static_cast<float>(sums.max_logit), second = second_largest(tiles, num_tiles, max_logit);
  if (threadIdx.x) return;
  state.params = params;
  state.sums = sums;
  state.valid = params.valid && sums.max_logit > -infinity && sums.raw_others < infinity;
  state.is_on = state.valid && !params.greedy && params.has_filter();
  state.searches = state.is_on && (params.top_k || params.top_p < 1.f);
  state.bins = {max_logit, 0.f, 0.f};
  state.second = second;
  state.unit = exp((static_cast<double>(second) - max_logit) / params.temperature);
  if (state.searches) state.bins = make_bins(params, sums, V);
  state.min_p = lowest_logit;
  if (state.is_on && params.min_p > 0.f) state.min_p = min_p_threshold(max_logit, params.temperature, params.min_p);
  const float low = params.greedy ? max_logit : state.min_p;  // if no bin decides
  state.bracket = {low, low, 0};
  state.mass_above = 0;
  state.num_in_bracket = 0;
}

template <class T>
__global__ void __launch_bounds__(filter_threads)
    histogram_kernel(const T* logits, int64_t stride, int V, int splits, FilterState* states) {
  __shared__ unsigned counts[num_bins + warp_size];  // those in no bin go to a place of their lane
  // The last rows first: they are still in the L2 cache from the kernel before.
  const unsigned item = gridDim.x - 1 - blockIdx.x;
  const int64_t row_index = item / splits;
  FilterState& state = states[row_index];
  if (!state.searches) return;
  for (int i = threadIdx.x; i < num_bins; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  const Bins bins = state.bins;
  const unsigned no_bin = num_bins + threadIdx.x % warp_size;
  const UnalignedRow<T> row(logits + row_index * stride, 0, V);
  const int split = static_cast<int>(item % splits);
  for_each_vec(row, split_begin(row.num_vecs(), split, splits), split_begin(row.num_vecs(), split + 1, splits),
               [&](int, const float (&x)[vec_size<T>], const uint4&, bool) {
#pragma unroll
                 for (int i = 0; i < vec_size<T>; ++i) {
                   const unsigned bin = bins.at(x[i]);
                   atomicAdd(&counts[bin < num_bins ? bin : no_bin], 1u);
                 }
               });
  __syncthreads();
  for (int i = threadIdx.x; i < num_bins; i += blockDim.x)
    if (counts[i]) atomicAdd(&state.counts[i], counts[i]);
}

__global__ void __launch_bounds__(filter_threads) bracket_kernel(int V, FilterState* states) {
  __shared__ BracketShared shared;
  FilterState& state = states[blockIdx.x];
  if (!state.searches) return;
  const Bracket bracket = choose_bracket(state, V, shared);
  if (threadIdx.x == 0) state.bracket = state.min_p >= bracket.high ? Bracket{state.min_p, state.min_p, 0} : bracket;
}

template <class T>
__global__ void __launch_bounds__(filter_threads, 3)
    sample_kept_kernel(const T* logits, int64_t stride, int V, int splits, FilterState* states) {
  __shared__ SampleShared sample_shared;
  __shared__ QuadQueue<T> queues[filter_warps];
  __shared__ unsigned long long sums_shared[warp_size];
  const int64_t row_index = blockIdx.x / splits;
  FilterState& state = states[row_index];
  if (!state.valid) return;
  const Bracket bracket = state.bracket;
  const TokenMass mass(state);
  const FixedPoint fixed(V);
  const UnalignedRow<T> row(logits + row_index * stride, 0, V);
  const int split = static_cast<int>(blockIdx.x % splits);
  unsigned long long mass_above = 0;
  GumbelArgmax<T> argmax(state.params, row.base);
  for_each_quad_with(
      bracket.low, row, split_begin(row.num_vecs(), split, splits), split_begin(row.num_vecs(), split + 1, splits),
      queues[threadIdx.x / warp_size], [&](int v, const float (&x)[4]) {
        float inverse_masses[4], quad_mass = 0.f;
        bool in_bracket = false;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool above = x[i] >= bracket.high;
          inverse_masses[i] = above ? inverse_mass(x[i], mass.max_logit, mass.inverse_temperature) : INFINITY;
          quad_mass += above ? mass.fast(x[i]) : 0.f;
          in_bracket |= !above && x[i] >= bracket.low;
        }
        if (in_bracket) list_tokens(state, bracket, v, x);
        mass_above += fixed.from(quad_mass);
        for (unsigned candidates = argmax.offer(v, inverse_masses); candidates; candidates &= candidates - 1)
          argmax.score(v + __ffs(static_cast<int>(candidates)) - 1);
      });
  mass_above = block_reduce<Add>(mass_above, 0ull, sums_shared);
  const Candidate best = argmax.finish(sample_shared);
  if (threadIdx.x == 0) {
    atomicAdd(&state.mass_above, mass_above);
    state.best[split] = best;
  }
}

template <class T>
union FinishShared {
  CutoffShared cutoff;
  QuadQueue<T> queues[filter_warps];
};

template <class T>
__global__ void __launch_bounds__(filter_threads, 2)
    finish_filter_kernel(const T* logits, int64_t stride, int V, int splits, const FilterState* states, Outputs out) {
  __shared__ SampleShared sample_shared;
  __shared__ FinishShared<T> shared;
  __shared__ unsigned long long sums_shared[warp_size];
  __shared__ T warp_tiles[filter_warps][warp_size * vec_size<T>];
  const int64_t row_index = blockIdx.x;
  const FilterState& state = states[row_index];
  if (!state.valid) {
    if (threadIdx.x == 0) write_invalid(out, row_index);
    return;
  }
  const UnalignedRow<T> row(logits + row_index * stride, 0, V);
  const TokenMass mass(state);
  const FixedPoint fixed(V);
  const BracketTokens<T> tokens{row, state, warp_tiles[threadIdx.x / warp_size]};
  // The mass of the tokens above the bracket and of those within it that the cutoff keeps, but for one with the largest
  // logit, which every cutoff keeps.
  const auto others_kept_by = [&](const Cutoff& cutoff) {
    unsigned long long sum = 0;
    tokens.for_each([&](float x, int v) { sum += cutoff.keeps(x, v) ? fixed.from(mass.fast(x)) : 0; });
    sum = state.mass_above + block_reduce<Add>(sum, 0ull, sums_shared);
    return mass.of_sum(fixed, sum - (mass.has_leader() ? 0ull : fixed.from(1.f)));
  };
  Cutoff cutoff = no_cutoff();
  LogitSums kept = state.sums;
  if (state.is_on) {
    cutoff = find_cutoffs(tokens, fixed, others_kept_by, shared.cutoff);
    kept.others = others_kept_by(cutoff);
  }

  GumbelArgmax<T> argmax(state.params, row.base);
  if (static_cast<int>(threadIdx.x) < splits) argmax.best = state.best[threadIdx.x];
  if (tokens.is_listed()) {
    tokens.for_each([&](float x, int v) {
      if (cutoff.keeps(x, v)) argmax.score(v);
    });
  } else {
    __syncthreads();  // the queues are in the memory of the search
    for_each_quad_with(
        max(state.bracket.low, cutoff.logit), row, 0, row.num_vecs(), shared.queues[threadIdx.x / warp_size],
        [&](int v, const float (&x)[4]) {
          float inverse_masses[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const bool kept = x[i] < state.bracket.high && cutoff.keeps(x[i], v + i);
            inverse_masses[i] = kept ? inverse_mass(x[i], mass.max_logit, mass.inverse_temperature) : INFINITY;
          }
          for (unsigned candidates = argmax.offer(v, inverse_masses); candidates; candidates &= candidates - 1)
            argmax.score(v + __ffs(static_cast<int>(candidates)) - 1);
        });
  }
  const Candidate best = argmax.finish(sample_shared);
  if (threadIdx.x == 0) write_row(out, row_index, state.params, state.sums, best, kept);
}

// logits: rows of V numbers, `stride` apart. tiles: memory for B x num_tiles TileResults. With filters, states: memory
// for B FilterStates, and at most max_splits blocks share a row.
const char* sample_tokens(uintptr_t logits, int dtype, int64_t B, int64_t V, int64_t stride, uintptr_t temperature,
                          uintptr_t top_k, uintptr_t top_p, uintptr_t min_p, int64_t seed, uintptr_t row_ids,
                          uintptr_t steps, uintptr_t noise, uintptr_t tokens, uintptr_t logprobs,
                          uintptr_t raw_logprobs, uintptr_t kept_logprobs, uintptr_t log_kept_mass, uintptr_t entropy,
                          int threads, int64_t num_tiles, uintptr_t tiles, int splits, uintptr_t states,
                          uintptr_t stream) {
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
  const unsigned blocks = blocks_for(B * num_tiles, 1), filter_blocks = blocks_for(B * splits, 1);
  if (!blocks || !filter_blocks) return "more tiles of rows than a grid has blocks";
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
    FilterState* const rows = ptr<FilterState>(states);
    error = launch(prepare_filter_kernel, blocks_for(B, 1), warp_size, 0, stream, num_columns, tiles_per_row, results,
                   args, rows);
    if (!error && (top_k || top_p)) {
      error =
          launch(histogram_kernel<T>, filter_blocks, filter_threads, 0, stream, x, stride, num_columns, splits, rows);
      if (!error) error = launch(bracket_kernel, blocks_for(B, 1), filter_threads, 0, stream, num_columns, rows);
    }
    if (!error)
      error =
          launch(sample_kept_kernel<T>, filter_blocks, filter_threads, 0, stream, x, stride, num_columns, splits, rows);
    if (!error)
      error = launch(finish_filter_kernel<T>, blocks_for(B, 1), filter_threads, 0, stream, x, stride, num_columns,
                     splits, rows, out);
    return error;
  });
}

CONSTANT(sample_tokens_per_thread, tokens_per_thread)
CONSTANT(sample_tokens_max_threads, tile_threads)
CONSTANT(sample_tokens_tile_bytes, sizeof(TileResult))
CONSTANT(sample_tokens_state_bytes, sizeof(FilterState))
CONSTANT(sample_tokens_max_splits, max_splits)
KERNEL(sample_tokens)

}  // namespace
