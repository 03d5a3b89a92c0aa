// AMX tiles: 8 registers of up to 16 rows of 64 bytes, whose shapes are set before they are used.
// Included where __AMX_BF16__ is defined.
//
// _tile_dpbf16ps(c, a, b): c[m][n] += sum over 32 k of a[m][k] * b[k / 2][n][k % 2]. Even and odd k
// are summed apart from zero and then added to c, so how many m and n there are changes no bit.

#pragma once

#include <immintrin.h>
#include <stdint.h>

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

}  // namespace MANYLORA_ISA
}  // namespace manylora
