// A thread's part of ppo_loss: four tokens are loaded, their terms added to its sums, and their gradients stored.
#pragma once
#include "ppo_terms.h"
#include "quad.cuh"
#include "reduce.cuh"

namespace {

constexpr int tokens_per_thread = 4, block_threads = 256, num_warps = block_threads / warp_size;
constexpr int tokens_per_block = block_threads * tokens_per_thread;

// A block's partial results: the sums of ppo_terms.h, then the extremes of the ratio.
constexpr int ratio_max_index = PpoSum::COUNT, ratio_min_index = PpoSum::COUNT + 1, num_partials = PpoSum::COUNT + 2;

template <int DTYPE>  // of all arrays, or ANY_DTYPE
struct PpoArgs {
  using In = Input<DTYPE>;
  using Out = Output<DTYPE>;
  In logprobs, old_logprobs, advantages, weights, values, old_values, returns, value_weights, sampler_logprobs;
  Input<ANY_DTYPE> shift, scale;  // A = (advantages - shift) * scale
  Out logprobs_grad, values_grad;
  const float* row_log_ratios;  // of the rows with one ratio each, or null
  int64_t row_length;
  bool is_cispo;
  float* partials;   // (num_partials, num_blocks)
  unsigned* ticket;  // of `is_last_block`
  float *policy_loss, *value_loss, *stats;
  int64_t N, num_blocks;
  PpoClip clip;
  float max_importance, min_importance;  // of pi_old / pi_sampler
  bool drop_capped;                      // one beyond them: weight 0, else the bound
  bool aligned;                          // four tokens of any array are one load
};

struct Quad {
  float x[tokens_per_thread];
};

// True if the four tokens from t on are one load of each array.
template <class Args>
__device__ __forceinline__ bool is_vector(const Args& args, int64_t t) {
  return args.aligned && t + tokens_per_thread <= args.N;
}

// Loads the bits of the four numbers from t on of each of n arrays; 0 beyond the end.
template <int n, class Args>
__device__ __forceinline__ void load(const Args& args, const typename Args::In* const (&arrays)[n], int64_t t,
                                     uint4 (&bits)[n]) {
  if (is_vector(args, t)) {
#pragma unroll
    for (int k = 0; k < n; ++k) bits[k] = arrays[k]->load4(t);
  } else {
    const int64_t left = args.N - t;
    const unsigned inside = left >= tokens_per_thread ? ~0u : left > 0 ? (1u << left) - 1 : 0;
#pragma unroll
    for (int k = 0; k < n; ++k) bits[k] = arrays[k]->load_each(inside, [&](int i) { return t + i; });
  }
}
template <class In>
__device__ __forceinline__ Quad unpack_quad(const In& array, const uint4& bits) {
  Quad quad;
  array.unpack(bits, quad.x);
  return quad;
}
// Returns a bit for each token, 1 if its weight is not 0.
__device__ __forceinline__ unsigned mask_of(const Quad& weights) {
  unsigned mask = 0;
#pragma unroll
  for (int i = 0; i < tokens_per_thread; ++i) mask |= unsigned(weights.x[i] != 0.f) << i;
  return mask;
}
template <class Args>
__device__ __forceinline__ void store(const Args& args, const typename Args::Out& out, int64_t t, const Quad& quad) {
  if (!out.p) return;
  if (is_vector(args, t)) {
    out.store4(t, quad.x);
  } else {
#pragma unroll
    for (int i = 0; i < tokens_per_thread; ++i)
      if (t + i < args.N) out.store(t + i, quad.x[i]);
  }
}

// The log-ratio of a token's row; after each call of `next`, that of the next token's.
struct RowLogRatio {
  const float* p;
  int64_t row_length, left;  // `left`: tokens of the row from this one on

