// What stands between the matrix products of a linear head, on the CPU: the ops linear_*.py call these on a block of
// float32 logits, some rows by some columns, that a product has just left in the cache. softmax.h has the mathematics.
//
// Floor of a training step over N rows: three products of 2 N D V operations. The row work is about 25 vector
// operations a logit for the statistics and 25 for the gradient, under a tenth of the products from D = 512 on.
#include "kernel.h"
#include "softmax.h"

namespace {

// A row's running sums, in memory between two blocks; the last three only where there is a reference.
struct State {
  Softmax policy;
  Softmax reference;
  float cross;  // B
};

template <bool CAP>
void add_block(State& s, const float* x, const float* bias, int64_t columns, int64_t target, const Scaling& by) {
  add_columns<CAP>(s.policy, x, bias, columns, target, by);
}

template <bool CAP>
void add_pair(State& s, const float* x, const float* bias, const float* ref, const float* ref_bias, int64_t columns,
              int64_t target, const Scaling& by) {
  alignas(64) float z[TILE];
  alignas(64) float z2[TILE];
  for (int64_t begin = 0; begin < columns; begin += TILE) {
    const int n = (int)min<int64_t>(TILE, columns - begin);
    const float most = scale_tile<CAP>(x + begin, bias ? bias + begin : nullptr, n, by, z);
    const float most2 = scale_tile<CAP>(ref + begin, ref_bias ? ref_bias + begin : nullptr, n, by, z2);
    if (target >= begin && target < begin + n)
      s.policy.target = z[target - begin], s.reference.target = z2[target - begin];
    const float before = s.reference.largest;
    const float factor = move(s.policy, max(s.policy.largest, most));
    s.cross = factor > 0.f ? s.cross * factor : 0.f;
    move(s.reference, max(before, most2));
    if (s.reference.largest > before && s.policy.sum > 0.f && before > -__builtin_inff())
      s.cross += (before - s.reference.largest) * s.policy.sum;
    const f32 from = splat(max(s.policy.largest, -FLT_MAX)), from2 = splat(max(s.reference.largest, -FLT_MAX));
    f32 sums = splat(0.f), moments = sums, sums2 = sums, cross = sums;
    for (int i = 0; i < n; i += W) {
      const f32 exact = load(z + i) - from, d = at_least_far(exact), d2 = load(z2 + i) - from2;
      const f32 e = select(exact < splat(FAR), splat(0.f), exp_near(d));
      sums = sums + e;
      moments = moments + d * e;
      sums2 = sums2 + exp_near(at_least_far(d2));
      cross = cross + select(e == splat(0.f), splat(0.f), d2 * e);
    }
    s.policy.sum += sum(sums), s.policy.moment += sum(moments);
    s.reference.sum += sum(sums2), s.cross += sum(cross);
  }
}

// Rows of a block: `x` and `ref` with their rows `stride` apart; its first column is column `first` of the vocabulary.
// state (rows, 9) must start as head_begin leaves it.
void head_statistics(uintptr_t x, uintptr_t bias, uintptr_t ref, uintptr_t ref_bias, uintptr_t targets, uintptr_t state,
                     int64_t rows, int64_t columns, int64_t stride, int64_t first, float temperature, float softcap,
                     int threads) {
  const Scaling by = scaling(temperature, softcap);
  const bool cap = softcap > 0.f;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns > 16384)
  for (int64_t row = 0; row < rows; ++row) {
    const float *const z = ptr<const float>(x) + row * stride, *const b = ptr<const float>(bias);
    const int64_t target = ptr<const int64_t>(targets)[row] - first;
    State& s = ptr<State>(state)[row];
    if (ref) {
      const float *const z2 = ptr<const float>(ref) + row * stride, *const b2 = ptr<const float>(ref_bias);
      if (cap)
        add_pair<true>(s, z, b, z2, b2, columns, target, by);
      else
        add_pair<false>(s, z, b, z2, b2, columns, target, by);
    } else if (cap) {
      add_block<true>(s, z, b, columns, target, by);
    } else {
      add_block<false>(s, z, b, columns, target, by);
    }
  }
}

void head_begin(uintptr_t state, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) ptr<State>(state)[row] = State{nothing_yet, nothing_yet, 0.f};
}

// Per row the results of a whole row's sums: out (8, rows) = log p, entropy, m, log s, and of the reference log p, KL,
// m, log s (the first four rows alone without a reference).
void head_results(uintptr_t state, uintptr_t out, int64_t rows, bool with_reference) {
  for (int64_t row = 0; row < rows; ++row) {
    const State& s = ptr<const State>(state)[row];
    float* const to = ptr<float>(out) + row;
    const float log_sum = scalar_log(s.policy.sum), mean = s.policy.moment / s.policy.sum;
    to[0] = (s.policy.target - s.policy.largest) - log_sum;
    to[rows] = log_sum - mean;
    to[2 * rows] = s.policy.largest;
    to[3 * rows] = log_sum;
    if (!with_reference) continue;
    const float ref_log_sum = scalar_log(s.reference.sum);
    to[4 * rows] = (s.reference.target - s.reference.largest) - ref_log_sum;
    to[5 * rows] = (mean - s.cross / s.policy.sum) - (log_sum - ref_log_sum);
    to[6 * rows] = s.reference.largest;
    to[7 * rows] = ref_log_sum;
  }
}

// x becomes the gradient of the raw logits: slopes (rows, 8) hold m, log s, g, a, b and c, m, log s of the reference.
void head_gradient(uintptr_t x, uintptr_t bias, uintptr_t ref, uintptr_t ref_bias, uintptr_t targets, uintptr_t slopes,
                   int64_t rows, int64_t columns, int64_t stride, int64_t first, float temperature, float softcap,
                   int threads) {
  const Scaling by = scaling(temperature, softcap);
  const bool cap = softcap > 0.f;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns > 16384)
  for (int64_t row = 0; row < rows; ++row) {
    float* const z = ptr<float>(x) + row * stride;
    const float* const b = ptr<const float>(bias);
    const int64_t target = ptr<const int64_t>(targets)[row] - first;
    const Slope& s = ptr<const Slope>(slopes)[row];
    if (ref) {
      const float *const z2 = ptr<const float>(ref) + row * stride, *const b2 = ptr<const float>(ref_bias);
      if (cap)
        row_gradient<true, true>(z, b, z2, b2, z, columns, target, s, by);
      else
        row_gradient<false, true>(z, b, z2, b2, z, columns, target, s, by);
    } else if (cap) {
      row_gradient<true, false>(z, b, nullptr, nullptr, z, columns, target, s, by);
    } else {
      row_gradient<false, false>(z, b, nullptr, nullptr, z, columns, target, s, by);
    }
  }
}

KERNEL(head_begin)
KERNEL(head_statistics)
KERNEL(head_results)
KERNEL(head_gradient)

}  // namespace
