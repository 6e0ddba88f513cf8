// The scan of gae, gae_packed and ppo_advantages on NVIDIA GPUs; kernels/gae.py defines it.
//
// Let the carry x be what a token adds to r - V of its left neighbour: gamma V + gamma lam A. Then
//     A = (r - V) + x        x' = gamma lam x + (gamma lam r + (gamma - gamma lam) V)
// for a valid token, and x' = x for a masked one. Both are affine maps x -> a x + b, which compose, so they can be
// scanned:
//
//     a row        |   tile 0   |   tile 1   |  ...  | last tile |   128 tokens each, from the row's start
//     a tile       |lane 0: 4 tokens|lane 1: 4 tokens|  ...  |       each lane composes its 4 maps, then the warp
//                                                                    composes its 32 lanes by shuffles
//     W warps      take W tiles at a time, the last ones first, and pass the carry on in shared memory
//     a chunk      a block's part of a long row, if rows are few: `chunk_map_kernel` composes the map of each chunk,
//                  then each block of `scan_kernel` starts from the maps of the chunks to its right
//
// Floor: one load of every input and one store of every output; a lane's 4 tokens are one load of 16 bytes. If a row
// does not start at a multiple of 16 bytes, lanes load single tokens, neighbours from neighbouring lanes, and transpose
// them in shared memory. The mask is loaded one step ahead: if 4 tokens are masked, nothing else is loaded. Only where
// a GPU is not full is the first step's mask not waited for. The inputs of the next step are loaded before this step is
// scanned. Chunks load their tokens twice, the second time mostly from the L2 cache.
//
// Deterministic: the order in which maps are composed depends on a token's place in its row alone, not on padding,
// other rows, alignment or W. In a tile without masked tokens all a are powers of one number, so only b is shuffled.
#pragma once
#include "gae_job.cuh"

namespace {

// The bits of the inputs of a lane's 4 tokens, the values first.
template <int num_inputs>
struct LaneBits {
  uint4 x[num_inputs];
};
// The inputs themselves.
template <int num_inputs>
struct LaneInputs {
  float x[num_inputs][tokens_per_lane];
};

// Returns bit i for byte i of four mask bytes, which are 0 or 1.
__device__ __forceinline__ unsigned bits_of_bytes(uint32_t bytes) {
  // The product adds up shifted copies of the bytes: byte i lands at bit 24 + i, everything else below bit 24 or
  // beyond bit 31.
  return bytes * ((1u << 24) | (1u << 17) | (1u << 10) | (1u << 3)) >> 24;
}

// One warp loads and stores a span. If all arrays are aligned, a lane loads its 4 tokens at once. Otherwise it
// loads tokens lane, lane + 32, ..., and `transpose` exchanges them for 4 consecutive tokens, in 128 floats of shared
// memory.
template <class Source>
struct SpanAccess {
  const Source& source;
  const GaeJob& job;
  int64_t begin, length;
  float* buffer;
  int lane;
  bool aligned;

  __device__ SpanAccess(const Source& source, const GaeJob& job, const Span& span, float* buffer)
      : source(source),
        job(job),
        begin(span.begin),
        length(span.length),
        buffer(buffer),
        lane(threadIdx.x % warp_size) {
    uintptr_t addresses = reinterpret_cast<uintptr_t>(job.mask + begin) * 4;
    addresses |= reinterpret_cast<uintptr_t>(job.advantages + begin) | reinterpret_cast<uintptr_t>(job.returns + begin);
    for (int k = 0; k < Source::num_inputs; ++k) addresses |= source.input[k].alignment(begin);
    aligned = addresses % 16 == 0;
  }

  // Token i of those that the lane loads of the tile at `start`.
  __device__ __forceinline__ int64_t token(int64_t start, int i) const {
    return start + (aligned ? tokens_per_lane * lane + i : warp_size * i + lane);
  }
  // True if the lane's 4 tokens exist and are one vector.
  __device__ __forceinline__ bool is_vector(int64_t start) const {
    return aligned && token(start, tokens_per_lane) <= length;
  }

  // Returns a bit for each of the 4 tokens that the lane loads of the tile at `start`: 1 if it is valid.
  __device__ __forceinline__ unsigned load_mask(int64_t start) const {
    if (start < 0) return 0;
    const uint8_t* mask = job.mask + begin;
    if (is_vector(start)) return bits_of_bytes(*reinterpret_cast<const uint32_t*>(mask + token(start, 0)));
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < tokens_per_lane; ++i)
      if (token(start, i) < length && mask[token(start, i)]) bits |= 1u << i;
    return bits;
  }

