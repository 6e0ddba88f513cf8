// Runs CUDA kernels on the CPU, for tests: one block at a time, one fiber a thread, warps of 32.
//
// Threads run until they wait, in an order that changes with every block (SIMT_SEED), so that a barrier that is missing
// shows: memory shared by a block starts as NaN. A barrier or an exchange that some threads never reach, or reach at
// another place of the source, is an error that names the places, not a wait. What a warp exchanges is checked against
// its mask. Blocks run one after the other: what one block may only read after another has ended cannot be tested here.
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
#define __shared__ static thread_local  // thread-local memory of a module lies together: `poison` finds it
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

struct Place {
  const char* file;
  int line;
  const char* what;
};

struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
  Place place{};
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  char* stack = nullptr;
  dim3 id;
  bool begun = false, done = false;
  const Barrier* waits_for = nullptr;
  int64_t generation = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
#endif
};

constexpr size_t stack_bytes = 256 << 10;
constexpr size_t exchange_bytes = 16;

struct State {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier block;
  jmp_buf scheduler;
  int current = 0;
  std::vector<char> shared;
  std::vector<char> stacks;
  std::vector<unsigned char> slots;  // two a thread: a warp's exchanges alternate
  std::vector<unsigned char> votes;
  const std::function<void()>* body = nullptr;
  std::string error;
  uint64_t random = 0x9e3779b97f4a7c15ull;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
#endif
};
inline State state;

inline int threads() { return static_cast<int>(state.fibers.size()); }
inline int lane() { return state.current % 32; }
inline int warp_begin() { return state.current / 32 * 32; }
inline int warp_end() { return std::min(warp_begin() + 32, threads()); }

inline int alive(int begin, int end) {
  int n = 0;
  for (int i = begin; i < end; ++i) n += !state.fibers[i].done;
  return n;
}

// Back to the scheduler. A fiber that is done, or has an error, does not come back.
inline void leave(bool for_good = false) {
  Fiber& me = state.fibers[state.current];
  if (!for_good && _setjmp(me.resume)) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(me.fake, &state.bottom, &state.size);
#endif
    return;
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &me.fake, state.bottom, state.size);
#endif
  _longjmp(state.scheduler, 1);
}

inline void fail(const Place& at, const std::string& what) {
  if (state.error.empty()) {
    const dim3& t = state.fibers[state.current].id;
    char text[640];
    std::snprintf(text, sizeof text, "%s:%d: %s in thread (%u, %u, %u) of block (%u, %u, %u): %s", at.file, at.line,
                  at.what, t.x, t.y, t.z, blockIdx.x, blockIdx.y, blockIdx.z, what.c_str());
    state.error = text;
  }
  leave();
}

inline std::string where(const Place& at) { return std::string(at.file) + ":" + std::to_string(at.line); }

// Lets the waiting go on once all that are left have arrived.
inline void release(Barrier& barrier, int expected) {
  if (barrier.arrived && barrier.arrived >= expected) barrier.arrived = 0, ++barrier.generation;
}

// Waits until `expected` threads have arrived, all of them at one place.
inline void wait(Barrier& barrier, const Place& at, int expected) {
  if (barrier.arrived == 0)
    barrier.place = at;
  else if (barrier.place.line != at.line || std::strcmp(barrier.place.file, at.file) != 0)
    fail(at, "other threads wait at " + where(barrier.place) + ", for the same barrier");
  Fiber& me = state.fibers[state.current];
  me.waits_for = &barrier, me.generation = barrier.generation;
  ++barrier.arrived;
  release(barrier, expected);
  while (barrier.generation == me.generation) leave();
  me.waits_for = nullptr;
}

inline void block_wait(const Place& at) { wait(state.block, at, alive(0, threads())); }

// __syncthreads_count: how many threads are for it.
inline int block_count(const Place& at, bool vote) {
  const int64_t half = state.block.generation & 1;
  state.votes[2 * state.current + half] = vote;
  block_wait(at);
  int n = 0;
  for (int i = 0; i < threads(); ++i) n += state.votes[2 * i + half] == 1;
  state.votes[2 * state.current + 1 - half] = 0;
  return n;
}

