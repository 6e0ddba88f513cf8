// Generalized advantage estimation on NVIDIA GPUs; kernels/gae.py defines it, gae_scan.cuh holds the scan.
//
// Floor: 9 bytes in (reward, value, mask) and 8 out per token, in one launch; a few long rows load the 9 bytes twice,
// in two launches.
#include "gae_scan.cuh"

namespace {

const char* gae(uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t bootstrap, uintptr_t advantages,
                uintptr_t returns, uintptr_t chunk_maps, int64_t chunk_length, int64_t B, int64_t T, float gamma,
                float lam, uintptr_t stream) {
  if (T == 0) return nullptr;
  const GaeJob job = make_job(mask, 0, advantages, returns, chunk_maps, chunk_length, B, T, gamma, lam);
  if (job.chunk_log2 < 0) return invalid_chunk;
  const GivenRewards source{{ptr<const float>(values), ptr<const float>(rewards)}, ptr<const float>(bootstrap)};
  return launch_rows(job, source, plan_launch(job, T), stream);
}

KERNEL(gae)

}  // namespace
