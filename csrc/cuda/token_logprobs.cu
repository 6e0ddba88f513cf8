// Log-probabilities and entropies of given logits, and their gradient, on NVIDIA GPUs; kernels/token_logprobs.py
// defines them, softmax.cuh sums a row.
//
// Floor: forward one load of the logits, backward one load and one store.
//
//     a row of         forward                                         backward
//     up to 256 vecs   a warp                                          a warp
//     more             a block of 256 threads                          a block of 256, 512 or 1024 threads
//     more, few rows   a block per 2048 vectors writes its threads'    the same
//                      states; a second launch merges them
//
// The backward kernel keeps a row's vectors in shared memory while it sums them, and reads them there to compute the
// gradient. What does not fit (above 227 KiB on an H100) is loaded again, from the end, which may still be in the L2
// cache.
//
// Deterministic: which logits a thread adds, and in which order, depends on V and the dtype alone, not on the row's
// address nor on the other rows. Long rows are summed in parts of 2048 vectors even by one block, so that both forward
// paths have the same bits.
#include "softmax.cuh"

namespace {

constexpr int64_t ignore_index = -100;
constexpr int block_threads = 256, unroll = 4;
constexpr int part_vecs = 2 * unroll * block_threads;
constexpr int max_warp_vecs = 2 * unroll * warp_size;  // a longer row takes a block

struct LogitsJob {
  const void* logits;
  int64_t N, stride;
  int V;
  const void* targets;
  bool targets_int64;  // else int32
  Scaling scaling;

  __device__ int64_t target(int64_t row) const {
    return targets_int64 ? static_cast<const int64_t*>(targets)[row] : static_cast<const int32_t*>(targets)[row];
  }
  // The column of a target, or -1 if it is outside the row.
  __device__ int column(int64_t target) const { return target >= 0 && target < V ? static_cast<int>(target) : -1; }
  template <class T>
  __device__ const T* row(int64_t index) const {
    return static_cast<const T*>(logits) + index * stride;
  }
};

template <class T>
__host__ __device__ int vecs_of(int V) {
  return (V + vec_size<T> - 1) / vec_size<T>;
}

// The row of this thread, and its place among the threads that share the row.
struct RowThread {
  bool by_warp;
  int64_t row;
  int thread, num_threads;

