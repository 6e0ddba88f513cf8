// PPO's clipped losses, gradients and statistics on NVIDIA GPUs; kernels/ppo_loss.py defines them, ppo_terms.h has a
// token's terms.
//
// Floor: at most 36 bytes in (three log-probabilities, advantage, weight, two values, return, second weight) and 8 out
// per token, against about 90 instructions, a third of them sums for the statistics. 16-bit inputs are half of that.
//
//     tokens        | 0 1 2 3 | 4 5 6 7 |  ...  | 1020 ... 1023 |   4 tokens per thread, one load of 16 bytes per input
//     thread             0         1       ...        255           of block 0; then block 1, ... ; then block 0 again
//
//     even blocks   the policy's part      odd blocks   the value's part, of the same tokens
//
// In two kinds of blocks a thread needs half the registers, so twice the loads are in flight; a weight that both load
// comes from the L2 cache the second time. Weights are loaded one round ahead: if all four are 0, nothing else is
// loaded. In the first round everything is loaded at once.
//
// Deterministic: sums add up over a thread's tokens, its warp and its block in float32, and over the blocks in double
// in the block that ends last, all in orders that N alone decides.
#include "ppo_sums.cuh"
#include "reduce.cuh"
#include "scale_gradients.cuh"

namespace {

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
template <class Sums, class Args>
__device__ __forceinline__ void run_block(const Args& args, int64_t block, float (*shared)[num_partials]) {
  Sums sums;
  const auto& weights = Sums::weights(args);
  const int64_t stride = args.num_blocks * tokens_per_block;
  int64_t t = block * tokens_per_block + int64_t(threadIdx.x) * tokens_per_thread;
  uint4 w_bits[1], next_w_bits[1], bits[Sums::num_inputs];
  load(args, {&weights}, t, w_bits);
  Sums::load_inputs(args, t, bits);
  while (t < args.N) {
    load(args, {&weights}, t + stride, next_w_bits);
    const Quad w = unpack_quad(weights, w_bits[0]);
    Quad grads = {};
    if (const unsigned mask = mask_of(w)) grads = sums.add_quad(args, bits, mask, w, t);
    store(args, Sums::grads(args), t, grads);
    t += stride;
    w_bits[0] = next_w_bits[0];
    if (mask_of(unpack_quad(weights, w_bits[0]))) Sums::load_inputs(args, t, bits);
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

// All threads of one block call it: a warp adds up each row of `partials`.
template <class Args>
__device__ __forceinline__ void finish(const Args& args) {
  const int lane = threadIdx.x % warp_size;
  for (int index = threadIdx.x / warp_size; index < num_partials; index += num_warps) {
    const float* partials = args.partials + index * args.num_blocks;
    const bool is_value = (index >= PpoSum::VALUE_WEIGHT && index < PpoSum::POLICY_LOSS) || index == PpoSum::VALUE_LOSS;
    const int64_t num_blocks = (is_value ? args.values : args.logprobs).p ? args.num_blocks : 0;
    if (index >= PpoSum::COUNT) {
      const float sign = index == ratio_max_index ? 1.f : -1.f;
      float extreme = -INFINITY, ratio_sum = 0.f;
#pragma unroll 4
      for (int64_t i = lane; i < num_blocks; i += warp_size) {
        extreme = fmaxf(extreme, sign * __ldcg(partials + i));
        ratio_sum += __ldcg(args.partials + PpoSum::RATIO * args.num_blocks + i);
      }
      extreme = warp_reduce<Max>(extreme);
      ratio_sum = warp_reduce<Add>(ratio_sum);
      const bool is_nan = ratio_sum != ratio_sum;  // fmaxf ignores a NaN, the sum does not
      if (lane == 0) args.stats[num_summed_stats + index - PpoSum::COUNT] = is_nan ? ratio_sum : sign * extreme;
      continue;
    }
    double sum = 0;
#pragma unroll 8
    for (int64_t i = lane; i < num_blocks; i += warp_size) sum += __ldcg(partials + i);
    sum = warp_reduce<Add>(sum);
    if (lane) continue;
    if (index < num_summed_stats) args.stats[index] = float(sum);
    if (index == PpoSum::POLICY_LOSS) *args.policy_loss = float(sum);
    if (index == PpoSum::VALUE_LOSS) *args.value_loss = float(0.5 * sum);
  }
}

template <bool HAS_SAMPLER, bool ANY_RATIO, class Args>
__device__ __forceinline__ void run_kernel(const Args& args) {
  __shared__ float shared[num_warps][num_partials];
  const bool both = args.logprobs.p && args.values.p;
  const int64_t block = both ? blockIdx.x / 2 : blockIdx.x;
  if (args.logprobs.p && !(both && blockIdx.x % 2)) {
    run_block<PolicySums<HAS_SAMPLER, ANY_RATIO, Args>>(args, block, shared);
  } else {
    run_block<ValueSums<Args>>(args, block, shared);
  }
  if (is_last_block(args.ticket)) finish(args);
}

// Arrays of any dtypes take registers.
template <bool HAS_SAMPLER, int DTYPE>
__global__ void __launch_bounds__(block_threads, DTYPE == ANY_DTYPE ? 3 : 4)
    ppo_loss_kernel(const PpoArgs<DTYPE> args) {
  run_kernel<HAS_SAMPLER, false>(args);
}
template <bool HAS_SAMPLER>
__global__ void __launch_bounds__(block_threads, 3) ppo_loss_any_ratio_kernel(const PpoArgs<ANY_DTYPE> args) {
  run_kernel<HAS_SAMPLER, true>(args);
}

// The arrays of a call with their dtypes: 11 inputs, two outputs.
struct PpoArrays {
  Input<ANY_DTYPE> in[11];
  Output<ANY_DTYPE> out[2];
};

template <int DTYPE>
const char* launch_loss(PpoArgs<DTYPE>& args, const PpoArrays& arrays, bool clips_values, uintptr_t stream) {
  using Args = PpoArgs<DTYPE>;
  typename Args::In* const inputs[] = {&args.logprobs, &args.old_logprobs,  &args.advantages,
                                       &args.weights,  &args.values,        &args.old_values,
                                       &args.returns,  &args.value_weights, &args.sampler_logprobs};
  uintptr_t alignment = 0;
  for (int k = 0; k < 9; ++k) {
    *inputs[k] = {arrays.in[k].p, arrays.in[k].dtype};
    alignment |= inputs[k]->alignment(0);
  }
  if (!clips_values) args.old_values = args.values;  // not used
  if (!args.value_weights.p) args.value_weights = args.weights;
  args.shift = arrays.in[9];
  args.scale = arrays.in[10];
  args.logprobs_grad = {arrays.out[0].p, arrays.out[0].dtype};
  args.values_grad = {arrays.out[1].p, arrays.out[1].dtype};
  args.aligned = (alignment | args.logprobs_grad.alignment(0) | args.values_grad.alignment(0)) % 16 == 0;
  const unsigned grid = blocks_for(args.num_blocks * (args.logprobs.p && args.values.p ? 2 : 1), 1);
  if (!grid) return "a grid has no such number of blocks";
  auto kernel = args.sampler_logprobs.p ? ppo_loss_kernel<true, DTYPE> : ppo_loss_kernel<false, DTYPE>;
  if constexpr (DTYPE == ANY_DTYPE) {
    if (args.row_log_ratios || args.is_cispo || args.min_importance > 0.f)
      kernel = args.sampler_logprobs.p ? ppo_loss_any_ratio_kernel<true> : ppo_loss_any_ratio_kernel<false>;
  }
  return launch(kernel, grid, block_threads, 0, stream, args);
}

// logprobs or values may be null: without them, that loss is 0. partials: memory for 19 numbers of each of `num_blocks`
// blocks. row_log_ratios: of the rows of row_length tokens with one ratio each, or null. dtypes: the numbers of
// dtypes.h of the 11 inputs and 2 gradients, two bits each, the first one lowest.
const char* ppo_loss(uintptr_t logprobs, uintptr_t old_logprobs, uintptr_t advantages, uintptr_t weights,
                     uintptr_t values, uintptr_t old_values, uintptr_t returns, uintptr_t value_weights,
                     uintptr_t sampler_logprobs, uintptr_t shift, uintptr_t scale, uintptr_t policy_loss,
                     uintptr_t value_loss, uintptr_t stats, uintptr_t logprobs_grad, uintptr_t values_grad,
                     uintptr_t partials, uintptr_t row_log_ratios, uintptr_t ticket, int64_t dtypes, int64_t num_blocks,
                     int64_t N, int64_t row_length, float clip_low, float clip_high, float dual_clip, float value_clip,
                     float log_ratio_clamp, float max_importance, float min_importance, int drop_capped, int is_cispo,
                     uintptr_t stream) {
  const uintptr_t inputs[] = {logprobs, old_logprobs,  advantages,       weights, values, old_values,
                              returns,  value_weights, sampler_logprobs, shift,   scale};
  PpoArrays arrays;
  for (int k = 0; k < 11; ++k) arrays.in[k] = {ptr<const void>(inputs[k]), int(dtypes >> 2 * k & 3)};
  arrays.out[0] = {ptr<void>(logprobs_grad), int(dtypes >> 22 & 3)};
  arrays.out[1] = {ptr<void>(values_grad), int(dtypes >> 24 & 3)};
  const auto launch_with = [&](auto args) {
    args.partials = ptr<float>(partials);
    args.ticket = ptr<unsigned>(ticket);
    args.policy_loss = ptr<float>(policy_loss);
    args.value_loss = ptr<float>(value_loss);
    args.stats = ptr<float>(stats);
    args.row_log_ratios = ptr<const float>(row_log_ratios);
    args.row_length = row_length;
    args.is_cispo = is_cispo;
    args.N = N;
    args.num_blocks = num_blocks;
    args.clip.ratio_low = is_cispo ? -INFINITY : 1.f - clip_low;
    args.clip.ratio_high = 1.f + clip_high;
    args.clip.dual = dual_clip > 0.f ? dual_clip : INFINITY;
    args.clip.value = value_clip > 0.f ? value_clip : INFINITY;
    args.clip.log_ratio = log_ratio_clamp > 0.f ? log_ratio_clamp : INFINITY;
    args.max_importance = max_importance;
    args.min_importance = min_importance;
    args.drop_capped = drop_capped;
    return launch_loss(args, arrays, value_clip > 0.f, stream);
  };
  if (row_log_ratios || is_cispo || min_importance > 0.f) return launch_with(PpoArgs<ANY_DTYPE>{});
  CommonDtype common;
  for (int k = 0; k < 9; ++k) common.add(arrays.in[k].p, arrays.in[k].dtype);
  for (const auto& out : arrays.out) common.add(out.p, out.dtype);
  if (common.dtype == FLOAT32) return launch_with(PpoArgs<FLOAT32>{});
  if (common.dtype == BFLOAT16) return launch_with(PpoArgs<BFLOAT16>{});
  return launch_with(PpoArgs<ANY_DTYPE>{});
}

CONSTANT(ppo_loss_num_stats, num_summed_stats + 2)
CONSTANT(ppo_loss_tokens_per_block, tokens_per_block)
CONSTANT(ppo_loss_num_partials, num_partials)
KERNEL(ppo_loss)

}  // namespace
