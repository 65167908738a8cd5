// Work that is shared by the threads of an OpenMP team, or that one thread does alone.
#pragma once
#include <cstdint>

namespace qpass {

// shared: the threads of the team around the call divide the tasks and wait for each other; else this thread runs them all
template <class F>
inline void each_task(int64_t count, bool shared, const F& run) {
  if (shared) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) run(i);
  } else {
    for (int64_t i = 0; i < count; i++) run(i);
  }
}

}  // namespace qpass
