// The scan of gae, gae_packed and ppo_advantages on NVIDIA GPUs; kernels/gae.py says what it means.
//
// Let x be what a token adds to r - V of its left neighbour: gamma V + gamma lam A. Then
//     A = (r - V) + x        x' = gamma lam x + (gamma lam r + (gamma - gamma lam) V)
// within the mask, and x' = x outside it: a gap needs nothing of its own. Both are maps x -> a x + b, which compose: a
// lane folds its 4 tokens, a warp scans its 32 lanes by shuffles, and a team of warps hands x from the right to the
// left. Tiles of 128 tokens start at multiples of 128 from a row's start, and x meets them in their order: padding, the
// other rows, alignment and the size of the team do not change a row's bits. In a full tile all a are powers of one
// number, and only b is shuffled.
//
// Memory is the floor. A lane's 4 tokens are one load of 16 bytes an input; where a row does not start at 16 bytes, the
// warp loads them 32 in line and turns them in shared memory. The mask is read one step ahead: of 4 tokens outside it
// nothing else is read. The next step's inputs are under way while this one is scanned.
//
// A few long rows are cut into pieces, a block each, in two launches: `fold_kernel` makes each piece a map, and each
// block of `rows_kernel` applies the maps to its right. What is read twice then mostly lies in the L2 cache.
#pragma once
#include "reduce.cuh"

namespace {

constexpr int each = 4, tile = lanes * each;  // tokens of a lane, of a warp
constexpr int most_warps = 8;                 // of a block; each has a tile or more of a piece

struct Affine {  // x -> a x + b
  float a, b;
};
__device__ __forceinline__ float apply(const Affine& f, float x) { return fmaf(f.a, x, f.b); }
// `left` after `right`.
__device__ __forceinline__ Affine compose(const Affine& left, const Affine& right) {
  return {left.a * right.a, fmaf(left.a, right.b, left.b)};
}

// B rows of T tokens, or segments that lie end to end: then `offsets` are given, and T is their sum.
struct Rows {
  const uint8_t* mask;
  const int64_t* offsets;
  float *advantages, *returns;
  int64_t B, T;
  float gamma, decay, rest;  // decay is gamma lam, and rest what gamma has more
  int cut;                   // a piece has 2^cut tokens; 0 where rows are not cut
  Affine* folds;             // of the pieces
};

// A row, or a piece of one.
struct Span {
  int64_t row, begin, length;
  int64_t index, later;  // of this piece among all, and how many of its row follow it
  bool first;
};

__host__ __device__ __forceinline__ int64_t pieces_of(const Rows& r, int64_t length) {
  return (length + (int64_t(1) << r.cut) - 1) >> r.cut;
}

// Piece `place` of a row.
__device__ __forceinline__ Span piece_of(const Rows& r, int64_t row, int64_t begin, int64_t length, int64_t index,
                                         int64_t place) {
  const int64_t from = place << r.cut, left = length - from, most = int64_t(1) << r.cut;
  return {row, begin + from, left < most ? left : most, index, pieces_of(r, length) - 1 - place, place == 0};
}

// The span `index`: a row, or where rows are cut a piece; row -1 where there is none. A warp looks together.
__device__ __forceinline__ Span span_of(const Rows& r, int64_t index) {
  if (!r.cut) {
    const int64_t begin = r.offsets ? r.offsets[index] : index * r.T;
    return {index, begin, r.offsets ? r.offsets[index + 1] - begin : r.T, index, 0, true};
  }
  if (!r.offsets) {
    const int64_t pieces = pieces_of(r, r.T), row = index / pieces;
    return piece_of(r, row, row * r.T, r.T, index, index % pieces);
  }
  const int lane = threadIdx.x % lanes;
  int64_t before = 0;
  for (int64_t first = 0; first < r.B; first += lanes) {
    const int64_t s = first + lane, mine = s < r.B ? pieces_of(r, r.offsets[s + 1] - r.offsets[s]) : 0;
    int64_t until = before + mine;
    for (int d = 1; d < lanes; d *= 2) {
      const int64_t left = __shfl_up_sync(all_lanes, until, d);
      if (lane >= d) until += left - before;
    }
    const unsigned beyond = __ballot_sync(all_lanes, index < until);
    if (beyond) {
      const int owner = __ffs(beyond) - 1;
      const int64_t row = first + owner, begin = r.offsets[row];
      const int64_t place = index - __shfl_sync(all_lanes, until - mine, owner);
      return piece_of(r, row, begin, r.offsets[row + 1] - begin, index, place);
    }
    before = __shfl_sync(all_lanes, until, lanes - 1);
  }
  return {-1, 0, 0, 0, 0, false};
}

// Four tokens of a lane: `inputs` of a source, the values first.
template <int inputs>
struct Quad {
  float x[inputs][each];
};

// One warp's view of a span. Where 16 bytes cannot be loaded at once a lane loads tokens lane, lane + 32, ..., and the
// warp turns them, through 128 floats of shared memory, into 4 in line for each.
template <class Source>
struct View {
  const Source& source;
  const Rows& rows;
  int64_t begin, length;
  float* memory;
  int lane;
  bool aligned;

