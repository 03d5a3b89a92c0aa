// y = out_scale * y + scale * B h + bias for the rows of a bfloat16 job on AMX tiles, in place of
// expand.h.
//
// Up to 16 rows of h are tile a, and 16 columns of B tile b, as they lie once unpacked. With up to
// 32 ranks h stays in its tile while 96 columns at a time pass by: six products hide what one takes.
// While their sums are added into y, the next ones are made. More ranks go through 64 columns at a
// time in steps of 32, and the last step's tiles have a shape of their own.

#pragma once

#include "amx.h"
#include "expand.h"
#include "unpack_amx.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

constexpr int kMostVecs = 6;  // of 16 columns, that are multiplied at once

// B h of up to 16 rows by up to 96 columns; rows before `row` were there before.
struct Sums {
  int64_t first_row, row, row_end, column;
  alignas(64) float of[kMostVecs][kTileLines][kTileLines];
};

// The job's rows from `row` on that a tile of `lines` has; the last tile goes back for all its lines.
MANYLORA_INLINE void place(const Job<bf16>& job, int64_t row, int64_t lines, int64_t column,
                           Sums& sums) {
  sums.row = row;
  sums.row_end = least(row + lines, job.row_count);
  sums.first_row = sums.row_end - lines;
  sums.column = column;
}

// Sums in 0 to 5, h in 6, B in 7.
TileShapes few_ranks(const Job<bf16>& job, int64_t lines) {
  TileShapes shapes;
  for (int i = 0; i < kMostVecs; ++i) shapes.set(i, lines, kTileBytes);
  shapes.set(6, lines, job.padded_rank * 2);
  shapes.set(7, job.padded_rank / 2, kTileBytes);
  return shapes;
}
// Sums in 0 to 3; of 32 ranks h in 4 and B in 6, of the last few in 5 and 7.
TileShapes many_ranks(const Job<bf16>& job, int64_t lines) {
  const int64_t rest = job.padded_rank % kTileDepth, tail = rest ? rest : kTileDepth;
  TileShapes shapes;
  for (int i = 0; i < 5; ++i) shapes.set(i, lines, kTileBytes);
  shapes.set(5, lines, tail * 2);
  shapes.set(6, kTileLines, kTileBytes);
  shapes.set(7, tail / 2, kTileBytes);
  return shapes;
}

template <int Vecs>
MANYLORA_INLINE void store_sums(Sums& sums) {
  store_tiles<Vecs>(sums.of[0][0], kTileLines * kTileLines, kTileBytes);
}

// Where 16 columns of packed B begin, within whole blocks.
MANYLORA_INLINE const bf16* columns_of(const Job<bf16>& job, int64_t column) {
  column -= job.b_column;
  return job.b + column / kBlock * kBlock * job.padded_rank + column % kBlock * 2;
}

// c 0 to Vecs - 1 = h in 6 by B, whose rows are a block's.
template <int Vecs>
MANYLORA_INLINE void multiply_few(const Job<bf16>& job, Sums& sums) {
  constexpr int64_t kStride = kBlock * 4;
  zero_tiles<Vecs>();
  const auto columns = [&](int n) { return columns_of(job, sums.column + n * kLanes); };
  multiply_tiles<Vecs, 6, 7>(columns, kStride);
  store_sums<Vecs>(sums);
}

// c 0 to Vecs - 1 = the rows of h by one block of packed B.
template <int Vecs>
MANYLORA_INLINE void multiply_many(const Job<bf16>& job, Sums& sums) {
  constexpr int64_t kWidth = Vecs * kLanes;
  const int64_t h_stride = job.padded_rank * 2, b_stride = kWidth * 4;
  const bf16* const h = job.h + sums.first_row * job.padded_rank;
  const bf16* const b = job.b + (sums.column - job.b_column) * job.padded_rank;
  zero_tiles<Vecs>();
  int64_t j = 0;
  const auto columns = [&](int n) { return b + j * kWidth + n * kTileDepth; };
  for (; j + kTileDepth <= job.padded_rank; j += kTileDepth) {
    load_tile<4>(h + j, h_stride);
    multiply_tiles<Vecs, 4, 6>(columns, b_stride);
  }
  if (j < job.padded_rank) {
    load_tile<5>(h + j, h_stride);
    multiply_tiles<Vecs, 5, 7>(columns, b_stride);
  }
  store_sums<Vecs>(sums);
}

