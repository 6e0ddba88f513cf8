// Log-probabilities and entropies of given logits, and their gradient, on the CPU; kernels/token_logprobs.py says what
// they mean, softmax.h how they are summed.
//
// Forward 4 bytes a logit in (2 for bfloat16) and about 25 vector operations, most of them the exponential's: on two
// cores of 2021 both take about as long. Backward reads a row twice, the second time from the cache, and writes it
// once.
#include "kernel.h"
#include "softmax.h"

namespace {

constexpr int64_t ignored = -100;

struct Logits {
  const void* at;
  int64_t N, V, stride;
  bool half;
  const void* targets;
  bool wide_targets;

  int64_t target(int64_t row) const {
    return wide_targets ? static_cast<const int64_t*>(targets)[row] : static_cast<const int32_t*>(targets)[row];
  }
  bool in_range() const {
    for (int64_t row = 0; row < N; ++row)
      if (target(row) != ignored && (target(row) < 0 || target(row) >= V)) return false;
    return true;
  }
};

template <bool CAP>
Softmax statistics(const Logits& x, int64_t row, const Scaling& by) {
  Softmax s = nothing_yet;
  if (x.half)
    add_columns<CAP>(s, static_cast<const bf16*>(x.at) + row * x.stride, nullptr, x.V, x.target(row), by);
  else
    add_columns<CAP>(s, static_cast<const float*>(x.at) + row * x.stride, nullptr, x.V, x.target(row), by);
  return s;
}

template <bool CAP>
void gradient(const Logits& x, int64_t row, float grad_logprob, float grad_entropy, void* out, const Scaling& by) {
  const int64_t width = x.half ? 2 : 4;
  if (x.target(row) == ignored) {
    memset(static_cast<char*>(out) + row * x.V * width, 0, x.V * width);
    return;
  }
  const Softmax sums = statistics<CAP>(x, row, by);
  Slope s = {};
  s.largest = sums.largest, s.log_sum = scalar_log(sums.sum);
  s.g = grad_logprob, s.b = -grad_entropy;
  s.a = -grad_logprob - grad_entropy * (s.log_sum - sums.moment / sums.sum);
  if (x.half)
    row_gradient<CAP, false>(static_cast<const bf16*>(x.at) + row * x.stride, nullptr, nullptr, nullptr,
                             static_cast<bf16*>(out) + row * x.V, x.V, x.target(row), s, by);
  else
    row_gradient<CAP, false>(static_cast<const float*>(x.at) + row * x.stride, nullptr, nullptr, nullptr,
                             static_cast<float*>(out) + row * x.V, x.V, x.target(row), s, by);
}

// logits: rows of V, `stride` apart; targets of 4 or 8 bytes.
const char* token_logprobs(uintptr_t logits, bool half, uintptr_t targets, bool wide_targets, uintptr_t logprobs,
                           uintptr_t entropy, int64_t N, int64_t V, int64_t stride, float temperature, float softcap,
                           int threads) {
  const Logits x{ptr<const void>(logits), N, V, stride, half, ptr<const void>(targets), wide_targets};
  if (!x.in_range()) return "a target is out of range";
  const Scaling by = scaling(temperature, softcap);
  float *const p = ptr<float>(logprobs), *const h = ptr<float>(entropy);
#pragma omp parallel for num_threads(threads) if (threads > 1 && N * V > 16384)
  for (int64_t row = 0; row < N; ++row) {
    if (x.target(row) == ignored) {
      p[row] = h[row] = 0.f;
      continue;
    }
    const Softmax s = softcap > 0.f ? statistics<true>(x, row, by) : statistics<false>(x, row, by);
    const float log_sum = scalar_log(s.sum);
    p[row] = (s.target - s.largest) - log_sum;
    h[row] = log_sum - s.moment / s.sum;
  }
  return nullptr;
}

void token_logprobs_backward(uintptr_t grad_logprobs, uintptr_t grad_entropy, uintptr_t logits, bool half,
                             uintptr_t targets, bool wide_targets, uintptr_t out, int64_t N, int64_t V, int64_t stride,
                             float temperature, float softcap, int threads) {
  const Logits x{ptr<const void>(logits), N, V, stride, half, ptr<const void>(targets), wide_targets};
  const Scaling by = scaling(temperature, softcap);
  const float *const gp = ptr<const float>(grad_logprobs), *const gh = ptr<const float>(grad_entropy);
#pragma omp parallel for num_threads(threads) if (threads > 1 && N * V > 16384)
  for (int64_t row = 0; row < N; ++row) {
    if (softcap > 0.f)
      gradient<true>(x, row, gp[row], gh[row], ptr<void>(out), by);
    else
      gradient<false>(x, row, gp[row], gh[row], ptr<void>(out), by);
  }
}

KERNEL(token_logprobs)
KERNEL(token_logprobs_backward)

}  // namespace