  __device__ View(const Source& source, const Rows& rows, const Span& span, float* memory)
      : source(source), rows(rows), begin(span.begin), length(span.length), memory(memory), lane(threadIdx.x % lanes) {
    uintptr_t low = reinterpret_cast<uintptr_t>(rows.mask + begin) * 4;
    low |= reinterpret_cast<uintptr_t>(rows.advantages + begin) | reinterpret_cast<uintptr_t>(rows.returns + begin);
    for (int k = 0; k < Source::inputs; ++k) low |= reinterpret_cast<uintptr_t>(source.input[k] + begin);
    aligned = low % 16 == 0;
  }

  __device__ __forceinline__ int64_t at(int64_t start, int i) const {
    return start + (aligned ? each * lane + i : lanes * i + lane);
  }
  __device__ __forceinline__ bool whole(int64_t start) const { return aligned && at(start, each) <= length; }

  // A bit for each of the four tokens that the lane loads of the tile at `start`: whether it exists.
  __device__ __forceinline__ unsigned look(int64_t start) const {
    if (start < 0) return 0;
    const uint8_t* mask = rows.mask + begin;
    if (whole(start)) return *reinterpret_cast<const uint32_t*>(mask + at(start, 0)) * 0x01020408u >> 24;
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < each; ++i)
      if (at(start, i) < length && mask[at(start, i)]) bits |= 1u << i;
    return bits;
  }

  __device__ __forceinline__ Quad<Source::inputs> load(int64_t start, unsigned bits) const {
    Quad<Source::inputs> q = {};
    if (!bits) return q;
    if (whole(start)) {
#pragma unroll
      for (int k = 0; k < Source::inputs; ++k) {
        const float4 v = *reinterpret_cast<const float4*>(source.input[k] + begin + at(start, 0));
        q.x[k][0] = v.x, q.x[k][1] = v.y, q.x[k][2] = v.z, q.x[k][3] = v.w;
      }
    } else {
#pragma unroll
      for (int k = 0; k < Source::inputs; ++k) {
#pragma unroll
        for (int i = 0; i < each; ++i)
          if (bits >> i & 1) q.x[k][i] = source.input[k][begin + at(start, i)];
      }
    }
    return q;
  }

  // From what was loaded to four tokens in line.
  __device__ __forceinline__ unsigned arrange(unsigned bits, Quad<Source::inputs>& q) const {
    if (aligned) return bits;
#pragma unroll
    for (int k = 0; k < Source::inputs; ++k) {
#pragma unroll
      for (int i = 0; i < each; ++i) memory[lanes * i + lane] = q.x[k][i];
      __syncwarp();
      const float4 v = reinterpret_cast<const float4*>(memory)[lane];
      __syncwarp();
      q.x[k][0] = v.x, q.x[k][1] = v.y, q.x[k][2] = v.z, q.x[k][3] = v.w;
    }
    unsigned mine = 0;
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const unsigned inside = __ballot_sync(all_lanes, bits >> i & 1);
      if (lane / (lanes / each) == i) mine = inside >> each * lane % lanes & 15;
    }
    return mine;
  }

  __device__ __forceinline__ void store(float* out, int64_t start, const float (&x)[each]) const {
    out += begin;
    if (whole(start)) {
      __stcg(reinterpret_cast<float4*>(out + at(start, 0)), make_float4(x[0], x[1], x[2], x[3]));
      return;  // by its name: nvcc makes four stores of an assignment here
    }
    if (!aligned) {
      reinterpret_cast<float4*>(memory)[lane] = make_float4(x[0], x[1], x[2], x[3]);
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < each; ++i)
      if (at(start, i) < length) out[at(start, i)] = aligned ? x[i] : memory[lanes * i + lane];
    if (!aligned) __syncwarp();
  }
};

