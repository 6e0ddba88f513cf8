// Runs CUDA kernels on the CPU, for tests: one block at a time, one fiber per thread, warps of 32. cuda_intrinsics.h
// has the functions that kernels call.
//
//     run()          for each block: run_block()
//     run_block()    resumes the fibers in turn, until each has ended or waits at a barrier
//     a fiber        the kernel's body as one thread; it yields to run_block() at a barrier or an exchange of its warp
//
// The order of the threads changes with every block (SIMT_SEED), and shared memory starts as NaN, so a missing barrier
// shows in the results. If some threads never reach a barrier or an exchange, or reach it at another place of the
// source, the launch returns an error that names the places; it does not hang. Exchanges of a warp are checked against
// their mask. Blocks run one after the other, so memory that one block writes and another reads in the same launch
// cannot be tested here.
#pragma once
#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ static thread_local  // a module's thread-local memory is one segment: poison_static_memory finds it
#define __constant__ static const
#define __grid_constant__
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;
using std::max;
using std::min;

namespace simt {

// Where the source calls a barrier or an exchange, and which.
struct Location {
  const char* file;
  int line;
  const char* function;
};

struct Barrier {
  int num_arrived = 0;
  int64_t phase = 0;    // how often all threads have arrived
  Location location{};  // where the threads of this phase wait
};

struct Fiber {
  ucontext_t entry;
  jmp_buf resume_point;
  char* stack = nullptr;
  dim3 thread_index;
  bool started = false, done = false;
  const Barrier* barrier = nullptr;  // that it waits at
  int64_t phase = 0;                 // of that barrier when it arrived
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

constexpr size_t stack_bytes = 256 << 10;
constexpr size_t exchange_bytes = 16;

struct State {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warp_barriers;
  Barrier block_barrier;
  jmp_buf scheduler;
  int current = 0;  // the running fiber
  std::vector<char> shared;
  std::vector<char> stacks;
  std::vector<unsigned char> slots;  // two per thread: successive exchanges of a warp alternate
  std::vector<unsigned char> votes;  // two per thread
  const std::function<void()>* body = nullptr;
  std::string error;
  uint64_t random = 0x9e3779b97f4a7c15ull;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
#endif
};
inline State state;

inline int num_threads() { return static_cast<int>(state.fibers.size()); }
inline int lane() { return state.current % 32; }
inline int warp_begin() { return state.current / 32 * 32; }
inline int warp_end() { return std::min(warp_begin() + 32, num_threads()); }
inline Barrier& warp_barrier() { return state.warp_barriers[state.current / 32]; }

// Number of threads from `begin` to `end` that have not ended.
inline int num_running(int begin, int end) {
  int n = 0;
  for (int i = begin; i < end; ++i) n += !state.fibers[i].done;
  return n;
}

// Yields to the scheduler. `ended`: the fiber is never resumed.
inline void yield_to_scheduler(bool ended = false) {
  Fiber& fiber = state.fibers[state.current];
  if (!ended && _setjmp(fiber.resume_point)) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &state.stack_bottom, &state.stack_size);
#endif
    return;
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ended ? nullptr : &fiber.fake_stack, state.stack_bottom, state.stack_size);
#endif
  _longjmp(state.scheduler, 1);
}

// Ends the launch with an error, unless there is one already.
inline void fail(const Location& location, const std::string& message) {
  if (state.error.empty()) {
    const dim3& thread = state.fibers[state.current].thread_index;
    char text[640];
    std::snprintf(text, sizeof text, "%s:%d: %s in thread (%u, %u, %u) of block (%u, %u, %u): %s", location.file,
                  location.line, location.function, thread.x, thread.y, thread.z, blockIdx.x, blockIdx.y, blockIdx.z,
                  message.c_str());
    state.error = text;
  }
  yield_to_scheduler();
}

inline std::string file_and_line(const Location& location) {
  return std::string(location.file) + ":" + std::to_string(location.line);
}

// Starts the next phase if all `num_expected` threads have arrived.
inline void release(Barrier& barrier, int num_expected) {
  if (barrier.num_arrived == 0 || barrier.num_arrived < num_expected) return;
  barrier.num_arrived = 0;
  ++barrier.phase;
}

