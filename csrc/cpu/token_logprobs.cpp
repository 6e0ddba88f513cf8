// Log-probabilities and entropies of given logits, and the gradient by them, on the CPU; kernels/token_logprobs.py
// defines them, softmax.h has the algorithm. A thread takes rows.
//
// Floor: the forward pass reads 4 bytes a logit (2 of bfloat16) and takes about 25 vector operations, most of them for
// the exponential: on two cores of 2021 both take about as long. The backward pass reads a row twice, the second time
// from the cache, and writes it once. A row's bits depend on that row alone.
#include "dtypes.h"
#include "softmax_gradient.h"

namespace {

constexpr int64_t IGNORE_INDEX = -100;

struct LogitsArgs {
  const void* logits;
  int64_t N, V, stride;
  bool is_bf16;
  const void* targets;
  bool int64_targets;

  int64_t target(int64_t row) const {
    return int64_targets ? static_cast<const int64_t*>(targets)[row] : static_cast<const int32_t*>(targets)[row];
  }
  bool targets_in_range() const {
    for (int64_t row = 0; row < N; ++row)
      if (target(row) != IGNORE_INDEX && (target(row) < 0 || target(row) >= V)) return false;
    return true;
  }
};

template <bool SOFTCAP>
SoftmaxState statistics(const LogitsArgs& args, int64_t row, const Scaling& scaling) {
  SoftmaxState state = empty_state;
  if (args.is_bf16)
    add_columns<SOFTCAP>(state, static_cast<const bf16*>(args.logits) + row * args.stride, nullptr, args.V,
                         args.target(row), scaling);
  else
    add_columns<SOFTCAP>(state, static_cast<const float*>(args.logits) + row * args.stride, nullptr, args.V,
                         args.target(row), scaling);
  return state;
}

template <bool SOFTCAP>
void gradient(const LogitsArgs& args, int64_t row, float grad_logprob, float grad_entropy, void* out,
              const Scaling& scaling) {
  const int64_t element_size = args.is_bf16 ? 2 : 4;
  if (args.target(row) == IGNORE_INDEX) {
    memset(static_cast<char*>(out) + row * args.V * element_size, 0, args.V * element_size);
    return;
  }
  const SoftmaxState state = statistics<SOFTCAP>(args, row, scaling);
  const RowSoftmax softmax = finish_row(state, scaling);
  const double g = grad_logprob, h = grad_entropy, surprise = softmax.entropy + softmax.logprob;
  LogitGrad grad = {};
  grad.max = state.max;
  grad.scale = softmax.scale;
  grad.log_scale = max(softmax.log_scale, -1e30);  // finite: its product with p = 0 must be 0
  grad.a = -g - h * softmax.entropy;
  grad.b = -h;
  grad.target = g * softmax.rest - (softmax.p > 0. ? h * softmax.p * surprise : 0.);
  if (args.is_bf16)
    row_gradient<SOFTCAP>(static_cast<const bf16*>(args.logits) + row * args.stride, nullptr,
                          static_cast<bf16*>(out) + row * args.V, args.V, args.target(row), grad, scaling);
  else
    row_gradient<SOFTCAP>(static_cast<const float*>(args.logits) + row * args.stride, nullptr,
                          static_cast<float*>(out) + row * args.V, args.V, args.target(row), grad, scaling);
}

// logits: N rows of V, `stride` apart. targets: int64 or int32.
const char* token_logprobs(uintptr_t logits, bool is_bf16, uintptr_t targets, bool int64_targets, uintptr_t logprobs,
                           uintptr_t entropy, int64_t N, int64_t V, int64_t stride, double temperature, float softcap,
                           int threads) {
  const LogitsArgs args{ptr<const void>(logits), N, V, stride, is_bf16, ptr<const void>(targets), int64_targets};
  if (!args.targets_in_range()) return "a target is out of range";
  const Scaling scaling = make_scaling(temperature, softcap);
  float *const p = ptr<float>(logprobs), *const h = ptr<float>(entropy);
#pragma omp parallel for num_threads(threads) if (threads > 1 && N * V > 16384)
  for (int64_t row = 0; row < N; ++row) {
    if (args.target(row) == IGNORE_INDEX) {
      p[row] = h[row] = 0.f;
      continue;
    }
    const RowSoftmax softmax = finish_row(
        softcap > 0.f ? statistics<true>(args, row, scaling) : statistics<false>(args, row, scaling), scaling);
    p[row] = (float)softmax.logprob;
    h[row] = (float)softmax.entropy;
  }
  return nullptr;
}

void token_logprobs_backward(uintptr_t grad_logprobs, uintptr_t grad_entropy, uintptr_t logits, bool is_bf16,
                             uintptr_t targets, bool int64_targets, uintptr_t out, int64_t N, int64_t V, int64_t stride,
                             double temperature, float softcap, int threads) {
  const LogitsArgs args{ptr<const void>(logits), N, V, stride, is_bf16, ptr<const void>(targets), int64_targets};
  const Scaling scaling = make_scaling(temperature, softcap);
  const float *const dp = ptr<const float>(grad_logprobs), *const dh = ptr<const float>(grad_entropy);
#pragma omp parallel for num_threads(threads) if (threads > 1 && N * V > 16384)
  for (int64_t row = 0; row < N; ++row) {
    if (softcap > 0.f)
      gradient<true>(args, row, dp[row], dh[row], ptr<void>(out), scaling);
    else
      gradient<false>(args, row, dp[row], dh[row], ptr<void>(out), scaling);
  }
}

CONSTANT(ignore_index, IGNORE_INDEX)
KERNEL(token_logprobs)
KERNEL(token_logprobs_backward)

}  // namespace