  __device__ RowThread(int num_vecs, int threads_of_block) : by_warp(num_vecs <= max_warp_vecs) {
    const int warps_of_block = threads_of_block / warp_size;
    row = by_warp ? int64_t(blockIdx.x) * warps_of_block + threadIdx.x / warp_size : blockIdx.x;
    thread = by_warp ? threadIdx.x % warp_size : threadIdx.x;
    num_threads = by_warp ? warp_size : threads_of_block;
  }
  template <bool SOFTCAP>
  __device__ __forceinline__ SoftmaxState merge_threads(const SoftmaxState& state, const Scaling& scaling,
                                                        float* shared) const {
    return by_warp ? warp_merge<SOFTCAP>(state, scaling) : block_merge<SOFTCAP>(state, scaling, shared);
  }
};

// The logit of the target. A target outside the row, column -1, gives NaN and loads nothing.
template <class T>
__device__ __forceinline__ float target_logit(const T* row, int column) {
  return column < 0 ? NAN : to_float(row[column]);
}

template <bool SOFTCAP>
__device__ __forceinline__ void write_row(const SoftmaxState& others, float target_logit, const Scaling& scaling,
                                          float* logprob, float* entropy) {
  const Softmax row = softmax_of<SOFTCAP>(others, target_logit, scaling);
  *logprob = row.logprob;
  *entropy = row.entropy;
}

__device__ __forceinline__ void write_ignored(float* logprob, float* entropy) {
  *logprob = 0.f;
  *entropy = 0.f;
}

template <class T, bool SOFTCAP>
__global__ void __launch_bounds__(block_threads, SOFTCAP ? 3 : 4)
    token_logprobs_kernel(const LogitsJob job, float* logprobs, float* entropy) {
  __shared__ float shared[3 * warp_size];
  const int num_vecs = vecs_of<T>(job.V);
  const RowThread at(num_vecs, block_threads);
  if (at.row >= job.N) return;
  const int64_t target = job.target(at.row);
  if (target == ignore_index) {
    if (at.thread == 0) write_ignored(logprobs + at.row, entropy + at.row);
    return;
  }
  const int column = job.column(target);
  const UnalignedRow<T> row(job.row<T>(at.row), 0, job.V);
  SoftmaxState state = empty_state();
  for (int first = 0; first < num_vecs; first += part_vecs) {
    const int last = min(first + part_vecs, num_vecs);
    const SoftmaxState part =
        row_state<unroll, SOFTCAP>(row, first, last, at.thread, at.num_threads, column, job.scaling);
    state = merge<SOFTCAP>(state, part, job.scaling);
  }
  state = at.merge_threads<SOFTCAP>(state, job.scaling, shared);
  if (at.thread == 0)
    write_row<SOFTCAP>(state, target_logit(row.base, column), job.scaling, logprobs + at.row, entropy + at.row);
}

// One block per part of a row. scratch: (N, num_parts, 3, block_threads), the threads' states.
template <class T, bool SOFTCAP>
__global__ void __launch_bounds__(block_threads, SOFTCAP ? 3 : 4)
    parts_kernel(const LogitsJob job, int num_parts, float* scratch) {
  const int64_t row_index = blockIdx.x / num_parts;
  const int64_t target = job.target(row_index);
  if (target == ignore_index) return;
  const int first = int(blockIdx.x % num_parts) * part_vecs, last = min(first + part_vecs, vecs_of<T>(job.V));
  const UnalignedRow<T> row(job.row<T>(row_index), 0, job.V);
  const SoftmaxState state =
      row_state<unroll, SOFTCAP>(row, first, last, threadIdx.x, block_threads, job.column(target), job.scaling);
  scratch += int64_t(blockIdx.x) * 3 * block_threads + threadIdx.x;
  scratch[0] = state.max;
  scratch[block_threads] = state.sum;
  scratch[2 * block_threads] = state.moment;
}

// One block per row merges its parts, as the block of `token_logprobs_kernel` does.
template <class T, bool SOFTCAP>
__global__ void __launch_bounds__(block_threads)
    merge_kernel(const LogitsJob job, int num_parts, const float* scratch, float* logprobs, float* entropy) {
  __shared__ float shared[3 * warp_size];
  const int64_t row = blockIdx.x, target = job.target(row);
  if (target == ignore_index) {
    if (threadIdx.x == 0) write_ignored(logprobs + row, entropy + row);
    return;
  }
  const float logit = target_logit(job.row<T>(row), job.column(target));
  scratch += row * num_parts * 3 * block_threads + threadIdx.x;
  SoftmaxState state = empty_state();
#pragma unroll 4
  for (int i = 0; i < num_parts; ++i, scratch += 3 * block_threads) {
    const float max = scratch[0], sum = scratch[block_threads], moment = scratch[2 * block_threads];
    state = merge<SOFTCAP>(state, {max, origin_of<SOFTCAP>(max, job.scaling), sum, moment}, job.scaling);
  }
  state = block_merge<SOFTCAP>(state, job.scaling, shared);
  if (threadIdx.x == 0) write_row<SOFTCAP>(state, logit, job.scaling, logprobs + row, entropy + row);
}

// Vectors of a row of gradients are counted from this many numbers before it: then stores are aligned.
template <class T>
__device__ __forceinline__ int numbers_before(const T* out) {
  return static_cast<int>((reinterpret_cast<uintptr_t>(out) & 15) / sizeof(T));
}

// Writes the gradient of one row, in aligned vectors of `out`; `target` -1: none. Goes from the last vector to the
// first, as the last were loaded last. `saved` has the first `num_saved` vectors of the logits; it is used if the
// logits are aligned like `out`.
template <class T, bool SOFTCAP>
__device__ __forceinline__ void write_gradient(const T* logits, T* out, int V, int target, const LogitGrad& grad,
                                               const Scaling& scaling, int thread, int num_threads, const uint4* saved,
                                               int num_saved) {
  constexpr int size = vec_size<T>;
  const int offset = numbers_before(out);
  const UnalignedRow<T> row(logits, offset, V);
  num_saved = row.shift ? 0 : min(num_saved, UnalignedRow<T>(logits, 0, V).full_end);
  out -= offset;
  const int target_column = target < 0 ? -1 : target + offset;
  const auto vec_grad = [&](int k, const uint4& vec, float (&y)[size]) {
    unpack<T>(vec, y);
#pragma unroll
    for (int i = 0; i < size; ++i) y[i] = logit_grad<SOFTCAP>(y[i], grad, scaling);
    if (target_column < k * size || target_column >= (k + 1) * size) return;
#pragma unroll
    for (int i = 0; i < size; ++i)
      if (target_column - k * size == i) y[i] = grad.target;
  };
  for (int k = row.num_vecs() - 1 - thread; k >= 0; k -= num_threads) {
    float y[size];
    if (row.is_full(k)) {
      vec_grad(k, k < num_saved ? saved[k] : row.load_full(k), y);
      // A streaming store: these lines may leave the L2 cache first, as the logits are loaded again.
      __stcs(reinterpret_cast<uint4*>(out) + k, pack<T>(y));
    } else {
      vec_grad(k, row.load_edge(k), y);
#pragma unroll
      for (int i = 0; i < size; ++i)
        if (k * size + i >= row.begin && k * size + i < row.end) from_float(y[i], out[k * size + i]);
    }
  }
}

template <class T>
__device__ __forceinline__ void write_zeros(T* out, int V, int thread, int num_threads) {
  constexpr int size = vec_size<T>;
  const UnalignedRow<T> row(out, numbers_before(out), V);
  T* const base = out - row.begin;
  for (int k = thread; k < row.num_vecs(); k += num_threads) {
    if (row.is_full(k)) {
      reinterpret_cast<uint4*>(base)[k] = make_uint4(0, 0, 0, 0);
    } else {
      for (int i = max(k * size, row.begin); i < min((k + 1) * size, row.end); ++i) from_float(0.f, base[i]);
    }
  }
}

constexpr size_t max_static_bytes = 1024;  // of token_logprobs_backward_kernel

template <class T, bool SOFTCAP, int THREADS>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS)
    token_logprobs_backward_kernel(const float* grad_logprobs, const float* grad_entropy, const LogitsJob job, T* out,
                                   int num_saved) {
  __shared__ float shared[3 * warp_size];
  static_assert(sizeof(shared) <= max_static_bytes, "launch_backward leaves less");
  const int num_vecs = vecs_of<T>(job.V);
  const RowThread at(num_vecs, THREADS);
  if (at.row >= job.N) return;
  T* const out_row = out + at.row * job.V;
  const int64_t given_target = job.target(at.row);
  if (given_target == ignore_index) return write_zeros(out_row, job.V, at.thread, at.num_threads);
  const int column = job.column(given_target);
  uint4* const saved = shared_memory<uint4>();
  const T* const logits = job.row<T>(at.row);
  const UnalignedRow<T> row(logits, 0, job.V);
  constexpr int U =
      SOFTCAP && sizeof(T) == 2 ? 2 : unroll;  // 4 vectors of z and their softcap spill registers on sm_80
  SoftmaxState state =
      row_state<U, SOFTCAP>(row, 0, num_vecs, at.thread, at.num_threads, column, job.scaling, saved, num_saved);
  state = at.merge_threads<SOFTCAP>(state, job.scaling, shared);
  const Softmax softmax = softmax_of<SOFTCAP>(state, target_logit(logits, column), job.scaling);
  const LogitGrad grad = logit_grad_of(softmax, grad_logprobs[at.row], grad_entropy[at.row], job.scaling);
  write_gradient<T, SOFTCAP>(logits, out_row, job.V, column, grad, job.scaling, at.thread, at.num_threads, saved,
                             num_saved);
}