  __device__ __forceinline__ void next() {
    if (--left) return;
    ++p;
    left = row_length;
  }
};
// One division for four tokens: of 32 bits where it can be, as one of 64 takes several times as long.
__device__ __forceinline__ RowLogRatio row_log_ratio(const float* row_log_ratios, int64_t t, int64_t row_length) {
  const bool is_small = (t | row_length) >> 32 == 0;
  const int64_t row = is_small ? int64_t(unsigned(t) / unsigned(row_length)) : t / row_length;
  return {row_log_ratios + row, row_length, (row + 1) * row_length - t};
}

// A thread's sums of the policy's part. HAS_SAMPLER: sampler_logprobs are given. ANY_RATIO: the ratio may be a row's,
// the clip CISPO's, and there may be a min_importance.
template <bool HAS_SAMPLER, bool ANY_RATIO, class Args>
struct PolicySums {
  using In = typename Args::In;
  static constexpr int num_inputs = HAS_SAMPLER ? 4 : 3;
  static constexpr int first = PpoSum::WEIGHT, num_stats = PpoSum::VALUE_WEIGHT - first;
  static constexpr int loss = PpoSum::POLICY_LOSS, num_sums = num_stats + 1;  // the last one is the loss
  float sum[num_sums] = {}, ratio_max = -INFINITY, ratio_min = INFINITY;

  static __device__ __forceinline__ const In& weights(const Args& args) { return args.weights; }
  static __device__ __forceinline__ const typename Args::Out& grads(const Args& args) { return args.logprobs_grad; }
  static __device__ __forceinline__ void load_inputs(const Args& args, int64_t t, uint4 (&bits)[num_inputs]) {
    if constexpr (HAS_SAMPLER) {
      load(args, {&args.logprobs, &args.old_logprobs, &args.advantages, &args.sampler_logprobs}, t, bits);
    } else {
      load(args, {&args.logprobs, &args.old_logprobs, &args.advantages}, t, bits);
    }
  }

  // Adds a token and returns the gradient by its log-ratio; CISPO's is by its log-probability. All numbers of a token
  // of weight 0 are 0.
  __device__ __forceinline__ float add(const Args& args, bool valid, float w, float logprob, float unclipped_log_ratio,
                                       float advantage, float log_importance) {
    const PpoClip& clip = args.clip;
    const float log_ratio = clamped_log_ratio(unclipped_log_ratio, clip), ratio = expf(log_ratio);
    const PolicyTerm<float> term = ANY_RATIO && args.is_cispo
                                       ? cispo_term(logprob, ratio, advantage, clip)
                                       : policy_term<true>(unclipped_log_ratio, ratio, advantage, clip);
    float coefficient = w;
    bool is_capped = false;
    if (HAS_SAMPLER) {
      const float importance = expf(log_importance);
      const bool is_high = importance > args.max_importance;
      const bool is_low = ANY_RATIO && importance < args.min_importance;  // two registers too many elsewhere
      is_capped = is_high || is_low;
      const float bound = is_low ? args.min_importance : args.max_importance;
      coefficient = w * (is_capped ? (args.drop_capped ? 0.f : bound) : importance);
    }
    const bool counts = coefficient != 0.f;
    sum[PpoSum::WEIGHT] += w;
    sum[PpoSum::CLIPPED_LOW] += term.is_clipped && ratio < clip.ratio_low ? w : 0.f;
    sum[PpoSum::CLIPPED_HIGH] += term.is_clipped && ratio > clip.ratio_high ? w : 0.f;
    sum[PpoSum::CLIPPED_DUAL] += term.is_dual ? w : 0.f;
    sum[PpoSum::KL_K1] -= w * log_ratio;
    sum[PpoSum::KL_K3] += w * exp_minus_1_minus(log_ratio, ratio);
    sum[PpoSum::RATIO] += w * ratio;
    sum[PpoSum::RATIO_SQUARE] += w * (ratio * ratio);
    sum[PpoSum::IMPORTANCE] += coefficient;
    sum[PpoSum::IMPORTANCE_CAPPED] += is_capped ? w : 0.f;
    sum[num_sums - 1] += counts ? coefficient * term.loss : 0.f;
    ratio_max = fmaxf(ratio_max, valid ? ratio : -INFINITY);
    ratio_min = fminf(ratio_min, valid ? ratio : INFINITY);
    return counts ? coefficient * term.grad : 0.f;
  }

