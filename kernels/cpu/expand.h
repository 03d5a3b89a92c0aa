// y = out_scale * y + scale * B h + bias for the rows of a job. Lanes are outputs.
//
// B is packed (kernels/cpu/pack.py) in blocks of 64 outputs, within a block by rank, so that a
// register tile of rows x 4 vectors reads it strictly in the order of memory.

#pragma once

#include "ahead.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

constexpr int64_t kBlock = 64;  // outputs of a block of packed B; the last one may have 16, 32, 48
constexpr int64_t kUnit = 16;   // the outputs of a block are a multiple of this
// Columns that are gone through for one tile of rows after the other: y is met in the order of
// memory for a while, and the columns' part of a B of rank 16 stays in the core's first cache.
constexpr int64_t kRun = 512;

// One vector of a row's slice; `n` is given where it has less than kLanes columns.
template <class T, class... N>
MANYLORA_INLINE void finish(T* y, const Job<T>& job, int64_t column, Vec product, N... n) {
  Vec result = load(y, n...);
  if (job.out_scale != nullptr) result = mul(result, load(job.out_scale + column, n...));
  if (job.rank != 0) result = fma(splat(job.scale), product, result);
  if (job.bias != nullptr) result = add(result, load(job.bias + column, n...));
  store(y, result, n...);
}

// The same, of as many columns as the slice has from there on.
template <class T>
MANYLORA_INLINE void finish_part(T* y, const Job<T>& job, int64_t column, Vec product) {
  const int64_t left = job.size - column;
  if (left >= kLanes) {
    finish(y, job, column, product);
  } else if (left > 0) {
    finish(y, job, column, product, left);
  }
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
      if (R == 1) fetch_ahead(job, b + j * width + c * kStep<T>, kStep<T> * sizeof(T));
      for (int i = 0; i < R; ++i) acc[i][c] = dot(acc[i][c], bs, hs[i]);
    }
  }
  for (int i = 0; i < R; ++i) {
    T* y = t.y + job.rows[row + i] * t.y_stride + job.start + column;
    for (int c = 0; c < C; ++c) {
      finish_part(y + c * kLanes, job, column + c * kLanes, acc[i][c]);
    }
  }
}

// Columns [begin, end) of R rows, `begin` at a block's start: C vectors at a time.
template <class T, int R, int C>
void expand_rows(const Tensors<T>& t, const Job<T>& job, int64_t row, int64_t begin, int64_t end) {
  for (int64_t column = begin; column < end; column += kBlock) {
    const int64_t left = (end - column + kUnit - 1) / kUnit * kUnit;
    const int64_t width = left < kBlock ? left : kBlock;
    const T* b = job.b + column * job.padded_rank;
    int64_t c = 0;
    for (; c + C * kLanes <= width; c += C * kLanes) {
      expand_tile<T, R, C>(t, job, row, column + c, b + c * kDepth<T>, width);
    }
    for (; c < width; c += kUnit) {
      expand_tile<T, R, kUnit / kLanes>(t, job, row, column + c, b + c * kDepth<T>, width);
    }
  }
}

// Columns [begin, end) of the slice, `begin` at a block's start.
template <class T>
void expand(const Tensors<T>& t, const Job<T>& job, int64_t begin, int64_t end) {
  constexpr int kAll = kBlock / kLanes < 8 ? kBlock / kLanes : 8;
  for (int64_t column = begin, next; column < end; column = next) {
    next = column + kRun < end ? column + kRun : end;
    int64_t row = 0;
    for (; row + kTileRows <= job.row_count; row += kTileRows) {
      expand_rows<T, kTileRows, 4>(t, job, row, column, next);
    }
    for (; row < job.row_count; ++row) expand_rows<T, 1, kAll>(t, job, row, column, next);
  }
}

}  // namespace
}  // namespace MANYLORA_ISA
}  // namespace manylora
