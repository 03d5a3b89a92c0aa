// A and B as the edits read them (pack.py), many in one call.
//
// A matrix [lines, columns] becomes blocks of `block` lines, the last of those that are left, rounded
// up to whole `unit`s. A block lies [columns / depth][lines][depth], its columns rounded up to whole
// depths. Zeros fill what is rounded up. For bfloat16 on AMX the result is then made compact.

#include <stdlib.h>

#include "compact.h"
#include "simd.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

// pack.py has the same words. Strides in elements; start: of the result, in the buffer's elements,
// written here.
struct Matrix {
  const void* from;
  int64_t dtype, line_stride, column_stride, lines, columns, start, block, unit, depth;
};

constexpr int64_t kMostLines = 64, kColumns = 64;

template <class T>
MANYLORA_INLINE void convert(T x, T* out) {
  *out = x;
}
template <class S, class T>
MANYLORA_INLINE void convert(S x, T* out) {
  from_float(to_float(x), out);
}

template <class S, class T>
MANYLORA_INLINE void read_line(const S* from, int64_t stride, int64_t columns, T* to) {
  if (stride == 1) {
    for (int64_t i = 0; i < columns; ++i) convert(from[i], to + i);
  } else {
    for (int64_t i = 0; i < columns; ++i) convert(from[i * stride], to + i);
  }
}

// to[i][line] = from[line][i], each of `Depth` elements.
template <int Depth, class T>
void turn(const T* from, int64_t stride, int64_t lines, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i, from += Depth) {
    for (int64_t line = 0; line < lines; ++line, to += Depth) {
      memcpy(to, from + line * stride, Depth * sizeof(T));
    }
  }
}

template <class T>
void turn(const T* from, int64_t stride, int64_t lines, int64_t columns, int64_t depth, T* to) {
  if (depth == 2) return turn<2>(from, stride, lines, columns / 2, to);
  turn<1>(from, stride, lines, columns, to);
}

// Whether a block can be turned as it lies.
template <class S, class T>
constexpr bool kSame = false;
template <class T>
constexpr bool kSame<T, T> = true;

template <class S, class T>
void pack_block(const Matrix& m, const S* from, int64_t lines, int64_t padded, T* to) {
  if (m.block == 1) return read_line(from, m.column_stride, m.columns, to);
  const bool whole = m.columns % m.depth == 0 && lines == padded;
  if constexpr (kSame<S, T>) {
    if (whole && m.column_stride == 1) {
      return turn(from, m.line_stride, lines, m.columns, m.depth, to);
    }
  }
  alignas(64) T part[kMostLines][kColumns];
  memset(part + lines, 0, static_cast<size_t>(padded - lines) * sizeof part[0]);
  for (int64_t column = 0; column < m.columns; column += kColumns) {
    const int64_t columns = least(kColumns, m.columns - column), whole = round_up(columns, m.depth);
    for (int64_t line = 0; line < lines; ++line) {
      read_line(from + line * m.line_stride + column * m.column_stride, m.column_stride, columns,
                part[line]);
      for (int64_t i = columns; i < whole; ++i) part[line][i] = {};
    }
    turn(part[0], kColumns, padded, whole, m.depth, to);
    to += padded * whole;
  }
}

template <class S, class T>
void pack_matrix(const Matrix& m, T* to) {
  for (int64_t line = 0; line < m.lines; line += m.block) {
    const int64_t lines = least(m.block, m.lines - line), padded = round_up(lines, m.unit);
    pack_block(m, static_cast<const S*>(m.from) + line * m.line_stride, lines, padded, to);
    to += padded * round_up(m.columns, m.depth);
  }
}

template <class T>
void pack_from(const Matrix& m, T* to) {
  with_type(m.dtype, [&](auto t) { pack_matrix<decltype(t)>(m, to); });
}

int64_t numel(const Matrix& m) { return round_up(m.lines, m.unit) * round_up(m.columns, m.depth); }

// Packs one matrix; returns how many elements it takes. part: memory for one, where it is compact.
template <class T>
int64_t pack_one(const Matrix& m, T* to, T*) {
  pack_from(m, to);
  return numel(m);
}
#if defined(__AMX_BF16__)
int64_t pack_one(const Matrix& m, bf16* to, bf16* part) {
  pack_from(m, part);
  return compact(to, part, numel(m)) / static_cast<int64_t>(sizeof(bf16));
}
#endif

// One after the other from element *end on, each on a cache line.
template <class T>
void pack_all(T* buffer, Matrix* matrices, int64_t count, int64_t* end) {
  constexpr int64_t kLine = 64 / sizeof(T);
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = numel(matrices[i]) > most ? numel(matrices[i]) : most;
  T* const part = static_cast<T*>(malloc(static_cast<size_t>(most) * sizeof(T) + 1));
  if (part == nullptr) abort();
  for (int64_t i = 0; i < count; ++i) {
    matrices[i].start = round_up(*end, kLine);
    *end = matrices[i].start + pack_one(matrices[i], buffer + matrices[i].start, part);
  }
  free(part);
}

}  // namespace

void pack(void* buffer, int64_t dtype, void* matrices, int64_t count, int64_t* end) {
  Matrix* const all = static_cast<Matrix*>(matrices);
  with_type(dtype, [&](auto t) {
    pack_all(static_cast<decltype(t)*>(buffer), all, count, end);
  });
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