// A lane's tokens as maps: A = excess + x, x' = step x + feed. A token that does not exist has step 1 and feed 0.
struct Tokens {
  float value[each], excess[each], feed[each];
  unsigned here;
};

__device__ __forceinline__ float step_of(const Tokens& t, int i, float decay) { return t.here >> i & 1 ? decay : 1.f; }

// What may be NaN outside the mask becomes 0 first, and what 0 earns is 0.
template <class Source>
__device__ __forceinline__ Tokens shape(const Source& source, const Rows& r, const Quad<Source::inputs>& q,
                                        unsigned here, float& noted) {
  Tokens t;
  t.here = here;
#pragma unroll
  for (int i = 0; i < each; ++i) {
    float x[Source::inputs];
#pragma unroll
    for (int k = 0; k < Source::inputs; ++k) x[k] = here >> i & 1 ? q.x[k][i] : 0.f;
    const float reward = source.reward(x, noted);
    t.value[i] = x[0], t.excess[i] = reward - x[0], t.feed[i] = fmaf(r.decay, reward, r.rest * x[0]);
  }
  return t;
}

// decay^(tokens from the lane's first to the end of a full tile).
__device__ __forceinline__ float reach_of(float decay) {
  const int left = lanes - threadIdx.x % lanes;
  float power = decay * decay * decay * decay, reach = 1.f;
#pragma unroll
  for (int bit = 0; bit < 6; ++bit, power *= power)
    if (left >> bit & 1) reach *= power;
  return reach;
}

// What the tokens from a lane's first to the tile's last do to x.
__device__ __forceinline__ Affine scan_tile(const Tokens& t, float decay, float reach) {
  const int lane = threadIdx.x % lanes;
  Affine f{1.f, 0.f};
#pragma unroll
  for (int i = each - 1; i >= 0; --i) f = compose({step_of(t, i, decay), t.feed[i]}, f);
  if (__all_sync(all_lanes, t.here == 15)) {
    float power = f.a;
#pragma unroll
    for (int d = 1; d < lanes; d *= 2, power *= power) {
      const float right = __shfl_down_sync(all_lanes, f.b, d);
      if (lane + d < lanes) f.b = fmaf(power, right, f.b);
    }
    f.a = reach;
  } else if (__any_sync(all_lanes, t.here)) {
#pragma unroll
    for (int d = 1; d < lanes; d *= 2) {
      const Affine right{__shfl_down_sync(all_lanes, f.a, d), __shfl_down_sync(all_lanes, f.b, d)};
      if (lane + d < lanes) f = compose(f, right);
    }
  }
  return f;
}

// Of a piece: x at its left end, from x at its right end and what all pieces of the row between the two do to it.
__device__ __forceinline__ float enter(const Rows& r, const Span& span, float x) {
  const int lane = threadIdx.x % lanes;
  const int64_t share = (span.later + lanes - 1) / lanes;
  Affine f{1.f, 0.f};
  for (int64_t i = share - 1; i >= 0; --i) {
    const int64_t place = lane * share + i;
    if (place < span.later) f = compose(r.folds[span.index + 1 + place], f);
  }
#pragma unroll
  for (int d = 1; d < lanes; d *= 2) {
    const Affine right{__shfl_down_sync(all_lanes, f.a, d), __shfl_down_sync(all_lanes, f.b, d)};
    if (lane + d < lanes) f = compose(f, right);
  }
  return apply({__shfl_sync(all_lanes, f.a, 0), __shfl_sync(all_lanes, f.b, 0)}, x);
}

