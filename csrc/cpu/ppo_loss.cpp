// PPO's clipped losses, gradients and metrics in one visit of memory; kernels/ppo_loss.py says what they mean.
//
// Per token at most 32 bytes in (two log-probabilities, advantage, weight, two values, return, second weight) and 8
// out, against about 90 instructions for W tokens, a third of them sums for the metrics. Lanes of weight 0 are replaced
// before anything is computed from them. Sums run over chunks that depend on N alone and join in their order, in
// double: any number of threads gives the same bits.
#include "kernel.h"
#include "simd.h"

namespace {

// In the order of ppo_loss.stats; the losses stand behind them.
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
  sums
};
constexpr int stats_summed = policy_loss_;
constexpr int64_t max_chunks = 256, least_chunk = 4096;

struct Options {
  const float *logprobs, *old_logprobs, *advantages, *weights, *values, *old_values, *returns, *value_weights, *sampler;
  float *logprobs_slope, *values_slope;
  float shift, scale, low, high, dual, value_clip, bound, cap;
  bool drop_capped;
};

struct Chunk {
  float sum[sums];
  float most, least;
};

struct Lanes {
  f32 sum[sums];
  f32 most, least;
};

// Whole steps read W tokens, the last one what is left, with weight 0 behind it.
struct Whole {
  INLINE f32 get(const float* p) const { return load(p); }
  INLINE void put(float* p, f32 x) const { store(p, x); }
};
struct Part {
  int n;
  INLINE f32 get(const float* p) const { return load_part(p, n, 0.f); }
  INLINE void put(float* p, f32 x) const { store_part(p, x, n); }
};

INLINE f32 clamp(f32 x, f32 low, f32 high) { return select(x < low, low, select(x > high, high, x)); }  // NaN stays
INLINE bool all_zero(f32 x) {
  uint64_t words[W / 2], any = 0;
  memcpy(words, &x, sizeof words);
  for (int i = 0; i < W / 2; ++i) any |= words[i];
  return any == 0;
}

// Log-ratios and ratios of one step. A pass of its own: an exponential is one long chain, and only where nothing else
// stands between them do several steps overlap.
template <class Access>
INLINE void ratio_step(const Options& o, int64_t t, Access at, f32& raw, f32& ratio) {
  const f32 w = at.get(o.weights + t);
  if (all_zero(w)) return;
  const i32 on = w != splat(0.f);
  raw = keep(on, at.get(o.logprobs + t)) - keep(on, at.get(o.old_logprobs + t));
  ratio = exp(clamp(raw, splat(-o.bound), splat(o.bound)));
}

template <class Access>
INLINE void policy_step(const Options& o, int64_t t, Access at, f32 raw, f32 ratio, Lanes& s) {
  const f32 w = at.get(o.weights + t);
  if (all_zero(w)) {
    if (o.logprobs_slope) at.put(o.logprobs_slope + t, splat(0.f));
    return;
  }
  const i32 on = w != splat(0.f);
  const f32 log_ratio = clamp(raw, splat(-o.bound), splat(o.bound));
  const f32 cost = -keep(on, (at.get(o.advantages + t) - o.shift) * o.scale);
  const f32 free = cost * ratio, clipped = cost * clamp(ratio, splat(o.low), splat(o.high));
  const i32 worse = clipped > free;
  f32 loss = select(worse, clipped, free);
  f32 slope = keep(~worse & (abs(raw) <= splat(o.bound)), free);
  i32 dual = {};
  if (o.dual > 0.f) {
    const f32 limit = select(cost > splat(0.f), cost * o.dual, splat(__builtin_inff()));
    dual = loss > limit;
    slope = keep(~dual, select(loss == limit, 0.5f * slope, slope));
    loss = select(dual, limit, loss);
  }
  f32 coefficient = w, trust = splat(1.f);
  i32 capped = {};
  if (o.sampler) {
    trust = exp(keep(on, at.get(o.old_logprobs + t) - at.get(o.sampler + t)));
    capped = trust > splat(o.cap);
    trust = select(capped, splat(o.drop_capped ? 0.f : o.cap), trust);
    coefficient = w * trust;
  }
  const i32 counts = coefficient != splat(0.f);
  if (o.logprobs_slope) at.put(o.logprobs_slope + t, keep(counts, coefficient * slope));
  s.sum[policy_loss_] += keep(counts, coefficient * loss);
  s.sum[weight] += w;
  s.sum[clipped_low] += keep(worse & (ratio < splat(o.low)), w);
  s.sum[clipped_high] += keep(worse & (ratio > splat(o.high)), w);
  s.sum[clipped_dual] += keep(dual, w);
  s.sum[kl_k1] -= w * log_ratio;
  s.sum[kl_k3] += w * ((ratio - 1.f) - log_ratio);
  s.sum[ratio_] += w * ratio;
  s.sum[ratio_square] += w * (ratio * ratio);
  s.sum[importance] += w * trust;
  s.sum[importance_capped] += keep(capped, w);
  s.most = select(on, max(ratio, s.most), s.most);
  s.least = select(on, min(ratio, s.least), s.least);
}

