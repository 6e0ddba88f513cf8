// A warp's part of attention over keys in pages: scores, exponentials, weighted sums, and how states of keys are
// folded. decode_attention.cu says what for.
#pragma once
#include "softmax.cuh"

namespace {

constexpr int split = 256;  // kernels/decode_attention.py knows it too
constexpr int warps = 8, block_threads = warps * lanes;
constexpr int score_bits = 3;  // 8 lanes score a key
static_assert(split == warps * lanes, "a warp takes a key a lane");

// Keys or values, rows of `width` numbers: a team of 2^bits lanes reads a row, `words` words of 16 bytes a lane.
struct Rows {
  const void* at;
  int width, bits, words;

  __host__ __device__ int team() const { return 1 << bits; }
  __device__ int shift() const { return 5 - bits; }  // a warp reads 2^shift rows at once
  __device__ int member() const { return threadIdx.x & (team() - 1); }
  __device__ int slot(int step) const { return (step << shift()) + ((threadIdx.x % lanes) >> bits); }
};

struct Attention {
  const void* q;
  int q_type;
  int64_t q_token, q_head;
  Rows k, v;
  const int32_t *table, *lengths, *rows;
  void* out;
  float *states, *sums;  // (N, H, splits, 2) and (N, H, splits, width), width a multiple of 4
  int64_t N;
  int H, kv_heads, P, M, window;
  int parts, splits, chunks;  // blocks that share the splits; splits at most; blocks that share the query heads
  int quads;                  // of four columns of an output, that teams have lanes for
  float inverse, factor;      // a score is x * factor, or tanh(x * inverse) * factor, in units of log 2
  bool cap;

  __device__ int end(int64_t n) const { return min(lengths[n], M * P); }
  __device__ int begin(int end) const { return window > 0 ? max(end - window, 0) : 0; }
  __host__ __device__ int width() const { return (v.width + 3) / 4 * 4; }
};

// Of some keys: the largest score, the sum of 2^(score - largest), that of 2^(score - largest) value in four columns.
struct State {
  float top, total;
  float4 sums;
};

__device__ __forceinline__ State no_keys() { return {-INFINITY, 0.f, make_float4(0.f, 0.f, 0.f, 0.f)}; }

__device__ __forceinline__ float4 add_product(float4 a, float x, float4 b) {
  return make_float4(__fmaf_rn(a.x, x, b.x), __fmaf_rn(a.y, x, b.y), __fmaf_rn(a.z, x, b.z), __fmaf_rn(a.w, x, b.w));
}

// a + the a of the lane `apart` from this one.
__device__ __forceinline__ float4 add_from(float4 a, int apart) {
  return make_float4(a.x + __shfl_xor_sync(all_lanes, a.x, apart), a.y + __shfl_xor_sync(all_lanes, a.y, apart),
                     a.z + __shfl_xor_sync(all_lanes, a.z, apart), a.w + __shfl_xor_sync(all_lanes, a.w, apart));
}

__device__ __forceinline__ float add_dot(float4 a, float4 b, float c) {
  return __fmaf_rn(a.w, b.w, __fmaf_rn(a.z, b.z, __fmaf_rn(a.y, b.y, __fmaf_rn(a.x, b.x, c))));
}

// The keys of `next` follow those of `into`.
__device__ __forceinline__ void fold(State& into, const State& next) {
  const float top = fmaxf(into.top, next.top), from = origin(top);
  const float x = exp2_near(into.top - from), y = exp2_near(next.top - from);
  const float4 scaled = make_float4(__fmul_rn(next.sums.x, y), __fmul_rn(next.sums.y, y), __fmul_rn(next.sums.z, y),
                                    __fmul_rn(next.sums.w, y));
  into = {top, __fmaf_rn(into.total, x, __fmul_rn(next.total, y)), add_product(into.sums, x, scaled)};
}

// The mean of the values from column `column` on, of one query head; 0 without keys. Scores that are all -inf give NaN.
__device__ __forceinline__ void write_mean(const Attention& a, int64_t head, int column, const State& all, bool keys) {
  const float sums[4] = {all.sums.x, all.sums.y, all.sums.z, all.sums.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i >= a.v.width) return;
    const int64_t at = head * a.v.width + column + i;
    const float mean = keys ? sums[i] / all.total : 0.f;
    if (a.q_type == 0)
      narrow(mean, static_cast<float*>(a.out)[at]);
    else if (a.q_type == 1)
      narrow(mean, static_cast<__nv_bfloat16*>(a.out)[at]);
    else
      narrow(mean, static_cast<__half*>(a.out)[at]);
  }
}

__device__ __forceinline__ float query(const Attention& a, int64_t at) {
  if (a.q_type == 0) return static_cast<const float*>(a.q)[at];
  if (a.q_type == 1) return widened(static_cast<const __nv_bfloat16*>(a.q)[at]);
  return widened(static_cast<const __half*>(a.q)[at]);
}

