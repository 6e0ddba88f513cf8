// PPO's clipped losses, gradients and metrics on NVIDIA GPUs; kernels/ppo_loss.py says what they mean.
//
// Per token at most 36 bytes in (three log-probabilities, advantage, weight, two values, return, second weight) and 8
// out, against about 90 instructions, a third of them sums for the metrics. Even blocks have the policy's part, odd
// ones the value's: apart they need half the registers, so that twice the loads are under way; a weight that both read
// comes from the L2 cache the second time. A thread has 4 tokens at a time, one load of 16 bytes an input; weights are
// read one round ahead, and where all four are 0 nothing else is read. Sums add up over a thread's tokens, its warp,
// its block, in float32; a second launch joins the blocks in double. All in orders that N alone decides: the same bits
// each time.
#include "reduce.cuh"

namespace {

constexpr int each = 4, threads = 256, warps = threads / lanes, per_block = threads * each;

// In the order of ppo_loss.stats; the losses stand behind what is summed, then what is compared.
enum {
  weight,
  clipped_low,
  clipped_high,
  clipped_dual,
  kl_k1,
  kl_k3,
  ratio_,
  ratio_square,
  importance,
  importance_capped,
  value_weight,
  value_clipped,
  value_,
  value_error,
  return_,
  policy_loss_,
  value_loss_,
  sums,
  ratio_most = sums,
  ratio_least,
  numbers
};
constexpr int stats_summed = policy_loss_;

struct Options {
  const float *logprobs, *old_logprobs, *advantages, *weights, *values, *old_values, *returns, *value_weights, *sampler;
  const float *shift, *scale;
  float *logprobs_slope, *values_slope;
  float* parts;  // [numbers][blocks]
  int64_t N, blocks;
  float low, high, dual, value_clip, bound, cap;
  bool drop_capped, aligned;
};

struct Four {
  float x[each];
};

__device__ __forceinline__ float clamp(float x, float low, float high) {
  return x < low ? low : x > high ? high : x;  // NaN stays
}

// Whether four tokens from t on are one access of 16 bytes.
__device__ __forceinline__ bool whole(const Options& o, int64_t t) { return o.aligned && t + each <= o.N; }

// Four numbers from t on of each p; those without their bit in `some` are not looked at.
template <int n>
__device__ __forceinline__ void read(const Options& o, const float* const (&p)[n], int64_t t, unsigned some,
                                     Four (&f)[n]) {
  if (whole(o, t)) {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float4 v = *reinterpret_cast<const float4*>(p[k] + t);
      f[k] = {{v.x, v.y, v.z, v.w}};
    }
  } else {
#pragma unroll
    for (int k = 0; k < n; ++k) {
#pragma unroll
      for (int i = 0; i < each; ++i) f[k].x[i] = t + i < o.N && some >> i & 1 ? p[k][t + i] : 0.f;
    }
  }
}
__device__ __forceinline__ Four weights_at(const Options& o, const float* p, int64_t t) {
  Four f[1] = {};
  if (t < o.N) read(o, {p}, t, ~0u, f);
  return f[0];
}
__device__ __forceinline__ unsigned bits_of(const Four& w) {
  unsigned on = 0;
#pragma unroll
  for (int i = 0; i < each; ++i) on |= unsigned(w.x[i] != 0.f) << i;
  return on;
}
__device__ __forceinline__ void write(const Options& o, float* p, int64_t t, const Four& f) {
  if (!p) return;
  if (whole(o, t)) {
    *reinterpret_cast<float4*>(p + t) = make_float4(f.x[0], f.x[1], f.x[2], f.x[3]);
  } else {
#pragma unroll
    for (int i = 0; i < each; ++i)
      if (t + i < o.N) p[t + i] = f.x[i];
  }
}

template <bool sampled>
struct Policy {
  static constexpr int first = weight, last = value_weight, loss = policy_loss_, sums = last - first + 1;
  float sum[sums] = {}, most = -INFINITY, least = INFINITY;