// Waits until `num_expected` threads have arrived, all of them at one place of the source.
inline void wait(Barrier& barrier, const Location& location, int num_expected) {
  if (barrier.num_arrived == 0)
    barrier.location = location;
  else if (barrier.location.line != location.line || std::strcmp(barrier.location.file, location.file) != 0)
    fail(location, "other threads wait at " + file_and_line(barrier.location) + ", for the same barrier");
  Fiber& fiber = state.fibers[state.current];
  fiber.barrier = &barrier;
  fiber.phase = barrier.phase;
  ++barrier.num_arrived;
  release(barrier, num_expected);
  while (barrier.phase == fiber.phase) yield_to_scheduler();
  fiber.barrier = nullptr;
}

inline void block_wait(const Location& location) { wait(state.block_barrier, location, num_running(0, num_threads())); }

// __syncthreads_count: the number of threads with a true `vote`.
inline int block_count(const Location& location, bool vote) {
  const int64_t parity = state.block_barrier.phase & 1;
  state.votes[2 * state.current + parity] = vote;
  block_wait(location);
  int n = 0;
  for (int i = 0; i < num_threads(); ++i) n += state.votes[2 * i + parity] == 1;
  state.votes[2 * state.current + 1 - parity] = 0;
  return n;
}

inline void check_mask(unsigned mask, const Location& location) {
  if (!(mask >> lane() & 1)) fail(location, "the thread is not in its own mask");
  // A mask may have lanes that the block does not have: kernels write a full mask.
  for (int thread = warp_begin(); thread < warp_end(); ++thread)
    if ((mask >> (thread - warp_begin()) & 1) && state.fibers[thread].done)
      fail(location, "the mask names a thread that has ended");
}

inline void warp_wait(unsigned mask, const Location& location) {
  check_mask(mask, location);
  const int num_lanes = warp_end() - warp_begin();
  const unsigned all_lanes = num_lanes == 32 ? ~0u : (1u << num_lanes) - 1;
  if ((mask & all_lanes) != all_lanes) fail(location, "only whole warps exchange here");
  wait(warp_barrier(), location, num_running(warp_begin(), warp_end()));
}

inline unsigned char* slot_of(int thread, int64_t parity) {
  return &state.slots[(2 * thread + parity) * exchange_bytes];
}

// Every lane of a warp gives a value and gets that of lane `source`, or its own if there is no such lane.
template <class T>
T exchange(unsigned mask, T value, int source, const Location& location) {
  static_assert(sizeof(T) <= exchange_bytes && std::is_trivially_copyable<T>::value, "at most 16 plain bytes");
  const int64_t parity = warp_barrier().phase & 1;
  std::memcpy(slot_of(state.current, parity), &value, sizeof(T));
  const int begin = warp_begin(), end = warp_end();
  warp_wait(mask, location);
  T out = value;
  if (source >= 0 && source < 32 && begin + source < end) std::memcpy(&out, slot_of(begin + source, parity), sizeof(T));
  return out;
}

// xorshift64 (Marsaglia 2003)
inline uint64_t next_random() {
  uint64_t& x = state.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x;
}

// What a fiber runs.
inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &state.stack_bottom, &state.stack_size);
#endif
  (*state.body)();
  state.fibers[state.current].done = true;
  release(state.block_barrier, num_running(0, num_threads()));  // as on a GPU, an ended thread counts as arrived
  release(warp_barrier(), num_running(warp_begin(), warp_end()));
  yield_to_scheduler(true);
}

inline void resume(int index) {
  Fiber& fiber = state.fibers[index];
  state.current = index;
  threadIdx = fiber.thread_index;
  if (_setjmp(state.scheduler)) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(state.fake_stack, nullptr, nullptr);
#endif
    return;
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&state.fake_stack, fiber.stack, stack_bytes);
#endif
  if (fiber.started) _longjmp(fiber.resume_point, 1);
  fiber.started = true;
  setcontext(&fiber.entry);
}

