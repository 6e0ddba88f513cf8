// PPO's clipped losses, gradients and statistics on NVIDIA GPUs; kernels/ppo_loss.py defines them, ppo_terms.h has a
// token's terms.
//
// Floor: at most 36 bytes in (three log-probabilities, advantage, weight, two values, return, second weight) and 8 out
// per token, against about 90 instructions, a third of them sums for the statistics.
//
//     tokens        | 0 1 2 3 | 4 5 6 7 |  ...  | 1020 ... 1023 |   4 tokens per thread, one load of 16 bytes per input
//     thread             0         1       ...        255           of block 0; then block 1, ... ; then block 0 again
//
//     even blocks   the policy's part      odd blocks   the value's part, of the same tokens
//
// In two kinds of blocks a thread needs half the registers, so twice the loads are in flight; a weight that both load
// comes from the L2 cache the second time. Weights are loaded one round ahead: if all four are 0, nothing else is
// loaded.
//
// Deterministic: sums add up over a thread's tokens, its warp and its block in float32, and over the blocks in double
// in a second launch, all in orders that N alone decides.
#include "ppo_terms.h"
#include "reduce.cuh"

namespace {

constexpr int tokens_per_thread = 4, block_threads = 256, num_warps = block_threads / warp_size;
constexpr int tokens_per_block = block_threads * tokens_per_thread;

// A block's partial results: the sums of ppo_terms.h, then the extremes of the ratio.
constexpr int ratio_max_index = PpoSum::COUNT, ratio_min_index = PpoSum::COUNT + 1, num_partials = PpoSum::COUNT + 2;

struct PpoArgs {
  const float *logprobs, *old_logprobs, *advantages, *weights, *values, *old_values, *returns, *value_weights;
  const float* sampler_logprobs;
  const float *shift, *scale;  // A = (advantages - shift) * scale
  float *logprobs_grad, *values_grad;
  float* partials;  // (num_partials, num_blocks)
  int64_t N, num_blocks;
  PpoClip clip;
  float max_importance;  // of pi_old / pi_sampler
  bool drop_capped;      // a larger one: weight 0, else max_importance
  bool aligned;          // all arrays are multiples of 16 bytes
};

struct Quad {
  float x[tokens_per_thread];
};

// True if the four tokens from t on are one load of 16 bytes.
__device__ __forceinline__ bool is_vector(const PpoArgs& args, int64_t t) {
  return args.aligned && t + tokens_per_thread <= args.N;
}

// Loads the four numbers from t on of each of n arrays; those without their bit in `mask` may become 0.
template <int n>
__device__ __forceinline__ void load(const PpoArgs& args, const float* const (&p)[n], int64_t t, unsigned mask,
                                     Quad (&quads)[n]) {
  if (is_vector(args, t)) {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float4 v = *reinterpret_cast<const float4*>(p[k] + t);
      quads[k] = {{v.x, v.y, v.z, v.w}};
    }
  } else {
#pragma unroll
    for (int k = 0; k < n; ++k) {
#pragma unroll
      for (int i = 0; i < tokens_per_thread; ++i) quads[k].x[i] = t + i < args.N && mask >> i & 1 ? p[k][t + i] : 0.f;
    }
  }
}
__device__ __forceinline__ Quad load_weights(const PpoArgs& args, const float* weights, int64_t t) {
  Quad quads[1] = {};
  if (t < args.N) load(args, {weights}, t, ~0u, quads);
  return quads[0];
}
// Returns a bit for each token, 1 if its weight is not 0.
__device__ __forceinline__ unsigned mask_of(const Quad& weights) {
  unsigned mask = 0;
#pragma unroll
  for (int i = 0; i < tokens_per_thread; ++i) mask |= unsigned(weights.x[i] != 0.f) << i;
  return mask;
}
__device__ __forceinline__ void store(const PpoArgs& args, float* p, int64_t t, const Quad& quad) {
  if (!p) return;
  if (is_vector(args, t)) {
    *reinterpret_cast<float4*>(p + t) = make_float4(quad.x[0], quad.x[1], quad.x[2], quad.x[3]);
  } else {
#pragma unroll
    for (int i = 0; i < tokens_per_thread; ++i)
      if (t + i < args.N) p[t + i] = quad.x[i];
  }
}

// A thread's sums of the policy's part. HAS_SAMPLER: sampler_logprobs are given.
template <bool HAS_SAMPLER>
struct PolicySums {
  static constexpr int first = PpoSum::WEIGHT, num_stats = PpoSum::VALUE_WEIGHT - first;
  static constexpr int loss = PpoSum::POLICY_LOSS, num_sums = num_stats + 1;  // the last one is the loss
  float sum[num_sums] = {}, ratio_max = -INFINITY, ratio_min = INFINITY;

