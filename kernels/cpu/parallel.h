// Threads: torch's own pool, reached through a function pointer that Python hands over at load.
//
// A kernel cuts its work into tasks and every thread draws the next task from one counter, so a
// slow thread does not hold up the others. Tasks are drawn in order, which lets a task wait for
// one with a smaller number: that one is finished or being worked on.
//
// Several kernels in a row can share one parallel region of torch's: `as_team` runs a program on
// one of the region's threads, the leader, and the others stand by for the program's kernels. The
// leader waits for those only that have begun a task, so a thread that the system has taken off
// its core, as a busy server's do, holds up nobody; torch's own region waits for all, each time.

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

// What the leader and its helpers share. epoch is odd while a job is open.
struct Team {
  RangeFn job;
  void* context;
  int64_t epoch;
  int64_t inside;  // helpers that may be using the job
  int32_t closed;
  int32_t leaders;
  int64_t leader;  // which worker it is
};
extern thread_local Team* team;  // the leader's; in dispatch.cpp

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
  const int64_t tasks;
  int64_t next = 0;

  Draw(const Task& its_task, int64_t its_tasks, int64_t) : task(its_task), tasks(its_tasks) {}
  static void run(int64_t, int64_t, void* context) {
    Draw& draw = *static_cast<Draw*>(context);
    for (;;) {
      const int64_t i = __atomic_fetch_add(&draw.next, 1, __ATOMIC_RELAXED);
      if (i >= draw.tasks) return;
      draw.task(i);
    }
  }
};

// Like Draw, but each worker first draws the tasks of its own share, then the others': from call to
// call a thread meets the same part of the data, which may still lie in its core's cache.
template <class Task>
struct Shares {
  static constexpr int64_t kMost = 32;
  struct alignas(64) Share {
    int64_t next, end;
  };
  const Task& task;
  const int64_t count;
  Share shares[kMost];

  Shares(const Task& its_task, int64_t tasks, int64_t workers)
      : task(its_task), count(workers < kMost ? workers : kMost) {
    for (int64_t i = 0; i < count; ++i) {
      shares[i] = {tasks * i / count, tasks * (i + 1) / count};
    }
  }
  static void run(int64_t worker, int64_t, void* context) {
    Shares& all = *static_cast<Shares*>(context);
    for (int64_t i = 0; i < all.count; ++i) {
      Share& share = all.shares[(worker + i) % all.count];
      for (;;) {
        const int64_t task = __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED);
        if (task >= share.end) break;
        all.task(task, share.end);
      }
    }
  }
};

// The leader's part of a job: opens it, does what it can, and waits for those who are inside.
static inline void run_job(Team& t, RangeFn job, void* context) {
  t.job = job;
  t.context = context;
  __atomic_fetch_add(&t.epoch, 1, __ATOMIC_SEQ_CST);
  job(t.leader, 0, context);
  __atomic_fetch_add(&t.epoch, 1, __ATOMIC_SEQ_CST);
  while (__atomic_load_n(&t.inside, __ATOMIC_SEQ_CST) != 0) relax();
}

// A helper's part: joins each job that it finds open, until the team is closed.
static inline void help(Team& t, int64_t worker) {
  int64_t done = 0;  // the epoch of the job last helped with
  while (!__atomic_load_n(&t.closed, __ATOMIC_ACQUIRE)) {
    const int64_t epoch = __atomic_load_n(&t.epoch, __ATOMIC_SEQ_CST);
    if (epoch % 2 == 0 || epoch == done) {
      relax();
      continue;
    }
    __atomic_fetch_add(&t.inside, 1, __ATOMIC_SEQ_CST);
    // Inside, a job that is still open stays valid until this thread leaves.
    if (__atomic_load_n(&t.epoch, __ATOMIC_SEQ_CST) == epoch) t.job(worker, 0, t.context);
    __atomic_fetch_sub(&t.inside, 1, __ATOMIC_SEQ_CST);
    done = epoch;
  }
}

// Calls program() on one thread; parallel_tasks within it use the others of one region.
template <class Program>
static void as_team(const Program& program) {
  struct Region {
    const Program& program;
    Team shared;
    static void run(int64_t worker, int64_t, void* context) {
      Region& region = *static_cast<Region*>(context);
      if (__atomic_fetch_add(&region.shared.leaders, 1, __ATOMIC_SEQ_CST) > 0) {
        return help(region.shared, worker);
      }
      region.shared.leader = worker;
      team = &region.shared;
      region.program();
      team = nullptr;
      __atomic_store_n(&region.shared.closed, 1, __ATOMIC_RELEASE);
    }
  } region{program, {}};
  const int64_t workers = threads();
  if (workers > 1) pool.parallel_for(0, workers, 1, &Region::run, &region);
  if (region.shared.leaders == 0) program();
}

// Runs job with the numbers of the workers, on at most so many threads; in a team, on all of it.
static inline void on_threads(RangeFn job, int64_t workers, void* context) {
  if (team != nullptr) return run_job(*team, job, context);
  if (pool.parallel_for(0, workers, 1, job, context) != 0) job(0, 0, context);
}

template <template <class> class Order, class Task>
static void run_tasks(int64_t tasks, int64_t workers, const Task& task) {
  if (workers > tasks) workers = tasks;
  if (workers <= 1) {
    Order<Task> alone(task, tasks, 1);
    return Order<Task>::run(0, 0, &alone);
  }
  Order<Task> order(task, tasks, workers);
  on_threads(&Order<Task>::run, workers, &order);
}

// Calls task(i) once for each i in [0, tasks), on at most `workers` threads.
template <class Task>
static void parallel_tasks(int64_t tasks, int64_t workers, const Task& task) {
  run_tasks<Draw>(tasks, workers, task);
}

// Calls task(i, end of its share) likewise for tasks that wait for no others, each thread its own
// share first.
template <class Task>
static void parallel_shares(int64_t tasks, int64_t workers, const Task& task) {
  run_tasks<Shares>(tasks, workers, task);
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
