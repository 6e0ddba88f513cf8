// Finds the cutoff of a filter among the tokens of a bracket (filters.cuh), by one block. A token's position is the
// place of (logit falling, index rising) as one integer. Tokens are counted, with their masses, in 256 equal parts of
// the bracket's positions, and the part that has the cutoff is the new bracket, until each thread can rank one token:
// its rank is the number of positions before its own.
#pragma once
#include "filters.cuh"

namespace {

// The tokens of a bracket: those listed, or if they are too many, those of the row.
template <class T>
struct BracketTokens {
  UnalignedRow<T> row;
  const FilterState& state;
  T* warp_tile;  // shared memory of each warp for 32 vectors

  __device__ __forceinline__ bool is_listed() const { return state.num_in_bracket <= max_candidates; }

  // Calls f(x, v) for each token of this thread, not by all threads equally often.
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
    if (is_listed()) {
      const int count = static_cast<int>(state.num_in_bracket);
      for (int i = threadIdx.x; i < count; i += blockDim.x) f(state.logits[i], state.tokens[i]);
      return;
    }
    const int lane = threadIdx.x % warp_size;
    const float low = state.bracket.low, high = state.bracket.high;
    for_each_vec(row, 0, row.num_vecs(), [&](int v, const float (&)[vec_size<T>], const uint4& vec, bool) {
      // Through shared memory, so that f is compiled once, not for each of the vector's numbers.
      memcpy(warp_tile + lane * vec_size<T>, &vec, sizeof vec);
      const int warp_v = __shfl_sync(full_mask, v, 0);
      __syncwarp();
#pragma unroll 1
      for (int i = lane; i < warp_size * vec_size<T>; i += warp_size) {
        const float x = to_float(warp_tile[i]);
        if (x >= low && x < high) f(x, warp_v + i);
      }
      __syncwarp();
    });
  }
};

// Positions of a row's tokens, in the order of the filters.
struct Positions {
  static constexpr int token_bits = 30;
  int64_t first_key;

  __device__ explicit Positions(float max_logit) : first_key(order_key(max_logit)) {}
  __device__ __forceinline__ int64_t of(float x, int token) const {
    return ((first_key - order_key(x)) << token_bits) + token;
  }
  __device__ __forceinline__ Cutoff cutoff(int64_t position) const {
    return {from_order_key(first_key - (position >> token_bits)),
            static_cast<int32_t>(position & ((1 << token_bits) - 1))};
  }
};

struct CutoffShared {
  double sums[filter_warps];
  unsigned long long integer_sums[filter_warps];
  int num_ranked, part, num_in_part;
  double mass_before;
  union {
    struct {
      unsigned counts[filter_threads];
      unsigned long long masses[filter_threads];
    } parts;
    struct {
      int64_t positions[filter_threads], sorted[filter_threads];
    } ranks;
  };
};

