// KL-shaped rewards, advantages, returns and their moments on NVIDIA GPUs; kernels/ppo_advantages.py says what they
// mean, gae_scan.cuh how the scan is done.
//
// Per token 13 bytes in (two log-probabilities, value, mask) and 8 out, in two launches: the second joins the moments
// of the first one's blocks. A few long rows are read twice, in three. A warp takes the moments of a tile while it is
// in registers, by distances from one of the tile's own numbers: they keep their digits where the mean is large beside
// the spread. Tiles, warps and blocks join by Chan's rule, in double, in an order that the shapes alone decide.
#include "gae_scan.cuh"

namespace {

enum Estimator { k1, k2, k3, absolute };

// Of advantages and of returns: mean, and sum of squared distances from it.
struct Moments {
  double count, mean[2], m2[2];
};

__device__ __forceinline__ void join(Moments& a, const Moments& b) {
  if (!(b.count > 0)) return;
  if (!(a.count > 0)) {
    a = b;
    return;
  }
  const double count = a.count + b.count, share = float(b.count) / float(count);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const double gap = b.mean[k] - a.mean[k];
    a.mean[k] += gap * share;
    a.m2[k] += b.m2[k] + gap * gap * (a.count * share);
  }
  a.count = count;
}

// Lane 0 gets all of the first n lanes.
template <int n>
__device__ __forceinline__ void join_lanes(Moments& m) {
#pragma unroll
  for (int d = n / 2; d; d /= 2) {
    const Moments other{__shfl_down_sync(all_lanes, m.count, d),
                        {__shfl_down_sync(all_lanes, m.mean[0], d), __shfl_down_sync(all_lanes, m.mean[1], d)},
                        {__shfl_down_sync(all_lanes, m.m2[0], d), __shfl_down_sync(all_lanes, m.m2[1], d)}};
    join(m, other);
  }
}

// Thread 0 of a block of so many warps gets what each of them has in `room`.
template <int warps>
__device__ __forceinline__ Moments join_warps(const Moments* room) {
  __syncthreads();
  Moments m = threadIdx.x < warps ? room[threadIdx.x] : Moments{};
  if (threadIdx.x < lanes) join_lanes<warps>(m);
  return m;
}

__device__ __forceinline__ void put(double* parts, int64_t stride, const Moments& m) {
  parts[0] = m.count, parts[stride] = m.mean[0], parts[2 * stride] = m.m2[0];
  parts[3 * stride] = m.mean[1], parts[4 * stride] = m.m2[1];
}

// `exponential` is k3, which is dear enough for a kernel of its own.
template <bool exponential>
struct Shaped {
  static constexpr int inputs = 3, blocks = exponential ? 3 : 4;
  struct Room {
    Moments moments[most_warps];  // of each warp so far: in registers they would be too many
    float kl[most_warps];
  };
  const float* input[inputs];  // values, logprobs, ref_logprobs
  const float *scores, *bootstrap;
  float* kl;      // of rows
  double* parts;  // of each block its moments; behind them, of each piece its kl
  float coef, clip;
  int estimator;

