// h = A x for the rows of a bfloat16 job with AMX's sums, in place of shrink.h.
//
// A is packed (kernels/cpu/pack.py) in blocks of 16 ranks, a block as [in / 2][ranks][2]: 32 inputs of
// a block are tile b, as they lie once unpacked (unpack_amx.h), 16 rows of x tile a, and up to four
// blocks meet a tile of x. One row takes vectors, which read A in the order of memory, and AMX's order
// of sums: a row's bits may not depend on how many rows its adapter has.

#pragma once

#include "amx.h"
#include "rows.h"
#include "shrink.h"
#include "unpack_amx.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

constexpr int kMostBlocks = 4;  // of ranks, that a tile of x meets at once

// Ranks [rank, rank + count) of A, a block of it.
struct RankBlock {
  const bf16* a;  // [in / 2][count][2]
  int64_t rank, count;

  int64_t stride() const { return count * 2; }  // elements from one pair of inputs to the next
};

// Adds the products of 32 inputs or fewer, even and odd ones apart. Whole: of 32, by 16 ranks.
template <bool Whole>
MANYLORA_INLINE Vec sums_of(const float* x, int64_t inputs, const bf16* a, const RankBlock& block) {
  const __mmask16 ranks = Whole ? 0xffff : first(block.count);
  const int64_t stride = Whole ? kTileDepth : block.stride(), end = Whole ? kTileDepth : inputs;
  Vec even = zero(), odd = zero();
  for (int64_t i = 0; i < end; i += 2) {
    const __m512i pairs = _mm512_maskz_loadu_epi32(ranks, a + i / 2 * stride);
    even = fma(splat(x[i]), even_of(pairs), even);
    if (Whole || i + 1 < end) odd = fma(splat(x[i + 1]), odd_of(pairs), odd);
  }
  return add(even, odd);
}

// The sums of one row by a block.
MANYLORA_INLINE Vec shrink_row(const Job<bf16>& job, const float* x, int64_t in,
                               const RankBlock& block) {
  const bf16* a = block.a;
  const bool whole = block.count == kTileLines;
  Vec total = zero();
  for (int64_t k = 0; k < in; k += kTileDepth, a += kTileLines * block.stride()) {
    for (int i = 0; job.ahead != nullptr && i < 8; ++i) job.ahead->fetch(block.count * 4);
    const int64_t left = in - k;
    total = add(total, whole && left >= kTileDepth
                           ? sums_of<true>(x + k, kTileDepth, a, block)
                           : sums_of<false>(x + k, least(left, kTileDepth), a, block));
  }
  return total;
}

// A row of x in float32, in memory that the thread keeps for it.
inline const float* widened(const bf16* x, int64_t in) {
  float* const to = scratch<float>(in);
  each_vec(in, [&](int64_t k, auto part) { store(to + k, load(x + k, part), part); });
  return to;
}

// Up to 16 rows of x, `stride` elements apart; 0: each where it is.
struct RowTile {
  const bf16* x[kTileLines];
  int64_t lines, stride;
};

MANYLORA_INLINE RowTile tile_of(const Tensors<bf16>& t, const int32_t* rows, int64_t lines) {
  RowTile tile = {{}, lines, t.x_stride};
  for (int64_t i = 0; i < lines; ++i) {
    tile.x[i] = t.x + rows[i] * t.x_stride;
    if (rows[i] != rows[0] + i) tile.stride = 0;
  }
  return tile;
}

// Tile a of the rows' inputs from k on; through `buffer`, with zeros beyond `in`, where need be.
MANYLORA_INLINE void load_rows(const RowTile& rows, int64_t k, int64_t in, bf16* buffer) {
  const int64_t left = in - k;
  if (rows.stride != 0 && left >= kTileDepth) {
    load_tile<4>(rows.x[0] + k, rows.stride * 2);
    return;
  }
  const __mmask32 mask = left < kTileDepth ? (1u << left) - 1u : ~0u;
  for (int64_t i = 0; i < rows.lines; ++i) {
    const __m512i line = _mm512_maskz_loadu_epi16(mask, rows.x[i] + k);
    _mm512_storeu_si512(buffer + i * kTileDepth, line);
  }
  load_tile<4>(buffer, kTileBytes);
}

// Tile b of a block's last inputs, fewer than 32, with zeros up to a whole tile.
MANYLORA_INLINE const bf16* pad(const RankBlock& block, int64_t k, int64_t in, bf16* to) {
  for (int64_t i = 0; i < kTileLines; ++i) {
    const bool there = k + i * 2 < in;
    const __mmask16 ranks = there ? first(block.count) : 0;
    const bf16* const from = block.a + (there ? k / 2 + i : 0) * block.stride();
    _mm512_mask_storeu_epi32(to + i * block.stride(), first(block.count),
                             _mm512_maskz_loadu_epi32(ranks, from));
  }
  return to;
}