template <bool VALUE>
struct Constant {
  static constexpr bool value = VALUE;
};

// Calls f with a number of the dtype, and with Constant<true> if there is a softcap.
template <class F>
const char* dispatch_dtype_and_softcap(int dtype, const LogitsJob& job, F f) {
  return dispatch_dtype(dtype, [&](auto number) {
    return job.scaling.softcap > 0.f ? f(number, Constant<true>()) : f(number, Constant<false>());
  });
}

LogitsJob make_job(uintptr_t logits, uintptr_t targets, bool targets_int64, int64_t N, int64_t V, int64_t stride,
                   double temperature, float softcap) {
  LogitsJob job;
  job.logits = ptr<const void>(logits);
  job.N = N;
  job.stride = stride;
  job.V = static_cast<int>(V);
  job.targets = ptr<const void>(targets);
  job.targets_int64 = targets_int64;
  job.scaling = make_scaling(temperature, softcap);
  return job;
}

const char* row_too_long = "a row has more than 2^30 logits";
const char* too_many_rows = "more rows than a grid has blocks";

// logits: rows of V numbers, `stride` apart. targets: int64 or int32. scratch: null, or what `parts_kernel` writes if
// few long rows are to fill the GPU.
const char* token_logprobs(uintptr_t logits, int dtype, uintptr_t targets, bool targets_int64, uintptr_t logprobs,
                           uintptr_t entropy, uintptr_t scratch, int64_t N, int64_t V, int64_t stride,
                           double temperature, float softcap, uintptr_t stream) {
  if (N == 0) return nullptr;
  if (V > 1 << 30) return row_too_long;
  const LogitsJob job = make_job(logits, targets, targets_int64, N, V, stride, temperature, softcap);
  return dispatch_dtype_and_softcap(dtype, job, [&](auto number, auto softcap_on) {
    using T = decltype(number);
    constexpr bool SOFTCAP = decltype(softcap_on)::value;
    float *const logprobs_out = ptr<float>(logprobs), *const entropy_out = ptr<float>(entropy);
    const int num_vecs = vecs_of<T>(job.V), num_parts = (num_vecs + part_vecs - 1) / part_vecs;
    const unsigned blocks = blocks_for(N, num_vecs <= max_warp_vecs ? block_threads / warp_size : 1);
    if (!scratch) {
      if (!blocks) return too_many_rows;
      return launch(token_logprobs_kernel<T, SOFTCAP>, blocks, block_threads, 0, stream, job, logprobs_out,
                    entropy_out);
    }
    const unsigned part_blocks = blocks_for(N * num_parts, 1);
    if (!part_blocks) return too_many_rows;
    float* const states = ptr<float>(scratch);
    const char* error = launch(parts_kernel<T, SOFTCAP>, part_blocks, block_threads, 0, stream, job, num_parts, states);
    if (error) return error;
    return launch(merge_kernel<T, SOFTCAP>, blocks_for(N, 1), block_threads, 0, stream, job, num_parts, states,
                  logprobs_out, entropy_out);
  });
}

