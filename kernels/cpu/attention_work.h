// How one call of paged attention is cut into tasks for threads.

#pragma once

#include <stdlib.h>

#include "attention.h"
#include "parallel.h"
#include "simd.h"

namespace manylora {
namespace MANYLORA_ISA {

// After so many positions a line's sum is closed and merged, whoever computed it.
constexpr int64_t kSplit = 512;
// Lines (a row's query head) that share a unit, unless one row's are more.
constexpr int64_t kUnitLines = 64;
// More tasks than threads, so that a slow one does not hold up the call.
constexpr int64_t kTasksPerThread = 8;
// What is kept of each line alone is padded to so many.
constexpr int64_t kLineStep = 16;

MANYLORA_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// In whole cache lines.
static void* allocate(int64_t count, size_t size) {
  const size_t line = 64, bytes = (static_cast<size_t>(count) * size + line) / line * line;
  void* memory = aligned_alloc(line, bytes);
  if (memory == nullptr) abort();
  return memory;
}

struct Call {
  const Batch* batch;
  const AttentionLayer* layer;
  const void* q;
  int64_t q_row_stride;
  int64_t q_head_stride;
  const void* k_cache;
  const void* v_cache;
  void* out;
};

// Consecutive rows of one sequence with consecutive KV heads. Its lines: [heads][rows][group].
struct Unit {
  int64_t sequence;
  int64_t row, rows;  // in the flat batch
  int64_t position;   // of the first row
  int64_t lo, hi;     // keys that some row sees
  int64_t first_split, splits;
  int64_t head, heads;
  int64_t head_lines;  // of one KV head
  int64_t tasks;       // that share the unit
  int64_t remaining;   // of them, not finished yet
  float* partials;     // [splits][part_floats(lines)], if several tasks share it

  __attribute__((always_inline)) int64_t lines() const { return heads * head_lines; }
};

struct Task {
  Unit* unit;
  int64_t first_split, splits;
};

// Sizes of one call, in elements.
struct Sizes {
  int64_t group;      // query heads of a KV head
  int64_t unit_rows;  // of the largest unit
  int64_t lines;      // of the largest unit
  int64_t head_dim;
  int64_t width;  // head_dim, padded to whole vectors
  bool amx;
};

// A softmax under way (attention_scratch.h).
MANYLORA_INLINE int64_t part_floats(int64_t lines, int64_t width) {
  return round_up(2 * round_up(lines, kLineStep) + lines * width, kLineStep);
}

// The keys that the row at `position` sees, within [lo, hi).
struct Span {
  int64_t lo, hi;
};
MANYLORA_INLINE Span seen(const AttentionLayer& layer, int64_t position, int64_t lo, int64_t hi) {
  const int64_t begin = layer.window > 0 ? position - layer.window + 1 : 0;
  return {larger(lo, begin), least(hi, position + 1)};
}

MANYLORA_INLINE Span keys_of(const Task& task) {
  const int64_t begin = task.first_split * kSplit, end = begin + task.splits * kSplit;
  return {larger(task.unit->lo, begin), least(task.unit->hi, end)};
}

struct Work {
  Unit* units;
  Task* tasks;
  float* partials;
  int64_t unit_count;
  int64_t task_count;
};

// The unit of all KV heads whose first row is `row` of the sequence's [begin, end).
static Unit unit_of(const Call& call, const Sizes& sizes, int64_t sequence, int64_t row) {
  const int64_t end = call.batch->seq_starts[sequence + 1];
  Unit unit = {};
  unit.sequence = sequence;
  unit.row = row;
  unit.rows = least(sizes.unit_rows, end - row);
  unit.position = call.batch->context[sequence] - (end - row);
  unit.lo = seen(*call.layer, unit.position, 0, 1).lo;
  unit.hi = unit.position + unit.rows;
  unit.first_split = unit.lo / kSplit;
  unit.splits = ceil_div(unit.hi, kSplit) - unit.first_split;
  unit.heads = call.layer->kv_heads;
  unit.head_lines = unit.rows * sizes.group;
  return unit;
}

template <class Visit>
static void visit_units(const Call& call, const Sizes& sizes, const Visit& visit) {
  for (int64_t s = 0; s < call.batch->seqs; ++s) {
    const int64_t end = call.batch->seq_starts[s + 1];
    for (int64_t row = call.batch->seq_starts[s]; row < end; row += sizes.unit_rows) {
      visit(unit_of(call, sizes, s, row));
    }
  }
}

// A unit takes as many KV heads as its lines allow, since they lie side by side in a block; its
// splits are one task, or several where that is more than a fair part of the call.
static Work make_work(const Call& call, const Sizes& sizes) {
  const int64_t kv_heads = call.layer->kv_heads;
  int64_t pieces = 0, row_blocks = 0;  // a piece is a split with one KV head
  visit_units(call, sizes, [&](const Unit& unit) {
    pieces += unit.splits * kv_heads;
    ++row_blocks;
  });
  const int64_t fair = ceil_div(pieces, threads() * kTasksPerThread);

  Work work = {};
  work.units = static_cast<Unit*>(allocate(row_blocks * kv_heads, sizeof(Unit)));
  work.tasks = static_cast<Task*>(allocate(pieces, sizeof(Task)));
  int64_t shared = 0;
  visit_units(call, sizes, [&](Unit unit) {
    const int64_t fitting = larger(1, kUnitLines / unit.head_lines);
    const int64_t step = least(least(fitting, fair), kv_heads);
    const int64_t task_splits = larger(1, fair / step);
    for (unit.head = 0; unit.head < kv_heads; unit.head += step) {
      unit.heads = least(step, kv_heads - unit.head);
      unit.tasks = unit.remaining = ceil_div(unit.splits, task_splits);
      if (unit.tasks > 1) shared += unit.splits * part_floats(unit.lines(), sizes.width);
      Unit* const kept = work.units + work.unit_count++;
      *kept = unit;
      for (int64_t done = 0; done < unit.splits; done += task_splits) {
        work.tasks[work.task_count++] = {kept, unit.first_split + done,
                                         least(task_splits, unit.splits - done)};
      }
    }
  });
  float* next = work.partials = static_cast<float*>(allocate(shared, sizeof(float)));
  for (int64_t u = 0; u < work.unit_count; ++u) {
    Unit& unit = work.units[u];
    unit.partials = next;
    if (unit.tasks > 1) next += unit.splits * part_floats(unit.lines(), sizes.width);
  }
  return work;
}

static void release(const Work& work) {
  free(work.units);
  free(work.tasks);
  free(work.partials);
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