// c 0 to Blocks - 1 += x in 4 by the blocks, in 6 and the last, maybe narrower one, in 7.
template <int Blocks, class Tile>
MANYLORA_INLINE void multiply_blocks(const RankBlock* blocks, const Tile& tile) {
  multiply_tiles<Blocks - 1, 4, 6>(tile, kTileBytes);
  load_tile<7>(tile(Blocks - 1), blocks[Blocks - 1].stride() * 2);
  multiply_tile<Blocks - 1, 4, 7>();
}

// sums [Blocks][16 rows][16 ranks]. first: these rows are the first to read the blocks.
template <int Blocks>
void shrink_tiles(const Job<bf16>& job, const RowTile& rows, int64_t in, const RankBlock* blocks,
                  bool first, float* sums) {
  constexpr int64_t kTile = kTileLines * kTileDepth;
  alignas(64) bf16 gathered[2][kTile], last[kMostBlocks][kTile];
  zero_tiles<Blocks>();
  for (int64_t k = 0; k < in; k += kTileDepth) {
    load_rows(rows, k, in, gathered[k / kTileDepth % 2]);
    multiply_blocks<Blocks>(blocks, [&](int i) {
      if (in - k < kTileDepth) return pad(blocks[i], k, in, last[i]);
      const bf16* const a = blocks[i].a + k / 2 * blocks[i].stride();
      for (int64_t line = 0; first && line < kTileLines; ++line) {
        if (job.ahead != nullptr) job.ahead->fetch(blocks[i].stride() / 2);
      }
      return a;
    });
  }
  store_tiles<Blocks>(sums, kTileLines * kTileLines, kTileBytes);
}

MANYLORA_INLINE void shrink_tiles(const Job<bf16>& job, const RowTile& rows, int64_t in,
                                  const RankBlock* blocks, int64_t count, bool first,
                                  float* sums) {
  if (count == 1) return shrink_tiles<1>(job, rows, in, blocks, first, sums);
  if (count == 2) return shrink_tiles<2>(job, rows, in, blocks, first, sums);
  if (count == 3) return shrink_tiles<3>(job, rows, in, blocks, first, sums);
  shrink_tiles<4>(job, rows, in, blocks, first, sums);
}

// Rows [row, row_end) by up to four blocks. The last tile of rows goes back for all its lines.
void shrink_rows(const Tensors<bf16>& t, const Job<bf16>& job, int64_t row, int64_t row_end,
                 const RankBlock* blocks, int64_t count) {
  const int64_t lines = least(kTileLines, row_end - row);
  TileShapes shapes;
  for (int64_t i = 0; i < count; ++i) {
    shapes.set(static_cast<int>(i), lines, blocks[i].count * 4);
  }
  shapes.set(4, lines, kTileBytes);
  shapes.set(6, kTileLines, kTileBytes);
  shapes.set(7, kTileLines, blocks[count - 1].count * 4);
  shapes.use();
  alignas(64) float sums[kMostBlocks][kTileLines][kTileLines];
  for (; row < row_end; row += kTileLines) {
    const int64_t from = least(row, row_end - lines);
    const RowTile rows = tile_of(t, job.rows + from, lines);
    shrink_tiles(job, rows, t.in, blocks, count, row == 0, sums[0][0]);
    for (int64_t i = row - from; i < lines; ++i) {
      bf16* const h = job.h + (from + i) * job.padded_rank;
      for (int64_t b = 0; b < count; ++b) {
        store(h + blocks[b].rank, load(sums[b][i]), blocks[b].count);
      }
    }
  }
  _tile_release();
}

// begin, and end but for A's last rank, are where a block begins.
void shrink(const Tensors<bf16>& t, const Job<bf16>& job, int64_t row, int64_t row_end,
            int64_t begin, int64_t end) {
  const bool one = row_end - row == 1;
  const float* const x = one ? widened(t.x + job.rows[row] * t.x_stride, t.in) : nullptr;
  const int64_t most = one ? 1 : kMostBlocks, rank_size = round_up(t.in, 2);
  while (begin < end) {
    const int64_t stop = least(begin + most * kTileLines, end);
    const bf16* a = unpack(job, job.a, begin * rank_size, stop * rank_size);
    RankBlock blocks[kMostBlocks];
    int64_t count = 0;
    for (; begin < stop; begin += kTileLines) {
      blocks[count] = {a, begin, least(kTileLines, stop - begin)};
      a += blocks[count++].count * rank_size;
    }
    if (one) {
      const FlushDenormals like_tiles;
      const Vec sums = shrink_row(job, x, t.in, blocks[0]);
      store(job.h + row * job.padded_rank + blocks[0].rank, sums, blocks[0].count);
    } else {
      shrink_rows(t, job, row, row_end, blocks, count);
    }
  }
}

}  // namespace
}  // namespace MANYLORA_ISA
}  // namespace manylora
