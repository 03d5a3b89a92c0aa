// A small matrix product on tiles in a thread's cache: lines x depth times depth x columns.

#pragma once

#include "attention_fetch.h"

namespace manylora {
namespace MANYLORA_ISA {

// The part of c that is kept in registers.
constexpr int kBlockVecs = kManyRegisters ? 4 : 2;
template <bool Halves>
inline constexpr int kBlockLines = kManyRegisters ? 6 : Halves ? 3 : 4;

// The right side of a product, its depth in parts: each [depth / kDepth] steps of so many elements.
// vector(part, n): where the n-th vector of columns begins.
template <class Vector>
struct Right {
  const Vector& vector;
  int64_t parts, depth, stride;
};

// Sums of M lines by N vectors of columns.
template <class E, int M, int N, bool Halves>
struct Sums {
  Vec acc[M][N];

  void begin(int m, int n, Vec from) { acc[m][n] = from; }
  void step(const Hidden<E>* a, int64_t a_stride, const E* const* from, int64_t at) {
    Operand<E> right[N];
    for (int n = 0; n < N; ++n) right[n] = load_operand<E>(from[n] + at);
    for (int m = 0; m < M; ++m) {
      const Operand<E> left = broadcast<E>(a + m * a_stride);
      for (int n = 0; n < N; ++n) acc[m][n] = dot(acc[m][n], left, right[n]);
    }
  }
  Vec total(int m, int n) const { return acc[m][n]; }
};

#if !defined(__AVX512BF16__)
// The halves of pairs by themselves: no multiply-add waits for another one of its step.
template <int M, int N>
struct Sums<bf16, M, N, true> {
  Vec even[M][N], odd[M][N];

  void begin(int m, int n, Vec from) {
    even[m][n] = from;
    odd[m][n] = zero();
  }
  void step(const float* a, int64_t a_stride, const bf16* const* from, int64_t at) {
    Vec right[N];
    for (int n = 0; n < N; ++n) right[n] = load_operand<bf16>(from[n] + at).even;
    for (int m = 0; m < M; ++m) {
      const Vec left = splat(a[m * a_stride]);
      for (int n = 0; n < N; ++n) even[m][n] = fma(left, right[n], even[m][n]);
    }
    for (int n = 0; n < N; ++n) right[n] = load_operand<bf16>(another(from[n] + at)).odd;
    for (int m = 0; m < M; ++m) {
      const Vec left = splat(a[m * a_stride + 1]);
      for (int n = 0; n < N; ++n) odd[m][n] = fma(left, right[n], odd[m][n]);
    }
  }
  Vec total(int m, int n) const { return add(even[m][n], odd[m][n]); }

