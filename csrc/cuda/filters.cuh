// Finds where the filters of sample_tokens cut off a row of logits, without a sort. Top-k, top-p and min-p each keep a
// prefix of the order (logit falling, index rising); its last token is the cutoff.
//
// A block counts, or sums the mass of, the tokens above 8 thresholds within a bracket, and continues in the part of the
// bracket that has the cutoff:
//
//     logit    low      t7    t6      t5   t4       ...        t0      high
//               |-------|-----|-------|----|--------...--------|--------|
//                             [ new bracket ): count or mass above t6 reaches the target, above t5 it does not
//
// When at most one token per thread is left, a token's rank is the number of tokens before it. If more tokens are left
// and all are equal, the index decides, in the same way. Logits are compared as they are, not divided by the
// temperature, so ties are those of the input.
//
// Floor: 3 to 5 loads of the row, mostly from the L2 cache. Counts are exact; masses are summed in one fixed order.
#pragma once
#include "sample.cuh"

namespace {

constexpr int num_thresholds = 8, max_warps = 16, max_threads = max_warps * warp_size;

struct FilterShared {
  int warp_counts[max_warps][num_thresholds], counts[num_thresholds];
  double warp_masses[max_warps][num_thresholds], masses[num_thresholds];
  int num_left;  // tokens left in the bracket
  float logits[max_threads], sorted_logits[max_threads];
  int tokens[max_threads], sorted_tokens[max_threads];
  double sorted_masses[max_threads];
};

// A row of logits x; z = (x - max_logit) / temperature, and a token's mass is e^z.
template <class T>
struct LogitsRow {
  UnalignedRow<T> row;
  float max_logit;
  double temperature;
  float inverse_temperature;

