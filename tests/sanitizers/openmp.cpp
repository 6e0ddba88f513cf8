// The part of OpenMP's runtime that csrc/cpu calls, from pthreads and atomics that ThreadSanitizer sees.
//
//     GOMP_parallel   starts OMP_NUM_THREADS threads, even where an `if` clause asks for one, and joins them
//     dynamic loops   the k-th loop of a region counts the iterations taken, in an atomic that orders nothing else
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr int MAX_LOOPS = 8;  // dynamic loops in one parallel region

struct Region {
  pthread_barrier_t barrier;
  std::atomic<long> taken[MAX_LOOPS] = {};
};

struct Loop {
  long start, end, step, chunk;
  std::atomic<long>* taken;
};

struct Thread {
  Region* region = nullptr;
  int number = 0, num_threads = 1, num_loops = 0;
  Loop loop;
};

thread_local Thread self;

}  // namespace

extern "C" {

int omp_get_thread_num() { return self.number; }

int omp_get_num_threads() { return self.num_threads; }

void GOMP_barrier() { pthread_barrier_wait(&self.region->barrier); }

void GOMP_parallel(void (*body)(void*), void* data, unsigned, unsigned) {
  const int num_threads = std::atoi(std::getenv("OMP_NUM_THREADS"));
  Region region;
  pthread_barrier_init(&region.barrier, nullptr, num_threads);
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i)
    threads.emplace_back([=, &region] {
      self.region = &region;
      self.number = i;
      self.num_threads = num_threads;
      body(data);
    });
  for (std::thread& thread : threads) thread.join();
  pthread_barrier_destroy(&region.barrier);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* end) {
  const Loop& loop = self.loop;
  const long from = loop.start + loop.taken->fetch_add(loop.chunk, std::memory_order_relaxed) * loop.step;
  if (from >= loop.end) return false;
  *begin = from;
  *end = std::min(from + loop.chunk * loop.step, loop.end);
  return true;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* begin, long* last) {
  if (step < 1 || self.num_loops == MAX_LOOPS) std::abort();
  self.loop = {start, end, step, chunk, &self.region->taken[self.num_loops++]};
  return GOMP_loop_nonmonotonic_dynamic_next(begin, last);
}

void GOMP_loop_end() { GOMP_barrier(); }

void GOMP_loop_end_nowait() {}
}
