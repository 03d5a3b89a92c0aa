// h = A x for the rows of a bfloat16 job on AMX tiles, in place of shrink.h.
//
// 16 ranks of A are tile a as they lie in memory. x is tile b, [32 / 2][rows][2]: one row as it lies
// in memory; more are transposed in pairs, a panel of k at a time, for up to 64 ranks. One row takes
// tiles too, since AMX sums in an order of its own and a row's bits may not depend on how many rows
// its adapter has.

#pragma once

#include "amx.h"
#include "shrink.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

constexpr int64_t kPanelDepth = 512;  // k of a panel of x, which 16 KB hold
constexpr int kMostBlocks = 4;        // of 16 ranks, that a panel meets at once

// Reads memory in its own order, which the hardware's prefetchers follow: a tile's rows lie apart.
MANYLORA_INLINE void touch(const Job<bf16>& job, const bf16* p, int64_t count) {
  __m512i any = _mm512_setzero_si512();
  for (int64_t i = 0; i + kTileDepth <= count; i += kTileDepth) {
    fetch_ahead(job, p + i, kTileBytes);
    any = _mm512_or_si512(any, _mm512_loadu_si512(p + i));
  }
  asm volatile("" : : "v"(any));
}

// `lines` rows of `depth` < 32 elements, `stride` elements apart, padded with zeros.
MANYLORA_INLINE void pad(const bf16* from, int64_t stride, int64_t lines, int64_t depth,
                         bf16 (*to)[kTileDepth]) {
  const __mmask32 mask = (1u << depth) - 1u;
  for (int64_t i = 0; i < lines; ++i) {
    _mm512_storeu_si512(to[i], _mm512_maskz_loadu_epi16(mask, from + i * stride));
  }
}

// Tile b of 16 rows of x from k on, of which the rows have `depth` elements left.
MANYLORA_INLINE void transpose_pairs(const bf16* const* x, int64_t k, int64_t depth, bf16* to) {
  const __mmask32 mask = depth < kTileDepth ? (1u << depth) - 1u : ~0u;
  Vec rows[kTileLines];
  for (int i = 0; i < kTileLines; ++i) {
    rows[i].v = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, x[i] + k));
  }
  transpose(rows);
  for (int i = 0; i < kTileLines; ++i) _mm512_storeu_ps(to + i * kTileDepth, rows[i].v);
}

// c 0 to Blocks - 1 += 16 ranks each by tile b in 6; a in 4, and in 5 the last, maybe smaller one.
template <int Blocks>
MANYLORA_INLINE void multiply(const bf16* a, int64_t stride, int64_t block) {
  if constexpr (Blocks > 1) {
    _tile_loadd(4, a, stride);
    _tile_dpbf16ps(0, 4, 6);
  }
  if constexpr (Blocks > 2) {
    _tile_loadd(4, a + block, stride);
    _tile_dpbf16ps(1, 4, 6);
  }
  if constexpr (Blocks > 3) {
    _tile_loadd(4, a + 2 * block, stride);
    _tile_dpbf16ps(2, 4, 6);
  }
  _tile_loadd(5, a + (Blocks - 1) * block, stride);
  if constexpr (Blocks == 1) _tile_dpbf16ps(0, 5, 6);
  if constexpr (Blocks == 2) _tile_dpbf16ps(1, 5, 6);
  if constexpr (Blocks == 3) _tile_dpbf16ps(2, 5, 6);
  if constexpr (Blocks == 4) _tile_dpbf16ps(3, 5, 6);
}

