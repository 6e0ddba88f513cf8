// Threads that go through many short phases together: a barrier that gives way, and pieces of work for whoever is free.
//
// OpenMP's own barrier spins for milliseconds. Where other programs run, the thread that it waits for often stands in
// the queue of the very core that spins: a step of 200 barriers then takes a second instead of 20 milliseconds.
#pragma once
#include <sched.h>
#include <stdint.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

constexpr int SPINS = 2000;  // looks before the core is offered to others: some 20 microseconds

// What the threads of one parallel region share; all zero at its begin. Apart, for each line has its own writers.
struct Shared {
  alignas(64) int32_t arrived;
  alignas(64) int32_t phase;
  alignas(64) int64_t next;  // the next piece of work of this phase
};

struct Team {
  int me, size;
  Shared* shared;
};

inline Team join_team(Shared* shared) {
#if defined(_OPENMP)
  return {omp_get_thread_num(), omp_get_num_threads(), shared};
#else
  return {0, 1, shared};
#endif
}

// Nobody leaves before all have come; what each wrote before is seen by all after. The pieces start again at 0.
inline void barrier(const Team& team) {
  Shared& s = *team.shared;
  if (team.size == 1) {
    s.next = 0;
    return;
  }
  const int32_t phase = __atomic_load_n(&s.phase, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&s.arrived, 1, __ATOMIC_ACQ_REL) == team.size) {
    __atomic_store_n(&s.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&s.next, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&s.phase, phase + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int looks = 0; __atomic_load_n(&s.phase, __ATOMIC_ACQUIRE) == phase; ++looks) {
    if (looks > SPINS) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }
}

// work(i) for each i in [0, count), by whichever thread is free; once a phase.
template <class Work>
inline void share(const Team& team, int64_t count, Work work) {
  if (team.size == 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  int64_t* const next = &team.shared->next;
  for (int64_t i; (i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count;) work(i);
}

}  // namespace