// A word of a row, of its last one where it has fewer; WHOLE: all are whole. What else is none of the row is 0.
template <bool WHOLE, class T>
__device__ __forceinline__ uint4 read_word(const Rows& rows, int row, int word) {
  constexpr int per = per_word<T>;
  if constexpr (WHOLE) {
    const int count = rows.width / per;
    return static_cast<const uint4*>(rows.at)[int64_t(row) * count + min(word, count - 1)];
  } else {
    const T* const at = static_cast<const T*>(rows.at) + int64_t(row) * rows.width + word * per;
    T x[per];
#pragma unroll
    for (int i = 0; i < per; ++i) {
      if (word * per + i < rows.width)
        x[i] = at[i];
      else
        narrow(0.f, x[i]);
    }
    uint4 bits;
    memcpy(&bits, x, 16);
    return bits;
  }
}

// Four numbers of a word.
template <class T>
__device__ __forceinline__ float4 quad(const uint4& word, int which) {
  float x[per_word<T>];
  unpack<T>(word, x);
  return make_float4(x[4 * which], x[4 * which + 1], x[4 * which + 2], x[4 * which + 3]);
}

// One step of `team_sums`, of m numbers: a lane keeps one half of them and its neighbour the other.
template <int m, int n>
__device__ __forceinline__ int halve(float (&x)[n], int apart) {
  constexpr int half = m / 2;
  const bool upper = threadIdx.x & apart;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const float given = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
    x[i] = kept + __shfl_xor_sync(all_lanes, given, apart);
  }
  return upper ? half : 0;
}

// n sums over teams of 8 lanes at once. The lane then has n / 8 of them, from the returned one on.
template <int n>
__device__ __forceinline__ int team_sums(float (&x)[n]) {
  int first = halve<n>(x, 1);
  first += halve<n / 2>(x, 2);
  return first + halve<n / 4>(x, 4);
}

// One number of each query head, side by side in shared memory.
template <int HEADS>
__device__ __forceinline__ void read_heads(const float* at, float (&x)[HEADS]) {
  if constexpr (HEADS % 4 == 0) {
#pragma unroll
    for (int h = 0; h < HEADS; h += 4) {
      const float4 four = *reinterpret_cast<const float4*>(at + h);
      x[h] = four.x, x[h + 1] = four.y, x[h + 2] = four.z, x[h + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int h = 0; h < HEADS; ++h) x[h] = at[h];
  }
}

// The lane's key of the split that begins at `start`: its row, or -1. Four keys of every 32 are the warp's.
__device__ __forceinline__ int row_of(const Attention& a, int sequence, int kv, int start, int end) {
  const int lane = threadIdx.x % lanes, warp = threadIdx.x / lanes;
  const int position = start + lane / 4 * (4 * warps) + warp * 4 + lane % 4;
  if (position < a.begin(end) || position >= end) return -1;
  const int page = a.table[int64_t(sequence) * a.M + position / a.P];
  return (page * a.kv_heads + kv) * a.P + position % a.P;
}

// A warp's keys: a lane has the row of one, and of another of them where its own is not to be read.
struct Keys {
  int row;
  unsigned here;  // a bit for each that is to be read

  __device__ explicit Keys(int row) : row(row), here(__ballot_sync(all_lanes, row >= 0)) {
    const int some = __shfl_sync(all_lanes, row, __ffs(here) - 1);
    if (row < 0) this->row = some;
  }
  __device__ bool has(int slot) const { return here >> slot & 1; }
  // The steps that meet them, U at a time; there are none of no keys.
  template <int U>
  __device__ int from(const Rows& rows) const {
    return ((__ffs(here) - 1) >> rows.shift()) / U * U;
  }
  __device__ int to(const Rows& rows) const { return ((lanes - 1 - __clz(here)) >> rows.shift()) + 1; }

  // Word `chunk` of the lane's share, of the key that its team reads in this step.
  template <bool WHOLE, class T>
  __device__ __forceinline__ uint4 read(const Rows& rows, int step, int chunk) const {
    const int at = __shfl_sync(all_lanes, row, rows.slot(step));
    return read_word<WHOLE, T>(rows, at, (chunk << rows.bits) + rows.member());
  }
};

template <bool WHOLE, class T, int U>
__device__ __forceinline__ void read_first(uint4 (&words)[U], const Rows& rows, const Keys& keys, int chunk = 0) {
  if (!keys.here) return;
  const int from = keys.from<U>(rows);
#pragma unroll
  for (int u = 0; u < U; ++u) words[u] = keys.read<WHOLE, T>(rows, from + u, chunk);
}

// Scores of a warp's keys into `weights` (32, HEADS). `words` are the first of them.
template <int HEADS, bool WHOLE, class T, int U>
__device__ __forceinline__ void score(uint4 (&words)[U], const Rows& given, const Keys& keys, const float4* queries,
                                      float* weights) {
  constexpr int quads = per_word<T> / 4, n = U * HEADS;
  const Rows rows{given.at, given.width, score_bits, given.words};
  const int member = rows.member(), to = keys.to(rows);
  queries += member;
#pragma unroll 1
  for (int step = keys.from<U>(rows); step < to; step += U) {
    float products[n];
#pragma unroll
    for (int i = 0; i < n; ++i) products[i] = 0.f;
#pragma unroll 1
    for (int chunk = 0; chunk < rows.words; ++chunk) {
      const bool turn = chunk + 1 == rows.words, more = !turn || step + U < to;
      const int next = turn ? step + U : step, next_chunk = turn ? 0 : chunk + 1;
      if (((chunk << rows.bits) + member) * per_word<T> >= rows.width) {  // a row has no such word
#pragma unroll
        for (int u = 0; u < U; ++u) words[u] = make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int u = 0; u < U; u += 2) {
#pragma unroll
        for (int i = 0; i < quads; ++i) {
          const float4 x = quad<T>(words[u], i), y = quad<T>(words[u + 1], i);
#pragma unroll
          for (int h = 0; h < HEADS; ++h) {
            const float4 q = queries[((chunk * HEADS + h) * quads + i) << rows.bits];
            products[u * HEADS + h] = add_dot(q, x, products[u * HEADS + h]);
            products[(u + 1) * HEADS + h] = add_dot(q, y, products[(u + 1) * HEADS + h]);
          }
        }
        if (more) {
          words[u] = keys.read<WHOLE, T>(rows, next + u, next_chunk);
          words[u + 1] = keys.read<WHOLE, T>(rows, next + u + 1, next_chunk);
        }
      }
    }
    const int first = team_sums(products), slot = rows.slot(step + first / HEADS);
#pragma unroll
    for (int i = 0; i < n / 8; ++i) weights[slot * HEADS + first % HEADS + i] = products[i];
  }
}

// Scores into exponentials, a lane a key; the warp's largest scores and sums.
template <int HEADS>
__device__ __forceinline__ void exponentials(const Attention& a, const Keys& keys, float* weights, float* tops,
                                             float* totals) {
  const int lane = threadIdx.x % lanes;
  const bool here = keys.has(lane);
  float scores[HEADS];
  read_heads(weights + lane * HEADS, scores);
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    const float x = a.cap ? tanhf(scores[h] * a.inverse) : scores[h];
    const float top = warp_reduce<Largest>(here ? __fmul_rn(x, a.factor) : -INFINITY);
    const float weight = here ? exp2_near(__fmaf_rn(x, a.factor, -origin(top))) : 0.f;
    const float total = warp_reduce<Add>(weight);
    weights[lane * HEADS + h] = weight;
    if (lane == 0) tops[h] = top, totals[h] = total;
  }
}