inline void check_mask(unsigned mask, const Place& at) {
  if (!(mask >> lane() & 1)) fail(at, "the thread is not in its own mask");
  for (int l = 0; l < 32; ++l) {
    const int thread = warp_begin() + l;
    const bool here = thread < warp_end() && !state.fibers[thread].done;
    // Lanes that a block does not have may be named: a full mask is how kernels write "all of us".
    if ((mask >> l & 1) && !here && thread < warp_end()) fail(at, "the mask names a thread that has ended");
  }
}

inline void warp_wait(unsigned mask, const Place& at) {
  check_mask(mask, at);
  const unsigned whole = warp_end() - warp_begin() == 32 ? ~0u : (1u << (warp_end() - warp_begin())) - 1;
  if ((mask & whole) != whole) fail(at, "only whole warps exchange here");
  wait(state.warps[state.current / 32], at, alive(warp_begin(), warp_end()));
}

// All of a warp give a value; each takes that of lane `from`, its own where there is none.
template <class T>
T exchange(unsigned mask, T value, int from, const Place& at) {
  static_assert(sizeof(T) <= exchange_bytes && std::is_trivially_copyable<T>::value, "at most 16 plain bytes");
  const size_t half = state.warps[state.current / 32].generation & 1;
  auto slot = [half](int thread) { return &state.slots[(2 * thread + half) * exchange_bytes]; };
  std::memcpy(slot(state.current), &value, sizeof(T));
  const int begin = warp_begin(), end = warp_end();
  warp_wait(mask, at);
  T out = value;
  if (from >= 0 && from < 32 && begin + from < end) std::memcpy(&out, slot(begin + from), sizeof(T));
  return out;
}

inline uint64_t next_random() {
  uint64_t& x = state.random;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return x;
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &state.bottom, &state.size);
#endif
  (*state.body)();
  state.fibers[state.current].done = true;
  release(state.block, alive(0, threads()));  // threads that have ended count as arrived, as on a GPU
  release(state.warps[state.current / 32], alive(warp_begin(), warp_end()));
  leave(true);
}

inline void resume(int index) {
  Fiber& fiber = state.fibers[index];
  state.current = index, threadIdx = fiber.id;
  if (_setjmp(state.scheduler)) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(state.fake, nullptr, nullptr);
#endif
    return;
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&state.fake, fiber.stack, stack_bytes);
#endif
  if (fiber.begun) _longjmp(fiber.resume, 1);
  fiber.begun = true;
  setcontext(&fiber.start);
}

inline thread_local char landmark;

// Static shared memory becomes NaN. The linker puts all of a module's thread-local memory into one segment.
inline void poison_static_memory() {
  static char *begin = nullptr, *end = nullptr;
  landmark = 0;  // now the segment has memory
  if (!begin) {
    dl_iterate_phdr(
        [](dl_phdr_info* module, size_t, void*) {
          for (int i = 0; i < module->dlpi_phnum; ++i) {
            char* at = static_cast<char*>(module->dlpi_tls_data);
            const size_t size = module->dlpi_phdr[i].p_memsz;
            if (module->dlpi_phdr[i].p_type != PT_TLS || !at || &landmark < at || &landmark >= at + size) continue;
            begin = at, end = at + size;
          }
          return 0;
        },
        nullptr);
  }
  std::memset(begin, 0xff, end - begin);
}

