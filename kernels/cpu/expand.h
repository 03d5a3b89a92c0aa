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

}  // namespace
}  // namespace MANYLORA_ISA
}  // namespace manylora