  // Returns a bit for each of the 4 tokens that the lane loads of the tile at `start`: 1 if it exists.
  __device__ __forceinline__ unsigned existing(int64_t start) const {
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < tokens_per_lane; ++i) bits |= unsigned(token(start, i) < length) << i;
    return bits;
  }

  // Loads nothing if all bits of `mask` are 0.
  __device__ __forceinline__ LaneBits<Source::num_inputs> load(int64_t start, unsigned mask) const {
    LaneBits<Source::num_inputs> bits = {};
    if (!mask) return bits;
    if (is_vector(start)) {
#pragma unroll
      for (int k = 0; k < Source::num_inputs; ++k) bits.x[k] = source.input[k].load4(begin + token(start, 0));
    } else {
#pragma unroll
      for (int k = 0; k < Source::num_inputs; ++k)
        bits.x[k] = source.input[k].load_each(mask, [&](int i) { return begin + token(start, i); });
    }
    return bits;
  }
  __device__ __forceinline__ LaneInputs<Source::num_inputs> unpack(const LaneBits<Source::num_inputs>& bits) const {
    LaneInputs<Source::num_inputs> inputs;
#pragma unroll
    for (int k = 0; k < Source::num_inputs; ++k) source.input[k].unpack(bits.x[k], inputs.x[k]);
    return inputs;
  }

  // Turns what the lane loaded into 4 consecutive tokens, and returns their mask.
  __device__ __forceinline__ unsigned transpose(unsigned mask, LaneInputs<Source::num_inputs>& inputs) const {
    if (aligned) return mask;
#pragma unroll
    for (int k = 0; k < Source::num_inputs; ++k) {
#pragma unroll
      for (int i = 0; i < tokens_per_lane; ++i) buffer[warp_size * i + lane] = inputs.x[k][i];
      __syncwarp();
      const float4 v = reinterpret_cast<const float4*>(buffer)[lane];
      __syncwarp();
      inputs.x[k][0] = v.x;
      inputs.x[k][1] = v.y;
      inputs.x[k][2] = v.z;
      inputs.x[k][3] = v.w;
    }
    // Load i covers tokens 32 i to 32 i + 31; the 4 tokens of this lane are in load `lane / 8`.
    constexpr int lanes_per_load = warp_size / tokens_per_lane;
    unsigned lane_mask = 0;
#pragma unroll
    for (int i = 0; i < tokens_per_lane; ++i) {
      const unsigned load_bits = __ballot_sync(full_mask, mask >> i & 1);
      if (lane / lanes_per_load == i) lane_mask = load_bits >> tokens_per_lane * lane % warp_size & 15;
    }
    return lane_mask;
  }

  // Stores 4 consecutive tokens.
  __device__ __forceinline__ void store(float* out, int64_t start, const float (&x)[tokens_per_lane]) const {
    out += begin;
    if (is_vector(start)) {
      // __stcg in place of an assignment, of which nvcc would make four stores.
      __stcg(reinterpret_cast<float4*>(out + token(start, 0)), make_float4(x[0], x[1], x[2], x[3]));
      return;
    }
    if (!aligned) {
      reinterpret_cast<float4*>(buffer)[lane] = make_float4(x[0], x[1], x[2], x[3]);
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < tokens_per_lane; ++i)
      if (token(start, i) < length) out[token(start, i)] = aligned ? x[i] : buffer[warp_size * i + lane];
    if (!aligned) __syncwarp();
  }
};

// A lane's tokens as maps of the carry x: A = reward_minus_value + x, x' = a x + b. a is the decay for a valid token;
// for a masked one a is 1 and b is 0.
struct LaneTokens {
  float value[tokens_per_lane], reward_minus_value[tokens_per_lane], b[tokens_per_lane];
  unsigned mask;

  __device__ __forceinline__ Affine map(int i, float decay) const { return {mask >> i & 1 ? decay : 1.f, b[i]}; }
};

// Masked inputs, which may be NaN, become 0 first; the reward of zeros is 0.
template <class Source>
__device__ __forceinline__ LaneTokens make_tokens(const Source& source, const Discount& discount,
                                                  const LaneInputs<Source::num_inputs>& inputs, unsigned mask,
                                                  float& kl_sum) {
  LaneTokens tokens;
  tokens.mask = mask;
#pragma unroll
  for (int i = 0; i < tokens_per_lane; ++i) {
    float x[Source::num_inputs];
#pragma unroll
    for (int k = 0; k < Source::num_inputs; ++k) x[k] = mask >> i & 1 ? inputs.x[k][i] : 0.f;
    const float reward = source.reward(x, kl_sum);
    tokens.value[i] = x[0];
    tokens.reward_minus_value[i] = reward - x[0];
    tokens.b[i] = fmaf(discount.decay, reward, discount.gamma_minus_decay * x[0]);
  }
  return tokens;
}

