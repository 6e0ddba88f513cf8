// Finds where the filters of sample_tokens cut off a row of logits, without a sort. Top-k, top-p and min-p each keep a
// prefix of the order (logit falling, index rising); its last token is the cutoff.
//
//     prepare_filter_kernel  one warp a row: the row's sums and the width of its bins
//     histogram_kernel       several blocks a row count the tokens in bins of equal width below the largest logit
//
//         largest                                                                  low logits
//         bin 0     bin 1     bin 2     ...               bin 2047     | no bin: of no weight, or far away
//         |    3    |    0    |   17    |   ...           |   908   |  |
//
//     bracket_kernel         one block a row chooses the bracket of bins that has the cutoff. Counts decide it for
//                            top-k. A bin's count and edges bound its mass, and so the bins where the mass may, and
//                            where it must, reach top-p.
//
//         |  kept: their mass, their winner   |   bracket   |   not kept    |
//                                             high         low
//
//     sample_kept_kernel     several blocks a row sum and sample the tokens above the bracket and list those in it
//     finish_filter_kernel   one block a row: ranks the listed tokens, which gives the cutoff, and samples those kept
//
// A bin's mass is never summed, so a token costs the histogram one atomic addition of 1. If more tokens than the list
// holds are in the bracket (ties), the last kernel looks at the row again and narrows the bracket by 256 each time.
//
// Floor: two loads of the row. Bits do not depend on the number of blocks: counts are integers, and so are the masses
// that blocks add, in fixed point. Logits are compared as they are, not divided by the temperature, so ties are those
// of the input.
#pragma once
#include "sample.cuh"

namespace {

constexpr int num_bins = 2048, max_candidates = 1024, max_splits = 16;
constexpr int filter_threads = 256, filter_warps = filter_threads / warp_size;
constexpr int bins_per_thread = num_bins / filter_threads;
constexpr float lowest_logit = -3.4028235e38f;  // finite: a token of -inf is never kept
constexpr float top_k_depth = 32.f;             // the bins of a row with top-k reach so far below its largest logit

// Masses relative to that of the second largest logit, as integers: the sum of a row is less than 2^63.
struct FixedPoint {
  float scale;

  // In the body, because nvcc gives initializers to the host's compiler too, which has no __clz.
  __device__ explicit FixedPoint(int V) { scale = static_cast<float>(1ll << (30 + __clz(V - 1))); }
  __device__ __forceinline__ unsigned long long from(float mass) const {
    return static_cast<unsigned long long>(mass * scale);
  }
  __device__ __forceinline__ double to_double(unsigned long long x) const { return static_cast<double>(x) / scale; }
};

// Bins of a row, by the distance of a logit from the largest one.
struct Bins {
  float max_logit, scale;  // scale: bins per unit of logit
  float width;             // of a bin, in nats

  // The bin of a logit, num_bins or more if it is below them all: the sum's low bits are an integer.
  __device__ __forceinline__ unsigned at(float x) const {
    return __float_as_uint(__fmaf_rn(max_logit - x, scale, 0x1p23f)) - 0x4b000000u;
  }
  // Bounds of the mass of a token in a bin. 0.501: at() rounds to the nearest bin, from numbers that are rounded.
  __device__ __forceinline__ float max_mass(int bin) const {
    return bin ? __expf(-(bin - 0.501f) * width) * (1 + 1e-5f) : 1.f;
  }
  __device__ __forceinline__ float min_mass(int bin) const { return __expf(-(bin + 0.501f) * width) * (1 - 1e-5f); }
  // The smallest logit in the bins up to this one.
  __device__ float lowest(int bin) const {
    if (bin < 0) return INFINITY;
    if (bin >= num_bins) return lowest_logit;
    int64_t below = order_key(-INFINITY), inside = order_key(max_logit);
    while (inside - below > 1) {
      const int64_t middle = (below + inside) >> 1;
      (at(from_order_key(middle)) <= static_cast<unsigned>(bin) ? inside : below) = middle;
    }
    return from_order_key(inside);
  }
};

// With top-p alone, tokens below the bins have at most half of the mass that the filter removes.
__device__ __forceinline__ Bins make_bins(const SamplingParams& params, const LogitSums& sums, int V) {
  double depth = top_k_depth;
  if (!params.top_k) depth = log(2. * V / ((1. - params.top_p) * sums.mass())) * params.temperature;
  const float scale = static_cast<float>(min((num_bins - 1) / depth, 3e38));
  return {static_cast<float>(sums.max_logit), scale, static_cast<float>(1. / (scale * params.temperature))};
}

// The tokens in [low, high) have the cutoff, count_above tokens are above.
struct Bracket {
  float low, high;
  int count_above;
};

// A row's state in global memory, which each kernel of the search reads and adds to.
struct FilterState {
  // prepare_filter_kernel
  SamplingParams params;
  LogitSums sums;
  Bins bins;
  double unit;                  // the mass of the second largest logit, relative to the largest
  float second;                 // the largest of all logits but one, equal to the largest in a tie
  float min_p;                  // the smallest logit that passes min-p
  bool valid, is_on, searches;  // is_on: any filter; searches: top-k or top-p

