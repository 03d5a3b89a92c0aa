// y = out_scale * y + scale * B (A x) + bias, each row by its own adapter.
//
// The plan cuts the rows into segments: at most 64 rows of one adapter. For each segment and slice
// `shrink` computes h = A x (dot products along x's own direction, A row-major [r, in]) and `expand`
// adds B h (lanes are outputs, B packed as kernels/cpu/edits.py says). Both hold a register tile of
// rows x ranks or rows x outputs, so that many rows load each operand once for several products. A
// job's first rows read A and B strictly in the order of memory, which is what the hardware's
// prefetchers follow: with tiles that walk several streams, a decode step took twice as long.
//
// A result is one accumulator's sum in a fixed order whatever the tile's shape, so a row's bits
// depend neither on the rows beside it nor on the number of threads.

#include <stdlib.h>

#include "parallel.h"
#include "simd.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

constexpr int64_t kBlock = 64;  // outputs of a block of packed B; the last one may have 16, 32, 48
constexpr int64_t kUnit = 16;   // the outputs of a block are a multiple of this
constexpr int kTileRows = kManyRegisters ? 4 : 2;
constexpr int64_t kMaxSegment = 64;  // MAX_SEGMENT_ROWS of kernels/plan.py

// Reading A in order leaves each rank's sum as one chain of dependent additions. Where lanes are
// few, a chain longer than this takes longer than memory does.
constexpr int64_t kLongestChain = kLanes >= 16 ? INT64_MAX : 2048;

// kernels/table.py: SliceGroup
struct Group {
  int64_t count;
  const int32_t *modules, *starts, *sizes;
  explicit Group(const int32_t* words)
      : count(words[0]),
        modules(words + 1),
        starts(modules + count),
        sizes(starts + count) {}
};

// kernels/table.py: EditTable
struct Table {
  int64_t slots, modules;
  const int32_t* rank;
  const float* scale;
  const int64_t (*offsets)[5];
};
enum Offset { kA, kB, kInScale, kOutScale, kBias };

// kernels/plan.py: Plan
struct Plan {
  int64_t rows, edited, segments;
  const int32_t *order, *starts, *slots;
  explicit Plan(const int32_t* words)
      : rows(words[0]),
        edited(words[1]),
        segments(words[2]),
        order(words + 4 + rows),
        starts(order + edited),
        slots(starts + segments + 1) {}
};

template <class T>
struct Tensors {
  T* y;
  int64_t y_stride;
  const T* x;
  int64_t x_stride, in;
  const T* pool;
};

template <class T>
const T* at(const T* pool, int64_t offset) {
  return offset < 0 ? nullptr : pool + offset;
}
template <class T>
const float* vector_at(const T* pool, int64_t offset) {
  return reinterpret_cast<const float*>(at(pool, offset));
}

// What one segment's adapter does to one slice.
template <class T>
struct Job {
  const int32_t* rows;  // indices into x and y
  int64_t row_count;
  int64_t rank, padded_rank;
  const T *a, *b;
  const float *out_scale, *bias;
  float scale;
  int64_t start, size;  // columns of y
  Hidden<T>* h;         // [row_count, padded_rank]
  int64_t shrinks_left;

  bool idle() const { return rank == 0 && out_scale == nullptr && bias == nullptr; }
};

// ---- shrink: h = A x ----

