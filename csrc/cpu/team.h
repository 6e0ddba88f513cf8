// Threads that go through many short phases together: a barrier that yields the core, and a dynamic parallel_for.
//
//     phase 1   parallel_for: thread 0 takes i = 0, 2, 5, ...   thread 1 takes i = 1, 3, 4, ...
//               barrier
//     phase 2   parallel_for: ...
//
// OpenMP's own barrier spins for milliseconds. If other programs run, the thread that it waits for is often queued on
// the core that spins: a step of 200 barriers then takes a second instead of 20 milliseconds.
#pragma once
#include <sched.h>
#include <stdint.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

constexpr int SPINS_BEFORE_YIELD = 2000;  // some 20 microseconds

// The state that the threads of one parallel region share; it must start as zeros. Each number has a cache line of its
// own, as each has other writers.
struct TeamState {
  alignas(64) int32_t num_arrived;
  alignas(64) int32_t phase;
  alignas(64) int64_t next;  // the next index of this phase's parallel_for
};

struct Team {
  int thread, num_threads;
  TeamState* state;
};

inline Team join_team(TeamState* state) {
#if defined(_OPENMP)
  return {omp_get_thread_num(), omp_get_num_threads(), state};
#else
  return {0, 1, state};
#endif
}

// Waits for all threads. What they wrote before is visible to all after. The next parallel_for starts again at 0.
inline void barrier(const Team& team) {
  TeamState& s = *team.state;
  if (team.num_threads == 1) {
    s.next = 0;
    return;
  }
  const int32_t phase = __atomic_load_n(&s.phase, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&s.num_arrived, 1, __ATOMIC_ACQ_REL) == team.num_threads) {
    __atomic_store_n(&s.num_arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&s.next, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&s.phase, phase + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int spins = 0; __atomic_load_n(&s.phase, __ATOMIC_ACQUIRE) == phase; ++spins) {
    if (spins > SPINS_BEFORE_YIELD) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }
}

// Calls body(i) once for each i in [0, count), on the threads that are free. At most one between two barriers.
template <class Body>
inline void parallel_for(const Team& team, int64_t count, Body body) {
  if (team.num_threads == 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  int64_t* const next = &team.state->next;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) body(i);
}

// Without a team: calls body(i, thread) once for each i in [0, count), on the threads that are free. Threads are
// numbered from 0 in the order in which they come.
template <class Body>
inline void parallel_items(int num_threads, int64_t count, Body body) {
  int next_thread = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    int thread;
#pragma omp atomic capture
    thread = next_thread++;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) body(i, thread);
  }
}

}  // namespace
