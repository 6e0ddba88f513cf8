// Log-probabilities and entropies of given logits, and their gradient, on NVIDIA GPUs; kernels/token_logprobs.py says
// what they mean, softmax.cuh how they are summed.
//
// Forward: memory is the floor, one read of the logits. A block takes a row, or, where a row is a few KiB, a warp does.
// Which numbers a thread adds up, and in which order, depends on V and the dtype alone, neither on where the row lies
// nor on the other rows: a row has the same bits in a batch and alone. A long row's sums are cut into parts for that,
// which few rows give to a block each, to fill the GPU; a second launch then joins them as the block of a row would.
//
// Backward: one read and one write. The block that sums a row keeps it in shared memory, from where it is read again
// when the sums are known. What does not fit (above 227 KiB on an H100) is read again from the end, out of the
// second-level cache if it is still there.
#include "softmax.cuh"

namespace {

constexpr int64_t ignored = -100;
constexpr int block_threads = 256, unroll = 4;
constexpr int part = 2 * unroll * block_threads;  // words; kernels/token_logprobs.py knows it too
constexpr int small = 2 * unroll * lanes;         // words of a row that a warp takes

struct Logits {
  const void* at;
  int64_t N, stride;
  int V;
  const void* targets;
  bool wide_targets;
  Scaling by;