  static __device__ __forceinline__ const float* weights(const PpoArgs& args) { return args.weights; }
  static __device__ __forceinline__ float* grads(const PpoArgs& args) { return args.logprobs_grad; }

  // Adds a token and returns the gradient by its log-probability. All numbers of a token of weight 0 are 0.
  __device__ __forceinline__ float add(const PpoArgs& args, bool valid, float w, float logprob, float old_logprob,
                                       float advantage, float sampler_logprob) {
    const PpoClip& clip = args.clip;
    const float unclipped_log_ratio = logprob - old_logprob;
    const float log_ratio = clamped_log_ratio(unclipped_log_ratio, clip), ratio = expf(log_ratio);
    const PolicyTerm<float> term = policy_term<true>(unclipped_log_ratio, ratio, advantage, clip);
    float coefficient = w;
    bool is_capped = false;
    if (HAS_SAMPLER) {
      const float importance = expf(old_logprob - sampler_logprob);
      is_capped = importance > args.max_importance;
      const float capped_importance = args.drop_capped ? 0.f : args.max_importance;
      coefficient = w * (is_capped ? capped_importance : importance);
    }
    const bool counts = coefficient != 0.f;
    sum[PpoSum::WEIGHT] += w;
    sum[PpoSum::CLIPPED_LOW] += term.is_clipped && ratio < clip.ratio_low ? w : 0.f;
    sum[PpoSum::CLIPPED_HIGH] += term.is_clipped && ratio > clip.ratio_high ? w : 0.f;
    sum[PpoSum::CLIPPED_DUAL] += term.is_dual ? w : 0.f;
    sum[PpoSum::KL_K1] -= w * log_ratio;
    sum[PpoSum::KL_K3] += w * ((ratio - 1.f) - log_ratio);
    sum[PpoSum::RATIO] += w * ratio;
    sum[PpoSum::RATIO_SQUARE] += w * (ratio * ratio);
    sum[PpoSum::IMPORTANCE] += coefficient;
    sum[PpoSum::IMPORTANCE_CAPPED] += is_capped ? w : 0.f;
    sum[num_sums - 1] += counts ? coefficient * term.loss : 0.f;
    ratio_max = fmaxf(ratio_max, valid ? ratio : -INFINITY);
    ratio_min = fminf(ratio_min, valid ? ratio : INFINITY);
    return counts ? coefficient * term.grad : 0.f;
  }

  // Adds the four tokens from t on and returns their gradients.
  __device__ __forceinline__ Quad add_quad(const PpoArgs& args, int64_t t, unsigned mask, const Quad& w) {
    Quad quads[HAS_SAMPLER ? 4 : 3], grads;
    if constexpr (HAS_SAMPLER) {
      load(args, {args.logprobs, args.old_logprobs, args.advantages, args.sampler_logprobs}, t, mask, quads);
    } else {
      load(args, {args.logprobs, args.old_logprobs, args.advantages}, t, mask, quads);
    }
    const float shift = args.shift ? *args.shift : 0.f, scale = args.scale ? *args.scale : 1.f;
#pragma unroll
    for (int i = 0; i < tokens_per_thread; ++i) {
      const bool valid = mask >> i & 1;
      const float logprob = valid ? quads[0].x[i] : 0.f;
      const float old_logprob = valid ? quads[1].x[i] : 0.f;
      const float advantage = valid ? (quads[2].x[i] - shift) * scale : 0.f;
      const float sampler_logprob = HAS_SAMPLER && valid ? quads[HAS_SAMPLER ? 3 : 1].x[i] : 0.f;
      grads.x[i] = add(args, valid, w.x[i], logprob, old_logprob, advantage, sampler_logprob);
    }
    return grads;
  }
};

// A thread's sums of the value's part.
struct ValueSums {
  static constexpr int first = PpoSum::VALUE_WEIGHT, num_stats = PpoSum::POLICY_LOSS - first;
  static constexpr int loss = PpoSum::VALUE_LOSS, num_sums = num_stats + 1;  // the last one is the loss
  float sum[num_sums] = {}, ratio_max = 0.f, ratio_min = 0.f;                // no ratios here

  static __device__ __forceinline__ const float* weights(const PpoArgs& args) { return args.value_weights; }
  static __device__ __forceinline__ float* grads(const PpoArgs& args) { return args.values_grad; }

  __device__ __forceinline__ float add(const PpoArgs& args, float w, float value, float old_value, float target) {
    const ValueTerm<float> term = value_term<true>(value, old_value, target, args.clip);
    sum[PpoSum::VALUE_WEIGHT - first] += w;
    sum[PpoSum::VALUE_CLIPPED - first] += term.is_clipped ? w : 0.f;
    sum[PpoSum::VALUE - first] += w * value;
    sum[PpoSum::VALUE_ERROR - first] += w * term.squared_error;
    sum[PpoSum::RETURN - first] += w * target;
    sum[num_sums - 1] += w * term.loss;
    return w * term.grad;
  }