// Adds one vector into y. Plain: whole vectors, no out_scale, no bias.
template <bool Plain>
MANYLORA_INLINE void add_sum(bf16* y, const Job<bf16>& job, int64_t column, Vec sum) {
  if (Plain) {
    store(y, fma(splat(job.scale), sum, load(y)));
  } else {
    finish_part(y, job, column, sum);
  }
}

// What the stores might change, for all the compiler knows, is read before them.
template <int Vecs, bool Plain>
MANYLORA_INLINE void add_sums(const Tensors<bf16>& t, const Job<bf16>& job, const Sums& sums) {
  const Vec scale = splat(job.scale);
  const int32_t* const rows = job.rows;
  const int64_t stride = t.y_stride, first = sums.first_row, end = sums.row_end;
  bf16* const column = t.y + job.start + sums.column;
  for (int64_t row = sums.row; row < end; ++row) {
    bf16* const y = column + rows[row] * stride;
    Vec products[Vecs];
    for (int v = 0; v < Vecs; ++v) products[v] = load(sums.of[v][row - first]);
    if (Plain) {
      for (int v = 0; v < Vecs; ++v) products[v] = fma(scale, products[v], load(y + v * kLanes));
      for (int v = 0; v < Vecs; ++v) store(y + v * kLanes, products[v]);
    } else {
      for (int v = 0; v < Vecs; ++v) {
        finish_part(y + v * kLanes, job, sums.column + v * kLanes, products[v]);
      }
    }
  }
}

// Brings near what the sums will be added to.
MANYLORA_INLINE void fetch_rows(const Tensors<bf16>& t, const Job<bf16>& job, const Sums& sums) {
  constexpr int64_t kLine = kTileBytes / sizeof(bf16);
  for (int64_t row = sums.row; row < sums.row_end; ++row) {
    const bf16* const y = t.y + job.rows[row] * t.y_stride + job.start + sums.column;
    for (int64_t i = 0; i < kMostVecs * kLanes; i += kLine) __builtin_prefetch(y + i, 1);
  }
}

// Whole blocks of columns, up to 32 ranks.
template <bool Plain>
void expand_few(const Tensors<bf16>& t, const Job<bf16>& job, int64_t lines, int64_t begin,
                int64_t end) {
  constexpr int64_t kStep = kMostVecs * kLanes;
  Sums both[2];
  for (int64_t row = 0; row < job.row_count; row += lines) {
    int64_t column = begin, done = 0;
    place(job, row, lines, column, both[0]);
    load_tile<6>(job.h + both[0].first_row * job.padded_rank, job.padded_rank * 2);
    for (; column + kStep <= end; column += kStep, ++done) {
      Sums& sums = both[done % 2];
      place(job, row, lines, column, sums);
      fetch_rows(t, job, sums);
      multiply_few<kMostVecs>(job, sums);
      if (done > 0) add_sums<kMostVecs, Plain>(t, job, both[1 - done % 2]);
    }
    if (done > 0) add_sums<kMostVecs, Plain>(t, job, both[1 - done % 2]);
    for (; column < end; column += 2 * kLanes) {
      place(job, row, lines, column, both[0]);
      multiply_few<2>(job, both[0]);
      add_sums<2, Plain>(t, job, both[0]);
    }
  }
}

// Blocks of Vecs * 16 columns, any number of ranks.
template <int Vecs, bool Plain>
void expand_many(const Tensors<bf16>& t, const Job<bf16>& job, int64_t lines, int64_t begin,
                 int64_t end) {
  Sums both[2];
  for (int64_t row = 0; row < job.row_count; row += lines) {
    int64_t done = 0;
    for (int64_t column = begin; column < end; column += Vecs * kLanes, ++done) {
      Sums& sums = both[done % 2];
      place(job, row, lines, column, sums);
      multiply_many<Vecs>(job, sums);
      if (done > 0) add_sums<Vecs, Plain>(t, job, both[1 - done % 2]);
    }
    if (done > 0) add_sums<Vecs, Plain>(t, job, both[1 - done % 2]);
  }
}

