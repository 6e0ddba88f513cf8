// The row work between the matrix products of a linear head, on the CPU: the ops linear_*.py call it on a block of
// float32 logits, some rows by some columns, that a product has just left in the cache. softmax.h has the mathematics.
//
//     vocabulary   | block 0 | block 1 | ...      head_init once; head_statistics a block; head_results once;
//     row          [ HeadState in memory ]        then head_gradient a block. A thread takes rows.
//
// Floor of a training step over N rows: three products of 2 N D V operations. The row work is about 25 vector
// operations a logit for the statistics and 25 for the gradient, under a tenth of the products from D = 512 on. A row's
// bits depend on that row alone.
#include "kernel.h"
#include "softmax.h"

namespace {

// A row's state between two blocks. The last two only with a reference.
struct HeadState {
  SoftmaxState policy;
  SoftmaxState reference;
  float cross;  // B
};

// A block's rows: `ref` is null without a reference. Column 0 of the block is column `first` of the vocabulary.
struct Block {
  const float *bias, *ref, *ref_bias;
  const int64_t* targets;
  int64_t columns, stride, first;

  int64_t target(int64_t row) const { return targets[row] - first; }
};

template <bool SOFTCAP>
void add_pair(HeadState& state, const float* x, const float* ref, const Block& block, int64_t target,
              const Scaling& scaling) {
  alignas(64) float z[TILE];
  alignas(64) float z2[TILE];
  const float *const bias = block.bias, *const ref_bias = block.ref_bias;
  for (int64_t begin = 0; begin < block.columns; begin += TILE) {
    const int n = (int)min<int64_t>(TILE, block.columns - begin);
    const float tile_max = scale_tile<SOFTCAP>(x + begin, bias ? bias + begin : nullptr, n, scaling, z);
    const float ref_tile_max = scale_tile<SOFTCAP>(ref + begin, ref_bias ? ref_bias + begin : nullptr, n, scaling, z2);
    if (target >= begin && target < begin + n) {
      state.policy.target = z[target - begin];
      state.reference.target = z2[target - begin];
    }
    const float old_ref_max = state.reference.max;
    const float factor = rescale(state.policy, max(state.policy.max, tile_max));
    state.cross = factor > 0.f ? state.cross * factor : 0.f;
    rescale(state.reference, max(old_ref_max, ref_tile_max));
    if (state.reference.max > old_ref_max && state.policy.sum > 0.f && old_ref_max > -__builtin_inff())
      state.cross += (old_ref_max - state.reference.max) * state.policy.sum;
    const f32 row_max = splat(max(state.policy.max, -FLT_MAX)), ref_max = splat(max(state.reference.max, -FLT_MAX));
    f32 sums = splat(0.f), moments = sums, ref_sums = sums, cross = sums;
    for (int i = 0; i < n; i += W) {
      const f32 exact = load(z + i) - row_max, d = clamp_exponent(exact), ref_d = load(z2 + i) - ref_max;
      const f32 e = select(exact < splat(MIN_EXPONENT), splat(0.f), fast_exp(d));
      sums = sums + e;
      moments = moments + d * e;
      ref_sums = ref_sums + fast_exp(clamp_exponent(ref_d));
      cross = cross + select(e == splat(0.f), splat(0.f), ref_d * e);
    }
    state.policy.sum += reduce_sum(sums);
    state.policy.moment += reduce_sum(moments);
    state.reference.sum += reduce_sum(ref_sums);
    state.cross += reduce_sum(cross);
  }
}

// Adds a block of logits to the rows' states. x and ref: rows `stride` apart. state (rows, head_state_floats) must come
// from head_init.
void head_statistics(uintptr_t x, uintptr_t bias, uintptr_t ref, uintptr_t ref_bias, uintptr_t targets, uintptr_t state,
                     int64_t rows, int64_t columns, int64_t stride, int64_t first, float temperature, float softcap,
                     int threads) {
  const Block block = {ptr<const float>(bias),
                       ptr<const float>(ref),
                       ptr<const float>(ref_bias),
                       ptr<const int64_t>(targets),
                       columns,
                       stride,
                       first};
  const Scaling scaling = make_scaling(temperature, softcap);
  const bool has_softcap = softcap > 0.f;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns > 16384)
  for (int64_t row = 0; row < rows; ++row) {
    const float* const logits = ptr<const float>(x) + row * stride;
    const int64_t target = block.target(row);
    HeadState& s = ptr<HeadState>(state)[row];
    if (block.ref) {
      const float* const ref_logits = block.ref + row * stride;
      if (has_softcap)
        add_pair<true>(s, logits, ref_logits, block, target, scaling);
      else
        add_pair<false>(s, logits, ref_logits, block, target, scaling);
    } else if (has_softcap) {
      add_columns<true>(s.policy, logits, block.bias, columns, target, scaling);
    } else {
      add_columns<false>(s.policy, logits, block.bias, columns, target, scaling);
    }
  }
}