  static __device__ __forceinline__ const float* weights(const Options& o) { return o.weights; }
  static __device__ __forceinline__ float* slopes(const Options& o) { return o.logprobs_slope; }

  // One token; returns the loss's slope. `advantage` is whitened; a token of weight 0 comes with zeros.
  __device__ __forceinline__ float add(const Options& o, bool on, float w, float logprob, float old, float advantage,
                                       float drawn) {
    const float raw = logprob - old, log_ratio = clamp(raw, -o.bound, o.bound), ratio = expf(log_ratio);
    const float free = -advantage * ratio, clipped = -advantage * clamp(ratio, o.low, o.high);
    const float limit = advantage < 0.f ? -advantage * o.dual : INFINITY;
    const bool worse = clipped > free, dual = (worse ? clipped : free) > limit;
    const float loss = dual ? limit : worse ? clipped : free;
    float slope = worse || dual || fabsf(raw) > o.bound ? 0.f : loss == limit ? 0.5f * free : free;
    float coefficient = w;
    bool capped = false;
    if (sampled) {
      const float trust = expf(old - drawn);
      capped = trust > o.cap;
      coefficient = w * (capped ? o.drop_capped ? 0.f : o.cap : trust);
    }
    const bool counts = coefficient != 0.f;
    sum[weight] += w;
    sum[clipped_low] += worse && ratio < o.low ? w : 0.f;
    sum[clipped_high] += worse && ratio > o.high ? w : 0.f;
    sum[clipped_dual] += dual ? w : 0.f;
    sum[kl_k1] -= w * log_ratio;
    sum[kl_k3] += w * ((ratio - 1.f) - log_ratio);
    sum[ratio_] += w * ratio;
    sum[ratio_square] += w * (ratio * ratio);
    sum[importance] += coefficient;
    sum[importance_capped] += capped ? w : 0.f;
    sum[sums - 1] += counts ? coefficient * loss : 0.f;
    most = fmaxf(most, on ? ratio : -INFINITY), least = fminf(least, on ? ratio : INFINITY);
    return counts ? coefficient * slope : 0.f;
  }

  __device__ __forceinline__ Four visit(const Options& o, int64_t t, unsigned on, const Four& w) {
    Four f[sampled ? 4 : 3], slope;
    if constexpr (sampled) {
      read(o, {o.logprobs, o.old_logprobs, o.advantages, o.sampler}, t, on, f);
    } else {
      read(o, {o.logprobs, o.old_logprobs, o.advantages}, t, on, f);
    }
    const float shift = o.shift ? *o.shift : 0.f, scale = o.scale ? *o.scale : 1.f;
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const bool here = on >> i & 1;
      const float old = here ? f[1].x[i] : 0.f, advantage = here ? (f[2].x[i] - shift) * scale : 0.f;
      const float drawn = sampled && here ? f[sampled ? 3 : 1].x[i] : 0.f;
      slope.x[i] = add(o, here, w.x[i], here ? f[0].x[i] : 0.f, old, advantage, drawn);
    }
    return slope;
  }
};

struct Value {
  static constexpr int first = value_weight, last = policy_loss_, loss = value_loss_, sums = last - first + 1;
  float sum[sums] = {}, most = 0.f, least = 0.f;

  static __device__ __forceinline__ const float* weights(const Options& o) { return o.value_weights; }
  static __device__ __forceinline__ float* slopes(const Options& o) { return o.values_slope; }

  __device__ __forceinline__ float add(const Options& o, float w, float v, float old, float target) {
    const float low = old - o.value_clip, high = old + o.value_clip;
    const float error = v - target, bounded = clamp(v, low, high) - target;
    const float free = error * error, clipped = bounded * bounded;
    const bool within = v >= low && v <= high, active = clipped > free;
    const float slope = active ? 0.f : !within && clipped == free ? 0.5f * error : error;
    sum[value_weight - first] += w;
    sum[value_clipped - first] += active ? w : 0.f;
    sum[value_ - first] += w * v;
    sum[value_error - first] += w * free;
    sum[return_ - first] += w * target;
    sum[sums - 1] += w * (active ? clipped : free);
    return w * slope;
  }