// The sums of weights and values over a warp's keys into `sums` (HEADS, columns). `words` are the first of them.
template <int HEADS, bool WHOLE, class T, int U>
__device__ __forceinline__ void weigh(uint4 (&words)[U], const Rows& rows, const Keys& keys, const float* weights,
                                      float4* sums, int width) {
  constexpr int quads = per_word<T> / 4, n = HEADS * quads;
  const int lane = threadIdx.x % lanes, to = keys.to(rows);
#pragma unroll 1
  for (int chunk = 0; chunk < rows.words; ++chunk) {
    if (chunk) read_first<WHOLE, T>(words, rows, keys, chunk);
    float4 total[n];
#pragma unroll
    for (int i = 0; i < n; ++i) total[i] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
    for (int step = keys.from<U>(rows); step < to; step += U) {
      if (keys.here != all_lanes) {
#pragma unroll
        for (int u = 0; u < U; ++u)
          if (!keys.has(rows.slot(step + u))) words[u] = make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        float w[HEADS];
        read_heads(weights + rows.slot(step + u) * HEADS, w);
#pragma unroll
        for (int i = 0; i < quads; ++i) {
          const float4 x = quad<T>(words[u], i);
#pragma unroll
          for (int h = 0; h < HEADS; ++h) total[h * quads + i] = add_product(x, w[h], total[h * quads + i]);
        }
        if (step + U < to) words[u] = keys.read<WHOLE, T>(rows, step + U + u, chunk);
      }
    }
    for (int apart = rows.team(); apart < lanes; apart *= 2)
#pragma unroll
      for (int i = 0; i < n; ++i) total[i] = add_from(total[i], apart);
    if (lane < rows.team())
#pragma unroll
      for (int i = 0; i < n; ++i)
        sums[i / quads * width + ((chunk << rows.bits) + lane) * quads + i % quads] = total[i];
  }
}

// What the warps of a block found, in their order.
template <int HEADS>
__device__ __forceinline__ State warps_joined(const float* tops, const float* totals, const float4* sums, int width) {
  float top = -INFINITY;
#pragma unroll
  for (int w = 0; w < warps; ++w) top = fmaxf(top, tops[w * HEADS]);
  State joined{top, 0.f, make_float4(0.f, 0.f, 0.f, 0.f)};
#pragma unroll
  for (int w = 0; w < warps; ++w) {
    const float factor = exp2_near(tops[w * HEADS] - origin(top));
    joined.total = __fmaf_rn(totals[w * HEADS], factor, joined.total);
    joined.sums = add_product(sums[w * HEADS * width], factor, joined.sums);
  }
  return joined;
}

}  // namespace