template <int THREADS, class T, bool SOFTCAP>
const char* launch_backward(const float* grad_logprobs, const float* grad_entropy, const LogitsJob& job, T* out,
                            uintptr_t stream) {
  const int num_vecs = vecs_of<T>(job.V);
  const bool by_warp = num_vecs <= max_warp_vecs;
  const unsigned blocks = blocks_for(job.N, by_warp ? THREADS / warp_size : 1);
  if (!blocks) return too_many_rows;
  const int max_saved = static_cast<int>((shared_memory_limit() - driver_shared_bytes - max_static_bytes) / 16);
  const int num_saved = by_warp ? 0 : min(num_vecs, max_saved);
  return launch(token_logprobs_backward_kernel<T, SOFTCAP, THREADS>, blocks, THREADS, num_saved * size_t(16), stream,
                grad_logprobs, grad_entropy, job, out, num_saved);
}

// An H100's shared memory holds 4 rows of up to 55 KiB, 2 of up to 112 KiB, or 1: threads per block are chosen for 1024
// threads per SM in each case.
const char* token_logprobs_backward(uintptr_t grad_logprobs, uintptr_t grad_entropy, uintptr_t logits, int dtype,
                                    uintptr_t targets, bool targets_int64, uintptr_t out, int64_t N, int64_t V,
                                    int64_t stride, double temperature, float softcap, uintptr_t stream) {
  if (N == 0) return nullptr;
  if (V > 1 << 30) return row_too_long;
  const LogitsJob job = make_job(logits, targets, targets_int64, N, V, stride, temperature, softcap);
  return dispatch_dtype_and_softcap(dtype, job, [&](auto number, auto softcap_on) {
    using T = decltype(number);
    constexpr bool SOFTCAP = decltype(softcap_on)::value;
    constexpr int vecs_per_KiB = 64;
    const float *const logprob_grads = ptr<const float>(grad_logprobs), *const entropy_grads =
                                                                            ptr<const float>(grad_entropy);
    const int num_vecs = vecs_of<T>(job.V);
    if (num_vecs <= 55 * vecs_per_KiB)
      return launch_backward<256, T, SOFTCAP>(logprob_grads, entropy_grads, job, ptr<T>(out), stream);
    if (num_vecs <= 112 * vecs_per_KiB)
      return launch_backward<512, T, SOFTCAP>(logprob_grads, entropy_grads, job, ptr<T>(out), stream);
    return launch_backward<1024, T, SOFTCAP>(logprob_grads, entropy_grads, job, ptr<T>(out), stream);
  });
}

CONSTANT(ignore_index, ignore_index)
CONSTANT(token_logprobs_part_bytes, part_vecs * sizeof(uint4))
CONSTANT(token_logprobs_state_floats, 3 * block_threads)
KERNEL(token_logprobs)
KERNEL(token_logprobs_backward)

}  // namespace