// decay^n, n the number of tokens from the lane's first to the end of a tile without masked tokens.
__device__ __forceinline__ float decay_to_tile_end(float decay) {
  const int lanes_left = warp_size - threadIdx.x % warp_size;
  float power = decay * decay * decay * decay, product = 1.f;
#pragma unroll
  for (int bit = 0; bit < 6; ++bit, power *= power)
    if (lanes_left >> bit & 1) product *= power;
  return product;
}

// Returns the map of the tokens from the lane's first to the tile's last. `decay_to_end` is decay_to_tile_end(decay).
__device__ __forceinline__ Affine scan_tile(const LaneTokens& tokens, float decay, float decay_to_end) {
  const int lane = threadIdx.x % warp_size;
  Affine f{1.f, 0.f};
#pragma unroll
  for (int i = tokens_per_lane - 1; i >= 0; --i) f = compose(tokens.map(i, decay), f);
  if (__all_sync(full_mask, tokens.mask == 15)) {
    float power = f.a;
#pragma unroll
    for (int d = 1; d < warp_size; d *= 2, power *= power) {
      const float right_b = __shfl_down_sync(full_mask, f.b, d);
      if (lane + d < warp_size) f.b = fmaf(power, right_b, f.b);
    }
    f.a = decay_to_end;
    return f;
  }
  return __any_sync(full_mask, tokens.mask) ? compose_later_lanes(f) : f;
}

// Returns the carry into a chunk from its right: x, the carry into the row, after the maps of all later chunks.
__device__ __forceinline__ float carry_into(const GaeJob& job, const Span& span, float x) {
  const int lane = threadIdx.x % warp_size;
  const int64_t chunks_per_lane = (span.num_later + warp_size - 1) / warp_size;
  Affine f{1.f, 0.f};
  for (int64_t i = chunks_per_lane - 1; i >= 0; --i) {
    const int64_t chunk = lane * chunks_per_lane + i;
    if (chunk < span.num_later) f = compose(job.chunk_maps[span.index + 1 + chunk], f);
  }
  f = compose_later_lanes(f);
  return apply({__shfl_sync(full_mask, f.a, 0), __shfl_sync(full_mask, f.b, 0)}, x);
}

// Threads of a block of `scan_kernel`, and blocks that an SM should hold: they bound the registers. A block has one
// team of W warps, or four teams of one warp.
constexpr int scan_threads(int W) { return W == 1 ? 4 * warp_size : W * warp_size; }
constexpr int scan_blocks_per_sm(int W, int blocks_of_8_warps) { return W == max_warps ? blocks_of_8_warps : 7; }

// Scans spans, tiles right to left. `Source` computes each token's reward and receives its advantage and return.
template <int W, class Source>
__global__ void __launch_bounds__(scan_threads(W), scan_blocks_per_sm(W, Source::blocks_per_sm))
    scan_kernel(const GaeJob job, Source source, const int64_t num_spans) {
  constexpr int num_teams = W == 1 ? 4 : 1;
  __shared__ float4 transpose_buffer[num_teams * W][warp_size];
  __shared__ Affine warp_maps[2][W];  // two, so that a step may write while the one before is still read
  __shared__ typename Source::Shared shared;
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size, team_warp = warp % W;
  float decay_to_end = Source::per_row ? 0.f : decay_to_tile_end(job.discount.decay);
  source.on_block_start(shared);
  int parity = 0;
  for (int64_t index = int64_t(blockIdx.x) * num_teams + warp / W; index < num_spans;
       index += int64_t(gridDim.x) * num_teams) {
    const Span span = find_span(job, index);
    if (span.row < 0) break;
    const SpanAccess<Source> access(source, job, span, reinterpret_cast<float*>(transpose_buffer[warp]));
    const Discount discount = row_discount<Source::per_row>(job, span.row);
    float carry = source.carry_into_row(span.row, discount), row_kl = 0.f;
    if constexpr (Source::per_row) {
      decay_to_end = decay_to_tile_end(discount.decay);
      if (discount.decay != discount.decay) carry = discount.decay;  // NaN reaches the last token too
    }
    if (job.chunk_log2) carry = carry_into(job, span, carry);
    int64_t start = (span.length - 1) / (W * tile) * (W * tile) + team_warp * tile;
    unsigned mask = access.load_mask(start), next_mask = access.load_mask(start - W * tile);
    LaneBits<Source::num_inputs> bits = access.load(start, job.waits_for_masks ? mask : access.existing(start));
    for (; start >= 0; start -= W * tile) {
      const LaneBits<Source::num_inputs> next_bits = access.load(start - W * tile, next_mask);
      const unsigned mask_after_next = access.load_mask(start - 2 * W * tile);
      LaneInputs<Source::num_inputs> inputs = access.unpack(bits);
      const unsigned lane_mask = access.transpose(mask, inputs);
      const LaneTokens tokens = make_tokens(source, discount, inputs, lane_mask, row_kl);
      const Affine f = scan_tile(tokens, discount.decay, decay_to_end);
      float tile_carry = carry;  // into this warp's tile
      if constexpr (W > 1) {
        if (lane == 0) warp_maps[parity][team_warp] = f;
        __syncthreads();
#pragma unroll
        for (int w = W - 1; w >= 0; --w) {
          if (w == team_warp) tile_carry = carry;
          carry = apply(warp_maps[parity][w], carry);
        }
        parity ^= 1;
      }
      const float carry_out = apply(f, tile_carry), right = __shfl_down_sync(full_mask, carry_out, 1);
      if constexpr (W == 1) carry = __shfl_sync(full_mask, carry_out, 0);
      float x = lane == warp_size - 1 ? tile_carry : right;
      float advantage[tokens_per_lane], ret[tokens_per_lane];
#pragma unroll
      for (int i = tokens_per_lane - 1; i >= 0; --i) {
        const bool valid = lane_mask >> i & 1;
        advantage[i] = valid ? tokens.reward_minus_value[i] + x : 0.f;
        ret[i] = valid ? advantage[i] + tokens.value[i] : 0.f;
        x = apply(tokens.map(i, discount.decay), x);
      }
      access.store(job.advantages, start, advantage);
      access.store(job.returns, start, ret);
      source.on_tile(shared, lane_mask, advantage, ret);
      bits = next_bits;
      mask = next_mask;
      next_mask = mask_after_next;
    }
    source.template on_span_end<W>(shared, job, span, row_kl);
  }
  source.template on_block_end<num_teams * W>(shared);
}

