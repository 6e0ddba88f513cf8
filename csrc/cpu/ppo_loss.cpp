// PPO's clipped losses, gradients and statistics in one pass over memory, on the CPU; kernels/ppo_loss.py defines them,
// ppo_terms.h has a token's terms.
//
//     tokens   | chunk 0                        | chunk 1    | ...    one thread each, sums joined in their order
//     chunk    | block of 32 W | block | ...                          lane i sums the tokens i, i + W, ... of a block
//     block    two passes for the policy: ratios, then the rest; one for the values
//
// Sequences with one ratio each are taken row by row, some rows a chunk. A row has three passes, while the caches have
// it: the mean of its log-ratios, the tokens' terms, and their gradient by the mean, shared by all tokens (none for
// CISPO). Up to 16 long rows, too few for the threads, are several chunks each; all have a pass before the next one.
// Both ways sum a row over segments that depend on its length alone: its bits do not depend on the number of rows.
//
// Floor: at most 32 bytes a token in (two log-probabilities, advantage, weight, two values, return, second weight) and
// 8 out, against about 90 instructions for W tokens, a third of them sums for the statistics.
//
// Tokens of weight 0 are read as zeros. Chunks depend on the shape alone and are joined in double: the bits do not
// depend on the number of threads.
#include "kernel.h"
#include "ppo_terms.h"