// sums[rank][row] of up to 16 rows; One: of one row, its sums side by side.
template <int Blocks, bool One>
void shrink_tiles(const bf16* const* x, const bf16* a, int64_t ranks, int64_t in, float* sums) {
  alignas(64) bf16 panel[kPanelDepth * kTileLines];
  zero_tiles<Blocks>();
  for (int64_t first = 0; first < in; first += kPanelDepth) {
    const int64_t end = least(in, first + kPanelDepth);
    for (int64_t k = first; !One && k < end; k += kTileDepth) {
      transpose_pairs(x, k, end - k, panel + (k - first) * kTileLines);
    }
    for (int64_t k = first; k < end; k += kTileDepth) {
      const bool whole = end - k >= kTileDepth;
      alignas(64) bf16 last[kMostBlocks * kTileLines][kTileDepth], last_x[1][kTileDepth];
      if (!One) {
        _tile_loadd(6, panel + (k - first) * kTileLines, kTileBytes);
      } else if (whole) {
        _tile_loadd(6, x[0] + k, 4);
      } else {
        pad(x[0] + k, 0, 1, end - k, last_x);
        _tile_loadd(6, last_x, 4);
      }
      if (whole) {
        multiply<Blocks>(a + k, in * 2, kTileLines * in);
      } else {
        pad(a + k, in, ranks, end - k, last);
        multiply<Blocks>(last[0], kTileBytes, kTileLines * kTileDepth);
      }
    }
  }
  constexpr int64_t kRowBytes = One ? 4 : kTileBytes, kStored = One ? kTileLines : 256;
  store_tiles<Blocks>(sums, kStored, kRowBytes);
}

template <bool One>
MANYLORA_INLINE void shrink_tiles(int64_t blocks, const bf16* const* x, const bf16* a,
                                  int64_t ranks, int64_t in, float* sums) {
  if (blocks == 1) return shrink_tiles<1, One>(x, a, ranks, in, sums);
  if (blocks == 2) return shrink_tiles<2, One>(x, a, ranks, in, sums);
  if (blocks == 3) return shrink_tiles<3, One>(x, a, ranks, in, sums);
  shrink_tiles<4, One>(x, a, ranks, in, sums);
}

// Rows [row, row_end) and up to 64 ranks from `rank` on of a job.
void shrink_ranks(const Tensors<bf16>& t, const Job<bf16>& job, int64_t row, int64_t row_end,
                  int64_t rank, int64_t ranks) {
  const int64_t blocks = (ranks + kTileLines - 1) / kTileLines;
  const int64_t last = ranks - (blocks - 1) * kTileLines;
  const bool one = row_end - row == 1;
  TileShapes shapes;
  for (int i = 0; i < kMostBlocks; ++i) {
    shapes.set(i, i + 1 < blocks ? kTileLines : last, one ? 4 : kTileBytes);
  }
  shapes.set(4, kTileLines, kTileBytes);
  shapes.set(5, last, kTileBytes);
  shapes.set(6, kTileLines, one ? 4 : kTileBytes);
  shapes.use();
  const bf16* const a = job.a + rank * t.in;
  if (row == 0) touch(job, a, ranks * t.in);
  alignas(64) float sums[kMostBlocks * kTileLines][kTileLines];
  for (; row < row_end; row += kTileLines) {
    const int64_t count = least(kTileLines, row_end - row);
    const bf16* x[kTileLines];
    for (int64_t i = 0; i < kTileLines; ++i) {
      x[i] = t.x + job.rows[row + least(i, count - 1)] * t.x_stride;
    }
    Hidden<bf16>* const h = job.h + row * job.padded_rank + rank;
    if (one) {
      shrink_tiles<true>(blocks, x, a, ranks, t.in, sums[0]);
      for (int64_t j = 0; j < ranks; j += kLanes) {
        store(h + j, load(sums[0] + j), least(kLanes, ranks - j));
      }
      continue;
    }
    shrink_tiles<false>(blocks, x, a, ranks, t.in, sums[0]);
    for (int64_t j = 0; j < ranks; j += kLanes) {
      Vec lines[kLanes];
      for (int i = 0; i < kLanes; ++i) lines[i] = load(sums[j + i]);
      transpose(lines);
      for (int64_t i = 0; i < count; ++i) {
        store(h + i * job.padded_rank + j, lines[i], least(kLanes, ranks - j));
      }
    }
  }
}

void shrink(const Tensors<bf16>& t, const Job<bf16>& job, int64_t row, int64_t row_end,
            int64_t begin, int64_t end) {
  constexpr int64_t kStepRanks = kMostBlocks * kTileLines;
  for (; begin < end; begin += kStepRanks) {
    shrink_ranks(t, job, row, row_end, begin, least(kStepRanks, end - begin));
  }
  _tile_release();
}

}  // namespace
}  // namespace MANYLORA_ISA
}  // namespace manylora