  // Adds four tokens and returns their gradients.
  __device__ __forceinline__ Quad add_quad(const Args& args, const uint4 (&bits)[num_inputs], unsigned mask,
                                           const Quad& w, int64_t t) {
    const Quad quads[] = {unpack_quad(args.logprobs, bits[0]), unpack_quad(args.old_logprobs, bits[1]),
                          unpack_quad(args.advantages, bits[2]),
                          HAS_SAMPLER ? unpack_quad(args.sampler_logprobs, bits[num_inputs - 1]) : Quad{}};
    const float shift = args.shift.p ? args.shift.load(0) : 0.f, scale = args.scale.p ? args.scale.load(0) : 1.f;
    const bool by_row = ANY_RATIO && args.row_log_ratios;
    RowLogRatio row = by_row ? row_log_ratio(args.row_log_ratios, t, args.row_length) : RowLogRatio{};
    Quad grads;
#pragma unroll
    for (int i = 0; i < tokens_per_thread; ++i) {
      const bool valid = mask >> i & 1;
      const float logprob = valid ? quads[0].x[i] : 0.f;
      const float old_logprob = valid ? quads[1].x[i] : 0.f;
      const float advantage = valid ? (quads[2].x[i] - shift) * scale : 0.f;
      const float log_importance = old_logprob - (valid ? quads[3].x[i] : 0.f);
      float log_ratio = logprob - old_logprob;
      if (by_row) {
        log_ratio = valid ? *row.p : 0.f;
        row.next();
      }
      grads.x[i] = add(args, valid, w.x[i], logprob, log_ratio, advantage, log_importance);
    }
    return grads;
  }
};

// A thread's sums of the value's part.
template <class Args>
struct ValueSums {
  using In = typename Args::In;
  static constexpr int num_inputs = 3;
  static constexpr int first = PpoSum::VALUE_WEIGHT, num_stats = PpoSum::POLICY_LOSS - first;
  static constexpr int loss = PpoSum::VALUE_LOSS, num_sums = num_stats + 1;  // the last one is the loss
  float sum[num_sums] = {}, ratio_max = 0.f, ratio_min = 0.f;                // no ratios here

  static __device__ __forceinline__ const In& weights(const Args& args) { return args.value_weights; }
  static __device__ __forceinline__ const typename Args::Out& grads(const Args& args) { return args.values_grad; }
  static __device__ __forceinline__ void load_inputs(const Args& args, int64_t t, uint4 (&bits)[num_inputs]) {
    load(args, {&args.values, &args.old_values, &args.returns}, t, bits);
  }

  __device__ __forceinline__ float add(const Args& args, float w, float value, float old_value, float target) {
    const ValueTerm<float> term = value_term<true>(value, old_value, target, args.clip);
    sum[PpoSum::VALUE_WEIGHT - first] += w;
    sum[PpoSum::VALUE_CLIPPED - first] += term.is_clipped ? w : 0.f;
    sum[PpoSum::VALUE - first] += w * value;
    sum[PpoSum::VALUE_ERROR - first] += w * term.squared_error;
    sum[PpoSum::RETURN - first] += w * target;
    sum[num_sums - 1] += w * term.loss;
    return w * term.grad;
  }

  __device__ __forceinline__ Quad add_quad(const Args& args, const uint4 (&bits)[num_inputs], unsigned mask,
                                           const Quad& w, int64_t) {
    const Quad quads[] = {unpack_quad(args.values, bits[0]), unpack_quad(args.old_values, bits[1]),
                          unpack_quad(args.returns, bits[2])};
    Quad grads;
#pragma unroll
    for (int i = 0; i < tokens_per_thread; ++i) {
      const bool valid = mask >> i & 1;
      const float value = valid ? quads[0].x[i] : 0.f;
      const float old_value = valid ? quads[1].x[i] : 0.f;
      const float target = valid ? quads[2].x[i] : 0.f;
      grads.x[i] = add(args, w.x[i], value, old_value, target);
    }
    return grads;
  }
};

}  // namespace