// Returns the first token at which the number of tokens, or with MASS the sum of their masses, reaches `target`, of
// which the tokens above the bracket have `mass_before`. Only tokens that `kept` keeps take part.
template <bool MASS, class T>
__device__ __forceinline__ Cutoff find_cutoff(const BracketTokens<T>& tokens, const Cutoff& kept, double mass_before,
                                              double target, const FixedPoint& fixed, CutoffShared& shared) {
  const FilterState& state = tokens.state;
  const TokenMass mass(state);
  const Positions positions(mass.max_logit);
  int64_t begin = 0, end = positions.of(state.bracket.low, 0) + (int64_t(1) << Positions::token_bits);
  int num_left = static_cast<int>(state.num_in_bracket);
  if (MASS && mass.has_leader() && mass.max_logit < state.bracket.high) {  // the bracket's first token
    if (target <= 1.) return {mass.max_logit, all_equal};
    mass_before = 1.;
    begin = int64_t(1) << Positions::token_bits;
  }
  while (num_left > filter_threads) {
    int shift = 0;  // log2 of the positions in a part
    while ((end - begin - 1) >> shift >= filter_threads) ++shift;
    shared.parts.counts[threadIdx.x] = 0;
    shared.parts.masses[threadIdx.x] = 0;
    if (threadIdx.x == 0) shared.part = -1;
    __syncthreads();
    tokens.for_each([&](float x, int v) {
      const int64_t position = positions.of(x, v);
      if (position < begin || position >= end || !kept.keeps(x, v)) return;
      const int part = static_cast<int>((position - begin) >> shift);
      atomicAdd(&shared.parts.counts[part], 1u);
      if (MASS) atomicAdd(&shared.parts.masses[part], fixed.from(mass.fast(x)));
    });
    __syncthreads();
    const unsigned count = shared.parts.counts[threadIdx.x];
    const unsigned long long mine = MASS ? shared.parts.masses[threadIdx.x] : count;
    unsigned long long total;
    const unsigned long long before = block_sum_before(mine, total, shared.integer_sums);
    const auto mass_with = [&](unsigned long long sum) {
      return mass_before + (MASS ? mass.of_sum(fixed, sum) : static_cast<double>(sum));
    };
    if (mass_with(before) < target && mass_with(before + mine) >= target) {
      shared.part = threadIdx.x;
      shared.num_in_part = static_cast<int>(count);
      shared.mass_before = mass_with(before);
    }
    __syncthreads();
    // By rounding, the tokens may already have reached the target above the bracket, or not with its last token.
    if (shared.part < 0)
      return mass_before >= target ? Cutoff{state.bracket.high, all_equal} : Cutoff{state.bracket.low, all_equal};
    begin += static_cast<int64_t>(shared.part) << shift;
    end = begin + (int64_t(1) << shift);
    num_left = shared.num_in_part;
    mass_before = shared.mass_before;
    __syncthreads();
  }

  if (threadIdx.x == 0) shared.num_ranked = 0;
  __syncthreads();
  tokens.for_each([&](float x, int v) {
    const int64_t position = positions.of(x, v);
    if (position < begin || position >= end || !kept.keeps(x, v)) return;
    shared.ranks.positions[atomicAdd(&shared.num_ranked, 1)] = position;  // in any order: ranks do not depend on it
  });
  __syncthreads();
  const int count = shared.num_ranked, mine = threadIdx.x;
  if (mine < count) {
    const int64_t position = shared.ranks.positions[mine];
    int rank = 0;
    for (int i = 0; i < count; ++i) rank += shared.ranks.positions[i] < position;
    shared.ranks.sorted[rank] = position;
  }
  __syncthreads();
  double my_mass = 0, total;
  if (mine < count) my_mass = MASS ? mass.exact(positions.cutoff(shared.ranks.sorted[mine]).logit) : 1.;
  const double before = mass_before + block_sum_before(my_mass, total, shared.sums);
  const int num_kept = __syncthreads_count(mine < count && before < target);
  const Cutoff cutoff =
      num_kept ? positions.cutoff(shared.ranks.sorted[num_kept - 1]) : Cutoff{state.bracket.high, all_equal};
  __syncthreads();
  return cutoff;
}

// Returns the cutoff of all filters together; others_kept_by(cutoff) is the mass of the tokens that it keeps but for
// one with the largest logit.
template <class T, class OthersKeptBy>
__device__ __forceinline__ Cutoff find_cutoffs(const BracketTokens<T>& tokens, const FixedPoint& fixed,
                                               const OthersKeptBy& others_kept_by, CutoffShared& shared) {
  const FilterState& state = tokens.state;
  const int64_t top_k = state.params.top_k;
  const float top_p = state.params.top_p;
  Cutoff cutoff = no_cutoff();
  if (state.bracket.high > state.bracket.low) {
    double total = state.sums.mass();
    if (top_k) {
      cutoff =
          find_cutoff<false>(tokens, no_cutoff(), state.bracket.count_above, static_cast<double>(top_k), fixed, shared);
      if (top_p < 1.f) total = 1. + others_kept_by(cutoff);
    }
    if (top_p < 1.f) {
      const double mass_above = TokenMass(state).above(fixed, state);
      cutoff = tighter(cutoff, find_cutoff<true>(tokens, cutoff, mass_above, top_p * total, fixed, shared));
    }
  }
  return tighter(cutoff, {state.min_p, all_equal});
}

}  // namespace