  __device__ int64_t target(int64_t row) const {
    return wide_targets ? static_cast<const int64_t*>(targets)[row] : static_cast<const int32_t*>(targets)[row];
  }
  template <class T>
  __device__ const T* row(int64_t index) const {
    return static_cast<const T*>(at) + index * stride;
  }
};

template <class T>
__host__ __device__ int words_of(int V) {
  return (V + per_word<T> - 1) / per_word<T>;
}

// A target that is no column gives NaN: nothing outside the row is read.
template <bool CAP, class T>
__device__ __forceinline__ float target_logit(const T* row, int64_t target, const Logits& x) {
  return target >= 0 && target < x.V ? scaled<CAP>(widened(row[target]), x.by) : NAN;
}

__device__ __forceinline__ void write_outputs(const Softmax& row, float target, float* logprob, float* entropy) {
  const float log_sum = logf(row.sum);
  *logprob = (target - row.largest) - log_sum, *entropy = log_sum - row.moment / row.sum;
}

template <class T, bool CAP>
__global__ void __launch_bounds__(block_threads, CAP ? 3 : 4)
    token_logprobs_kernel(const Logits x, float* logprobs, float* entropy) {
  __shared__ float memory[3 * lanes];
  const int words = words_of<T>(x.V);
  const bool by_warp = words <= small;
  const int64_t index = by_warp ? int64_t(blockIdx.x) * (block_threads / lanes) + threadIdx.x / lanes : blockIdx.x;
  if (index >= x.N) return;
  const int thread = by_warp ? threadIdx.x % lanes : threadIdx.x, threads = by_warp ? lanes : block_threads;
  const int64_t target = x.target(index);
  if (target == ignored) {
    if (thread == 0) logprobs[index] = entropy[index] = 0.f;
    return;
  }
  const Words<T> all(x.row<T>(index), 0, x.V);
  Softmax sums = nothing_yet();
  for (int first = 0; first < words; first += part)
    sums = joined(sums, statistics<unroll, CAP>(all, first, min(first + part, words), thread, threads, x.by));
  sums = by_warp ? warp_joined(sums) : block_joined(sums, memory);
  if (thread == 0) write_outputs(sums, target_logit<CAP>(all.base, target, x), logprobs + index, entropy + index);
}

// scratch: (N, parts, 3, block_threads). One block a part; then one a row.
template <class T, bool CAP>
__global__ void __launch_bounds__(block_threads, CAP ? 3 : 4) parts_kernel(const Logits x, int parts, float* scratch) {
  const int64_t index = blockIdx.x / parts;
  if (x.target(index) == ignored) return;
  const int words = words_of<T>(x.V), first = int(blockIdx.x % parts) * part;
  const Words<T> all(x.row<T>(index), 0, x.V);
  const Softmax own = statistics<unroll, CAP>(all, first, min(first + part, words), threadIdx.x, block_threads, x.by);
  scratch += int64_t(blockIdx.x) * 3 * block_threads + threadIdx.x;
  scratch[0] = own.largest, scratch[block_threads] = own.sum, scratch[2 * block_threads] = own.moment;
}

template <class T, bool CAP>
__global__ void __launch_bounds__(block_threads)
    join_kernel(const Logits x, int parts, const float* scratch, float* logprobs, float* entropy) {
  __shared__ float memory[3 * lanes];
  const int64_t index = blockIdx.x, target = x.target(index);
  if (target == ignored) {
    if (threadIdx.x == 0) logprobs[index] = entropy[index] = 0.f;
    return;
  }
  const float own = target_logit<CAP>(x.row<T>(index), target, x);
  scratch += index * parts * 3 * block_threads + threadIdx.x;
  Softmax sums = nothing_yet();
#pragma unroll 4
  for (int i = 0; i < parts; ++i, scratch += 3 * block_threads)
    sums = joined(sums, {scratch[0], scratch[block_threads], scratch[2 * block_threads]});
  sums = block_joined(sums, memory);
  if (threadIdx.x == 0) write_outputs(sums, own, logprobs + index, entropy + index);
}

// One row of gradients by a team of threads, in the words of `out`. If those of the logits lie alike, the first `kept`
// of them are in `memory`, but for what `statistics` could not read as such. From the last word to the first: the last
// were read last. A target below 0 is none.
template <class T, bool CAP>
__device__ __forceinline__ void write_row(const T* row, T* out, int V, int target, const Slope& s, const Scaling& by,
                                          int thread, int threads, const uint4* memory, int kept) {
  constexpr int per = per_word<T>;
  const int before = static_cast<int>((reinterpret_cast<uintptr_t>(out) & 15) / sizeof(T));
  const Words<T> x(row, before, V);
  kept = x.shift ? 0 : min(kept, Words<T>(row, 0, V).whole);
  out -= before;
  const int special = target < 0 ? -1 : target + before;
  const float at_target = special < 0 ? 0.f : logit_gradient<CAP, false>(widened(x.base[special]), 0.f, s.g, s, by);
  const auto gradients = [&](int k, const uint4& word, float (&y)[per]) {
    unpack<T>(word, y);
#pragma unroll
    for (int i = 0; i < per; ++i) y[i] = logit_gradient<CAP, false>(y[i], 0.f, 0.f, s, by);
    if (special < k * per || special >= (k + 1) * per) return;
#pragma unroll
    for (int i = 0; i < per; ++i)
      if (special - k * per == i) y[i] = at_target;
  };
  for (int k = x.count() - 1 - thread; k >= 0; k -= threads) {
    float y[per];
    if (x.inside(k)) {
      gradients(k, k < kept ? memory[k] : x.read_whole(k), y);
      __stcs(reinterpret_cast<uint4*>(out) + k, packed<T>(y));  // to be gone first: the logits are read again
    } else {
      gradients(k, x.read_edge(k), y);
#pragma unroll
      for (int i = 0; i < per; ++i)
        if (k * per + i >= x.begin && k * per + i < x.end) narrow(y[i], out[k * per + i]);
    }
  }
}

template <class T>
__device__ __forceinline__ void write_zeros(T* out, int V, int thread, int threads) {
  constexpr int per = per_word<T>;
  const Words<T> x(out, static_cast<int>((reinterpret_cast<uintptr_t>(out) & 15) / sizeof(T)), V);
  T* const base = out - x.begin;
  for (int k = thread; k < x.count(); k += threads) {
    if (x.inside(k)) {
      reinterpret_cast<uint4*>(base)[k] = make_uint4(0, 0, 0, 0);
    } else {
      for (int i = max(k * per, x.begin); i < min((k + 1) * per, x.end); ++i) narrow(0.f, base[i]);
    }
  }
}

// A warp a row of `small` words or fewer, else a block of THREADS.
template <class T, bool CAP, int THREADS>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS)
    token_logprobs_backward_kernel(const float* grad_logprobs, const float* grad_entropy, const Logits x, T* out,
                                   int kept) {
  __shared__ float joining[3 * lanes];
  const int words = words_of<T>(x.V);
  const bool by_warp = words <= small;
  const int64_t index = by_warp ? int64_t(blockIdx.x) * (THREADS / lanes) + threadIdx.x / lanes : blockIdx.x;
  if (index >= x.N) return;
  const int thread = by_warp ? threadIdx.x % lanes : threadIdx.x, threads = by_warp ? lanes : THREADS;
  const int64_t given = x.target(index);
  if (given == ignored) return write_zeros(out + index * x.V, x.V, thread, threads);
  const int target = given >= 0 && given < x.V ? static_cast<int>(given) : -1;
  uint4* const memory = shared_memory<uint4>();
  const T* const row = x.row<T>(index);
  const Words<T> all(row, 0, x.V);
  Softmax sums = statistics<unroll, CAP>(all, 0, words, thread, threads, x.by, memory, kept);
  sums = by_warp ? warp_joined(sums) : block_joined(sums, joining);
  const float log_sum = logf(sums.sum), g = grad_logprobs[index], h = grad_entropy[index];
  const float entropy = log_sum - sums.moment / sums.sum;
  const Slope slope{sums.largest, log_sum, g, -g - h * entropy, -h, 0.f, 0.f, 0.f};
  write_row<T, CAP>(row, out + index * x.V, x.V, target, slope, x.by, thread, threads, memory, kept);
}