inline thread_local char segment_probe;  // an address within the thread-local segment

// Fills static shared memory with NaN: the linker puts all of a module's thread-local memory into one segment.
inline void poison_static_memory() {
  static char *begin = nullptr, *end = nullptr;
  segment_probe = 0;  // the first access allocates the segment
  if (!begin) {
    dl_iterate_phdr(
        [](dl_phdr_info* module, size_t, void*) {
          for (int i = 0; i < module->dlpi_phnum; ++i) {
            char* const start = static_cast<char*>(module->dlpi_tls_data);
            const size_t size = module->dlpi_phdr[i].p_memsz;
            if (module->dlpi_phdr[i].p_type != PT_TLS || !start) continue;
            if (&segment_probe < start || &segment_probe >= start + size) continue;
            begin = start;
            end = start + size;
          }
          return 0;
        },
        nullptr);
  }
  std::memset(begin, 0xff, end - begin);
}

inline void start_fibers(int n) {
  for (int i = 0; i < n; ++i) {
    Fiber& fiber = state.fibers[i];
    fiber.started = false;
    fiber.done = false;
    fiber.barrier = nullptr;
    fiber.thread_index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
    fiber.stack = &state.stacks[i * stack_bytes];
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack;
    fiber.entry.uc_stack.ss_size = stack_bytes;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, run_thread, 0);
  }
}

// A random rotation of the threads, forwards or backwards.
inline std::vector<int> thread_order(int n) {
  std::vector<int> order(n);
  for (int i = 0; i < n; ++i) order[i] = i;
  if (next_random() & 1) std::reverse(order.begin(), order.end());
  std::rotate(order.begin(), order.begin() + next_random() % n, order.end());
  return order;
}

// Returns false if there is an error.
inline bool run_block(int n) {
  state.block_barrier = {};
  state.warp_barriers.assign((n + 31) / 32, {});
  std::fill(state.shared.begin(), state.shared.end(), char(0xff));  // NaN, or -1
  poison_static_memory();
  start_fibers(n);
  const std::vector<int> order = thread_order(n);
  for (bool progress = true; progress;) {
    progress = false;
    for (int i : order) {
      const Fiber& fiber = state.fibers[i];
      if (fiber.done || (fiber.barrier && fiber.barrier->phase == fiber.phase)) continue;
      progress = true;
      resume(i);
      if (!state.error.empty()) return false;
    }
  }
  for (const Fiber& fiber : state.fibers) {
    if (fiber.done) continue;
    const Location location = fiber.barrier->location;
    char text[256];
    std::snprintf(text, sizeof text, "%s:%d: %s: %d threads of block (%u, %u, %u) wait, the others never reach it",
                  location.file, location.line, location.function, num_running(0, n), blockIdx.x, blockIdx.y,
                  blockIdx.z);
    state.error = text;
    return false;
  }
  return true;
}

// Runs a kernel. Returns nullptr, or an error message.
inline const char* run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const int n = static_cast<int>(block.x * block.y * block.z);
  state.error.clear();
  if (n < 1 || n > 1024) return "simt: a block has 1 to 1024 threads";
  // Of an H100's 227 KiB, 1 KiB may be the driver's, and 1 KiB is left for static memory.
  if (shared_bytes > (225u << 10)) return "simt: more shared memory than a block can have";
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) return "simt: invalid grid";
  if (const char* seed = std::getenv("SIMT_SEED")) state.random ^= std::strtoull(seed, nullptr, 10) * 2654435769u;
  gridDim = grid;
  blockDim = block;
  state.body = &body;
  state.shared.assign(shared_bytes, 0);
  state.shared.shrink_to_fit();  // AddressSanitizer then sees its end
  state.fibers.resize(n);
  state.votes.assign(2 * size_t(n), 0);
  state.slots.assign(size_t(n) * 2 * exchange_bytes, 0xff);
  if (state.stacks.size() < n * stack_bytes) state.stacks.resize(n * stack_bytes);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        if (!run_block(n)) return state.error.c_str();
      }
  return nullptr;
}

}  // namespace simt

#include "cuda_intrinsics.h"