namespace {

constexpr int64_t MAX_CHUNKS = 256, MIN_CHUNK = 4096, MAX_SHARED_ROWS = 16;
constexpr int BLOCK_VECTORS = 32;  // a lane that summed a thousand terms would lose three bits to rounding

struct PpoArgs {
  const float *logprobs, *old_logprobs, *advantages, *weights, *values, *old_values, *returns, *value_weights;
  const float* sampler_logprobs;
  float *logprobs_grad, *values_grad;
  float shift, scale;  // A = (advantages - shift) * scale
  PpoClip clip;
  float max_importance, min_importance;  // of pi_old / pi_sampler
  bool drop_capped;                      // one beyond them: weight 0, else the bound
};

struct ChunkSums {
  float sum[PpoSum::COUNT];
  float ratio_max, ratio_min;
};

struct VectorSums {
  f32 sum[PpoSum::COUNT];
  f32 ratio_max, ratio_min;
  f32 row_grad;  // of a row's terms by the mean of its log-ratios
};

// Access to W tokens, or to the n that are left at the end: the other lanes read 0, so their weight is 0.
struct FullVector {
  INLINE f32 read(const float* p) const { return load(p); }
  INLINE void write(float* p, f32 x) const { store(p, x); }
};
struct PartialVector {
  int n;
  INLINE f32 read(const float* p) const { return load_partial(p, n, 0.f); }
  INLINE void write(float* p, f32 x) const { store_partial(p, x, n); }
};

INLINE bool all_zero(f32 x) {
  uint64_t words[W / 2], any = 0;
  memcpy(words, &x, sizeof words);
  for (int i = 0; i < W / 2; ++i) any |= words[i];
  return any == 0;
}

// Log-ratios and ratios of W tokens. In a pass of its own: an exponential is one long chain, and those of several
// vectors overlap only if nothing else is between them.
template <class Vector>
INLINE void ratio_step(const PpoArgs& args, int64_t t, Vector vector, f32& unclipped_log_ratio, f32& ratio) {
  const f32 w = vector.read(args.weights + t);
  if (all_zero(w)) return;
  const i32 valid = w != splat(0.f);
  unclipped_log_ratio =
      zero_unless(valid, vector.read(args.logprobs + t)) - zero_unless(valid, vector.read(args.old_logprobs + t));
  ratio = exp(clamped_log_ratio(unclipped_log_ratio, args.clip));
}

// CISPO: of its terms, else of PPO's. IS_ROW: the gradient is by the row's log-ratio, and not stored.
template <bool CISPO, bool IS_ROW, class Vector>
INLINE void policy_step(const PpoArgs& args, int64_t t, Vector vector, f32 unclipped_log_ratio, f32 ratio,
                        VectorSums& s) {
  const f32 w = vector.read(args.weights + t);
  if (all_zero(w)) {
    if (args.logprobs_grad) vector.write(args.logprobs_grad + t, splat(0.f));
    return;
  }
  const i32 valid = w != splat(0.f);
  const f32 advantage = zero_unless(valid, (vector.read(args.advantages + t) - args.shift) * args.scale);
  PolicyTerm<f32> term;
  if constexpr (CISPO) {
    term = cispo_term(zero_unless(valid, vector.read(args.logprobs + t)), ratio, advantage, args.clip);
  } else {
    term = args.clip.dual > 0.f ? policy_term<true>(unclipped_log_ratio, ratio, advantage, args.clip)
                                : policy_term<false>(unclipped_log_ratio, ratio, advantage, args.clip);
  }
  f32 coefficient = w, importance = splat(1.f);
  i32 is_capped = {};
  if (args.sampler_logprobs) {
    const f32 log_importance = vector.read(args.old_logprobs + t) - vector.read(args.sampler_logprobs + t);
    importance = exp(zero_unless(valid, log_importance));
    const i32 is_high = importance > splat(args.max_importance), is_low = importance < splat(args.min_importance);
    is_capped = is_high | is_low;
    importance = select(is_high, splat(args.drop_capped ? 0.f : args.max_importance), importance);
    importance = select(is_low, splat(args.drop_capped ? 0.f : args.min_importance), importance);
    coefficient = w * importance;
  }
  const i32 counts = coefficient != splat(0.f);
  const f32 grad = zero_unless(counts, coefficient * term.grad);
  if constexpr (IS_ROW && !CISPO) {
    s.row_grad += grad;
  } else {
    if (args.logprobs_grad) vector.write(args.logprobs_grad + t, grad);
  }
  const f32 log_ratio = clamped_log_ratio(unclipped_log_ratio, args.clip);
  s.sum[PpoSum::POLICY_LOSS] += zero_unless(counts, coefficient * term.loss);
  s.sum[PpoSum::WEIGHT] += w;
  s.sum[PpoSum::CLIPPED_LOW] += zero_unless(term.is_clipped & (ratio < splat(args.clip.ratio_low)), w);
  s.sum[PpoSum::CLIPPED_HIGH] += zero_unless(term.is_clipped & (ratio > splat(args.clip.ratio_high)), w);
  s.sum[PpoSum::CLIPPED_DUAL] += zero_unless(term.is_dual, w);
  s.sum[PpoSum::KL_K1] -= w * log_ratio;
  s.sum[PpoSum::KL_K3] += w * exp_minus_1_minus(log_ratio, ratio);
  s.sum[PpoSum::RATIO] += w * ratio;
  s.sum[PpoSum::RATIO_SQUARE] += w * (ratio * ratio);
  s.sum[PpoSum::IMPORTANCE] += w * importance;
  s.sum[PpoSum::IMPORTANCE_CAPPED] += zero_unless(is_capped, w);
  s.ratio_max = select(valid, max(ratio, s.ratio_max), s.ratio_max);
  s.ratio_min = select(valid, min(ratio, s.ratio_min), s.ratio_min);
}

template <class Vector>
INLINE void value_step(const PpoArgs& args, int64_t t, Vector vector, VectorSums& s) {
  const f32 w = vector.read(args.value_weights + t);
  if (all_zero(w)) {
    if (args.values_grad) vector.write(args.values_grad + t, splat(0.f));
    return;
  }
  const i32 valid = w != splat(0.f);
  const f32 value = zero_unless(valid, vector.read(args.values + t));
  const f32 target = zero_unless(valid, vector.read(args.returns + t));
  ValueTerm<f32> term;
  if (args.clip.value > 0.f) {
    const f32 old_value = zero_unless(valid, vector.read(args.old_values + t));
    term = value_term<true>(value, old_value, target, args.clip);
  } else {
    term = value_term<false>(value, value, target, args.clip);
  }
  if (args.values_grad) vector.write(args.values_grad + t, zero_unless(valid, w * term.grad));
  s.sum[PpoSum::VALUE_LOSS] += w * term.loss;
  s.sum[PpoSum::VALUE_WEIGHT] += w;
  s.sum[PpoSum::VALUE_CLIPPED] += zero_unless(term.is_clipped, w);
  s.sum[PpoSum::VALUE] += w * value;
  s.sum[PpoSum::VALUE_ERROR] += w * term.squared_error;
  s.sum[PpoSum::RETURN] += w * target;
}

// Calls step(t, vector) for the vectors of [begin, end).
template <class Step>
INLINE void for_vectors(int64_t begin, int64_t end, Step step) {
  const int64_t full_end = begin + (end - begin) / W * W;
  for (int64_t t = begin; t < full_end; t += W) step(t, FullVector{});
  if (full_end < end) step(full_end, PartialVector{int(end - full_end)});
}

// Calls block(begin, end, s) for the blocks of [begin, end) and adds its sums to `total`.
template <class Block>
INLINE void for_blocks(int64_t begin, int64_t end, VectorSums& total, Block block) {
  for (int64_t t = begin; t < end; t += BLOCK_VECTORS * W) {
    VectorSums s = {};
    s.ratio_max = total.ratio_max;
    s.ratio_min = total.ratio_min;
    block(t, min(end, t + BLOCK_VECTORS * W), s);
    for (int i = 0; i < PpoSum::COUNT; ++i) total.sum[i] += s.sum[i];
    total.row_grad += s.row_grad;
    total.ratio_max = s.ratio_max;
    total.ratio_min = s.ratio_min;
  }
}

template <bool CISPO>
INLINE void policy_block(const PpoArgs& args, int64_t begin, int64_t end, VectorSums& s) {
  f32 unclipped_log_ratio[BLOCK_VECTORS], ratio[BLOCK_VECTORS];
  int k = 0;
  for_vectors(begin, end, [&](int64_t t, auto vector) __attribute__((always_inline)) {
    ratio_step(args, t, vector, unclipped_log_ratio[k], ratio[k]);
    ++k;
  });
  k = 0;
  for_vectors(begin, end, [&](int64_t t, auto vector) __attribute__((always_inline)) {
    policy_step<CISPO, false>(args, t, vector, unclipped_log_ratio[k], ratio[k], s);
    ++k;
  });
}

INLINE void value_block(const PpoArgs& args, int64_t begin, int64_t end, VectorSums& s) {
  for_vectors(begin, end,
              [&](int64_t t, auto vector) __attribute__((always_inline)) { value_step(args, t, vector, s); });
}

INLINE VectorSums no_sums() {
  VectorSums s = {};
  s.ratio_max = splat(-__builtin_inff());
  s.ratio_min = splat(__builtin_inff());
  return s;
}

INLINE ChunkSums reduced(const VectorSums& total) {
  ChunkSums chunk;
  for (int i = 0; i < PpoSum::COUNT; ++i) chunk.sum[i] = reduce_sum(total.sum[i]);
  chunk.ratio_max = reduce_max(total.ratio_max);
  chunk.ratio_min = -reduce_max(-total.ratio_min);
  return chunk;
}

// The tokens [begin, end), each with its own ratio.
template <bool CISPO>
ChunkSums run_chunk(const PpoArgs& call_args, int64_t begin, int64_t end) {
  const PpoArgs args = call_args;  // a copy of its own: the compiler then knows that no store of a gradient changes it
  VectorSums total = no_sums();
  for_blocks(begin, end, total, [&](int64_t t, int64_t block_end, VectorSums& s) __attribute__((always_inline)) {
    if (args.logprobs) policy_block<CISPO>(args, t, block_end, s);
    if (args.values) value_block(args, t, block_end, s);
  });
  return reduced(total);
}

// The sums of a row of tokens with one ratio, or of a part of it. grad: of the terms by the mean of the log-ratios.
struct RowSums {
  double log_ratios, tokens, grad;
};

INLINE f32 mean_of(double sum, double tokens) { return splat(tokens > 0 ? float(sum / tokens) : 0.f); }

// The segments of a row, each summed on its own, then added in their order. They end where a block ends.
struct Segments {
  int64_t row_length, size, count;

