// Generalized advantage estimation on NVIDIA GPUs; kernels/gae.py says what it means.
//
// One warp a row, 32 tokens a step, right to left. A token maps the state (A, V) of its right neighbour to its own:
//     A' = a A + c V + b        V' = k V + e
// with a = gamma lambda, c = gamma, b = r - V_t, k = 0, e = V_t for a token inside the mask, and the identity outside
// it, so that a gap carries the state on. Such maps compose, and a suffix scan by shuffles applies 32 of them in five
// rounds. A step without gaps knows every next value beforehand: (a, b) with b = delta is enough. Memory is the floor,
// 17 bytes a token; the next step's loads are under way while this one is scanned.
#include "launch.cuh"

namespace {

constexpr int warp = 32, warps_per_block = 4;
constexpr unsigned everyone = 0xffffffffu;

struct Map {
  float a, c, b, k, e;
};

struct Token {
  float reward, value;
  bool here;
};

// `outer` is the left neighbour: it is applied to what `inner` gives.
__device__ __forceinline__ Map compose(const Map& outer, const Map& inner) {
  return {outer.a * inner.a, outer.a * inner.c + outer.c * inner.k, outer.a * inner.b + outer.c * inner.e + outer.b,
          outer.k * inner.k, outer.k * inner.e + outer.e};
}

__device__ __forceinline__ Map from_right(const Map& m, int distance) {
  return {__shfl_down_sync(everyone, m.a, distance), __shfl_down_sync(everyone, m.c, distance),
          __shfl_down_sync(everyone, m.b, distance), __shfl_down_sync(everyone, m.k, distance),
          __shfl_down_sync(everyone, m.e, distance)};
}

// What stands outside the mask is not even looked at: it may be NaN.
__device__ __forceinline__ Token read(const float* rewards, const float* values, const uint8_t* mask, int64_t row,
                                      int64_t t, int64_t T) {
  const bool here = t >= 0 && t < T && mask[row + t];
  return {here ? rewards[row + t] : 0.f, here ? values[row + t] : 0.f, here};
}

__global__ void __launch_bounds__(warp* warps_per_block)
    gae_kernel(const float* rewards, const float* values, const uint8_t* mask, const float* bootstrap,
               float* advantages, float* returns, int64_t B, int64_t T, float gamma, float decay) {
  const int lane = threadIdx.x % warp;
  const int64_t index = int64_t(blockIdx.x) * warps_per_block + threadIdx.x / warp, row = index * T;
  if (index >= B) return;
  float carry = 0.f, after = bootstrap ? bootstrap[index] : 0.f;  // A and V of the next token to the right
  int64_t start = (T - 1) / warp * warp;
  Token token = read(rewards, values, mask, row, start + lane, T);
  for (; start >= 0; start -= warp) {
    const Token next = read(rewards, values, mask, row, start - warp + lane, T);
    const unsigned inside = __ballot_sync(everyone, token.here);
    float advantage = carry, value = after;
    if (inside == everyone) {
      const float right = __shfl_down_sync(everyone, token.value, 1);
      float a = decay, b = (token.reward + gamma * (lane == warp - 1 ? after : right)) - token.value;
      for (int d = 1; d < warp; d *= 2) {
        const float ra = __shfl_down_sync(everyone, a, d), rb = __shfl_down_sync(everyone, b, d);
        if (lane + d < warp) b += a * rb, a *= ra;
      }
      advantage = a * carry + b, value = token.value;
    } else if (inside) {
      Map m{1.f, 0.f, 0.f, 1.f, 0.f};
      if (token.here) m = {decay, gamma, token.reward - token.value, 0.f, token.value};
      for (int d = 1; d < warp; d *= 2) {
        const Map right = from_right(m, d);
        if (lane + d < warp) m = compose(m, right);
      }
      advantage = (m.a * carry + m.c * after) + m.b, value = m.k * after + m.e;
    }
    if (start + lane < T) {
      advantages[row + start + lane] = token.here ? advantage : 0.f;
      returns[row + start + lane] = token.here ? advantage + token.value : 0.f;
    }
    carry = __shfl_sync(everyone, advantage, 0), after = __shfl_sync(everyone, value, 0);
    token = next;
  }
}

const char* gae(uintptr_t rewards, uintptr_t values, uintptr_t mask, uintptr_t bootstrap, uintptr_t advantages,
                uintptr_t returns, int64_t B, int64_t T, float gamma, float lam, uintptr_t stream) {
  if (B == 0 || T == 0) return nullptr;
  const unsigned blocks = blocks_for(B, warps_per_block);
  if (!blocks) return "more rows than a grid has blocks";
  return launch(gae_kernel, blocks, warp * warps_per_block, 0, stream, ptr<const float>(rewards),
                ptr<const float>(values), ptr<const uint8_t>(mask), ptr<const float>(bootstrap), ptr<float>(advantages),
                ptr<float>(returns), B, T, gamma, gamma * lam);
}

KERNEL(gae)

}  // namespace