// The only row of a job, by Vecs * 16 columns of one block of B, with AMX's sums but by vectors.
template <int Vecs, bool Plain>
MANYLORA_INLINE void expand_row(const Tensors<bf16>& t, const Job<bf16>& job, int64_t column) {
  const bf16* b = job.b + (column - job.b_column) * job.padded_rank;
  Vec total[Vecs];
  for (Vec& v : total) v = zero();
  for (int64_t first = 0; first < job.padded_rank; first += kTileDepth) {
    Vec even[Vecs], odd[Vecs];
    for (int v = 0; v < Vecs; ++v) even[v] = odd[v] = zero();
    const int64_t end = least(first + kTileDepth, job.padded_rank);
    for (int64_t j = first; j < end; j += 2, b += Vecs * kTileDepth) {
      const Vec h_even = splat(to_float(job.h[j])), h_odd = splat(to_float(job.h[j + 1]));
      for (int v = 0; job.ahead != nullptr && v < Vecs; v += 2) job.ahead->fetch(kTileBytes);
      for (int v = 0; v < Vecs; ++v) {
        const __m512i pairs = _mm512_loadu_si512(b + v * kTileDepth);
        even[v] = fma(h_even, even_of(pairs), even[v]);
        odd[v] = fma(h_odd, odd_of(pairs), odd[v]);
      }
    }
    for (int v = 0; v < Vecs; ++v) total[v] = add(total[v], add(even[v], odd[v]));
  }
  bf16* const y = t.y + job.rows[0] * t.y_stride + job.start + column;
  for (int v = 0; v < Vecs; ++v) {
    add_sum<Plain>(y + v * kLanes, job, column + v * kLanes, total[v]);
  }
}

// Storing a tile takes as long for one row as for 16, so one row takes vectors.
template <bool Plain>
void expand_one(const Tensors<bf16>& t, const Job<bf16>& job, int64_t column, int64_t end) {
  const FlushDenormals like_tiles;
  for (; column + kBlock <= end; column += kBlock) expand_row<4, Plain>(t, job, column);
  const int64_t vecs = (end - column + kUnit - 1) / kUnit;
  if (vecs == 1) expand_row<1, false>(t, job, column);
  if (vecs == 2) expand_row<2, false>(t, job, column);
  if (vecs == 3) expand_row<3, false>(t, job, column);
  if (vecs == 4) expand_row<4, false>(t, job, column);
}

// Columns from `column` on, in whole blocks.
template <bool Plain>
void expand_blocks(const Tensors<bf16>& t, const Job<bf16>& job, int64_t lines, int64_t column,
                   int64_t end) {
  TileShapes shapes = many_ranks(job, lines);
  if (job.padded_rank <= kTileDepth) shapes = few_ranks(job, lines);
  shapes.use();
  if (job.padded_rank <= kTileDepth) {
    expand_few<Plain>(t, job, lines, column, end);
  } else {
    expand_many<4, Plain>(t, job, lines, column, end);
  }
}

// Columns whose B has been unpacked.
void expand_span(const Tensors<bf16>& t, const Job<bf16>& job, int64_t begin, int64_t end) {
  const bool plain = job.out_scale == nullptr && job.bias == nullptr;
  if (job.row_count == 1) return (plain ? expand_one<true> : expand_one<false>)(t, job, begin, end);
  const int64_t lines = least(kTileLines, job.row_count);
  const int64_t whole = begin + (end - begin) / kBlock * kBlock;
  if (plain) {
    expand_blocks<true>(t, job, lines, begin, whole);
  } else {
    expand_blocks<false>(t, job, lines, begin, whole);
  }
  if (whole < end) {
    const int64_t vecs = (end - whole + kUnit - 1) / kUnit;
    many_ranks(job, lines).use();
    if (vecs == 1) expand_many<1, false>(t, job, lines, whole, end);
    if (vecs == 2) expand_many<2, false>(t, job, lines, whole, end);
    if (vecs == 3) expand_many<3, false>(t, job, lines, whole, end);
    if (vecs == 4) expand_many<4, false>(t, job, lines, whole, end);
  }
  _tile_release();
}

// A span at a time, so that its B stays near.
void expand(const Tensors<bf16>& t, const Job<bf16>& job, int64_t begin, int64_t end) {
  if (job.rank == 0) return expand<bf16>(t, job, begin, end);
  const int64_t span = job.row_count == 1 ? 1024 : 384;
  for (; begin < end; begin += span) {
    const int64_t stop = least(begin + span, end);
    const int64_t padded = round_up(stop, kUnit);
    Job<bf16> part = job;
    part.b = unpack(job, job.b, begin * job.padded_rank, padded * job.padded_rank);
    part.b_column = begin;
    expand_span(t, part, begin, stop);
  }
}

}  // namespace
}  // namespace MANYLORA_ISA
}  // namespace manylora
