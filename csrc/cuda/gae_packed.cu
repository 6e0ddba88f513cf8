// Generalized advantage estimation over segments on NVIDIA GPUs; kernels/gae_packed.py defines it, gae_scan.cuh holds
// the scan.
//
// Floor: as in gae.cu. The host does not know the lengths of the segments: the number of warps is chosen for the mean
// length, and blocks find the chunks of a segment on the device.
#include "gae_rewards.cuh"

namespace {

const char* gae_packed(uintptr_t rewards, int rewards_code, uintptr_t values, int values_code, uintptr_t mask,
                       uintptr_t gammas, uintptr_t lams, uintptr_t offsets, bool offsets_are_int32, uintptr_t bootstrap,
                       int bootstrap_code, uintptr_t advantages, uintptr_t returns, uintptr_t chunk_maps,
                       int64_t chunk_length, int64_t S, int64_t N, float gamma, float lam, uintptr_t stream) {
  if (S == 0 || N == 0) return nullptr;
  const GaeJob job = make_job(mask, {ptr<const void>(offsets), offsets_are_int32}, advantages, returns, chunk_maps,
                              chunk_length, S, N, gamma, lam, gammas, lams);
  if (job.chunk_log2 < 0) return invalid_chunk;
  return launch_given_rewards(job, {ptr<const void>(rewards), rewards_code}, {ptr<const void>(values), values_code},
                              {ptr<const void>(bootstrap), bootstrap_code}, plan_launch(job, N / S), stream);
}

KERNEL(gae_packed)

}  // namespace