void head_init(uintptr_t state, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) ptr<HeadState>(state)[row] = HeadState{empty_state, empty_state, 0.f};
}

// Writes the results of whole rows: out (8, rows) = log p, entropy, m, log s; of the reference, log p, KL, m, log s.
// Without a reference, only the first four.
void head_results(uintptr_t state, uintptr_t out, int64_t rows, bool has_reference) {
  for (int64_t row = 0; row < rows; ++row) {
    const HeadState& s = ptr<const HeadState>(state)[row];
    float* const column = ptr<float>(out) + row;
    const float log_sum = scalar_log(s.policy.sum), mean = s.policy.moment / s.policy.sum;
    column[0] = (s.policy.target - s.policy.max) - log_sum;
    column[rows] = log_sum - mean;
    column[2 * rows] = s.policy.max;
    column[3 * rows] = log_sum;
    if (!has_reference) continue;
    const float ref_log_sum = scalar_log(s.reference.sum);
    column[4 * rows] = (s.reference.target - s.reference.max) - ref_log_sum;
    column[5 * rows] = (mean - s.cross / s.policy.sum) - (log_sum - ref_log_sum);
    column[6 * rows] = s.reference.max;
    column[7 * rows] = ref_log_sum;
  }
}

template <bool SOFTCAP, bool KL>
void block_gradient(float* x, const Block& block, const LogitGrad* grads, int64_t row, const Scaling& scaling) {
  float* const logits = x + row * block.stride;
  const float* const ref_logits = KL ? block.ref + row * block.stride : nullptr;
  row_gradient<SOFTCAP, KL>(logits, block.bias, ref_logits, block.ref_bias, logits, block.columns, block.target(row),
                            grads[row], scaling);
}

// Replaces a block of logits x by the gradient by them. row_coefficients (rows, 8): the LogitGrad of each row.
void head_gradient(uintptr_t x, uintptr_t bias, uintptr_t ref, uintptr_t ref_bias, uintptr_t targets,
                   uintptr_t row_coefficients, int64_t rows, int64_t columns, int64_t stride, int64_t first,
                   float temperature, float softcap, int threads) {
  const Block block = {ptr<const float>(bias),
                       ptr<const float>(ref),
                       ptr<const float>(ref_bias),
                       ptr<const int64_t>(targets),
                       columns,
                       stride,
                       first};
  const LogitGrad* const grads = ptr<const LogitGrad>(row_coefficients);
  float* const logits = ptr<float>(x);
  const Scaling scaling = make_scaling(temperature, softcap);
  const bool has_softcap = softcap > 0.f;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns > 16384)
  for (int64_t row = 0; row < rows; ++row) {
    if (block.ref && has_softcap)
      block_gradient<true, true>(logits, block, grads, row, scaling);
    else if (block.ref)
      block_gradient<false, true>(logits, block, grads, row, scaling);
    else if (has_softcap)
      block_gradient<true, false>(logits, block, grads, row, scaling);
    else
      block_gradient<false, false>(logits, block, grads, row, scaling);
  }
}

CONSTANT(head_tile, TILE)
CONSTANT(head_state_floats, sizeof(HeadState) / sizeof(float))
KERNEL(head_init)
KERNEL(head_statistics)
KERNEL(head_results)
KERNEL(head_gradient)

}  // namespace
