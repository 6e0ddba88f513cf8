// Where the filters of sample_tokens cut a row of logits, found without a sort. Top-k, top-p and min-p each keep a
// prefix of the order (logit falling, index rising). A block counts or weighs what lies above a few thresholds, keeps
// the bracket that holds the cut, and looks again within it, until a thread can have each token that is left: its rank
// among them is the number of those before it. Of equal logits, more than that, the index decides, in like manner.
#pragma once
#include "sample.cuh"

namespace {

constexpr int thresholds = 8, most_warps = 16, most_threads = most_warps * lanes;

// Floats as integers of the same order, one for each value: -0 is 0.
__device__ __forceinline__ int64_t order_key(float x) {
  const int bits = __float_as_int(x);
  return bits < 0 ? -static_cast<int64_t>(bits & 0x7fffffff) : bits;
}
__device__ __forceinline__ float from_order_key(int64_t key) {
  return key < 0 ? __uint_as_float(0x80000000u | static_cast<unsigned>(-key))
                 : __uint_as_float(static_cast<unsigned>(key));
}

// The last token that is kept.
struct Cut {
  float logit;
  int token;

  __device__ __forceinline__ bool keeps(float x, int v) const { return x > logit || (x == logit && v <= token); }
};
constexpr int all_equal = 0x7fffffff;  // as a token: keep every one of that logit

__device__ __forceinline__ Cut stricter(const Cut& a, const Cut& b) {
  if (a.logit != b.logit) return a.logit > b.logit ? a : b;
  return a.token < b.token ? a : b;
}

struct CutMemory {
  int counts[most_warps][thresholds], count[thresholds];
  double masses[most_warps][thresholds], mass[thresholds];
  int few;
  float logit[most_threads], sorted_logit[most_threads];
  int token[most_threads], sorted_token[most_threads];
  double sorted_mass[most_threads];
};

// A row of logits, and z = (x - largest) / temperature.
template <class T>
struct Row {
  Words<T> words;
  float largest;
  double temperature;
  float inverse;

  // f(v, x) of each word of this thread: its logits, and the index of the first. -inf stands behind the last.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    constexpr int per = per_word<T>;
    for (int k = threadIdx.x; k < words.count(); k += blockDim.x) {
      float x[per];
      unpack<T>(words.read(k), x);
      f(k * per, x);
    }
  }
  __device__ __forceinline__ double mass(float x) const {
    return exp((static_cast<double>(x) - largest) / temperature);
  }
};

// The number of tokens for which over(v, x, j), and with MASS the sum of their p, in `memory`, for every j; it holds
// for j + 1 wherever it holds for j.
template <bool MASS, class T, class Over>
__device__ __forceinline__ void weigh(const Row<T>& row, const Over& over, CutMemory& memory) {
  int count[thresholds] = {};
  double mass[thresholds] = {};
  row.each([&](int v, const float (&x)[per_word<T>]) {
    float part[thresholds] = {};
    bool any = false;
#pragma unroll
    for (int i = 0; i < per_word<T>; ++i) {
      if (!over(v + i, x[i], thresholds - 1)) continue;
      any = true;
      const float p = MASS ? __expf((x[i] - row.largest) * row.inverse) : 0.f;
#pragma unroll
      for (int j = 0; j < thresholds; ++j) {
        const bool here = over(v + i, x[i], j);
        count[j] += here, part[j] += here ? p : 0.f;
      }
    }
    if (MASS && any) {
#pragma unroll
      for (int j = 0; j < thresholds; ++j) mass[j] += part[j];
    }
  });
  const int warp = threadIdx.x / lanes, warps = blockDim.x / lanes;
#pragma unroll
  for (int j = 0; j < thresholds; ++j) {
    count[j] = warp_reduce<Add>(count[j]);
    if (MASS) mass[j] = warp_reduce<Add>(mass[j]);
    if (threadIdx.x % lanes == 0) memory.counts[warp][j] = count[j], memory.masses[warp][j] = mass[j];
  }
  __syncthreads();
  if (threadIdx.x < thresholds) {
    int all = 0;
    double total = 0;
    for (int i = 0; i < warps; ++i) all += memory.counts[i][threadIdx.x], total += memory.masses[i][threadIdx.x];
    memory.count[threadIdx.x] = all, memory.mass[threadIdx.x] = total;
  }
  __syncthreads();
}

