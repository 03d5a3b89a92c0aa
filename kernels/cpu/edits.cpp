// y = out_scale * y + scale * B (A x) + bias, each row by its own adapter.
//
// The plan cuts the rows into segments: at most 64 rows of one adapter. Each segment and slice is a
// job: shrink (h = A x), then expand (y += B h). Many segments are shared out whole among the
// threads, the jobs of few are cut in pieces. A and B of a segment's jobs lie one after the other
// and are read in that order, while the next segment's are fetched. Several streams at once through
// A or B made decoding beyond the cache take twice as long.
//
// A result is one accumulator's sum in a fixed order whatever the tile's shape, so a row's bits
// depend neither on the rows beside it nor on the number of threads. With AMX, overloads for
// bfloat16 stand in for shrink and expand.

#include <stdlib.h>

#include "expand.h"
#include "kernels.h"
#include "parallel.h"
#include "shrink.h"
#if defined(__AMX_BF16__)
#include "expand_amx.h"
#include "shrink_amx.h"
#endif

namespace manylora {
namespace MANYLORA_ISA {
namespace {

// Below this many multiply-adds, waking another thread costs more than it saves.
constexpr int64_t kSerialCost = 100000;
// Where there are fewer segments than this for each thread, their jobs are cut; where there are
// fewer jobs then, these are cut into pieces.
constexpr int64_t kSegmentsPerWorker = 4, kJobsPerWorker = 4;
// Sizes of a piece. Ranks keep shrink's widest tile or, with AMX, are one block of packed A, columns
// are whole blocks.
#if defined(__AMX_BF16__)
constexpr int64_t kPieceRanks = 16;
#else
constexpr int64_t kPieceRanks = 8;
#endif
constexpr int64_t kPieceRows = 16;
constexpr int64_t kPieceColumns = 256, kPieceColumnsOneRow = 1024;

// In whole cache lines.
template <class E>
E* allocate(int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(E);
  E* memory = static_cast<E*>(aligned_alloc(64, (bytes + 64) / 64 * 64));
  if (memory == nullptr) abort();
  return memory;
}

// What segment `s` has to do to module `m` of the group.
template <class T>
Job<T> job_of(const Tensors<T>& t, const Group& group, const Table& table, const Plan& plan,
              int64_t s, int64_t m) {
  const int64_t entry = plan.slots[s] * table.modules + group.modules[m];
  const int64_t* offsets = table.offsets[entry];
  Job<T> job = {};
  job.rows = plan.order + plan.starts[s];
  job.row_count = plan.starts[s + 1] - plan.starts[s];
  job.rank = table.rank[entry];
  job.padded_rank = (job.rank + kDepth<T> - 1) / kDepth<T> * kDepth<T>;
  job.a = at(t.pool, offsets[kA]);
  job.b = at(t.pool, offsets[kB]);
  job.out_scale = vector_at(t.pool, offsets[kOutScale]);
  job.bias = vector_at(t.pool, offsets[kBias]);
  job.scale = table.scale[entry];
  job.start = group.starts[m];
  job.size = group.sizes[m];
  return job;
}

// Gives every job its part of one buffer, which the caller frees. Jobs' parts share no cache line.
template <class T>
Hidden<T>* allocate_hidden(Job<T>* jobs, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(Hidden<T>);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    total += (jobs[i].row_count * jobs[i].padded_rank + kLine - 1) / kLine * kLine;
  }
  Hidden<T>* buffer = allocate<Hidden<T>>(total);
  Hidden<T>* next = buffer;
  for (int64_t i = 0; i < count; ++i) {
    Job<T>& job = jobs[i];
    job.h = next;
    next += (job.row_count * job.padded_rank + kLine - 1) / kLine * kLine;
    if (job.padded_rank == job.rank) continue;
    for (int64_t row = 0; row < job.row_count; ++row) {
      from_float(0.0f, job.h + row * job.padded_rank + job.rank);
    }
  }
  return buffer;
}

template <class T>
int64_t cost(const Tensors<T>& t, const Job<T>& job) {
  return job.row_count * (job.rank * (t.in + job.size) + job.size);
}

// A part of a job: of its shrink (rows and ranks) or of its expand (columns).
struct Piece {
  int64_t job;
  int64_t row, row_end, rank, rank_end;
  int64_t column, column_end;
};

// Cuts the shrink of one job; writes nothing where `pieces` is null. Returns how many pieces.
template <class T>
int64_t cut_shrink(const Job<T>& job, int64_t index, Piece* pieces) {
  const bool by_rows = job.row_count >= kPieceRows;
  const int64_t row_step = by_rows ? kPieceRows : job.row_count;
  const int64_t rank_step = by_rows ? job.rank : kPieceRanks;
  int64_t count = 0;
  for (int64_t row = 0; row < job.row_count; row += row_step) {
    for (int64_t rank = 0; rank < job.rank; rank += rank_step, ++count) {
      if (pieces == nullptr) continue;
      const int64_t row_end = row + row_step, rank_end = rank + rank_step;
      pieces[count] = {index, row,  row_end < job.row_count ? row_end : job.row_count,
                       rank,  rank_end < job.rank ? rank_end : job.rank, 0, 0};
    }
  }
  return count;
}

// The same for its expand.
template <class T>
int64_t cut_expand(const Job<T>& job, int64_t index, Piece* pieces) {
  const int64_t step = job.row_count == 1 ? kPieceColumnsOneRow : kPieceColumns;
  int64_t count = 0;
  for (int64_t column = 0; column < job.size; column += step, ++count) {
    if (pieces == nullptr) continue;
    const int64_t end = column + step;
    pieces[count] = {index, 0, 0, 0, 0, column, end < job.size ? end : job.size};
  }
  return count;
}

template <class T>
void run_piece(const Tensors<T>& t, Job<T>* jobs, const Piece& piece) {
  Job<T>& job = jobs[piece.job];
  if (piece.column_end == 0) {
    shrink(t, job, piece.row, piece.row_end, piece.rank, piece.rank_end);
    __atomic_fetch_sub(&job.shrinks_left, 1, __ATOMIC_RELEASE);
    return;
  }
  while (__atomic_load_n(&job.shrinks_left, __ATOMIC_ACQUIRE) != 0) relax();
  expand(t, job, piece.column, piece.column_end);
}

// Few jobs for the threads: all shrinks in pieces, then all expands in pieces. An expand waits for
// its own job's shrinks only, which were drawn before it.
template <class T>
void run_pieces(const Tensors<T>& t, Job<T>* jobs, int64_t job_count, int64_t workers) {
  int64_t total = 0;
  for (int64_t i = 0; i < job_count; ++i) {
    jobs[i].shrinks_left = cut_shrink(jobs[i], i, nullptr);
    total += jobs[i].shrinks_left + cut_expand(jobs[i], i, nullptr);
  }
  Piece* pieces = allocate<Piece>(total);
  Piece* next = pieces;
  for (int64_t i = 0; i < job_count; ++i) next += cut_shrink(jobs[i], i, next);
  for (int64_t i = 0; i < job_count; ++i) next += cut_expand(jobs[i], i, next);
  parallel_tasks(total, workers, [&](int64_t i) { run_piece(t, jobs, pieces[i]); });
  free(pieces);
}

// Calls visit(first, count) for every few rows of a segment's.
template <class Visit>
void cut_rows(const Plan& plan, int64_t segment, int64_t step, const Visit& visit) {
  const int64_t rows = plan.starts[segment + 1] - plan.starts[segment];
  for (int64_t first = 0; first < rows; first += step) {
    visit(first, first + step < rows ? step : rows - first);
  }
}

// How many rows a job gets, so that there are enough jobs for the threads, if that is possible.
inline int64_t rows_of_a_job(const Group& group, const Plan& plan) {
  const int64_t wanted = kJobsPerWorker * threads();
  for (int64_t step = kMaxSegment; step > kPieceRows; step /= 2) {
    int64_t jobs = 0;
    for (int64_t s = 0; s < plan.segments; ++s) {
      cut_rows(plan, s, step, [&](int64_t, int64_t) { jobs += group.count; });
    }
    if (jobs >= wanted) return step;
  }
  return kPieceRows;
}

// Few segments: with many rows they become many jobs, otherwise their jobs are cut into pieces.
template <class T>
void run_few(const Tensors<T>& t, const Group& group, const Table& table, const Plan& plan) {
  const int64_t step = rows_of_a_job(group, plan);
  Job<T>* jobs = allocate<Job<T>>(plan.segments * kMaxSegment / step * group.count);
  int64_t count = 0, total = 0;
  for (int64_t s = 0; s < plan.segments; ++s) {
    cut_rows(plan, s, step, [&](int64_t first, int64_t rows) {
      for (int64_t m = 0; m < group.count; ++m) {
        Job<T>& job = jobs[count] = job_of(t, group, table, plan, s, m);
        job.rows += first;
        job.row_count = rows;
        if (!job.idle()) total += cost(t, jobs[count++]);
      }
    });
  }
  Hidden<T>* hidden = allocate_hidden(jobs, count);
  const int64_t workers = total < kSerialCost ? 1 : threads();
  if (workers > 1 && count < kJobsPerWorker * workers) {
    run_pieces(t, jobs, count, workers);
  } else {
    parallel_shares(count, workers, [&](int64_t i, int64_t) {
      shrink(t, jobs[i], 0, jobs[i].row_count, 0, jobs[i].rank);
      expand(t, jobs[i], 0, jobs[i].size);
    });
  }
  free(hidden);
  free(jobs);
}

// How many bytes are to be fetched of a tensor of so many elements. How many exceptions a compact one
// has is not known before it is read: a line of them.
template <class T>
int64_t bytes_of(const T*, int64_t count) {
  return count * static_cast<int64_t>(sizeof(T));
}
#if defined(__AMX_BF16__)
int64_t bytes_of(const bf16*, int64_t count) {
  constexpr int64_t kHeader = sizeof(Compact), kUnit = sizeof(CompactUnit);
  return kHeader + compact_units(count) * kUnit + kTileBytes;
}
#endif

// Many segments: each is one task. Its adapter's tensors for the group's modules lie one after the
// other, and are read in that order.
template <class T>
void run_many(const Tensors<T>& t, const Group& group, const Table& table, const Plan& plan) {
  parallel_shares(plan.segments, threads(), [&](int64_t s, int64_t end) {
    for (int64_t m = 0; m < group.count; ++m) {
      Job<T> job = job_of(t, group, table, plan, s, m), next = {};
      if (job.idle()) continue;
      if (s + 1 < end) next = job_of(t, group, table, plan, s + 1, m);
      Ahead a(next.a, bytes_of(next.a, next.rank * t.in));
      Ahead b(next.b, bytes_of(next.b, next.padded_rank * next.size));
      Hidden<T>* hidden = allocate_hidden(&job, 1);
      job.ahead = &a;
      shrink(t, job, 0, job.row_count, 0, job.rank);
      job.ahead = &b;
      expand(t, job, 0, job.size);
      free(hidden);
    }
  });
}

template <class T>
void run(const Tensors<T>& t, const Group& group, const Table& table, const Plan& plan) {
  if (plan.segments < kSegmentsPerWorker * threads()) {
    run_few(t, group, table, plan);
  } else {
    run_many(t, group, table, plan);
  }
}

template <class T>
void scale_rows_of(T* out, const T* x, int64_t x_stride, int64_t in, const T* pool, int64_t module,
                   const Table& table, const Plan& plan) {
  for (int64_t s = 0; s < plan.segments; ++s) {
    const int64_t entry = plan.slots[s] * table.modules + module;
    const float* in_scale = vector_at(pool, table.offsets[entry][kInScale]);
    if (in_scale == nullptr) continue;
    for (int32_t i = plan.starts[s]; i < plan.starts[s + 1]; ++i) {
      const T* from = x + plan.order[i] * x_stride;
      T* to = out + plan.order[i] * in;
      int64_t k = 0;
      for (; k + kLanes <= in; k += kLanes) store(to + k, mul(load(from + k), load(in_scale + k)));
      if (k < in) store(to + k, mul(load(from + k, in - k), load(in_scale + k, in - k)), in - k);
    }
  }
}

}  // namespace

void apply_edits(void* y, int64_t y_stride, const void* x, int64_t x_stride, int64_t in,
                 int64_t dtype, const void* pool, const int32_t* group, const void* table,
                 const int32_t* plan) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    const Tensors<T> tensors = {static_cast<T*>(y), y_stride, static_cast<const T*>(x),
                                x_stride, in, static_cast<const T*>(pool)};
    run(tensors, Group(group), *static_cast<const Table*>(table), Plan(plan));
  });
}

void scale_rows(void* out, const void* x, int64_t x_stride, int64_t in, int64_t dtype,
                const void* pool, int64_t module, const void* table, const int32_t* plan) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    scale_rows_of(static_cast<T*>(out), static_cast<const T*>(x), x_stride, in,
                  static_cast<const T*>(pool), module, *static_cast<const Table*>(table),
                  Plan(plan));
  });
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
