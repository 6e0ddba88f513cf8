// Generalized advantage estimation on NVIDIA GPUs; kernels/gae.py defines it, gae_scan.cuh holds the scan.
//
// Floor: 9 bytes in (reward, value, mask; 5 in 16 bits) and 8 out per token, in one launch; a few long rows load the 9
// bytes twice, in two launches.
#include "gae_rewards.cuh"

namespace {

const char* gae(uintptr_t rewards, int rewards_code, uintptr_t values, int values_code, uintptr_t mask,
                uintptr_t gammas, uintptr_t lams, uintptr_t bootstrap, int bootstrap_code, uintptr_t advantages,
                uintptr_t returns, uintptr_t chunk_maps, int64_t chunk_length, int64_t B, int64_t T, float gamma,
                float lam, uintptr_t stream) {
  if (T == 0) return nullptr;
  const GaeJob job =
      make_job(mask, Offsets{}, advantages, returns, chunk_maps, chunk_length, B, T, gamma, lam, gammas, lams);
  if (job.chunk_log2 < 0) return invalid_chunk;
  return launch_given_rewards(job, {ptr<const void>(rewards), rewards_code}, {ptr<const void>(values), values_code},
                              {ptr<const void>(bootstrap), bootstrap_code}, plan_launch(job, T), stream);
}

KERNEL(gae)

}  // namespace