template <class F>
const char* with_type_and_cap(int dtype, const Logits& x, F f) {
  return with_type(
      dtype, [&](auto type) { return x.by.softcap > 0.f ? f(type, std::true_type()) : f(type, std::false_type()); });
}

const char* too_long = "a row has more than 2^30 logits";
const char* too_many = "more rows than a grid has blocks";

// logits: rows of V, `stride` apart; targets of 4 or 8 bytes. scratch: null, or, for long rows, what parts_kernel says.
const char* token_logprobs(uintptr_t logits, int dtype, uintptr_t targets, bool wide_targets, uintptr_t logprobs,
                           uintptr_t entropy, uintptr_t scratch, int64_t N, int64_t V, int64_t stride,
                           float temperature, float softcap, uintptr_t stream) {
  if (N == 0) return nullptr;
  if (V > 1 << 30) return too_long;
  const Logits x{ptr<const void>(logits),      N, stride, static_cast<int>(V), ptr<const void>(targets), wide_targets,
                 scaling(temperature, softcap)};
  return with_type_and_cap(dtype, x, [&](auto type, auto cap) {
    using T = decltype(type);
    constexpr bool CAP = decltype(cap)::value;
    const int words = words_of<T>(x.V), parts = (words + part - 1) / part;
    const unsigned blocks = blocks_for(N, words <= small ? block_threads / lanes : 1);
    if (!scratch) {
      if (!blocks) return too_many;
      return launch(token_logprobs_kernel<T, CAP>, blocks, block_threads, 0, stream, x, ptr<float>(logprobs),
                    ptr<float>(entropy));
    }
    if (!blocks_for(N * parts, 1)) return too_many;
    const char* error =
        launch(parts_kernel<T, CAP>, blocks_for(N * parts, 1), block_threads, 0, stream, x, parts, ptr<float>(scratch));
    if (error) return error;
    return launch(join_kernel<T, CAP>, blocks_for(N, 1), block_threads, 0, stream, x, parts, ptr<const float>(scratch),
                  ptr<float>(logprobs), ptr<float>(entropy));
  });
}

template <int THREADS, class T, bool CAP>
const char* launch_backward(const float* grad_logprobs, const float* grad_entropy, const Logits& x, T* out,
                            uintptr_t stream) {
  const int words = words_of<T>(x.V);
  const bool by_warp = words <= small;
  const unsigned blocks = blocks_for(x.N, by_warp ? THREADS / lanes : 1);
  if (!blocks) return too_many;
  const int room = static_cast<int>((shared_memory_limit() - 1024) / 16), kept = by_warp ? 0 : min(words, room);
  return launch(token_logprobs_backward_kernel<T, CAP, THREADS>, blocks, THREADS, kept * size_t(16), stream,
                grad_logprobs, grad_entropy, x, out, kept);
}

// Threads by the length of a row: 4 rows of 55 KiB, 2 of 112 or 1 lie in an H100's shared memory, with 1024 threads.
const char* token_logprobs_backward(uintptr_t grad_logprobs, uintptr_t grad_entropy, uintptr_t logits, int dtype,
                                    uintptr_t targets, bool wide_targets, uintptr_t out, int64_t N, int64_t V,
                                    int64_t stride, float temperature, float softcap, uintptr_t stream) {
  if (N == 0) return nullptr;
  if (V > 1 << 30) return too_long;
  const Logits x{ptr<const void>(logits),      N, stride, static_cast<int>(V), ptr<const void>(targets), wide_targets,
                 scaling(temperature, softcap)};
  return with_type_and_cap(dtype, x, [&](auto type, auto cap) {
    using T = decltype(type);
    constexpr bool CAP = decltype(cap)::value;
    const float *gp = ptr<const float>(grad_logprobs), *gh = ptr<const float>(grad_entropy);
    const int words = words_of<T>(x.V);
    if (words <= 55 << 6) return launch_backward<256, T, CAP>(gp, gh, x, ptr<T>(out), stream);
    if (words <= 112 << 6) return launch_backward<512, T, CAP>(gp, gh, x, ptr<T>(out), stream);
    return launch_backward<1024, T, CAP>(gp, gh, x, ptr<T>(out), stream);
  });
}

KERNEL(token_logprobs)
KERNEL(token_logprobs_backward)

}  // namespace