  // Calls f(v, x) for each vector of this thread: its logits, and the index of the first. Beyond the row they are -inf.
  template <class F>
  __device__ __forceinline__ void for_each_vec(F f) const {
    constexpr int size = vec_size<T>;
    for (int k = threadIdx.x; k < row.num_vecs(); k += blockDim.x) {
      float x[size];
      unpack<T>(row.load(k), x);
      f(k * size, x);
    }
  }
  __device__ __forceinline__ float fast_mass(float x) const { return __expf((x - max_logit) * inverse_temperature); }
  __device__ __forceinline__ double exact_mass(float x) const {
    return exp((static_cast<double>(x) - max_logit) / temperature);
  }
};

// Writes shared.counts[j], the number of tokens with is_above(v, x, j), and with MASS shared.masses[j], the sum of
// their masses, for every threshold j. A token that is above threshold j must be above threshold j + 1.
template <bool MASS, class T, class IsAbove>
__device__ __forceinline__ void mass_above(const LogitsRow<T>& logits, const IsAbove& is_above, FilterShared& shared) {
  int count[num_thresholds] = {};
  double mass[num_thresholds] = {};
  logits.for_each_vec([&](int v, const float (&x)[vec_size<T>]) {
    float vec_mass[num_thresholds] = {};
    bool any = false;
#pragma unroll
    for (int i = 0; i < vec_size<T>; ++i) {
      if (!is_above(v + i, x[i], num_thresholds - 1)) continue;
      any = true;
      const float p = MASS ? logits.fast_mass(x[i]) : 0.f;
#pragma unroll
      for (int j = 0; j < num_thresholds; ++j) {
        const bool above = is_above(v + i, x[i], j);
        count[j] += above;
        vec_mass[j] += above ? p : 0.f;
      }
    }
    if (MASS && any) {
#pragma unroll
      for (int j = 0; j < num_thresholds; ++j) mass[j] += vec_mass[j];
    }
  });
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size, num_warps = blockDim.x / warp_size;
#pragma unroll
  for (int j = 0; j < num_thresholds; ++j) {
    count[j] = warp_reduce<Add>(count[j]);
    if (MASS) mass[j] = warp_reduce<Add>(mass[j]);
    if (lane == 0) {
      shared.warp_counts[warp][j] = count[j];
      shared.warp_masses[warp][j] = mass[j];
    }
  }
  __syncthreads();
  if (threadIdx.x < num_thresholds) {
    int total_count = 0;
    double total_mass = 0;
    for (int i = 0; i < num_warps; ++i) {
      total_count += shared.warp_counts[i][threadIdx.x];
      total_mass += shared.warp_masses[i][threadIdx.x];
    }
    shared.counts[threadIdx.x] = total_count;
    shared.masses[threadIdx.x] = total_mass;
  }
  __syncthreads();
}

// Returns the cutoff among the tokens with logits in [low, high), at most one per thread: the first token at which the
// count or mass, `mass_before` of the tokens before them included, reaches `target`.
template <bool MASS, class T>
__device__ __forceinline__ Cutoff cutoff_by_rank(const LogitsRow<T>& logits, float low, float high, double mass_before,
                                                 double target, FilterShared& shared) {
  if (threadIdx.x == 0) shared.num_left = 0;
  __syncthreads();
  logits.for_each_vec([&](int v, const float (&x)[vec_size<T>]) {
#pragma unroll
    for (int i = 0; i < vec_size<T>; ++i) {
      if (!(x[i] >= low && x[i] < high) || v + i >= logits.row.end) continue;
      const int slot = atomicAdd(&shared.num_left, 1);  // in any order: ranks do not depend on it
      shared.logits[slot] = x[i];
      shared.tokens[slot] = v + i;
    }
  });
  __syncthreads();
  const int num_left = shared.num_left, mine = threadIdx.x;
  if (mine < num_left) {
    const float logit = shared.logits[mine];
    const int token = shared.tokens[mine];
    int rank = 0;
    for (int i = 0; i < num_left; ++i)
      rank += shared.logits[i] > logit || (shared.logits[i] == logit && shared.tokens[i] < token);
    shared.sorted_logits[rank] = logit;
    shared.sorted_tokens[rank] = token;
    shared.sorted_masses[rank] = MASS ? logits.exact_mass(logit) : 1.;
  }
  __syncthreads();
  for (int i = 0; i < mine && i < num_left; ++i) mass_before += shared.sorted_masses[i];
  const int num_kept = max(1, __syncthreads_count(mine < num_left && mass_before < target));
  return {shared.sorted_logits[num_kept - 1], shared.sorted_tokens[num_kept - 1]};
}

// The same among the tokens whose logit is `logit`, by rising index: a search in 9 parts for the index up to which
// enough of them are counted.
template <bool MASS, class T>
__device__ __forceinline__ Cutoff cutoff_among_ties(const LogitsRow<T>& logits, float logit, double mass_before,
                                                    double target, FilterShared& shared) {
  const double mass = MASS ? logits.exact_mass(logit) : 1.;
  const double num_needed = max(1., ceil((target - mass_before) / mass));
  int low = 0, high = logits.row.end - 1;  // the cutoff's token is in [low, high]
  while (low < high) {
    const int64_t first = low, length = high - low;
    const auto index_at = [&](int j) { return first + length * (j + 1) / (num_thresholds + 1); };
    mass_above<false>(logits, [&](int v, float x, int j) { return x == logit && v <= index_at(j); }, shared);
    int j = 0;
    while (j < num_thresholds && shared.counts[j] < num_needed) ++j;
    if (j < num_thresholds) high = static_cast<int>(index_at(j));
    if (j) low = static_cast<int>(index_at(j - 1)) + 1;
    __syncthreads();
  }
  return {logit, low};
}

// Threshold j of a round, in a bracket [low, high) of order keys. First at fixed distances, in nats, below the largest
// logit; then in even steps of the logits; from round 5 on in even steps of the order keys, which always narrow the
// bracket.
template <class T>
__device__ __forceinline__ float threshold_at(const LogitsRow<T>& logits, int round, int64_t low, int64_t high, int j) {
  const float bottom = from_order_key(low), top = from_order_key(high);
  if (round == 0) {
    constexpr float depths[num_thresholds] = {1.f, 2.f, 3.5f, 5.f, 7.f, 9.f, 12.f, 16.f};
    return max(logits.max_logit - static_cast<float>(logits.temperature) * depths[j], -3.4e38f);
  }
  if (round < 5 && bottom > -1.7e38f) return max(top - (top - bottom) * (j + 1) / (num_thresholds + 1), bottom);
  return from_order_key(low + (high - low) * (num_thresholds - j) / (num_thresholds + 1));
}

// Returns the cutoff at which the number of tokens, or with MASS the sum of their masses, reaches `target`.
template <bool MASS, class T>
__device__ __forceinline__ Cutoff find_cutoff(const LogitsRow<T>& logits, double target, FilterShared& shared) {
  const int64_t end_key = order_key(logits.max_logit) + 1;
  int64_t low = order_key(-INFINITY), high = end_key;  // the bracket [low, high)
  int num_left = logits.row.end;                       // tokens in it
  double mass_before = 0;                              // count or mass above it
  for (int round = 0;; ++round) {
    const float bottom = from_order_key(low), top = high == end_key ? INFINITY : from_order_key(high);
    if (num_left <= 0) return {top, all_equal};  // up to rounding, the mass above the bracket is the target
    if (num_left <= static_cast<int>(blockDim.x))
      return cutoff_by_rank<MASS>(logits, bottom, top, mass_before, target, shared);
    if (high - low <= 1) return cutoff_among_ties<MASS>(logits, bottom, mass_before, target, shared);
    float thresholds[num_thresholds];
#pragma unroll
    for (int j = 0; j < num_thresholds; ++j) thresholds[j] = threshold_at(logits, round, low, high, j);
    mass_above<MASS>(
        logits, [&](int v, float x, int j) { return x >= thresholds[j] && x < top && v < logits.row.end; }, shared);
    const int64_t old_high = high;
    int num_above = 0;  // tokens of the old bracket above the new one, and their count or mass
    double mass = 0;
    bool found = false;
#pragma unroll
    for (int j = 0; j < num_thresholds; ++j) {
      const double new_mass = MASS ? shared.masses[j] : shared.counts[j];
      if (found) continue;
      if (mass_before + new_mass < target) {
        high = order_key(thresholds[j]);
        num_above = shared.counts[j];
        mass = new_mass;
      } else {
        low = order_key(thresholds[j]);
        num_left = shared.counts[j];
        found = true;
      }
    }
    num_left -= num_above;
    mass_before += mass;
    if (high > old_high) high = old_high;
    __syncthreads();
  }
}

}  // namespace
