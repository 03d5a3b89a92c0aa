// Scores and weighted values of a tile on AMX: C 0 to 3, A 4 and B 6 of 32 elements' depth, A 5 and
// B 7 of 16. A and C have the rows of `configure`; B lies in the cache as it is.
//
// Lines are taken `configured` at a time; the last of them may repeat lines that came before.

#pragma once

#include "amx.h"
#include "attention_fetch.h"

namespace manylora {
namespace MANYLORA_ISA {

MANYLORA_INLINE int64_t configured(int64_t lines) { return least(lines, kTileLines); }

// For heads of so many lines.
static void configure(int64_t lines) {
  TileShapes shapes;
  for (int i = 0; i < 5; ++i) shapes.set(i, configured(lines), kTileBytes);
  shapes.set(5, configured(lines), kTileBytes / 2);
  shapes.set(6, kTileLines, kTileBytes);
  shapes.set(7, kTileLines / 2, kTileBytes);
  shapes.use();
}

template <int N>
static void score_tiles(const bf16* q, int64_t head_dim, const bf16* const* keys, float* scores,
                        int64_t stride, Fetch* fetch) {
  zero_tiles<N>();
  int64_t d = 0;
  for (; d + 32 <= head_dim; d += 32) {
    const int64_t at = d * kGroup;
    const auto columns = [&](int n) {
      fetch_bytes(fetch, kTileLines * kTileBytes);
      return keys[n] + at;
    };
    load_tile<4>(q + d, head_dim * 2);
    multiply_tiles<N, 4, 6>(columns, kTileBytes);
  }
  if (d < head_dim) {
    const int64_t at = d * kGroup;
    const auto columns = [&](int n) {
      fetch_bytes(fetch, kTileLines / 2 * kTileBytes);
      return keys[n] + at;
    };
    load_tile<5>(q + d, head_dim * 2);
    multiply_tiles<N, 5, 7>(columns, kTileBytes);
  }
  store_tiles<N>(scores, kGroup, stride * 4);
}

// scores [lines][groups * 16] = q [lines][head_dim] times the groups' keys.
static void score_amx(int64_t lines, const bf16* q, int64_t head_dim, const bf16* const* keys,
                      int64_t groups, float* scores, int64_t stride, Fetch* fetch) {
  const int64_t rows = configured(lines);
  for (int64_t i = 0; i < lines; i += rows) {
    const int64_t line = i + rows <= lines ? i : lines - rows;
    const bf16* const from = q + line * head_dim;
    float* const to = scores + line * stride;
    if (i > 0) fetch = nullptr;
    if (groups == 1) score_tiles<1>(from, head_dim, keys, to, stride, fetch);
    if (groups == 2) score_tiles<2>(from, head_dim, keys, to, stride, fetch);
    if (groups == 3) score_tiles<3>(from, head_dim, keys, to, stride, fetch);
    if (groups == 4) score_tiles<4>(from, head_dim, keys, to, stride, fetch);
  }
}

// Columns [column, column + N * 16) of the weighted sum of the groups' values.
template <int N>
static void weigh_tiles(const bf16* weights, int64_t weight_stride, const bf16* const* values,
                        int64_t groups, int64_t column, int64_t head_dim, float* sums,
                        Fetch* fetch) {
  const int64_t row_bytes = head_dim * 4;
  zero_tiles<N>();
  for (int64_t g = 0; g < groups; ++g) {
    const bf16* const b = values[g] + column * 2;
    const auto columns = [&](int n) {
      fetch_bytes(fetch, kTileLines / 2 * kTileBytes);
      return b + n * kTileDepth;
    };
    load_tile<5>(weights + g * kGroup, weight_stride * 2);
    multiply_tiles<N, 5, 7>(columns, row_bytes);
  }
  store_tiles<N>(sums + column, kTileLines, head_dim * 4);
}

// sums [head_lines][head_dim]: those of [line, line + lines) = weights times the groups' values;
// others may be overwritten, so the caller takes what it wants before the next call.
static void weigh_amx(int64_t head_lines, int64_t line, int64_t lines, const bf16* weights,
                      int64_t weight_stride, const bf16* const* values, int64_t groups,
                      int64_t head_dim, float* sums, Fetch* fetch) {
  const int64_t rows = configured(head_lines), end = line + lines;
  for (int64_t i = line; i < end; i += rows) {
    const int64_t first = i + rows <= head_lines ? i : head_lines - rows;
    const bf16* const w = weights + first * weight_stride;
    float* const to = sums + first * head_dim;
    if (i > line) fetch = nullptr;
    int64_t d = 0;
    for (; d + 64 <= head_dim; d += 64) {
      weigh_tiles<4>(w, weight_stride, values, groups, d, head_dim, to, fetch);
    }
    for (; d < head_dim; d += 16) {
      weigh_tiles<1>(w, weight_stride, values, groups, d, head_dim, to, fetch);
    }
  }
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
