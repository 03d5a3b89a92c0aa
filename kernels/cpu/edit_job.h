// What Python hands over for a call (group, table, plan), and a job: a segment of rows, a slice.

#pragma once

#include "simd.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

constexpr int kTileRows = kManyRegisters ? 4 : 2;  // of a register tile 4 vectors wide
constexpr int64_t kMaxSegment = 64;  // MAX_SEGMENT_ROWS of kernels/plan.py

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

class Ahead;

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
  int64_t b_column;  // at which b begins
  Ahead* ahead;  // null: it is not known what is read next

  bool idle() const { return rank == 0 && out_scale == nullptr && bias == nullptr; }
};

}  // namespace
}  // namespace MANYLORA_ISA
}  // namespace manylora
