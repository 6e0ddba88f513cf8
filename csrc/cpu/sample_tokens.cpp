// Samples a token from each row of logits, on the CPU; kernels/sample_tokens.py defines it, sample.h has the algorithm.
// A thread takes a row at a time.
//
// Floor per logit: one read from memory; about 12 operations for e^z (24 if the temperature is not 1) and 35 for
// Philox. With filters Philox is for the blocks of kept tokens only; filters.h adds its own.
#include "kernel.h"
#include "sample.h"

namespace {

void sample_tokens(uintptr_t logits, int is_bf16, int64_t B, int32_t V, uintptr_t temperature, uintptr_t top_k,
                   uintptr_t top_p, uintptr_t min_p, int64_t seed, uintptr_t row_ids, uintptr_t steps, uintptr_t noise,
                   uintptr_t tokens, uintptr_t logprobs, uintptr_t raw_logprobs, uintptr_t kept_logprobs,
                   uintptr_t log_kept_mass, uintptr_t entropy, int threads) {
  const SampleArgs args = {
      ptr<const float>(temperature), ptr<const int64_t>(top_k), ptr<const float>(top_p), ptr<const float>(min_p), seed,
      ptr<const int64_t>(row_ids),   ptr<const int64_t>(steps), ptr<const float>(noise)};
  const Outputs out = {ptr<int64_t>(tokens),      ptr<float>(logprobs),      ptr<float>(raw_logprobs),
                       ptr<float>(kept_logprobs), ptr<float>(log_kept_mass), ptr<float>(entropy)};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1 && B > 1 && B * V > 16384)
  for (int64_t b = 0; b < B; ++b) {
    const SamplingParams params = sampling_params(args, b, V);
    if (is_bf16)
      sample_row(ptr<const bf16>(logits) + b * V, V, b, params, nullptr, out);
    else
      sample_row(ptr<const float>(logits) + b * V, V, b, params, nullptr, out);
  }
}

KERNEL(sample_tokens)

}  // namespace