// Writes the map of each chunk but a row's first. A warp takes an eighth of a chunk, tiles right to left.
template <class Source>
__global__ void __launch_bounds__(max_warps* warp_size) chunk_map_kernel(const GaeJob job, const Source source) {
  __shared__ float4 transpose_buffer[max_warps][warp_size];
  __shared__ Affine warp_maps[max_warps];
  const int warp = threadIdx.x / warp_size;
  const Span span = find_span(job, blockIdx.x);
  if (span.row < 0 || span.is_first) return;
  const SpanAccess<Source> access(source, job, span, reinterpret_cast<float*>(transpose_buffer[warp]));
  const Discount discount = row_discount<Source::per_row>(job, span.row);
  const float decay_to_end = decay_to_tile_end(discount.decay);
  const int64_t warp_tokens = (int64_t(1) << job.chunk_log2) / max_warps;
  float unused_kl = 0.f;
  Affine warp_map{1.f, 0.f};
  int64_t start = warp * warp_tokens + warp_tokens - tile;
  unsigned mask = access.load_mask(start);
  for (; start >= warp * warp_tokens; start -= tile) {
    LaneInputs<Source::num_inputs> inputs = access.unpack(access.load(start, mask));
    const unsigned next_mask = start > warp * warp_tokens ? access.load_mask(start - tile) : 0;
    const unsigned lane_mask = access.transpose(mask, inputs);
    const LaneTokens tokens = make_tokens(source, discount, inputs, lane_mask, unused_kl);
    warp_map = compose(scan_tile(tokens, discount.decay, decay_to_end), warp_map);
    mask = next_mask;
  }
  if (threadIdx.x % warp_size == 0) warp_maps[warp] = warp_map;
  __syncthreads();
  if (threadIdx.x) return;
  Affine chunk_map = warp_maps[max_warps - 1];
  for (int w = max_warps - 2; w >= 0; --w) chunk_map = compose(warp_maps[w], chunk_map);
  job.chunk_maps[span.index] = chunk_map;
}

template <int W, class Source>
const char* launch_scan(const GaeJob& job, const Source& source, const LaunchPlan& plan, uintptr_t stream) {
  return launch(scan_kernel<W, Source>, plan.blocks, scan_threads(W), 0, stream, job, source, plan.num_spans);
}

template <class Source>
const char* launch_rows(const GaeJob& job, const Source& source, const LaunchPlan& plan, uintptr_t stream) {
  if (!plan.blocks) return job.B ? "more chunks than a grid has blocks" : nullptr;
  if (job.chunk_log2) {
    const char* error = launch(chunk_map_kernel<Source>, plan.blocks, max_warps * warp_size, 0, stream, job, source);
    if (error) return error;
  }
  if (plan.warps_per_span == 1) return launch_scan<1>(job, source, plan, stream);
  if (plan.warps_per_span == 4) return launch_scan<4>(job, source, plan, stream);
  return launch_scan<max_warps>(job, source, plan, stream);
}

}  // namespace