// A team of W warps walks spans, tiles right to left; a block has one team, or four of one warp each. The source says
// what tokens earn, and is told what came of them.
template <int W, class Source>
__global__ void __launch_bounds__(W == most_warps ? W * lanes : 4 * lanes, W == most_warps ? Source::blocks : 7)
    rows_kernel(const Rows r, Source source, const int64_t spans) {
  constexpr int teams = W == 1 ? 4 : 1;
  __shared__ float4 turned[teams * W][lanes];
  __shared__ Affine handed[2][W];
  __shared__ typename Source::Room room;
  const int lane = threadIdx.x % lanes, warp = threadIdx.x / lanes, place = warp % W;
  const float reach = reach_of(r.decay);
  source.begin(room);
  int turn = 0;
  for (int64_t index = int64_t(blockIdx.x) * teams + warp / W; index < spans; index += int64_t(gridDim.x) * teams) {
    const Span span = span_of(r, index);
    if (span.row < 0) break;
    const View<Source> view(source, r, span, reinterpret_cast<float*>(turned[warp]));
    float x = source.last(span.row, r), noted = 0.f;  // what the step's last token will be handed from its right
    if (r.cut) x = enter(r, span, x);
    int64_t start = (span.length - 1) / (W * tile) * (W * tile) + place * tile;
    unsigned bits = view.look(start), bits_ahead = view.look(start - W * tile);
    Quad<Source::inputs> quad = view.load(start, bits);
    for (; start >= 0; start -= W * tile) {
      Quad<Source::inputs> ahead = view.load(start - W * tile, bits_ahead);
      const unsigned bits_far = view.look(start - 2 * W * tile);
      const unsigned here = view.arrange(bits, quad);
      const Tokens t = shape(source, r, quad, here, noted);
      const Affine f = scan_tile(t, r.decay, reach);
      float mine = x;
      if constexpr (W > 1) {
        if (lane == 0) handed[turn][place] = f;
        __syncthreads();
#pragma unroll
        for (int w = W - 1; w >= 0; --w) {
          if (w == place) mine = x;
          x = apply(handed[turn][w], x);
        }
        turn ^= 1;
      }
      const float out = apply(f, mine), right = __shfl_down_sync(all_lanes, out, 1);
      if constexpr (W == 1) x = __shfl_sync(all_lanes, out, 0);
      float inside = lane == lanes - 1 ? mine : right, advantage[each], ret[each];
#pragma unroll
      for (int i = each - 1; i >= 0; --i) {
        const bool exists = here >> i & 1;
        advantage[i] = exists ? t.excess[i] + inside : 0.f;
        ret[i] = exists ? advantage[i] + t.value[i] : 0.f;
        inside = apply({step_of(t, i, r.decay), t.feed[i]}, inside);
      }
      view.store(r.advantages, start, advantage);
      view.store(r.returns, start, ret);
      source.made(room, here, advantage, ret);
      quad = ahead, bits = bits_ahead, bits_ahead = bits_far;
    }
    source.template row_done<W>(room, r, span, noted);
  }
  source.template done<teams * W>(room);
}

// Each piece but a row's first as a map. A warp takes its eighth of a piece, tiles right to left.
template <class Source>
__global__ void __launch_bounds__(most_warps* lanes) fold_kernel(const Rows r, const Source source) {
  __shared__ float4 turned[most_warps][lanes];
  __shared__ Affine handed[most_warps];
  const int warp = threadIdx.x / lanes;
  const Span span = span_of(r, blockIdx.x);
  if (span.row < 0 || span.first) return;
  const View<Source> view(source, r, span, reinterpret_cast<float*>(turned[warp]));
  const float reach = reach_of(r.decay);
  const int64_t share = (int64_t(1) << r.cut) / most_warps;
  float noted = 0.f;
  Affine all{1.f, 0.f};
  int64_t start = warp * share + share - tile;
  unsigned bits = view.look(start);
  for (; start >= warp * share; start -= tile) {
    Quad<Source::inputs> quad = view.load(start, bits);
    const unsigned ahead = start > warp * share ? view.look(start - tile) : 0;
    const unsigned here = view.arrange(bits, quad);
    const Affine f = scan_tile(shape(source, r, quad, here, noted), r.decay, reach);
    all = compose(f, all);
    bits = ahead;
  }
  if (threadIdx.x % lanes == 0) handed[warp] = all;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = most_warps - 2; w >= 0; --w) handed[most_warps - 1] = compose(handed[w], handed[most_warps - 1]);
  r.folds[span.index] = handed[most_warps - 1];
}