// Among the few tokens of logits in [low, above), which `before` weighs: the one with which the weight reaches
// `target`.
template <bool MASS, class T>
__device__ __forceinline__ Cut cut_among_few(const Row<T>& row, float low, float above, double before, double target,
                                             CutMemory& memory) {
  if (threadIdx.x == 0) memory.few = 0;
  __syncthreads();
  row.each([&](int v, const float (&x)[per_word<T>]) {
#pragma unroll
    for (int i = 0; i < per_word<T>; ++i) {
      if (!(x[i] >= low && x[i] < above) || v + i >= row.words.end) continue;
      const int at = atomicAdd(&memory.few, 1);  // in any order: ranks do not know it
      memory.logit[at] = x[i], memory.token[at] = v + i;
    }
  });
  __syncthreads();
  const int few = memory.few, me = threadIdx.x;
  if (me < few) {
    const Cut mine{memory.logit[me], memory.token[me]};
    int rank = 0;
    for (int i = 0; i < few; ++i)
      rank += memory.logit[i] > mine.logit || (memory.logit[i] == mine.logit && memory.token[i] < mine.token);
    memory.sorted_logit[rank] = mine.logit, memory.sorted_token[rank] = mine.token;
    memory.sorted_mass[rank] = MASS ? row.mass(mine.logit) : 1.;
  }
  __syncthreads();
  for (int i = 0; i < me && i < few; ++i) before += memory.sorted_mass[i];
  const int kept = max(1, __syncthreads_count(me < few && before < target));
  return {memory.sorted_logit[kept - 1], memory.sorted_token[kept - 1]};
}

// The same among the tokens of one logit, by rising index.
template <bool MASS, class T>
__device__ __forceinline__ Cut cut_among_equals(const Row<T>& row, float logit, double before, double target,
                                                CutMemory& memory) {
  const double each = MASS ? row.mass(logit) : 1., wanted = max(1., ceil((target - before) / each));
  int low = 0, high = row.words.end - 1;  // the token is from low to high
  while (low < high) {
    const int64_t first = low, room = high - low;
    weigh<false>(
        row, [&](int v, float x, int j) { return x == logit && v <= first + room * (j + 1) / (thresholds + 1); },
        memory);
    int j = 0;
    while (j < thresholds && memory.count[j] < wanted) ++j;
    if (j < thresholds) high = static_cast<int>(first + room * (j + 1) / (thresholds + 1));
    if (j) low = static_cast<int>(first + room * j / (thresholds + 1)) + 1;
    __syncthreads();
  }
  return {logit, low};
}

// Thresholds for the next look at a bracket: first some nats below the maximum, then even steps of the logits, in the
// end even steps in the order of floats, which always get there.
template <class T>
__device__ __forceinline__ float threshold(const Row<T>& row, int visit, int64_t low, int64_t high, int j) {
  const float bottom = from_order_key(low), top = from_order_key(high);
  if (visit == 0) {
    constexpr float depths[thresholds] = {1.f, 2.f, 3.5f, 5.f, 7.f, 9.f, 12.f, 16.f};
    return max(row.largest - static_cast<float>(row.temperature) * depths[j], -3.4e38f);
  }
  if (visit < 5 && bottom > -1.7e38f) return max(top - (top - bottom) * (j + 1) / (thresholds + 1), bottom);
  return from_order_key(low + (high - low) * (thresholds - j) / (thresholds + 1));
}

// The cut with which the weight reaches `target`: the number of tokens, or the sum of their p.
template <bool MASS, class T>
__device__ __forceinline__ Cut find_cut(const Row<T>& row, double target, CutMemory& memory) {
  const int64_t beyond = order_key(row.largest) + 1;
  // The bracket [low, high): its number of tokens, and the weight above it.
  int64_t low = order_key(-INFINITY), high = beyond;
  int inside = row.words.end;
  double before = 0;
  for (int visit = 0;; ++visit) {
    const float bottom = from_order_key(low), above = high == beyond ? INFINITY : from_order_key(high);
    if (inside <= 0) return {above, all_equal};  // the target was the weight above, but for rounding
    if (inside <= static_cast<int>(blockDim.x)) return cut_among_few<MASS>(row, bottom, above, before, target, memory);
    if (high - low <= 1) return cut_among_equals<MASS>(row, bottom, before, target, memory);
    float at[thresholds];
#pragma unroll
    for (int j = 0; j < thresholds; ++j) at[j] = threshold(row, visit, low, high, j);
    weigh<MASS>(row, [&](int v, float x, int j) { return x >= at[j] && x < above && v < row.words.end; }, memory);
    int less = 0;  // tokens above the lower bound of the new bracket
    double weight = 0;
    bool found = false;
    const int64_t was_high = high;
#pragma unroll
    for (int j = 0; j < thresholds; ++j) {
      const double here = MASS ? memory.mass[j] : memory.count[j];
      if (found) continue;
      if (before + here < target) {
        high = order_key(at[j]), less = memory.count[j], weight = here;
      } else {
        low = order_key(at[j]), inside = memory.count[j], found = true;
      }
    }
    inside -= less, before += weight;
    if (high > was_high) high = was_high;
    __syncthreads();
  }
}

// The least float that is at least min_p times as probable as the largest logit.
template <class T>
__device__ __forceinline__ float least_of_min_p(const Row<T>& row, float min_p) {
  const double bound = log(static_cast<double>(min_p));
  int64_t below = order_key(-INFINITY), low = order_key(row.largest);
  while (low - below > 1) {
    const int64_t middle = (low + below) >> 1;
    const bool kept = (static_cast<double>(from_order_key(middle)) - row.largest) / row.temperature >= bound;
    (kept ? low : below) = middle;
  }
  return from_order_key(low);
}

}  // namespace
