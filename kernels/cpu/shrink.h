// h = A x for the rows of a job, A row-major [r, in]: dot products along x's own direction.
//
// A register tile holds rows x ranks. The first rows to meet A take one rank at a time, so that A
// is read strictly in the order of memory, which is what the hardware's prefetchers follow.

#pragma once

#include "ahead.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

// Reading A in order leaves each rank's sum as one chain of dependent additions. Where lanes are
// few, a chain longer than this takes longer than memory does.
constexpr int64_t kLongestChain = kLanes >= 16 ? INT64_MAX : 2048;

template <class T, int R, int J>
void shrink_tile(const T* const* x, const Job<T>& job, const T* a, int64_t in, Hidden<T>* h) {
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
      if (J == 1) fetch_ahead(job, a + k, kStep<T> * sizeof(T));
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
    for (int j = 0; j < J; ++j) from_float(sum(acc[i][j]), h + i * job.padded_rank + j);
  }
}

// Ranks [begin, end) of R rows, J at a time.
template <class T, int R, int J>
void shrink_ranks(const T* const* x, const Job<T>& job, int64_t in, int64_t begin, int64_t end,
                  Hidden<T>* h) {
  for (; begin + J <= end; begin += J) {
    shrink_tile<T, R, J>(x, job, job.a + begin * in, in, h + begin);
  }
  for (; begin < end; ++begin) {
    shrink_tile<T, R, 1>(x, job, job.a + begin * in, in, h + begin);
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

}  // namespace
}  // namespace MANYLORA_ISA
}  // namespace manylora