  // histogram_kernel and sample_kept_kernel add to these; prepare_filter_kernel sets them to 0
  alignas(16) unsigned counts[num_bins];
  unsigned long long mass_above;  // of the tokens above the bracket, in fixed point
  unsigned num_in_bracket;        // the first max_candidates of them, in any order, are listed below

  Bracket bracket;             // of bracket_kernel
  Candidate best[max_splits];  // of the tokens above the bracket, by the blocks of sample_kept_kernel
  float logits[max_candidates];
  int tokens[max_candidates];
};

// A row's masses e^z, z = (x - max_logit) / temperature. Sums have them relative to the second largest logit, and a
// largest logit that no other equals as 0, its 1 apart: beside it those of a row whose best token is far ahead would be
// lost.
struct TokenMass {
  float max_logit, second;
  double temperature, unit;
  float inverse_temperature;

  __device__ explicit TokenMass(const FilterState& state)
      : max_logit(state.bins.max_logit),
        second(state.second),
        temperature(state.params.temperature),
        unit(state.unit),
        inverse_temperature(state.params.inverse_temperature) {}
  __device__ __forceinline__ bool has_leader() const { return second < max_logit; }
  __device__ __forceinline__ float fast(float x) const {
    return x > second ? 0.f : fast_exp((x - second) * inverse_temperature);
  }
  // The masses of a sum, relative to the largest logit.
  __device__ __forceinline__ double of_sum(const FixedPoint& fixed, unsigned long long sum) const {
    return unit * fixed.to_double(sum);
  }
  // The mass of the tokens above the bracket.
  __device__ __forceinline__ double above(const FixedPoint& fixed, const FilterState& state) const {
    return of_sum(fixed, state.mass_above) + (has_leader() && max_logit >= state.bracket.high ? 1. : 0.);
  }
  __device__ __forceinline__ double exact(float x) const {
    return exp((static_cast<double>(x) - max_logit) / temperature);
  }
};

// Lists those of the tokens v to v + 3 that are in the bracket.
__device__ __forceinline__ void list_tokens(FilterState& state, const Bracket& bracket, int v, const float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (!(x[i] >= bracket.low && x[i] < bracket.high)) continue;
    const unsigned place = atomicAdd(&state.num_in_bracket, 1u);
    if (place >= max_candidates) continue;
    state.logits[place] = x[i];
    state.tokens[place] = v + i;
  }
}

// The sum of the x of all threads before this one, in one fixed order; `total` is that of all.
template <class T>
__device__ __forceinline__ T block_sum_before(T x, T& total, T* shared) {
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  T sum = x;
#pragma unroll
  for (int distance = 1; distance < warp_size; distance *= 2) {
    const T other = __shfl_up_sync(full_mask, sum, distance);
    if (lane >= distance) sum += other;
  }
  T before = __shfl_up_sync(full_mask, sum, 1);
  if (lane == 0) before = 0;
  __syncthreads();  // until all threads have read the results of the call before
  if (lane == warp_size - 1) shared[warp] = sum;
  __syncthreads();
  T sum_before = 0;
  total = 0;
  for (int i = 0; i < filter_warps; ++i) {
    if (i == warp) sum_before = total;
    total += shared[i];
  }
  return sum_before + before;
}

struct BracketShared {
  double sums[filter_warps];
  int counts[filter_warps];
  int top_k_bin, first_bin, last_bin, count_above;
  double min_kept, max_kept;  // bounds of the mass that top-k keeps
  float low, high;
};