  // The same pointer. Of three lines all registers but four hold sums: GCC would load both halves
  // at once, and spill sums.
  static const bf16* another(const bf16* p) {
    asm volatile("" : "+r"(p));
    return p;
  }
};
#endif

// Steps of a product between which is counted what has been fetched: counted in each, it is what
// the steps wait for. No more than `advance` may pass.
constexpr int kRound = kTurn;

// Fetches: whether `fetch` is given; with a test for it in each step prefill took 1.1 times as long
// on AVX2.
template <class E, int M, int N, bool Halves, bool Fetches, class Vector>
MANYLORA_INLINE void product_block(const Hidden<E>* a, int64_t a_stride, const Right<Vector>& b,
                                   int64_t column, const float* keep, float* c, int64_t c_stride,
                                   Fetch* fetch) {
  constexpr int64_t kBytes = N * kStep<E> * static_cast<int64_t>(sizeof(E));
  constexpr int kFetchSteps = kBytes < kFetchBytes ? kFetchBytes / kBytes : 1;
  static_assert(kRound % kFetchSteps == 0);
  Sums<E, M, N, Halves> sums;
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      sums.begin(m, n, keep ? mul(splat(keep[m]), load(c + m * c_stride + n * kLanes)) : zero());
    }
  }
  for (int64_t part = 0; part < b.parts; ++part, a += b.depth) {
    const E* from[N];
    for (int n = 0; n < N; ++n) from[n] = b.vector(part, column + n);
    int64_t k = 0, at = 0;
    if constexpr (Fetches) {
      for (; k + kRound * kDepth<E> <= b.depth; advance(fetch, kRound / kFetchSteps)) {
        for (int i = 0; i < kRound; ++i, k += kDepth<E>, at += b.stride) {
          if (i % kFetchSteps == 0) fetch_group(fetch, fetch->group + i / kFetchSteps);
          sums.step(a + k, a_stride, from, at);
        }
      }
    }
    for (; k < b.depth; k += kDepth<E>, at += b.stride) sums.step(a + k, a_stride, from, at);
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) store(c + m * c_stride + n * kLanes, sums.total(m, n));
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

template <class E, int N, bool Halves, class Vector>
static void product_lines(int64_t lines, const Hidden<E>* a, int64_t a_stride,
                          const Right<Vector>& b, int64_t column, const float* keep, float* c,
                          int64_t c_stride, Fetch* fetch) {
  int64_t m = 0;
  const auto some = [&](auto fetches) {
    const auto block = [&](auto count) {
      product_block<E, decltype(count)::value, N, Halves, decltype(fetches)::value != 0>(
          a + m * a_stride, a_stride, b, column, keep ? keep + m : nullptr, c + m * c_stride,
          c_stride, fetch);
    };
    constexpr int kMost = kBlockLines<Halves>;
    const int64_t left = lines - m, count = left < kMost ? left : kMost;
    if (count == 1) block(Count<1>());
    if (count == 2) block(Count<2>());
    if (count == 3) block(Count<3>());
    if constexpr (kMost >= 4) {
      if (count == 4) block(Count<4>());
    }
    if constexpr (kMost == 6) {
      if (count == 5) block(Count<5>());
      if (count == 6) block(Count<6>());
    }
    m += count;
  };
  if (fetch != nullptr) some(Count<1>());
  while (m < lines) some(Count<0>());
}

template <class E, bool Halves, class Vector>
static void product_columns(int64_t lines, int64_t vecs, const Hidden<E>* a, int64_t a_stride,
                            const Right<Vector>& b, const float* keep, float* c, int64_t c_stride,
                            Fetch* fetch) {
  const auto columns = [&](int64_t n, auto count) {
    product_lines<E, decltype(count)::value, Halves>(lines, a, a_stride, b, n, keep,
                                                     c + n * kLanes, c_stride, fetch);
  };
  int64_t n = 0;
  for (; n + kBlockVecs <= vecs; n += kBlockVecs) columns(n, Count<kBlockVecs>());
  if (kBlockVecs > 2 && n + 2 <= vecs) columns(n, Count<2>()), n += 2;
  if (n < vecs) columns(n, Count<1>());
}

// c [lines][vecs * kLanes] = keep[line] * c + a b; without keep, c = a b.
// a: [lines][parts * depth]; strides in elements.
// Each element of c is a sum in an order that depends on `group` alone, of which `lines` are a
// multiple: where registers are few and lines do not come in fours, the halves of pairs are summed
// by themselves.
// fetch: what is brought from memory meanwhile, about as many bytes as b has; or null.
template <class E, class Vector>
static void product(int64_t group, int64_t lines, int64_t vecs, const Hidden<E>* a,
                    int64_t a_stride, const Right<Vector>& b, const float* keep, float* c,
                    int64_t c_stride, Fetch* fetch) {
  if constexpr (kDepth<E> == 2 && !kManyRegisters) {
    if (group % 4 != 0) {
      return product_columns<E, true>(lines, vecs, a, a_stride, b, keep, c, c_stride, fetch);
    }
  }
  product_columns<E, false>(lines, vecs, a, a_stride, b, keep, c, c_stride, fetch);
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
