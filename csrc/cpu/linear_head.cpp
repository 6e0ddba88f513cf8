// The row work between the matrix products of a linear head, on the CPU: the ops linear_*.py call it on a block of
// float32 logits, some rows by some columns, that a product has just left in the cache. softmax.h has the mathematics.
//
//     vocabulary   | block 0 | block 1 | ...      head_init once; head_statistics a block; head_results once;
//     row          [ HeadState in memory ]        then head_gradient a block. A thread takes rows.
//
// Floor of a training step over N rows: three products of 2 N D V operations. The row work is about 25 vector
// operations a logit for the statistics and 25 for the gradient, under a tenth of the products from D = 512 on. A row's
// bits depend on that row alone.
#include "kept_exponentials.h"
#include "kernel.h"

namespace {

// A row's state between two blocks. The last two only with a reference; B is in distances.
struct HeadState {
  SoftmaxState policy;
  SoftmaxState reference;
  double cross;  // B
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
  Tile tile, ref_tile;
  const float *const bias = block.bias, *const ref_bias = block.ref_bias;
  for (int64_t begin = 0; begin < block.columns; begin += TILE) {
    const int n = (int)min<int64_t>(TILE, block.columns - begin);
    const int64_t taken = target >= begin && target < begin + n ? target - begin : -1;
    const float logit = tile.fill<SOFTCAP>(x + begin, bias ? bias + begin : nullptr, n, taken, scaling);
    const float ref_logit =
        ref_tile.fill<SOFTCAP>(ref + begin, ref_bias ? ref_bias + begin : nullptr, n, taken, scaling);
    if (taken >= 0) {
      state.policy.target = logit;
      state.reference.target = ref_logit;
    }
    const float old_ref_max = state.reference.max;
    const double factor = rescale<SOFTCAP>(state.policy, max(state.policy.max, tile.max), scaling);
    state.cross = factor > 0. ? state.cross * factor : 0.;
    rescale<SOFTCAP>(state.reference, max(old_ref_max, ref_tile.max), scaling);
    const float ref_max = state.reference.max;
    if (ref_max > old_ref_max && state.policy.sum > 0. && old_ref_max > -__builtin_inff())
      state.cross +=
          ((double)position<SOFTCAP>(old_ref_max, scaling) - position<SOFTCAP>(ref_max, scaling)) * state.policy.sum;
    const bool empty = is_empty<SOFTCAP>(state.policy, tile, n, taken);
    const bool ref_empty = is_empty<SOFTCAP>(state.reference, ref_tile, n, taken);
    const f32 origin = splat(position<SOFTCAP>(state.policy.max, scaling));
    const f32 ref_origin = splat(position<SOFTCAP>(ref_max, scaling)), lowest = splat(scaling.lowest);
    GroupSums sums, ref_sums, moments, crosses;
    i32 ties = {}, ref_ties = {};
    const auto add = [&](int i, f32& e, f32& ref_e, f32& moment, f32& cross) __attribute__((always_inline)) {
      const f32 raw_distance = load(tile.x + i) - origin, distance = max(lowest, raw_distance);
      const f32 ref_distance = load(ref_tile.x + i) - ref_origin;
      e = select(raw_distance < lowest, splat(0.f), exp_distance(distance, scaling));
      ref_e = exp_distance(max(lowest, ref_distance), scaling);
      moment = distance * e;
      cross = select(e == splat(0.f), splat(0.f), ref_distance * e);
      if (SOFTCAP) {
        ties -= raw_distance == splat(0.f);
        ref_ties -= ref_distance == splat(0.f);
      }
    };
    int i = 0;
    for (; i + GROUP * W <= tile.columns; i += GROUP * W) {
      f32 e[GROUP], ref_e[GROUP], moment[GROUP], cross[GROUP];
#pragma GCC unroll 8
      for (int j = 0; j < GROUP; ++j) add(i + j * W, e[j], ref_e[j], moment[j], cross[j]);
      sums.add(sum_group(e));
      ref_sums.add(sum_group(ref_e));
      moments.add(sum_group(moment));
      crosses.add(sum_group(cross));
    }
    for (; i < tile.columns; i += W) {
      f32 e, ref_e, moment, cross;
      add(i, e, ref_e, moment, cross);
      sums.add(e);
      ref_sums.add(ref_e);
      moments.add(moment);
      crosses.add(cross);
    }
    if (!empty) {
      state.policy.sum += sums.total();
      state.policy.moment += moments.total();
      state.cross += crosses.total();
    }
    if (!ref_empty) state.reference.sum += ref_sums.total();
    for (int i = 0; i < W && SOFTCAP; ++i) {
      state.policy.ties += ties[i];
      state.reference.ties += ref_ties[i];
    }
  }
}

// Adds a block of logits to the rows' states. x and ref: rows `stride` apart. state (rows, head_state_floats) must come
// from head_init. Where `kept` is not null, there is neither a reference nor a softcap: the exponentials (rows,
// columns) go there in bfloat16, and the origins of the block's tiles to `origins`.
void head_statistics(uintptr_t x, uintptr_t bias, uintptr_t ref, uintptr_t ref_bias, uintptr_t targets, uintptr_t state,
                     int64_t rows, int64_t columns, int64_t stride, int64_t first, double temperature, float softcap,
                     int threads, uintptr_t kept, int64_t kept_stride, uintptr_t origins, int64_t origins_stride) {
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
    } else if (kept) {
      const KeptRow record = {ptr<bf16>(kept) + row * kept_stride, ptr<float>(origins) + row * origins_stride,
                              scaling.lowest};
      add_columns<false>(s.policy, logits, block.bias, columns, target, scaling, record);
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

// The part of the KL of all tokens but the target.
double kl_of_others(const HeadState& state, const RowSoftmax& policy, const RowSoftmax& reference,
                    const Scaling& scaling) {
  if (!(policy.scale > 0.)) return policy.scale;  // 0, or NaN
  const double moments = (state.policy.moment - state.cross) * scaling.unit;
  return policy.scale * (moments + state.policy.sum * (policy.log_scale - reference.log_scale));
}

// Writes the results of whole rows: out (11, rows) = log p, entropy, of all tokens but the target the largest logit and
// s, log_z, and 1 where the target has the largest logit, else 0; of the reference, log p, KL, its largest logit and s,
// and the others' part of the KL. Without a reference, only the first six.
void head_results(uintptr_t state, uintptr_t out, int64_t rows, bool has_reference, double temperature, float softcap) {
  const Scaling scaling = make_scaling(temperature, softcap);
  for (int64_t row = 0; row < rows; ++row) {
    const HeadState& s = ptr<const HeadState>(state)[row];
    float* const column = ptr<float>(out) + row;
    const RowSoftmax policy = finish_row(s.policy, scaling);
    column[0] = (float)policy.logprob;
    column[rows] = (float)policy.entropy;
    column[2 * rows] = s.policy.max;
    column[3 * rows] = (float)s.policy.sum;
    const bool is_nan = policy.logprob != policy.logprob;
    column[4 * rows] = is_nan ? __builtin_nanf("") : (float)log_z(s.policy, policy, scaling);
    column[5 * rows] = !is_nan && s.policy.target >= s.policy.max ? 1.f : 0.f;
    if (!has_reference) continue;
    const RowSoftmax reference = finish_row(s.reference, scaling);
    const double of_others = kl_of_others(s, policy, reference, scaling);
    const double of_target = policy.p > 0. ? policy.p * (policy.logprob - reference.logprob) : 0.;
    column[6 * rows] = (float)reference.logprob;
    column[7 * rows] = (float)(of_others + of_target);
    column[8 * rows] = s.reference.max;
    column[9 * rows] = (float)s.reference.sum;
    column[10 * rows] = (float)of_others;
  }
}

template <bool VALUE>
struct Flag {
  static constexpr bool value = VALUE;
};

template <bool SOFTCAP, class Out>
void block_gradient(const float* x, Out* out, const Block& block, const LogitGrad* grads, int64_t row,
                    const Scaling& scaling) {
  if (block.ref && grads[row].c != 0)  // an unused KL may be infinite
    row_gradient<SOFTCAP, Loss::KL>(x, block.bias, block.ref + row * block.stride, block.ref_bias, out, block.columns,
                                    block.target(row), grads[row], scaling);
  else
    row_gradient<SOFTCAP>(x, block.bias, out, block.columns, block.target(row), grads[row], scaling);
}

// The gradient by a block of logits x: to `out` in bfloat16, or instead of x where `out` is null. row_coefficients
// (rows, 9): the LogitGrad of each row.
void head_gradient(uintptr_t x, uintptr_t bias, uintptr_t ref, uintptr_t ref_bias, uintptr_t targets,
                   uintptr_t row_coefficients, int64_t rows, int64_t columns, int64_t stride, int64_t first,
                   double temperature, float softcap, int threads, uintptr_t out, int64_t out_stride) {
  const Block block = {ptr<const float>(bias),
                       ptr<const float>(ref),
                       ptr<const float>(ref_bias),
                       ptr<const int64_t>(targets),
                       columns,
                       stride,
                       first};
  const LogitGrad* const grads = ptr<const LogitGrad>(row_coefficients);
  const Scaling scaling = make_scaling(temperature, softcap);
  const auto run = [&](auto has_softcap, auto* to, int64_t to_stride) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns > 16384)
    for (int64_t row = 0; row < rows; ++row)
      block_gradient<decltype(has_softcap)::value>(ptr<const float>(x) + row * stride, to + row * to_stride, block,
                                                   grads, row, scaling);
  };
  const auto with_softcap = [&](auto has_softcap) {
    if (out)
      run(has_softcap, ptr<bf16>(out), out_stride);
    else
      run(has_softcap, ptr<float>(x), stride);
  };
  if (softcap > 0.f)
    with_softcap(Flag<true>());
  else
    with_softcap(Flag<false>());
}

// Replaces the exponentials of a block, kept by head_statistics, by the gradient by its logits. The arguments are those
// of both.
void head_kept_gradient(uintptr_t kept, uintptr_t targets, uintptr_t row_coefficients, int64_t rows, int64_t columns,
                        int64_t stride, int64_t first, double temperature, int threads, uintptr_t origins,
                        int64_t origins_stride) {
  const Scaling scaling = make_scaling(temperature, 0.f);
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * columns > 16384)
  for (int64_t row = 0; row < rows; ++row) {
    const KeptRow record = {ptr<bf16>(kept) + row * stride, ptr<float>(origins) + row * origins_stride, scaling.lowest};
    kept_row_gradient(record, columns, ptr<const int64_t>(targets)[row] - first,
                      ptr<const LogitGrad>(row_coefficients)[row], scaling);
  }
}

CONSTANT(head_tile, TILE)
CONSTANT(head_state_floats, sizeof(HeadState) / sizeof(float))
KERNEL(head_init)
KERNEL(head_statistics)
KERNEL(head_results)
KERNEL(head_gradient)
KERNEL(head_kept_gradient)

}  // namespace