template <class T, int R, int J>
void shrink_tile(const T* const* x, const T* a, int64_t in, Hidden<T>* h, int64_t h_stride) {
  Vec acc[R][J];
  for (auto& row : acc) {
    for (Vec& v : row) v = zero();
  }
  int64_t k = 0;
  for (; k + kStep<T> <= in; k += kStep<T>) {
    Operand<T> xs[R];
    for (int i = 0; i < R; ++i) xs[i] = load_operand<T>(x[i] + k);
    for (int j = 0; j < J; ++j) {
      const Operand<T> as = load_operand<T>(a + j * in + k);
      for (int i = 0; i < R; ++i) acc[i][j] = dot(acc[i][j], xs[i], as);
    }
  }
  if (k < in) {
    for (int j = 0; j < J; ++j) {
      const Operand<T> as = load_operand<T>(a + j * in + k, in - k);
      for (int i = 0; i < R; ++i) {
        acc[i][j] = dot(acc[i][j], load_operand<T>(x[i] + k, in - k), as);
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < J; ++j) from_float(sum(acc[i][j]), h + i * h_stride + j);
  }
}

// Ranks [begin, end) of R rows, J at a time.
template <class T, int R, int J>
void shrink_ranks(const T* const* x, const Job<T>& job, int64_t in, int64_t begin, int64_t end,
                  Hidden<T>* h) {
  for (; begin + J <= end; begin += J) {
    shrink_tile<T, R, J>(x, job.a + begin * in, in, h + begin, job.padded_rank);
  }
  for (; begin < end; ++begin) {
    shrink_tile<T, R, 1>(x, job.a + begin * in, in, h + begin, job.padded_rank);
  }
}

// The first rows to meet A read it in order; for the others it lies in the cache.
template <class T, int R>
void shrink_rows(const T* const* x, const Job<T>& job, int64_t in, int64_t begin, int64_t end,
                 Hidden<T>* h, bool first) {
  if (first && in <= kLongestChain) {
    shrink_ranks<T, R, 1>(x, job, in, begin, end, h);
  } else {
    shrink_ranks<T, R, 4>(x, job, in, begin, end, h);
  }
}

// Rows [row, row_end) and ranks [begin, end) of a job.
template <class T>
void shrink(const Tensors<T>& t, const Job<T>& job, int64_t row, int64_t row_end, int64_t begin,
            int64_t end) {
  const T* x[kMaxSegment];
  for (int64_t i = row; i < row_end; ++i) x[i] = t.x + job.rows[i] * t.x_stride;
  bool first = row == 0;
  for (int64_t left; (left = row_end - row) > 0; row += kTileRows, first = false) {
    Hidden<T>* h = job.h + row * job.padded_rank;
    if (left >= kTileRows) {
      shrink_rows<T, kTileRows>(x + row, job, t.in, begin, end, h, first);
    } else if (left == 1) {
      shrink_rows<T, 1>(x + row, job, t.in, begin, end, h, first);
    } else if (left == 2) {
      shrink_rows<T, 2>(x + row, job, t.in, begin, end, h, first);
    } else {
      shrink_rows<T, 3>(x + row, job, t.in, begin, end, h, first);
    }
  }
}

// ---- expand: y = out_scale * y + scale * B h + bias ----

// One vector of a row's slice; `n` is given where it has less than kLanes columns.
template <class T, class... N>
MANYLORA_INLINE void finish(T* y, const Job<T>& job, int64_t column, Vec product, N... n) {
  Vec result = load(y, n...);
  if (job.out_scale != nullptr) result = mul(result, load(job.out_scale + column, n...));
  if (job.rank != 0) result = fma(splat(job.scale), product, result);
  if (job.bias != nullptr) result = add(result, load(job.bias + column, n...));
  store(y, result, n...);
}

// C vectors of columns, from `column` of the slice, of R rows of the job. `b` is where the
// columns' part of a block begins that is `width` columns wide.
template <class T, int R, int C>
void expand_tile(const Tensors<T>& t, const Job<T>& job, int64_t row, int64_t column, const T* b,
                 int64_t width) {
  Vec acc[R][C];
  for (int i = 0; i < R; ++i) {
    for (int c = 0; c < C; ++c) acc[i][c] = zero();
  }
  const Hidden<T>* h = job.h + row * job.padded_rank;
  for (int64_t j = 0; j < job.padded_rank; j += kDepth<T>) {
    Operand<T> hs[R];
    for (int i = 0; i < R; ++i) hs[i] = broadcast<T>(h + i * job.padded_rank + j);
    for (int c = 0; c < C; ++c) {
      const Operand<T> bs = load_operand<T>(b + j * width + c * kStep<T>);
      for (int i = 0; i < R; ++i) acc[i][c] = dot(acc[i][c], bs, hs[i]);
    }
  }
  for (int i = 0; i < R; ++i) {
    T* y = t.y + job.rows[row + i] * t.y_stride + job.start + column;
    for (int c = 0; c < C; ++c) {
      const int64_t left = job.size - column - c * kLanes;
      if (left >= kLanes) {
        finish(y + c * kLanes, job, column + c * kLanes, acc[i][c]);
      } else if (left > 0) {
        finish(y + c * kLanes, job, column + c * kLanes, acc[i][c], left);
      }
    }
  }
}

// `width` columns of every row, a block of B or what is left of one: C vectors at a time for a
// tile of rows, C1 for a row that is left over.
template <class T, int C, int C1>
void expand_block(const Tensors<T>& t, const Job<T>& job, int64_t column, int64_t width) {
  const T* b = job.b + column * job.padded_rank;
  int64_t row = 0;
  for (; row + kTileRows <= job.row_count; row += kTileRows) {
    for (int64_t c = 0; c < width; c += C * kLanes) {
      expand_tile<T, kTileRows, C>(t, job, row, column + c, b + c * kDepth<T>, width);
    }
  }
  for (; row < job.row_count; ++row) {
    for (int64_t c = 0; c < width; c += C1 * kLanes) {
      expand_tile<T, 1, C1>(t, job, row, column + c, b + c * kDepth<T>, width);
    }
  }
}

// Columns [begin, end) of the slice, `begin` at a block's start.
template <class T>
void expand(const Tensors<T>& t, const Job<T>& job, int64_t begin, int64_t end) {
  constexpr int kAll = kBlock / kLanes, kSome = kUnit / kLanes;
  int64_t column = begin;
  for (; column + kBlock <= end; column += kBlock) {
    expand_block<T, 4, kAll < 8 ? kAll : 8>(t, job, column, kBlock);
  }
  if (column < end) {
    expand_block<T, kSome, kSome>(t, job, column, (end - column + kUnit - 1) / kUnit * kUnit);
  }
}

// ---- one call ----

// Below this many multiply-adds, waking another thread costs more than it saves.
constexpr int64_t kSerialCost = 100000;
// A job is cut into pieces where there are fewer jobs than this for each thread.
constexpr int64_t kJobsPerWorker = 4;
// Sizes of a piece. Ranks keep shrink's widest tile, columns are whole blocks.
constexpr int64_t kPieceRows = 16, kPieceRanks = 8;
constexpr int64_t kPieceColumns = 256, kPieceColumnsOneRow = 1024;

template <class E>
E* allocate(int64_t count) {
  E* memory = static_cast<E*>(malloc(static_cast<size_t>(count) * sizeof(E) + 1));
  if (memory == nullptr) abort();
  return memory;
}

// Fills in every job that has something to do; returns how many.
template <class T>
int64_t collect(const Tensors<T>& t, const Group& group, const Table& table, const Plan& plan,
                Job<T>* jobs) {
  int64_t count = 0;
  for (int64_t s = 0; s < plan.segments; ++s) {
    for (int64_t m = 0; m < group.count; ++m) {
      const int64_t entry = plan.slots[s] * table.modules + group.modules[m];
      const int64_t* offsets = table.offsets[entry];
      Job<T>& job = jobs[count];
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
      count += !job.idle();
    }
  }
  return count;
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

template <class T>
void run(const Tensors<T>& t, const Group& group, const Table& table, const Plan& plan) {
  Job<T>* jobs = allocate<Job<T>>(plan.segments * group.count + 1);
  const int64_t count = collect(t, group, table, plan, jobs);
  Hidden<T>* hidden = allocate_hidden(jobs, count);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += cost(t, jobs[i]);
  const int64_t workers = total < kSerialCost ? 1 : threads();
  if (workers > 1 && count < kJobsPerWorker * workers) {
    run_pieces(t, jobs, count, workers);
  } else {
    parallel_tasks(count, workers, [&](int64_t i) {
      shrink(t, jobs[i], 0, jobs[i].row_count, 0, jobs[i].rank);
      expand(t, jobs[i], 0, jobs[i].size);
    });
  }
  free(hidden);
  free(jobs);
}

template <class T>
void scale_rows_of(T* out, const T* x, int64_t x_stride, int64_t in, const T* pool, int32_t module,
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

template <class T>
void apply_as(void* y, int64_t y_stride, const void* x, int64_t x_stride, int64_t in,
              const void* pool, const int32_t* group, const void* table, const int32_t* plan) {
  const Tensors<T> tensors = {static_cast<T*>(y),        y_stride, static_cast<const T*>(x), x_stride,
                              in, static_cast<const T*>(pool)};
  run(tensors, Group(group), *static_cast<const Table*>(table), Plan(plan));
}

template <class T>
void scale_as(void* out, const void* x, int64_t x_stride, int64_t in, const void* pool,
              int32_t module, const void* table, const int32_t* plan) {
  scale_rows_of(static_cast<T*>(out), static_cast<const T*>(x), x_stride, in,
                static_cast<const T*>(pool), module, *static_cast<const Table*>(table), Plan(plan));
}

}  // namespace

// y [rows, out] in place and x [rows, in], strides in elements; see kernels/reference.py.
void apply_edits(void* y, int64_t y_stride, const void* x, int64_t x_stride, int64_t in,
                 int32_t dtype, const void* pool, const int32_t* group, const void* table,
                 const int32_t* plan) {
  auto* apply = dtype == kFloat32   ? apply_as<float>
                : dtype == kFloat16 ? apply_as<f16>
                                    : apply_as<bf16>;
  apply(y, y_stride, x, x_stride, in, pool, group, table, plan);
}

// out [rows, in] contiguous = in_scale * x for the rows that have one; the others are not written.
void scale_rows(void* out, const void* x, int64_t x_stride, int64_t in, int32_t dtype,
                const void* pool, int32_t module, const void* table, const int32_t* plan) {
  auto* scale = dtype == kFloat32   ? scale_as<float>
                : dtype == kFloat16 ? scale_as<f16>
                                    : scale_as<bf16>;
  scale(out, x, x_stride, in, pool, module, table, plan);
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