  explicit Segments(int64_t length) : row_length(length) {
    constexpr int64_t BLOCK = BLOCK_VECTORS * W;
    size = (max(MIN_CHUNK, (length + MAX_CHUNKS - 1) / MAX_CHUNKS) + BLOCK - 1) / BLOCK * BLOCK;
    count = (length + size - 1) / size;
  }
  INLINE int64_t begin(int64_t row, int64_t segment) const {
    return row * row_length + min(row_length, segment * size);
  }
};

INLINE RowSums row_sums(const PpoArgs& args, int64_t begin, int64_t end) {
  RowSums row = {};
  for (int64_t t = begin; t < end; t += BLOCK_VECTORS * W) {
    f32 sum = {}, count = {};
    for_vectors(t, min(end, t + BLOCK_VECTORS * W), [&](int64_t i, auto vector) __attribute__((always_inline)) {
      const i32 valid = vector.read(args.weights + i) != splat(0.f);
      sum += zero_unless(valid, vector.read(args.logprobs + i) - vector.read(args.old_logprobs + i));
      count += zero_unless(valid, splat(1.f));
    });
    row.log_ratios += reduce_sum(sum);
    row.tokens += reduce_sum(count);
  }
  return row;
}

// Adds the terms of a row's tokens, whose log-ratios are `mean`, and returns the gradient by it.
template <bool CISPO>
INLINE double row_terms(const PpoArgs& args, int64_t begin, int64_t end, f32 mean, VectorSums& total) {
  const f32 ratio = exp(clamped_log_ratio(mean, args.clip));
  total.row_grad = splat(0.f);
  for_blocks(begin, end, total, [&](int64_t t, int64_t block_end, VectorSums& s) __attribute__((always_inline)) {
    for_vectors(t, block_end, [&](int64_t i, auto vector) __attribute__((always_inline)) {
      const i32 valid = vector.read(args.weights + i) != splat(0.f);
      policy_step<CISPO, true>(args, i, vector, zero_unless(valid, mean), select(valid, ratio, splat(1.f)), s);
    });
  });
  return reduce_sum(total.row_grad);
}

INLINE void value_terms(const PpoArgs& args, int64_t begin, int64_t end, VectorSums& total) {
  if (!args.values) return;
  for_blocks(begin, end, total, [&](int64_t t, int64_t block_end, VectorSums& s) __attribute__((always_inline)) {
    value_block(args, t, block_end, s);
  });
}

INLINE void share_grad(const PpoArgs& args, int64_t begin, int64_t end, f32 grad) {
  for_vectors(begin, end, [&](int64_t i, auto vector) __attribute__((always_inline)) {
    vector.write(args.logprobs_grad + i, zero_unless(vector.read(args.weights + i) != splat(0.f), grad));
  });
}

// The rows [begin, end).
template <bool CISPO>
ChunkSums run_rows(const PpoArgs& call_args, int64_t begin, int64_t end, const Segments& segments) {
  const PpoArgs args = call_args;
  VectorSums total = no_sums();
  for (int64_t row = begin; row < end; ++row) {
    RowSums sums = {};
    for (int64_t p = 0; p < segments.count; ++p) {
      const RowSums segment = row_sums(args, segments.begin(row, p), segments.begin(row, p + 1));
      sums.log_ratios += segment.log_ratios;
      sums.tokens += segment.tokens;
    }
    const f32 mean = mean_of(sums.log_ratios, sums.tokens);
    for (int64_t p = 0; p < segments.count; ++p) {
      sums.grad += row_terms<CISPO>(args, segments.begin(row, p), segments.begin(row, p + 1), mean, total);
    }
    if (!CISPO && args.logprobs_grad) {
      share_grad(args, segments.begin(row, 0), segments.begin(row + 1, 0), mean_of(sums.grad, sums.tokens));
    }
  }
  value_terms(args, segments.begin(begin, 0), segments.begin(end, 0), total);
  return reduced(total);
}

// All of a few long rows, each in `num_parts` parts of some segments for as many threads. Returns the number of chunks.
template <bool CISPO>
int64_t run_shared_rows(const PpoArgs& call_args, int64_t num_rows, const Segments& segments, int threads,
                        ChunkSums* chunks) {
  RowSums sums[MAX_SHARED_ROWS * MAX_CHUNKS];  // of the rows' segments
  const int64_t num_parts = min(MAX_CHUNKS / num_rows, segments.count), num_chunks = num_rows * num_parts;
  const auto for_parts = [&](auto body) {  // body(args, chunk, row, first segment, end of the segments)
#pragma omp parallel for num_threads(threads) if (threads > 1 && num_rows * segments.row_length > 32768)
    for (int64_t c = 0; c < num_chunks; ++c) {
      const int64_t row = c / num_parts, part = c - row * num_parts;
      const PpoArgs args = call_args;
      body(args, c, row, part * segments.count / num_parts, (part + 1) * segments.count / num_parts);
    }
  };
  const auto mean_of_row = [&](int64_t row, double RowSums::* field) {
    double sum = 0, tokens = 0;
    for (int64_t p = row * segments.count; p < (row + 1) * segments.count; ++p) {
      sum += sums[p].*field;
      tokens += sums[p].tokens;
    }
    return mean_of(sum, tokens);
  };
  for_parts([&](const PpoArgs& args, int64_t, int64_t row, int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      sums[row * segments.count + p] = row_sums(args, segments.begin(row, p), segments.begin(row, p + 1));
    }
  });
  for_parts([&](const PpoArgs& args, int64_t c, int64_t row, int64_t first, int64_t last) {
    const f32 mean = mean_of_row(row, &RowSums::log_ratios);
    VectorSums total = no_sums();
    for (int64_t p = first; p < last; ++p) {
      sums[row * segments.count + p].grad =
          row_terms<CISPO>(args, segments.begin(row, p), segments.begin(row, p + 1), mean, total);
    }
    value_terms(args, segments.begin(row, first), segments.begin(row, last), total);
    chunks[c] = reduced(total);
  });
  if (CISPO || !call_args.logprobs_grad) return num_chunks;
  for_parts([&](const PpoArgs& args, int64_t, int64_t row, int64_t first, int64_t last) {
    share_grad(args, segments.begin(row, first), segments.begin(row, last), mean_of_row(row, &RowSums::grad));
  });
  return num_chunks;
}