inline bool run_block(int n) {
  state.block = {};
  state.warps.assign((n + 31) / 32, {});
  std::fill(state.shared.begin(), state.shared.end(), char(0xff));  // NaN, or -1
  poison_static_memory();
  for (int i = 0; i < n; ++i) {
    Fiber& fiber = state.fibers[i];
    fiber.begun = fiber.done = false, fiber.waits_for = nullptr;
    fiber.id = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
    fiber.stack = &state.stacks[i * stack_bytes];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack, fiber.start.uc_stack.ss_size = stack_bytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
  }
  std::vector<int> order(n);
  for (int i = 0; i < n; ++i) order[i] = i;
  if (next_random() & 1) std::reverse(order.begin(), order.end());
  std::rotate(order.begin(), order.begin() + next_random() % n, order.end());
  for (bool progress = true; progress;) {
    progress = false;
    for (int i : order) {
      const Fiber& fiber = state.fibers[i];
      if (fiber.done || (fiber.waits_for && fiber.waits_for->generation == fiber.generation)) continue;
      progress = true;
      resume(i);
      if (!state.error.empty()) return false;
    }
  }
  for (int i = 0; i < n; ++i) {
    if (state.fibers[i].done) continue;
    state.current = i;
    const Place at = state.fibers[i].waits_for->place;
    char text[256];
    std::snprintf(text, sizeof text, "%s:%d: %s: %d threads of block (%u, %u, %u) wait, the others never reach it",
                  at.file, at.line, at.what, alive(0, n), blockIdx.x, blockIdx.y, blockIdx.z);
    state.error = text;
    return false;
  }
  return true;
}

// nullptr, or what went wrong.
inline const char* run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const int n = static_cast<int>(block.x * block.y * block.z);
  state.error.clear();
  if (n < 1 || n > 1024) return "simt: a block has 1 to 1024 threads";
  if (shared_bytes > (227u << 10)) return "simt: more shared memory than a block can have";
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) return "simt: invalid grid";
  if (const char* seed = std::getenv("SIMT_SEED")) state.random ^= std::strtoull(seed, nullptr, 10) * 2654435769u;
  gridDim = grid, blockDim = block, state.body = &body;
  state.shared.assign(shared_bytes, 0);
  state.shared.shrink_to_fit();  // so that AddressSanitizer sees its end
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

#define SIMT_PLACE(what) (simt::Place{__FILE__, __LINE__, what})
#define __syncthreads() simt::block_wait(SIMT_PLACE("__syncthreads"))
#define __syncthreads_count(vote) simt::block_count(SIMT_PLACE("__syncthreads_count"), vote)
#define __syncthreads_or(vote) (simt::block_count(SIMT_PLACE("__syncthreads_or"), vote) > 0)
#define __syncthreads_and(vote) (simt::block_count(SIMT_PLACE("__syncthreads_and"), !(vote)) == 0)
#define __syncwarp(...) simt::warp_wait(simt::mask_of(__VA_ARGS__), SIMT_PLACE("__syncwarp"))
#define __shfl_sync(...) simt::shuffle(SIMT_PLACE("__shfl_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) simt::shuffle_xor(SIMT_PLACE("__shfl_xor_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) simt::shuffle_down(SIMT_PLACE("__shfl_down_sync"), __VA_ARGS__)
#define __shfl_up_sync(...) simt::shuffle_up(SIMT_PLACE("__shfl_up_sync"), __VA_ARGS__)
#define __ballot_sync(...) simt::ballot(SIMT_PLACE("__ballot_sync"), __VA_ARGS__)
#define __any_sync(...) (simt::ballot(SIMT_PLACE("__any_sync"), __VA_ARGS__) != 0)
#define __all_sync(mask, vote) (simt::ballot(SIMT_PLACE("__all_sync"), mask, !(vote)) == 0)
#define __reduce_add_sync(...) simt::reduce(SIMT_PLACE("__reduce_add_sync"), std::plus<>(), __VA_ARGS__)
#define __reduce_max_sync(...) simt::reduce(SIMT_PLACE("__reduce_max_sync"), simt::Max(), __VA_ARGS__)
#define __reduce_min_sync(...) simt::reduce(SIMT_PLACE("__reduce_min_sync"), simt::Min(), __VA_ARGS__)