// Enough to fill any GPU several times over; blocks walk on over more rows.
constexpr int64_t most_blocks = 2048;

struct Plan {
  int warps;  // of a team
  int64_t spans;
  unsigned blocks;
};

// A row's team has a warp for each tile, up to 8: T is the length of a typical row.
inline Plan plan(const Rows& r, int64_t T, int64_t most = most_blocks) {
  if (r.cut) {  // cut segments have up to this many pieces: some blocks may be left without
    const int64_t pieces = r.offsets ? pieces_of(r, r.T) + r.B : r.B * pieces_of(r, r.T);
    return {most_warps, pieces, blocks_for(pieces, 1)};
  }
  const int warps = T <= 2 * tile ? 1 : T <= 4 * tile ? 4 : most_warps;
  const int64_t blocks = warps == 1 ? (r.B + 3) / 4 : r.B;
  return {warps, r.B, unsigned(blocks < most ? blocks : most)};
}

template <int W, class Source>
const char* launch_team(const Rows& r, const Source& source, const Plan& p, uintptr_t stream) {
  return launch(rows_kernel<W, Source>, p.blocks, W == 1 ? 4 * lanes : W * lanes, 0, stream, r, source, p.spans);
}

template <class Source>
const char* launch_rows(const Rows& r, const Source& source, const Plan& p, uintptr_t stream) {
  if (!p.blocks) return r.B ? "more pieces than a grid has blocks" : nullptr;
  if (r.cut) {
    const char* error = launch(fold_kernel<Source>, p.blocks, most_warps * lanes, 0, stream, r, source);
    if (error) return error;
  }
  if (p.warps == 1) return launch_team<1>(r, source, p, stream);
  if (p.warps == 4) return launch_team<4>(r, source, p, stream);
  return launch_team<most_warps>(r, source, p, stream);
}

// The exponent of a piece of `tokens`, 0 for none; -1 where it is not a power of two that warps can share.
inline int cut_of(int64_t tokens) {
  if (!tokens) return 0;
  for (int cut = 10; cut < 62; ++cut)
    if (tokens == int64_t(1) << cut) return cut;
  return -1;
}

// What a launcher is told of the rows; `offsets` 0 where all have T tokens.
inline Rows rows_of(uintptr_t mask, uintptr_t offsets, uintptr_t advantages, uintptr_t returns, uintptr_t folds,
                    int64_t piece, int64_t B, int64_t T, float gamma, float lam) {
  const float decay = gamma * lam;
  return {ptr<const uint8_t>(mask),
          ptr<const int64_t>(offsets),
          ptr<float>(advantages),
          ptr<float>(returns),
          B,
          T,
          gamma,
          decay,
          gamma - decay,
          cut_of(piece),
          ptr<Affine>(folds)};
}

constexpr const char* no_piece = "a piece must have a power of two of tokens, 1024 at least";

// Rewards as they lie in memory.
struct Stored {
  static constexpr int inputs = 2, blocks = 4;  // blocks of 8 warps that a processor should hold: 64 registers
  struct Room {};
  const float* input[inputs];  // values, rewards
  const float* bootstrap;

  __device__ __forceinline__ float last(int64_t row, const Rows& r) const {
    return bootstrap ? r.gamma * bootstrap[row] : 0.f;
  }
  __device__ __forceinline__ float reward(const float (&x)[inputs], float&) const { return x[1]; }
  __device__ __forceinline__ void begin(Room&) const {}
  __device__ __forceinline__ void made(Room&, unsigned, const float (&)[each], const float (&)[each]) const {}
  template <int W>
  __device__ __forceinline__ void row_done(Room&, const Rows&, const Span&, float) const {}
  template <int warps>
  __device__ __forceinline__ void done(Room&) const {}
};

}  // namespace