  __device__ __forceinline__ Quad add_quad(const PpoArgs& args, int64_t t, unsigned mask, const Quad& w) {
    Quad quads[3], grads;
    load(args, {args.values, args.old_values, args.returns}, t, mask, quads);
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

// Adds up n <= 32 numbers over a warp at once, in about n + 2 shuffles in place of 5 n. In each round a lane keeps one
// half of its numbers and gives the other half to its partner. After the call, lane l holds total number
// `owned_sum(l)` in x[0]; `owned_sum(l) == n` means the lane holds none.
template <int n, int d = warp_size / 2>
__device__ __forceinline__ void warp_sums(float* x) {
  constexpr int half = (n + 1) / 2;
  const bool upper = threadIdx.x & d;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const float low = x[i];
    float high = low;  // a single number is added up in both halves
    if (n > 1) high = i + half < n ? x[i + half] : 0.f;
    x[i] = (upper ? high : low) + __shfl_xor_sync(full_mask, upper ? low : high, d);
  }
  if constexpr (d > 1) warp_sums<half, d / 2>(x);
}
template <int n, int d = warp_size / 2>
__device__ __forceinline__ int owned_sum(int lane) {
  constexpr int half = (n + 1) / 2;
  int owned = 0;
  if constexpr (d > 1) owned = owned_sum<half, d / 2>(lane);
  if (owned == half) return n;
  return n > 1 && (lane & d) ? half + owned : owned;
}

// Goes through the tokens of a block and writes its column of `partials`.
template <class Sums>
__device__ __forceinline__ void run_block(const PpoArgs& args, int64_t block, float (*shared)[num_partials]) {
  Sums sums;
  const float* weights = Sums::weights(args);
  const int64_t stride = args.num_blocks * tokens_per_block;
  int64_t t = block * tokens_per_block + int64_t(threadIdx.x) * tokens_per_thread;
  Quad w = load_weights(args, weights, t);
  for (; t < args.N; t += stride) {
    const Quad next_w = load_weights(args, weights, t + stride);
    const unsigned mask = mask_of(w);
    Quad grads = {};
    if (mask) grads = sums.add_quad(args, t, mask, w);
    store(args, Sums::grads(args), t, grads);
    w = next_w;
  }
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const float ratio_max = warp_reduce<Max>(sums.ratio_max), ratio_min = -warp_reduce<Max>(-sums.ratio_min);
  warp_sums<Sums::num_sums>(sums.sum);
  const int owned = owned_sum<Sums::num_sums>(lane);
  if (owned < Sums::num_sums) shared[warp][owned] = sums.sum[0];
  if (lane == 0) {
    shared[warp][ratio_max_index] = ratio_max;
    shared[warp][ratio_min_index] = ratio_min;
  }
  __syncthreads();
  const int i = threadIdx.x;
  if (i < Sums::num_sums) {
    float sum = 0.f;
    for (int k = 0; k < num_warps; ++k) sum += shared[k][i];
    const int index = i < Sums::num_stats ? Sums::first + i : Sums::loss;
    args.partials[index * args.num_blocks + block] = sum;
  } else if (i < Sums::num_sums + 2 && Sums::first == PpoSum::WEIGHT) {
    const int index = ratio_max_index + i - Sums::num_sums;
    float extreme = shared[0][index];
    for (int k = 1; k < num_warps; ++k)
      extreme = index == ratio_max_index ? fmaxf(extreme, shared[k][index]) : fminf(extreme, shared[k][index]);
    args.partials[index * args.num_blocks + block] = extreme;
  }
}

template <bool HAS_SAMPLER>
__global__ void __launch_bounds__(block_threads, 4) ppo_loss_kernel(const PpoArgs args) {
  __shared__ float shared[num_warps][num_partials];
  const bool both = args.logprobs && args.values;
  const int64_t block = both ? blockIdx.x / 2 : blockIdx.x;
  if (args.logprobs && !(both && blockIdx.x % 2)) {
    run_block<PolicySums<HAS_SAMPLER>>(args, block, shared);
  } else {
    run_block<ValueSums>(args, block, shared);
  }
}

// A warp adds up each row of `partials`.
__global__ void __launch_bounds__(num_partials* warp_size)
    finish_kernel(const PpoArgs args, float* policy_loss, float* value_loss, float* stats) {
  const int lane = threadIdx.x % warp_size, index = threadIdx.x / warp_size;
  const float* partials = args.partials + index * args.num_blocks;
  const bool is_value = (index >= PpoSum::VALUE_WEIGHT && index < PpoSum::POLICY_LOSS) || index == PpoSum::VALUE_LOSS;
  const int64_t num_blocks = (is_value ? args.values : args.logprobs) ? args.num_blocks : 0;
  if (index >= PpoSum::COUNT) {
    const float sign = index == ratio_max_index ? 1.f : -1.f;
    float extreme = -INFINITY, ratio_sum = 0.f;
    for (int64_t i = lane; i < num_blocks; i += warp_size) {
      extreme = fmaxf(extreme, sign * partials[i]);
      ratio_sum += args.partials[PpoSum::RATIO * args.num_blocks + i];
    }
    extreme = warp_reduce<Max>(extreme);
    ratio_sum = warp_reduce<Add>(ratio_sum);
    const bool is_nan = ratio_sum != ratio_sum;  // fmaxf ignores a NaN, the sum does not
    if (lane == 0) stats[num_summed_stats + index - PpoSum::COUNT] = is_nan ? ratio_sum : sign * extreme;
    return;
  }
  double sum = 0;
#pragma unroll 8
  for (int64_t i = lane; i < num_blocks; i += warp_size) sum += partials[i];
  sum = warp_reduce<Add>(sum);
  if (lane) return;
  if (index < num_summed_stats) stats[index] = float(sum);
  if (index == PpoSum::POLICY_LOSS) *policy_loss = float(sum);
  if (index == PpoSum::VALUE_LOSS) *value_loss = float(0.5 * sum);
}

// logprobs or values may be null: without them, that loss is 0. partials: memory for 19 numbers of each of `num_blocks`
// blocks.
const char* ppo_loss(uintptr_t logprobs, uintptr_t old_logprobs, uintptr_t advantages, uintptr_t weights,
                     uintptr_t values, uintptr_t old_values, uintptr_t returns, uintptr_t value_weights,
                     uintptr_t sampler_logprobs, uintptr_t shift, uintptr_t scale, uintptr_t policy_loss,
                     uintptr_t value_loss, uintptr_t stats, uintptr_t logprobs_grad, uintptr_t values_grad,
                     uintptr_t partials, int64_t num_blocks, int64_t N, float clip_low, float clip_high,
                     float dual_clip, float value_clip, float log_ratio_clamp, float max_importance, int drop_capped,
                     uintptr_t stream) {
  PpoArgs args;
  args.logprobs = ptr<const float>(logprobs);
  args.old_logprobs = ptr<const float>(old_logprobs);
  args.advantages = ptr<const float>(advantages);
  args.weights = ptr<const float>(weights);
  args.values = ptr<const float>(values);
  args.old_values = value_clip > 0.f ? ptr<const float>(old_values) : args.values;  // not used without a clip
  args.returns = ptr<const float>(returns);
  args.value_weights = ptr<const float>(value_weights ? value_weights : weights);
  args.sampler_logprobs = ptr<const float>(sampler_logprobs);
  args.shift = ptr<const float>(shift);
  args.scale = ptr<const float>(scale);
  args.logprobs_grad = ptr<float>(logprobs_grad);
  args.values_grad = ptr<float>(values_grad);
  args.partials = ptr<float>(partials);
  args.N = N;
  args.num_blocks = N ? num_blocks : 0;
  args.clip.ratio_low = 1.f - clip_low;
  args.clip.ratio_high = 1.f + clip_high;
  args.clip.dual = dual_clip > 0.f ? dual_clip : INFINITY;
  args.clip.value = value_clip > 0.f ? value_clip : INFINITY;
  args.clip.log_ratio = log_ratio_clamp > 0.f ? log_ratio_clamp : INFINITY;
  args.max_importance = max_importance;
  args.drop_capped = drop_capped;
  const uintptr_t addresses = logprobs | old_logprobs | advantages | weights | values | old_values | returns |
                              value_weights | sampler_logprobs | logprobs_grad | values_grad;
  args.aligned = addresses % 16 == 0;
  if (N) {
    const unsigned grid = blocks_for(num_blocks * (logprobs && values ? 2 : 1), 1);
    if (!grid) return "a grid has no such number of blocks";
    const auto kernel = sampler_logprobs ? ppo_loss_kernel<true> : ppo_loss_kernel<false>;
    if (const char* error = launch(kernel, grid, block_threads, 0, stream, args)) return error;
  }
  return launch(finish_kernel, 1, num_partials * warp_size, 0, stream, args, ptr<float>(policy_loss),
                ptr<float>(value_loss), ptr<float>(stats));
}

CONSTANT(ppo_loss_num_stats, num_summed_stats + 2)
CONSTANT(ppo_loss_tokens_per_block, tokens_per_block)
CONSTANT(ppo_loss_num_partials, num_partials)
KERNEL(ppo_loss)

}  // namespace
