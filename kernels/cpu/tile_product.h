// A small matrix product on tiles in a thread's cache: lines x depth times depth x columns.

#pragma once

#include "attention_fetch.h"

namespace manylora {
namespace MANYLORA_ISA {

// The part of c that is kept in registers.
constexpr int kBlockLines = kManyRegisters ? 6 : 4;
constexpr int kBlockVecs = kManyRegisters ? 4 : 2;

// The right side of a product, its depth in parts: each [depth / kDepth] steps of so many elements.
// vector(part, n): where the n-th vector of columns begins.
template <class Vector>
struct Right {
  const Vector& vector;
  int64_t parts, depth, stride;
};

// ahead: a Fetch*, or nullptr as such: with a test for it in each step prefill took 1.1 times as
// long on AVX2.
template <class E, int M, int N, class Vector, class Ahead>
MANYLORA_INLINE void product_block(const Hidden<E>* a, int64_t a_stride, const Right<Vector>& b,
                                   int64_t column, const float* keep, float* c, int64_t c_stride,
                                   Ahead ahead) {
  constexpr int64_t kBytes = N * kStep<E> * static_cast<int64_t>(sizeof(E));
  constexpr int64_t kFetchSteps = kBytes < kFetchBytes ? kFetchBytes / kBytes : 1;
  Vec acc[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      acc[m][n] = keep ? mul(splat(keep[m]), load(c + m * c_stride + n * kLanes)) : zero();
    }
  }
  for (int64_t part = 0; part < b.parts; ++part, a += b.depth) {
    const E* from[N];
    for (int n = 0; n < N; ++n) from[n] = b.vector(part, column + n);
    for (int64_t k = 0, at = 0; k < b.depth; k += kDepth<E>, at += b.stride) {
      Operand<E> right[N];
      if (k / kDepth<E> % kFetchSteps == 0) fetch_bytes(ahead, kFetchBytes);
      for (int n = 0; n < N; ++n) right[n] = load_operand<E>(from[n] + at);
      for (int m = 0; m < M; ++m) {
        const Operand<E> left = broadcast<E>(a + m * a_stride + k);
        for (int n = 0; n < N; ++n) acc[m][n] = dot(acc[m][n], left, right[n]);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) store(c + m * c_stride + n * kLanes, acc[m][n]);
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

template <class E, int N, class Vector>
static void product_lines(int64_t lines, const Hidden<E>* a, int64_t a_stride,
                          const Right<Vector>& b, int64_t column, const float* keep, float* c,
                          int64_t c_stride, Fetch* fetch) {
  const auto lines_at = [&](int64_t m, auto ahead) {
    const auto block = [&](auto count) {
      product_block<E, decltype(count)::value, N>(a + m * a_stride, a_stride, b, column,
                                                  keep ? keep + m : nullptr, c + m * c_stride,
                                                  c_stride, ahead);
    };
    const int64_t left = lines - m < kBlockLines ? lines - m : kBlockLines;
    if (left == 1) block(Count<1>());
    if (left == 2) block(Count<2>());
    if (left == 3) block(Count<3>());
    if (left == 4) block(Count<4>());
    if constexpr (kBlockLines == 6) {
      if (left == 5) block(Count<5>());
      if (left == 6) block(Count<6>());
    }
  };
  lines_at(0, fetch);
  for (int64_t m = kBlockLines; m < lines; m += kBlockLines) lines_at(m, nullptr);
}

// c [lines][vecs * kLanes] = keep[line] * c + a b; without keep, c = a b.
// a: [lines][parts * depth]; strides in elements.
// Each element of c is one accumulator's sum over ascending depth, whatever the product's size.
// fetch: what is brought from memory meanwhile, as many bytes as b has.
template <class E, class Vector>
static void product(int64_t lines, int64_t vecs, const Hidden<E>* a, int64_t a_stride,
                    const Right<Vector>& b, const float* keep, float* c, int64_t c_stride,
                    Fetch* fetch) {
  const auto columns = [&](int64_t n, auto count) {
    product_lines<E, decltype(count)::value>(lines, a, a_stride, b, n, keep, c + n * kLanes,
                                             c_stride, fetch);
  };
  int64_t n = 0;
  for (; n + kBlockVecs <= vecs; n += kBlockVecs) columns(n, Count<kBlockVecs>());
  if (kBlockVecs > 2 && n + 2 <= vecs) columns(n, Count<2>()), n += 2;
  if (n < vecs) columns(n, Count<1>());
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