// Returns the bracket of top-k and top-p together.
__device__ __forceinline__ Bracket choose_bracket(const FilterState& state, int V, BracketShared& shared) {
  constexpr double error = 4e-6;  // of the sum of all masses, at most
  const Bins bins = state.bins;
  const double mass = state.sums.mass();
  const int64_t top_k = state.params.top_k;
  const float top_p = state.params.top_p;
  const int begin = threadIdx.x * bins_per_thread;
  unsigned count[bins_per_thread];
#pragma unroll
  for (int i = 0; i < bins_per_thread; i += 4) {
    const uint4 vec = *reinterpret_cast<const uint4*>(state.counts + begin + i);
    count[i] = vec.x;
    count[i + 1] = vec.y;
    count[i + 2] = vec.z;
    count[i + 3] = vec.w;
  }
  int num = 0, num_total;
  double max_part = 0, min_part = 0, max_total, min_total;
#pragma unroll
  for (int i = 0; i < bins_per_thread; ++i) {
    num += static_cast<int>(count[i]);
    max_part += static_cast<double>(count[i]) * bins.max_mass(begin + i);
    min_part += static_cast<double>(count[i]) * bins.min_mass(begin + i);
  }
  num = block_sum_before(num, num_total, shared.counts);
  max_part = block_sum_before(max_part, max_total, shared.sums);
  min_part = block_sum_before(min_part, min_total, shared.sums);
  max_total += static_cast<double>(V - num_total) * bins.max_mass(num_bins);
  if (threadIdx.x == 0) {
    shared.top_k_bin = shared.first_bin = shared.last_bin = num_bins;
    shared.count_above = num_total;
    shared.min_kept = top_k ? min_total : mass * (1 - error);
    shared.max_kept = top_k ? min(max_total, mass * (1 + error)) : mass * (1 + error);
  }
  __syncthreads();

  // Calls f(bin, number, number in it, max, min, min before it): the number and the bounds of the mass of the
  // tokens in the bins up to this one.
  const auto for_each_bin = [&](auto f) {
    int num_sum = num;
    double max_sum = max_part, min_sum = min_part;
#pragma unroll
    for (int i = 0; i < bins_per_thread; ++i) {
      num_sum += static_cast<int>(count[i]);
      max_sum += static_cast<double>(count[i]) * bins.max_mass(begin + i);
      const double min_before = min_sum;
      min_sum += static_cast<double>(count[i]) * bins.min_mass(begin + i);
      f(begin + i, num_sum, static_cast<int>(count[i]), max_sum, min_sum, min_before);
    }
  };
  if (top_k) {
    for_each_bin([&](int bin, int num_sum, int here, double max_sum, double, double min_before) {
      if (num_sum < top_k || num_sum - here >= top_k) return;
      shared.top_k_bin = bin;
      shared.max_kept = max_sum;
      shared.min_kept = min_before;
    });
    __syncthreads();
  }
  if (top_p < 1.f) {
    int first = num_bins, last = num_bins;
    const double min_target = top_p * shared.min_kept, max_target = top_p * shared.max_kept;
    for_each_bin([&](int bin, int, int, double max_sum, double min_sum, double) {
      if (!top_k) {  // all tokens but those of the later bins give bounds too
        const double max_later = max_total - max_sum, min_later = min_total - min_sum;
        max_sum = min(max_sum, shared.max_kept - min_later);
        min_sum = max(min_sum, shared.min_kept - max_later);
      }
      if (max_sum >= min_target) first = min(first, bin);
      if (min_sum >= max_target) last = min(last, bin);
    });
    atomicMin(&shared.first_bin, first);
    atomicMin(&shared.last_bin, last);
    __syncthreads();
  }
  // Top-p needs the exact mass that top-k keeps, so with both filters all tokens down to top-k's bin are listed.
  int first_bin = shared.first_bin, last_bin = shared.last_bin;
  if (top_k) {
    first_bin = min(first_bin, shared.top_k_bin);
    last_bin = shared.top_k_bin;
  }
  for_each_bin([&](int bin, int num_sum, int here, double, double, double) {
    if (bin == first_bin) shared.count_above = num_sum - here;
  });
  if (threadIdx.x == 0) shared.low = bins.lowest(last_bin);
  if (threadIdx.x == warp_size) shared.high = bins.lowest(first_bin - 1);
  __syncthreads();
  return {shared.low, shared.high, shared.count_above};
}

