// The scan of gae and gae_packed, whose rewards are given.
#pragma once
#include "gae_scan.cuh"

namespace {

// A source of gae_scan.cuh.
template <int DTYPE, bool PER_ROW = false>
struct GivenRewards {
  static constexpr bool per_row = PER_ROW;
  static constexpr int num_inputs = 2, blocks_per_sm = 4;  // 4 blocks of 8 warps leave 64 registers a thread
  struct Shared {};
  Input<DTYPE> input[num_inputs];  // values, rewards
  Input<ANY_DTYPE> bootstrap;

  __device__ __forceinline__ float carry_into_row(int64_t row, const Discount& discount) const {
    return bootstrap.p ? discount.gamma * bootstrap.load(row) : 0.f;
  }
  __device__ __forceinline__ float reward(const float (&x)[num_inputs], float&) const { return x[1]; }
  __device__ __forceinline__ void on_block_start(Shared&) const {}
  __device__ __forceinline__ void on_tile(Shared&, unsigned, const float (&)[tokens_per_lane],
                                          const float (&)[tokens_per_lane]) const {}
  template <int W>
  __device__ __forceinline__ void on_span_end(Shared&, const GaeJob&, const Span&, float) const {}
  template <int num_warps>
  __device__ __forceinline__ void on_block_end(Shared&) const {}
};

inline const char* launch_given_rewards(const GaeJob& job, const Input<ANY_DTYPE>& rewards,
                                        const Input<ANY_DTYPE>& values, const Input<ANY_DTYPE>& bootstrap,
                                        const LaunchPlan& plan, uintptr_t stream) {
  const auto launch_with = [&](auto source) {
    source.input[0] = {values.p, values.dtype};
    source.input[1] = {rewards.p, rewards.dtype};
    source.bootstrap = bootstrap;
    return launch_rows(job, source, plan, stream);
  };
  if (job.gammas || job.lams) return launch_with(GivenRewards<ANY_DTYPE, true>{});
  CommonDtype common;
  common.add(values.p, values.dtype);
  common.add(rewards.p, rewards.dtype);
  return common.dtype == FLOAT32 ? launch_with(GivenRewards<FLOAT32>{}) : launch_with(GivenRewards<ANY_DTYPE>{});
}

}  // namespace
