// Operations that go over each row of a matrix by itself.

#pragma once

#include "parallel.h"
#include "simd.h"

namespace manylora {
namespace MANYLORA_ISA {

// Less work, in elements that a norm reads, is not worth waking a thread.
constexpr int64_t kTaskWork = 32768;

// A vector's worth of a row, or less at its end.
struct Whole {};
struct Tail {
  int64_t n;
};
template <class T>
MANYLORA_INLINE Vec load(const T* p, Whole) {
  return load(p);
}
template <class T>
MANYLORA_INLINE Vec load(const T* p, Tail tail) {
  return load(p, tail.n);
}
template <class T>
MANYLORA_INLINE void store(T* p, Vec x, Whole) {
  store(p, x);
}
template <class T>
MANYLORA_INLINE void store(T* p, Vec x, Tail tail) {
  store(p, x, tail.n);
}

// Calls visit(i, part) for each vector of n elements.
template <class Visit>
MANYLORA_INLINE void each_vec(int64_t n, const Visit& visit) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) visit(i, Whole());
  if (i < n) visit(i, Tail{n - i});
}

// Calls visit(row) for each row, on several threads if there is much to do.
template <class Visit>
static void each_row(int64_t rows, int64_t row_work, const Visit& visit) {
  const int64_t step = kTaskWork / (row_work + 1) + 1;
  parallel_tasks((rows + step - 1) / step, threads(), [&](int64_t task) {
    const int64_t end = (task + 1) * step < rows ? (task + 1) * step : rows;
    for (int64_t row = task * step; row < end; ++row) visit(row);
  });
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
