// The elements of a compact tensor (compact.h), in memory that the thread keeps for them. A span of
// 16 ranks of A or of some columns of B at a time stays in the core's cache until it is multiplied.

#pragma once

#include <immintrin.h>

#include "ahead.h"
#include "compact.h"
#include "scratch.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

// Two rows of a unit. table: exponents in place by the lowest five bits of a word.
MANYLORA_INLINE void unpack_rows(bf16* to, const uint16_t* sign_fraction, __m512i low_codes,
                                 __m512i high_codes, __m512i table) {
  const __m512i sign = _mm512_set1_epi16(-0x8000), kept = _mm512_set1_epi16(-0x8000 | 0x7f);
  constexpr int kSelect = 0xca, kAndOr = 0xea;  // a ? b : c, (a & b) | c
  const __m512i both = _mm512_loadu_si512(sign_fraction);
  const __m512i low = _mm512_ternarylogic_epi32(sign, _mm512_slli_epi16(both, 8), both, kSelect);
  const __m512i high = _mm512_srai_epi16(both, 8);
  const __m512i low_exponents = _mm512_permutexvar_epi16(low_codes, table);
  const __m512i high_exponents = _mm512_permutexvar_epi16(high_codes, table);
  _mm512_store_si512(to, _mm512_ternarylogic_epi32(low, kept, low_exponents, kAndOr));
  _mm512_store_si512(to + 32, _mm512_ternarylogic_epi32(high, kept, high_exponents, kAndOr));
}

MANYLORA_INLINE void unpack_unit(bf16* to, const CompactUnit& unit, __m512i table) {
  const __m512i codes = _mm512_loadu_si512(unit.codes);
  unpack_rows(to, unit.sign_fraction[0], codes, _mm512_srli_epi16(codes, 4), table);
  unpack_rows(to + 64, unit.sign_fraction[1], _mm512_srli_epi16(codes, 8),
              _mm512_srli_epi16(codes, 12), table);
}

// Exponents by their codes, in place. Twice: a word of two codes finds its lower one.
MANYLORA_INLINE __m512i exponents_by_code(int32_t lowest) {
  alignas(64) static constexpr uint16_t kCodes[32] = {
      0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
      0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const __m512i codes = _mm512_load_si512(kCodes);
  const __m512i below = _mm512_set1_epi16(static_cast<short>(lowest - 1));
  const __mmask32 coded = _mm512_test_epi16_mask(codes, codes);
  return _mm512_slli_epi16(_mm512_maskz_add_epi16(coded, codes, below), 7);
}

// Those of elements [begin, end), whose first goes to `to`.
inline void put_exceptions(const Compact* tensor, int64_t begin, int64_t end, bf16* to) {
  const CompactException* const listed = exceptions_of(tensor);
  int32_t i = 0;
  for (int32_t count = tensor->exceptions; count > 0;) {  // a binary search
    const int32_t half = count / 2;
    const bool before = listed[i + half].index < begin;
    i = before ? i + half + 1 : i;
    count = before ? count - half - 1 : half;
  }
  for (; i < tensor->exceptions && listed[i].index < end; ++i) {
    to[listed[i].index - begin].bits = listed[i].bits;
  }
}

// Elements [begin, end) of a job's A or B, which may be overwritten by the thread's next call.
inline const bf16* unpack(const Job<bf16>& job, const bf16* stored, int64_t begin, int64_t end) {
  const Compact* const tensor = reinterpret_cast<const Compact*>(stored);
  if (tensor->exceptions < 0) return reinterpret_cast<const bf16*>(tensor + 1) + begin;
  constexpr int64_t kElements = CompactUnit::kElements;
  const int64_t first = begin / kElements, last = compact_units(end);
  bf16* const to = scratch<bf16>((last - first) * kElements);
  const CompactUnit* const units = units_of(tensor);
  const __m512i exponents = exponents_by_code(tensor->lowest);
  for (int64_t i = first; i < last; ++i) {
    fetch_ahead(job, reinterpret_cast<const bf16*>(units + i), kTileBytes);
    unpack_unit(to + (i - first) * kElements, units[i], exponents);
  }
  put_exceptions(tensor, first * kElements, last * kElements, to);
  return to + (begin - first * kElements);
}

}  // namespace
}  // namespace MANYLORA_ISA
}  // namespace manylora