namespace simt {

inline unsigned mask_of(unsigned mask = ~0u) { return mask; }

// A shuffle within groups of `width` lanes: a source beyond the group gives the lane's own value.
template <class T>
T shuffle(const Place& at, unsigned mask, T value, int from, int width = 32) {
  return exchange(mask, value, lane() / width * width + (from & (width - 1)), at);
}
template <class T>
T shuffle_xor(const Place& at, unsigned mask, T value, int bits, int width = 32) {
  const int from = lane() ^ bits;
  return exchange(mask, value, from < (lane() / width + 1) * width ? from : lane(), at);
}
template <class T>
T shuffle_down(const Place& at, unsigned mask, T value, unsigned by, int width = 32) {
  const bool inside = lane() % width + static_cast<int>(by) < width;
  return exchange(mask, value, inside ? lane() + static_cast<int>(by) : lane(), at);
}
template <class T>
T shuffle_up(const Place& at, unsigned mask, T value, unsigned by, int width = 32) {
  const bool inside = lane() % width >= static_cast<int>(by);
  return exchange(mask, value, inside ? lane() - static_cast<int>(by) : lane(), at);
}

// One exchange, then every lane's value: f(lane, value) for the lanes that are there.
template <class T, class F>
void everyone(const Place& at, unsigned mask, T value, F f) {
  const size_t half = state.warps[state.current / 32].generation & 1;
  const int begin = warp_begin(), end = warp_end();
  exchange(mask, value, lane(), at);
  for (int i = begin; i < end; ++i) {
    T other;
    std::memcpy(&other, &state.slots[(2 * i + half) * exchange_bytes], sizeof(T));
    f(i - begin, other);
  }
}

inline unsigned ballot(const Place& at, unsigned mask, bool vote) {
  unsigned bits = 0;
  everyone(at, mask, int(vote), [&](int l, int v) { bits |= unsigned(v == 1) << l; });
  return bits;
}

struct Max {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};
struct Min {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
template <class Op, class T>
T reduce(const Place& at, Op op, unsigned mask, T value) {
  static_assert(sizeof(T) == 4 && std::is_integral<T>::value, "the instruction takes 32-bit integers");
  T out = value;
  bool first = true;
  everyone(at, mask, value, [&](int, T v) { out = first ? v : op(out, v), first = false; });
  return out;
}

}  // namespace simt

template <class T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = old + v;
  return old;
}
template <class T>
T atomicMax(T* p, T v) {
  const T old = *p;
  *p = std::max(old, v);
  return old;
}
template <class T>
T atomicMin(T* p, T v) {
  const T old = *p;
  *p = std::min(old, v);
  return old;
}
template <class T>
T atomicOr(T* p, T v) {
  const T old = *p;
  *p = old | v;
  return old;
}
template <class T>
T atomicExch(T* p, T v) {
  const T old = *p;
  *p = v;
  return old;
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  const T old = *p;
  if (old == expected) *p = v;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}

inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline int __float_as_int(float x) {
  int u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
// Hardware's fast functions are wrong by a little: so are these, by 1 or 2 units in the last place, of which and to
// which side the result's bits decide. e^0 is 1 there too.
inline float off_by_a_little(float y) {
  if (y == 0.f || y == 1.f || !std::isfinite(y)) return y;
  const int by[4] = {-2, -1, 1, 2};
  const unsigned u = __float_as_uint(y);
  return __uint_as_float(u + by[u * 2654435761u >> 30]);
}
inline float ex2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.f : off_by_a_little(y);
}
inline float __expf(float x) { return off_by_a_little(std::exp2(x * 1.44269504f)); }
inline float __logf(float x) { return off_by_a_little(std::log(x)); }
inline float __fdividef(float a, float b) { return off_by_a_little(a / b); }
inline float rsqrtf(float x) { return off_by_a_little(1.f / std::sqrt(x)); }
inline float __int_as_float(int u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return unsigned((uint64_t(high) << 32 | low) >> (by & 31));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

// What the host side of the kernels asks of the runtime.
using cudaStream_t = struct CUstream_st*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

// bfloat16 and half, as cuda_bf16.h and cuda_fp16.h have them, as far as the kernels go.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float(unsigned(h.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned u = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
inline float __half2float(__half h) {
  _Float16 x;
  std::memcpy(&x, &h.bits, 2);
  return float(x);
}
inline __half __float2half_rn(float f) {
  const _Float16 x = _Float16(f);
  __half h;
  std::memcpy(&h.bits, &x, 2);
  return h;
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