  __device__ __forceinline__ float last(int64_t row, const Rows& r) const {
    float score = scores[row];
    if (clip > 0.f) score = score > clip ? clip : score < -clip ? -clip : score;  // NaN stays
    return bootstrap ? fmaf(r.gamma, bootstrap[row], score) : score;
  }
  __device__ __forceinline__ float reward(const float (&x)[inputs], float& noted) const {
    const float d = x[1] - x[2];
    const float now = exponential       ? (expf(-d > 20.f ? 20.f : -d) - 1.f) + d
                      : estimator == k2 ? 0.5f * d * d
                      : estimator == k1 ? d
                                        : fabsf(d);
    noted += now;
    return -coef * now;
  }
  __device__ __forceinline__ void begin(Room& room) const {
    if (threadIdx.x % lanes == 0) room.moments[threadIdx.x / lanes] = {};
  }
  // Distances are taken from one of the tile's own numbers: so the mean keeps its digits, and squares lose few.
  __device__ __forceinline__ void made(Room& room, unsigned here, const float (&advantage)[each],
                                       const float (&ret)[each]) const {
    const unsigned some = __ballot_sync(all_lanes, here != 0);
    if (!some) return;
    const float (*x[2])[each] = {&advantage, &ret};
    const int count = __reduce_add_sync(all_lanes, __popc(here));
    float pivot[2], sum[2] = {}, square[2] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      pivot[k] = 0.f;
#pragma unroll
      for (int i = each - 1; i >= 0; --i) pivot[k] = here >> i & 1 ? (*x[k])[i] : pivot[k];
      pivot[k] = __shfl_sync(all_lanes, pivot[k], __ffs(some) - 1);
#pragma unroll
      for (int i = 0; i < each; ++i) {
        const float e = here >> i & 1 ? (*x[k])[i] - pivot[k] : 0.f;
        sum[k] += e, square[k] = fmaf(e, e, square[k]);
      }
      sum[k] = warp_reduce<Add>(sum[k]), square[k] = warp_reduce<Add>(square[k]);
    }
    if (threadIdx.x % lanes) return;
    Moments tile{double(count), {}, {}};
    const float share = 1.f / float(count);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float apart = sum[k] * share;
      const float m2 = fmaf(-sum[k], apart, square[k]);
      tile.mean[k] = double(pivot[k]) + apart, tile.m2[k] = m2 < 0.f ? 0.f : m2;  // NaN stays
    }
    join(room.moments[threadIdx.x / lanes], tile);
  }
  template <int W>
  __device__ __forceinline__ void row_done(Room& room, const Rows& r, const Span& span, float noted) const {
    noted = warp_reduce<Add>(noted);
    if (W > 1) {
      if (threadIdx.x % lanes == 0) room.kl[threadIdx.x / lanes] = noted;
      __syncthreads();
      if (threadIdx.x) return;
      noted = 0.f;
      for (int w = 0; w < W; ++w) noted += room.kl[w];
    }
    if (threadIdx.x % lanes) return;
    if (r.cut) {
      parts[5 * int64_t(gridDim.x) + span.index] = noted;
    } else {
      kl[span.index] = noted;  // a row is a span
    }
  }
  template <int warps>
  __device__ __forceinline__ void done(Room& room) const {
    const Moments all = join_warps<warps>(room.moments);
    if (threadIdx.x == 0) put(parts + blockIdx.x, gridDim.x, all);
  }
};

constexpr int join_warps_count = 8;

// `pieces` of each row, whose kl is added up here; 0 where rows are whole.
__global__ void __launch_bounds__(join_warps_count* lanes)
    join_kernel(const double* parts, int64_t blocks, float* stats, float* kl, int64_t B, int64_t pieces) {
  __shared__ Moments room[join_warps_count];
  Moments all = {};
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) {
    const double* p = parts + i;
    join(all, {p[0], {p[blocks], p[3 * blocks]}, {p[2 * blocks], p[4 * blocks]}});
  }
  for (int64_t row = threadIdx.x; pieces && row < B; row += blockDim.x) {
    double sum = 0;
    for (int64_t i = 0; i < pieces; ++i) sum += parts[5 * blocks + row * pieces + i];
    kl[row] = float(sum);
  }
  join_lanes<lanes>(all);
  if (threadIdx.x % lanes == 0) room[threadIdx.x / lanes] = all;
  all = join_warps<join_warps_count>(room);
  if (threadIdx.x) return;
  stats[0] = float(all.count), stats[1] = float(all.mean[0]), stats[2] = float(all.m2[0]);
  stats[3] = float(all.mean[1]), stats[4] = float(all.m2[1]);
}

// `parts` has room for 6 numbers of each of `blocks` blocks.
const char* ppo_advantages(uintptr_t logprobs, uintptr_t ref_logprobs, uintptr_t values, uintptr_t scores,
                           uintptr_t mask, uintptr_t bootstrap, uintptr_t advantages, uintptr_t returns,
                           uintptr_t stats, uintptr_t kl, uintptr_t parts, int64_t blocks, uintptr_t folds,
                           int64_t piece, int64_t B, int64_t T, float coef, int estimator, float gamma, float lam,
                           float clip, uintptr_t stream) {
  const Rows r = rows_of(mask, 0, advantages, returns, folds, piece, B, T, gamma, lam);
  if (r.cut < 0) return no_piece;
  const Plan p = plan(r, T, blocks);
  if (p.blocks > blocks) return "there are more blocks than room for their moments";
  auto run = [&](auto source) {
    source = {{ptr<const float>(values), ptr<const float>(logprobs), ptr<const float>(ref_logprobs)},
              ptr<const float>(scores),
              ptr<const float>(bootstrap),
              ptr<float>(kl),
              ptr<double>(parts),
              coef,
              clip,
              estimator};
    return launch_rows(r, source, p, stream);
  };
  if (const char* error = estimator == k3 ? run(Shaped<true>{}) : run(Shaped<false>{})) return error;
  return launch(join_kernel, 1, join_warps_count * lanes, 0, stream, ptr<const double>(parts), int64_t(p.blocks),
                ptr<float>(stats), ptr<float>(kl), B, r.cut ? pieces_of(r, T) : 0);
}

KERNEL(ppo_advantages)

}  // namespace
