// A or B in the pool for AMX, in 12 bits an element where that loses nothing.
//
// The weights of one tensor are of like size: 15 consecutive exponents and the one of zero are
// nearly all that occur. An element keeps its sign and fraction, a byte, and has a code of 4 bits for
// its exponent: 0 for exponent 0, c for lowest + c - 1. The few others are listed behind. Decoding is
// bound by the reading of adapters, which makes a quarter fewer bytes a quarter less time.

#pragma once

#include <stdint.h>

#include "simd.h"

namespace manylora {

struct Compact {
  int64_t count;       // elements
  int32_t lowest;      // exponent of code 1
  int32_t exceptions;  // behind the units; -1: no units, the elements follow as they are
  int64_t unused[6];
};
static_assert(sizeof(Compact) == 64, "what follows begins on a cache line");

// 128 elements in four rows of 32, of which columns share words: signs and fractions of rows 0 and 1
// (the low byte and the high one), of rows 2 and 3, and codes of all, row 0's in the lowest bits.
struct CompactUnit {
  static constexpr int64_t kElements = 128;
  uint16_t sign_fraction[2][32];
  uint16_t codes[32];
};
static_assert(sizeof(CompactUnit) == 192, "three cache lines");

struct CompactException {
  uint32_t index;
  uint16_t bits, unused;
};

namespace MANYLORA_ISA {

MANYLORA_INLINE int64_t compact_units(int64_t count) {
  return ceil_div(count, CompactUnit::kElements);
}
MANYLORA_INLINE const CompactUnit* units_of(const Compact* tensor) {
  return reinterpret_cast<const CompactUnit*>(tensor + 1);
}
MANYLORA_INLINE const CompactException* exceptions_of(const Compact* tensor) {
  return reinterpret_cast<const CompactException*>(units_of(tensor) + compact_units(tensor->count));
}

// Writes bfloat16 elements to `to`; returns how many bytes they take there. to: on a cache line, with
// room for a Compact and either the elements as they are or whole units and an exception for every
// 64 elements, whichever is more. In compact.cpp.
int64_t compact(void* to, const void* from, int64_t count);

}  // namespace MANYLORA_ISA
}  // namespace manylora