template <class Access>
INLINE void value_step(const Options& o, int64_t t, Access at, Lanes& s) {
  const f32 w = at.get(o.value_weights + t);
  if (all_zero(w)) {
    if (o.values_slope) at.put(o.values_slope + t, splat(0.f));
    return;
  }
  const i32 on = w != splat(0.f);
  const f32 v = keep(on, at.get(o.values + t)), target = keep(on, at.get(o.returns + t)), error = v - target;
  const f32 free = error * error;
  f32 loss = free, slope = error;
  i32 active = {};
  if (o.value_clip > 0.f) {
    const f32 old = keep(on, at.get(o.old_values + t)), low = old - o.value_clip, high = old + o.value_clip;
    const f32 bounded = clamp(v, low, high) - target, clipped = bounded * bounded;
    const i32 outside = ~((v >= low) & (v <= high));
    active = clipped > free;
    slope = keep(~active, select(outside & (clipped == free), 0.5f * slope, slope));
    loss = select(active, clipped, free);
  }
  if (o.values_slope) at.put(o.values_slope + t, keep(on, w * slope));
  s.sum[value_loss_] += w * loss;
  s.sum[value_weight] += w;
  s.sum[value_clipped] += keep(active, w);
  s.sum[value_] += w * v;
  s.sum[value_error] += w * free;
  s.sum[return_] += w * target;
}

// Steps are summed by blocks: a lane that took a thousand terms would have lost three bits to rounding.
constexpr int block = 32;

INLINE void policy_block(const Options& o, int64_t begin, int64_t end, Lanes& s) {
  f32 raw[block], ratio[block];
  const int64_t whole = begin + (end - begin) / W * W;
  const Part rest{int(end - whole)};
  int k = 0;
  for (int64_t t = begin; t < whole; t += W, ++k) ratio_step(o, t, Whole{}, raw[k], ratio[k]);
  if (rest.n) ratio_step(o, whole, rest, raw[k], ratio[k]);
  k = 0;
  for (int64_t t = begin; t < whole; t += W, ++k) policy_step(o, t, Whole{}, raw[k], ratio[k], s);
  if (rest.n) policy_step(o, whole, rest, raw[k], ratio[k], s);
}

INLINE void value_block(const Options& o, int64_t begin, int64_t end, Lanes& s) {
  const int64_t whole = begin + (end - begin) / W * W;
  const Part rest{int(end - whole)};
  for (int64_t t = begin; t < whole; t += W) value_step(o, t, Whole{}, s);
  if (rest.n) value_step(o, whole, rest, s);
}

Chunk run_chunk(const Options& given, int64_t begin, int64_t end) {
  const Options o = given;  // its own copy: what the slopes are stored to cannot be a part of it
  Lanes total = {};
  total.most = splat(-__builtin_inff()), total.least = splat(__builtin_inff());
  for (int64_t t = begin; t < end; t += block * W) {
    Lanes s = {};
    s.most = total.most, s.least = total.least;
    if (o.logprobs) policy_block(o, t, min(end, t + block * W), s);
    if (o.values) value_block(o, t, min(end, t + block * W), s);
    for (int i = 0; i < sums; ++i) total.sum[i] += s.sum[i];
    total.most = s.most, total.least = s.least;
  }
  Chunk c;
  for (int i = 0; i < sums; ++i) c.sum[i] = sum(total.sum[i]);
  c.most = largest(total.most), c.least = -largest(-total.least);
  return c;
}

void ppo_loss(uintptr_t logprobs, uintptr_t old_logprobs, uintptr_t advantages, uintptr_t weights, uintptr_t values,
              uintptr_t old_values, uintptr_t returns, uintptr_t value_weights, uintptr_t sampler, uintptr_t shift,
              uintptr_t scale, uintptr_t policy_loss, uintptr_t value_loss, uintptr_t stats, uintptr_t logprobs_slope,
              uintptr_t values_slope, int64_t N, float clip_low, float clip_high, float dual_clip, float value_clip,
              float log_ratio_clamp, float cap, int drop_capped, int threads) {
  Options o;
  o.logprobs = ptr<const float>(logprobs), o.old_logprobs = ptr<const float>(old_logprobs);
  o.advantages = ptr<const float>(advantages), o.weights = ptr<const float>(weights);
  o.values = ptr<const float>(values), o.old_values = ptr<const float>(old_values);
  o.returns = ptr<const float>(returns), o.value_weights = ptr<const float>(value_weights);
  o.sampler = ptr<const float>(sampler);
  o.logprobs_slope = ptr<float>(logprobs_slope), o.values_slope = ptr<float>(values_slope);
  o.shift = shift ? *ptr<const float>(shift) : 0.f, o.scale = scale ? *ptr<const float>(scale) : 1.f;
  o.low = 1.f - clip_low, o.high = 1.f + clip_high, o.dual = dual_clip, o.value_clip = value_clip;
  o.bound = log_ratio_clamp > 0.f ? log_ratio_clamp : __builtin_inff();
  o.cap = cap, o.drop_capped = drop_capped;

  const int64_t share = (N + max_chunks - 1) / max_chunks, size = max(least_chunk, (share + W - 1) / W * W);
  const int64_t chunks = (N + size - 1) / size;
  Chunk part[max_chunks];
#pragma omp parallel for num_threads(threads) if (threads > 1 && N > 32768)
  for (int64_t c = 0; c < chunks; ++c) part[c] = run_chunk(o, c * size, min(N, (c + 1) * size));

  double total[sums] = {};
  float most = -__builtin_inff(), least = __builtin_inff();
  for (int64_t c = 0; c < chunks; ++c) {
    for (int i = 0; i < sums; ++i) total[i] += part[c].sum[i];
    most = max(most, part[c].most), least = min(least, part[c].least);
  }
  if (total[ratio_] != total[ratio_]) most = least = float(total[ratio_]);  // max and min pass a NaN over
  float* out = ptr<float>(stats);
  for (int i = 0; i < stats_summed; ++i) out[i] = float(total[i]);
  out[stats_summed] = most, out[stats_summed + 1] = least;
  *ptr<float>(policy_loss) = float(total[policy_loss_]);
  *ptr<float>(value_loss) = float(0.5 * total[value_loss_]);
}

KERNEL(ppo_loss)

}  // namespace
