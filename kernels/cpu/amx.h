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

__attribute__((always_inline)) static inline int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  __attribute__((always_inline)) void set(int tile, int64_t its_rows, int64_t its_bytes) {
    rows[tile] = static_cast<uint8_t>(its_rows);
    bytes[tile] = static_cast<uint16_t>(its_bytes);
  }
  __attribute__((always_inline)) void use() const { _tile_loadconfig(this); }
};

// C is tiles 0 to N - 1; the intrinsics want their tiles' numbers as literals.
template <int N>
__attribute__((always_inline)) static inline void zero_tiles() {
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (N > 2) _tile_zero(2);
  if constexpr (N > 3) _tile_zero(3);
  if constexpr (N > 4) _tile_zero(4);
  if constexpr (N > 5) _tile_zero(5);
}

// Tile n begins n * step floats from `to`; rows are row_bytes apart.
template <int N>
__attribute__((always_inline)) static inline void store_tiles(float* to, int64_t step,
                                                              int64_t row_bytes) {
  _tile_stored(0, to, row_bytes);
  if constexpr (N > 1) _tile_stored(1, to + step, row_bytes);
  if constexpr (N > 2) _tile_stored(2, to + 2 * step, row_bytes);
  if constexpr (N > 3) _tile_stored(3, to + 3 * step, row_bytes);
  if constexpr (N > 4) _tile_stored(4, to + 4 * step, row_bytes);
  if constexpr (N > 5) _tile_stored(5, to + 5 * step, row_bytes);
}

// C += A, in 4, times columns(n), through 6.
template <int N, class Columns>
__attribute__((always_inline)) static inline void multiply_tiles(const void* a, int64_t a_bytes,
                                                                 const Columns& columns,
                                                                 int64_t b_bytes) {
  static_assert(N <= 4);
  _tile_loadd(4, a, a_bytes);
  _tile_loadd(6, columns(0), b_bytes);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (N > 1) {
    _tile_loadd(6, columns(1), b_bytes);
    _tile_dpbf16ps(1, 4, 6);
  }
  if constexpr (N > 2) {
    _tile_loadd(6, columns(2), b_bytes);
    _tile_dpbf16ps(2, 4, 6);
  }
  if constexpr (N > 3) {
    _tile_loadd(6, columns(3), b_bytes);
    _tile_dpbf16ps(3, 4, 6);
  }
}

// The same through 5 and 7, which have the shapes of less depth.
template <int N, class Columns>
__attribute__((always_inline)) static inline void multiply_short_tiles(const void* a,
                                                                       int64_t a_bytes,
                                                                       const Columns& columns,
                                                                       int64_t b_bytes) {
  static_assert(N <= 4);
  _tile_loadd(5, a, a_bytes);
  _tile_loadd(7, columns(0), b_bytes);
  _tile_dpbf16ps(0, 5, 7);
  if constexpr (N > 1) {
    _tile_loadd(7, columns(1), b_bytes);
    _tile_dpbf16ps(1, 5, 7);
  }
  if constexpr (N > 2) {
    _tile_loadd(7, columns(2), b_bytes);
    _tile_dpbf16ps(2, 5, 7);
  }
  if constexpr (N > 3) {
    _tile_loadd(7, columns(3), b_bytes);
    _tile_dpbf16ps(3, 5, 7);
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