  __device__ __forceinline__ Four visit(const Options& o, int64_t t, unsigned on, const Four& w) {
    Four f[3], slope;
    read(o, {o.values, o.old_values, o.returns}, t, on, f);
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const bool here = on >> i & 1;
      slope.x[i] = add(o, w.x[i], here ? f[0].x[i] : 0.f, here ? f[1].x[i] : 0.f, here ? f[2].x[i] : 0.f);
    }
    return slope;
  }
};

// The n <= 32 sums of a warp at once: in each round a lane hands over those that the lane across will own. About n + 2
// shuffles in place of 5 n. Each of the n ends in x[0] of the lanes whose `owned` it is; lanes where that is n own
// none.
template <int n, int d = lanes / 2>
__device__ __forceinline__ void warp_sums(float* x) {
  constexpr int half = (n + 1) / 2;
  const bool upper = threadIdx.x & d;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const float low = x[i], high = n == 1 ? low : i + half < n ? x[i + half] : 0.f;
    x[i] = (upper ? high : low) + __shfl_xor_sync(all_lanes, upper ? low : high, d);
  }
  if constexpr (d > 1) warp_sums<half, d / 2>(x);
}
template <int n, int d = lanes / 2>
__device__ __forceinline__ int owned(int lane) {
  constexpr int half = (n + 1) / 2;
  int mine = 0;
  if constexpr (d > 1) mine = owned<half, d / 2>(lane);
  if (mine == half) return n;
  return n > 1 && (lane & d) ? half + mine : mine;
}

template <class Part>
__device__ __forceinline__ void run(const Options& o, int64_t block, float (*memory)[numbers]) {
  Part part;
  const float* weights = Part::weights(o);
  const int64_t stride = o.blocks * per_block;
  int64_t t = block * per_block + int64_t(threadIdx.x) * each;
  Four w = weights_at(o, weights, t);
  for (; t < o.N; t += stride) {
    const Four ahead = weights_at(o, weights, t + stride);
    const unsigned on = bits_of(w);
    Four slope = {};
    if (on) slope = part.visit(o, t, on, w);
    write(o, Part::slopes(o), t, slope);
    w = ahead;
  }
  const int lane = threadIdx.x % lanes, warp = threadIdx.x / lanes;
  const float most = warp_reduce<Largest>(part.most), least = -warp_reduce<Largest>(-part.least);
  warp_sums<Part::sums>(part.sum);
  const int mine = owned<Part::sums>(lane);
  if (mine < Part::sums) memory[warp][mine] = part.sum[0];
  if (lane == 0) memory[warp][ratio_most] = most, memory[warp][ratio_least] = least;
  __syncthreads();
  const int i = threadIdx.x;
  if (i < Part::sums) {
    float sum = 0.f;
    for (int k = 0; k < warps; ++k) sum += memory[k][i];
    o.parts[(i < Part::sums - 1 ? Part::first + i : Part::loss) * o.blocks + block] = sum;
  } else if (i < Part::sums + 2 && Part::first == weight) {
    const int k = ratio_most + i - Part::sums;
    float end = memory[0][k];
    for (int j = 1; j < warps; ++j) end = k == ratio_most ? fmaxf(end, memory[j][k]) : fminf(end, memory[j][k]);
    o.parts[k * o.blocks + block] = end;
  }
}

template <bool sampled>
__global__ void __launch_bounds__(threads, 4) ppo_loss_kernel(const Options o) {
  __shared__ float memory[warps][numbers];
  const bool both = o.logprobs && o.values;
  const int64_t block = both ? blockIdx.x / 2 : blockIdx.x;
  if (o.logprobs && !(both && blockIdx.x % 2)) {
    run<Policy<sampled>>(o, block, memory);
  } else {
    run<Value>(o, block, memory);
  }
}