// The first of the vectors of one of the blocks that share a row.
__device__ __forceinline__ int split_begin(int num_vecs, int split, int splits) {
  return min(num_vecs, (num_vecs + splits - 1) / splits * split);
}

// Calls f(v, x, vec, is_last) for the vectors [first, last) of a row, by all threads of the block equally often: the
// index of the first logit, the logits, their 16 bytes, and whether it is the last call. Beyond the row they are -inf.
template <class T, class F>
__device__ __forceinline__ void for_each_vec(const UnalignedRow<T>& row, int first, int last, F f) {
  const int step = static_cast<int>(blockDim.x);
  const auto index = [&](int begin) {
    const int k = begin + static_cast<int>(threadIdx.x);
    return k < last ? k : row.num_vecs();
  };
  uint4 next = row.load(index(first));
  for (int begin = first; begin < last; begin += step) {
    const uint4 vec = next;
    next = row.load(index(begin + step));
    float x[vec_size<T>];
    unpack<T>(vec, x);
    f(index(begin) * vec_size<T>, x, vec, begin + step >= last);
  }
}

// Four logits as they lie in memory.
template <class T>
struct Quad {
  uint2 bits;

  __device__ __forceinline__ Quad(const uint4& vec, int i)
      : bits(i ? make_uint2(vec.z, vec.w) : make_uint2(vec.x, vec.y)) {}
  __device__ __forceinline__ void unpack(float (&x)[4]) const {
    const float2 low = Pair<T>::unpack2(bits.x), high = Pair<T>::unpack2(bits.y);
    x[0] = low.x;
    x[1] = low.y;
    x[2] = high.x;
    x[3] = high.y;
  }
};
template <>
struct Quad<float> {
  uint4 bits;

  __device__ __forceinline__ Quad(const uint4& vec, int) : bits(vec) {}
  __device__ __forceinline__ void unpack(float (&x)[4]) const { ::unpack<float>(bits, x); }
};

// Quads of a row that a warp has set aside until there is one for each lane.
template <class T>
struct QuadQueue {
  static constexpr int capacity = warp_size - 1 + warp_size * vec_size<T> / 4;
  alignas(16) unsigned char quads[capacity * sizeof(Quad<T>)];  // memory: a constructor would have to run
  int first_tokens[capacity];
};

// Calls f(v, x) for the quads of vectors [first, last) in which a logit is at least `low`, a finite number: the index
// of the first logit and the logits. All lanes of a warp call it together; those without a quad get the row's end as v.
template <class T, class F>
__device__ __forceinline__ void for_each_quad_with(float low, const UnalignedRow<T>& row, int first, int last,
                                                   QuadQueue<T>& queue, F f) {
  const int lane = threadIdx.x % warp_size;
  Quad<T>* const quads = reinterpret_cast<Quad<T>*>(queue.quads);
  const unsigned lanes_before = (1u << lane) - 1;
  int size = 0;  // of the queue
  for_each_vec(row, first, last, [&](int v, const float (&x)[vec_size<T>], const uint4& vec, bool is_last) {
    constexpr int size_of_vec = vec_size<T>;
    bool is_wanted[size_of_vec / 4], any = false;
#pragma unroll
    for (int i = 0; i < size_of_vec; i += 4) {
      is_wanted[i / 4] = fmaxf(fmaxf(x[i], x[i + 1]), fmaxf(x[i + 2], x[i + 3])) >= low;
      any |= is_wanted[i / 4];
    }
    any = __any_sync(full_mask, any);
#pragma unroll
    for (int i = 0; any && i < size_of_vec; i += 4) {
      const unsigned wanted = __ballot_sync(full_mask, is_wanted[i / 4]);
      const int place = size + __popc(wanted & lanes_before);
      if (is_wanted[i / 4]) {
        quads[place] = Quad<T>(vec, i);
        queue.first_tokens[place] = v + i;
      }
      size += __popc(wanted);
    }
    while (size >= warp_size || (is_last && size)) {
      __syncwarp();  // until the quads are there
      const int num_taken = min(size, warp_size);
      size -= num_taken;
      int quad_v = row.end;
      float quad_x[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
      if (lane < num_taken) {
        quad_v = queue.first_tokens[size + lane];
        quads[size + lane].unpack(quad_x);
      }
      __syncwarp();  // until they have been read
      f(quad_v, quad_x);
    }
  });
}

}  // namespace