// logprobs or values may be null: without them, that loss is 0. stats: num_summed_stats sums, then the largest and the
// smallest ratio. row_length: of the rows with one ratio each, or 0.
void ppo_loss(uintptr_t logprobs, uintptr_t old_logprobs, uintptr_t advantages, uintptr_t weights, uintptr_t values,
              uintptr_t old_values, uintptr_t returns, uintptr_t value_weights, uintptr_t sampler_logprobs,
              uintptr_t shift, uintptr_t scale, uintptr_t policy_loss, uintptr_t value_loss, uintptr_t stats,
              uintptr_t logprobs_grad, uintptr_t values_grad, int64_t N, int64_t row_length, float clip_low,
              float clip_high, float dual_clip, float value_clip, float log_ratio_clamp, float max_importance,
              float min_importance, int drop_capped, int is_cispo, int threads) {
  PpoArgs args;
  args.logprobs = ptr<const float>(logprobs);
  args.old_logprobs = ptr<const float>(old_logprobs);
  args.advantages = ptr<const float>(advantages);
  args.weights = ptr<const float>(weights);
  args.values = ptr<const float>(values);
  args.old_values = ptr<const float>(old_values);
  args.returns = ptr<const float>(returns);
  args.value_weights = ptr<const float>(value_weights ? value_weights : weights);
  args.sampler_logprobs = ptr<const float>(sampler_logprobs);
  args.logprobs_grad = ptr<float>(logprobs_grad);
  args.values_grad = ptr<float>(values_grad);
  args.shift = shift ? *ptr<const float>(shift) : 0.f;
  args.scale = scale ? *ptr<const float>(scale) : 1.f;
  args.clip = {is_cispo ? -__builtin_inff() : 1.f - clip_low, 1.f + clip_high, dual_clip, value_clip,
               log_ratio_clamp > 0.f ? log_ratio_clamp : __builtin_inff()};
  args.max_importance = max_importance;
  args.min_importance = min_importance;
  args.drop_capped = drop_capped;

  ChunkSums chunks[MAX_CHUNKS];
  int64_t num_chunks;
  const int64_t num_rows = args.logprobs && row_length > 0 ? N / row_length : 0;
  const Segments segments(row_length);
  if (num_rows && num_rows <= MAX_SHARED_ROWS && row_length >= 2 * MIN_CHUNK) {
    num_chunks = (is_cispo ? run_shared_rows<true> : run_shared_rows<false>)(args, num_rows, segments, threads, chunks);
  } else {
    const int64_t even = (N + MAX_CHUNKS - 1) / MAX_CHUNKS;
    int64_t size = max(MIN_CHUNK, (even + W - 1) / W * W), units = N;  // a chunk's units, tokens or rows, and all
    if (num_rows) {
      units = num_rows;
      size = max((MIN_CHUNK + row_length - 1) / row_length, (units + MAX_CHUNKS - 1) / MAX_CHUNKS);
    }
    num_chunks = (units + size - 1) / size;
#pragma omp parallel for num_threads(threads) if (threads > 1 && N > 32768)
    for (int64_t c = 0; c < num_chunks; ++c) {
      const int64_t begin = c * size, end = min(units, begin + size);
      if (num_rows) {
        chunks[c] = is_cispo ? run_rows<true>(args, begin, end, segments) : run_rows<false>(args, begin, end, segments);
      } else {
        chunks[c] = is_cispo ? run_chunk<true>(args, begin, end) : run_chunk<false>(args, begin, end);
      }
    }
  }

  double total[PpoSum::COUNT] = {};
  float ratio_max = -__builtin_inff(), ratio_min = __builtin_inff();
  for (int64_t c = 0; c < num_chunks; ++c) {
    for (int i = 0; i < PpoSum::COUNT; ++i) total[i] += chunks[c].sum[i];
    ratio_max = max(ratio_max, chunks[c].ratio_max);
    ratio_min = min(ratio_min, chunks[c].ratio_min);
  }
  // max and min ignore a NaN; the sum has it.
  if (total[PpoSum::RATIO] != total[PpoSum::RATIO]) ratio_max = ratio_min = float(total[PpoSum::RATIO]);
  float* const out = ptr<float>(stats);
  for (int i = 0; i < num_summed_stats; ++i) out[i] = float(total[i]);
  out[num_summed_stats] = ratio_max;
  out[num_summed_stats + 1] = ratio_min;
  *ptr<float>(policy_loss) = float(total[PpoSum::POLICY_LOSS]);
  *ptr<float>(value_loss) = float(0.5 * total[PpoSum::VALUE_LOSS]);
}

CONSTANT(ppo_loss_num_stats, num_summed_stats + 2)
KERNEL(ppo_loss)

}  // namespace