// A warp for each number.
__global__ void __launch_bounds__(numbers* lanes)
    join_kernel(const Options o, float* policy_loss, float* value_loss, float* stats) {
  const int lane = threadIdx.x % lanes, number = threadIdx.x / lanes;
  const float* parts = o.parts + number * o.blocks;
  const bool of_value = (number >= value_weight && number < policy_loss_) || number == value_loss_;
  const int64_t blocks = (of_value ? o.values : o.logprobs) ? o.blocks : 0;
  if (number >= sums) {
    const float sign = number == ratio_most ? 1.f : -1.f;
    float most = -INFINITY, ratios = 0.f;
    for (int64_t i = lane; i < blocks; i += lanes) {
      most = fmaxf(most, sign * parts[i]);
      ratios += o.parts[ratio_ * o.blocks + i];
    }
    most = warp_reduce<Largest>(most), ratios = warp_reduce<Add>(ratios);
    if (lane == 0)
      stats[stats_summed + number - sums] = ratios == ratios ? sign * most : ratios;  // fmaxf passes a NaN over
    return;
  }
  double sum = 0;
#pragma unroll 8
  for (int64_t i = lane; i < blocks; i += lanes) sum += parts[i];
  sum = warp_reduce<Add>(sum);
  if (lane) return;
  if (number < stats_summed) stats[number] = float(sum);
  if (number == policy_loss_) *policy_loss = float(sum);
  if (number == value_loss_) *value_loss = float(0.5 * sum);
}

// `parts` has room for 19 numbers of each of `blocks` blocks.
const char* ppo_loss(uintptr_t logprobs, uintptr_t old_logprobs, uintptr_t advantages, uintptr_t weights,
                     uintptr_t values, uintptr_t old_values, uintptr_t returns, uintptr_t value_weights,
                     uintptr_t sampler, uintptr_t shift, uintptr_t scale, uintptr_t policy_loss, uintptr_t value_loss,
                     uintptr_t stats, uintptr_t logprobs_slope, uintptr_t values_slope, uintptr_t parts, int64_t blocks,
                     int64_t N, float clip_low, float clip_high, float dual_clip, float value_clip,
                     float log_ratio_clamp, float cap, int drop_capped, uintptr_t stream) {
  Options o;
  o.logprobs = ptr<const float>(logprobs), o.old_logprobs = ptr<const float>(old_logprobs);
  o.advantages = ptr<const float>(advantages), o.weights = ptr<const float>(weights);
  o.values = ptr<const float>(values), o.old_values = ptr<const float>(old_values);
  o.returns = ptr<const float>(returns), o.value_weights = ptr<const float>(value_weights);
  o.sampler = ptr<const float>(sampler), o.shift = ptr<const float>(shift), o.scale = ptr<const float>(scale);
  o.logprobs_slope = ptr<float>(logprobs_slope), o.values_slope = ptr<float>(values_slope);
  o.parts = ptr<float>(parts), o.N = N, o.blocks = blocks;
  o.low = 1.f - clip_low, o.high = 1.f + clip_high, o.dual = dual_clip > 0.f ? dual_clip : INFINITY;
  o.bound = log_ratio_clamp > 0.f ? log_ratio_clamp : INFINITY;
  o.cap = cap, o.drop_capped = drop_capped;
  o.value_clip = value_clip > 0.f ? value_clip : INFINITY;
  if (!(value_clip > 0.f)) o.old_values = o.values;  // not looked at
  const uintptr_t low_bits = logprobs | old_logprobs | advantages | weights | values | old_values | returns |
                             value_weights | sampler | logprobs_slope | values_slope;
  o.aligned = low_bits % 16 == 0;
  if (N) {
    const unsigned grid = blocks_for(blocks * (logprobs && values ? 2 : 1), 1);
    if (!grid) return "a grid has no such number of blocks";
    const auto kernel = sampler ? ppo_loss_kernel<true> : ppo_loss_kernel<false>;
    if (const char* error = launch(kernel, grid, threads, 0, stream, o)) return error;
  } else {
    o.blocks = 0;
  }
  return launch(join_kernel, 1, numbers * lanes, 0, stream, o, ptr<float>(policy_loss), ptr<float>(value_loss),
                ptr<float>(stats));
}

KERNEL(ppo_loss)

}  // namespace
