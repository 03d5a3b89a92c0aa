// Threads: torch's own pool, reached through a function pointer that Python hands over at load.
//
// A kernel cuts its work into tasks and every thread draws the next task from one counter, so a
// slow thread does not hold up the others. Tasks are drawn in order, which lets a task wait for
// one with a smaller number: that one is finished or being worked on.

#pragma once

#include <stdint.h>

namespace manylora {

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFn, void* context);
using ThreadCount = int32_t (*)(uint32_t* count);

struct Pool {
  ParallelFor parallel_for;  // null: no torch, one thread
  ThreadCount thread_count;
};
extern Pool pool;  // in dispatch.cpp

namespace MANYLORA_ISA {

static inline int64_t threads() {
  uint32_t count = 1;
  if (pool.parallel_for == nullptr || pool.thread_count(&count) != 0) return 1;
  return count;
}

// Between two looks at what another thread is about to write.
static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Task>
struct Draw {
  const Task& task;
  int64_t tasks;
  int64_t next;

  static void run(int64_t, int64_t, void* context) {
    Draw& draw = *static_cast<Draw*>(context);
    for (;;) {
      const int64_t i = __atomic_fetch_add(&draw.next, 1, __ATOMIC_RELAXED);
      if (i >= draw.tasks) return;
      draw.task(i);
    }
  }
};

// Calls task(i) once for each i in [0, tasks), on at most `workers` threads.
template <class Task>
static void parallel_tasks(int64_t tasks, int64_t workers, const Task& task) {
  if (workers > tasks) workers = tasks;
  if (workers <= 1) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  Draw<Task> draw{task, tasks, 0};
  if (pool.parallel_for(0, workers, 1, &Draw<Task>::run, &draw) != 0) Draw<Task>::run(0, 0, &draw);
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
