// AMX tiles: 8 registers of up to 16 rows of 64 bytes, whose shapes are set before they are used.
// Included where __AMX_BF16__ is defined.
//
// _tile_dpbf16ps(c, a, b): c[m][n] += sum over 32 k of a[m][k] * b[k / 2][n][k % 2]. Even and odd k
// are summed apart from zero and then added to c, so how many m and n there are changes no bit.

#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "simd.h"

namespace manylora {
namespace MANYLORA_ISA {

constexpr int64_t kTileBytes = 64;  // of a whole row
constexpr int64_t kTileLines = 16;  // rows of a whole tile
constexpr int64_t kTileDepth = 32;  // bfloat16 of a whole row

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  __attribute__((always_inline)) void set(int tile, int64_t its_rows, int64_t its_bytes) {
    rows[tile] = static_cast<uint8_t>(its_rows);
    bytes[tile] = static_cast<uint16_t>(its_bytes);
  }
  __attribute__((always_inline)) void use() const {
    asm volatile("" : : "r"(this) : "memory");  // the intrinsic does not say that it reads all of it
    _tile_loadconfig(this);
    asm volatile("" : : "r"(this) : "memory");
  }
};

// The compiler's intrinsics are macros that want their tiles' numbers as literals, and do not say
// that a load reads memory which has just been written.
template <int Tile>
__attribute__((always_inline)) static inline void load_tile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(Tile) : "memory");
}
template <int C, int A, int B>
__attribute__((always_inline)) static inline void multiply_tile() {
  asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "i"(B), "i"(A), "i"(C));
}

// C is tiles 0 to N - 1.
template <int N>
__attribute__((always_inline)) static inline void zero_tiles() {
  if constexpr (N > 0) {
    zero_tiles<N - 1>();
    asm volatile("tilezero %%tmm%c0" : : "i"(N - 1));
  }
}

// Tile n begins n * step floats from `to`; rows are row_bytes apart.
template <int N>
__attribute__((always_inline)) static inline void store_tiles(float* to, int64_t step,
                                                              int64_t row_bytes) {
  if constexpr (N > 0) {
    store_tiles<N - 1>(to, step, row_bytes);
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
                 : : "r"(to + (N - 1) * step), "r"(row_bytes), "i"(N - 1) : "memory");
  }
}

// C += tile A, which is loaded, times columns(n), each through tile B.
template <int N, int A, int B, class Columns>
__attribute__((always_inline)) static inline void multiply_tiles(const Columns& columns,
                                                                 int64_t row_bytes) {
  if constexpr (N > 0) {
    multiply_tiles<N - 1, A, B>(columns, row_bytes);
    load_tile<B>(columns(N - 1), row_bytes);
    multiply_tile<N - 1, A, B>();
  }
}

// A pair of bfloat16 in each lane, apart.
MANYLORA_INLINE Vec even_of(__m512i pairs) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
}
MANYLORA_INLINE Vec odd_of(__m512i pairs) {
  return {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)))};
}

// While it lives, numbers below 2^-126 are taken for zero, as tiles take them.
class FlushDenormals {
 public:
  FlushDenormals() { _mm_setcsr(mode_ | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON); }
  ~FlushDenormals() { _mm_setcsr(mode_); }
  FlushDenormals(const FlushDenormals&) = delete;

 private:
  const unsigned mode_ = _mm_getcsr();
};

}  // namespace MANYLORA_ISA
}  // namespace manylora
