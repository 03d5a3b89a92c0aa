// A tensor of bfloat16 made compact; compact.h says how it lies.

#include "compact.h"

#include <string.h>

namespace manylora {
namespace MANYLORA_ISA {
namespace {

constexpr int kCodes = 15;             // but for 0
constexpr int64_t kMostExceptions = 64;  // one of so many elements; where there are more, none is coded

inline int exponent_of(uint16_t bits) { return bits >> 7 & 0xff; }

// The 15 exponents that most elements have, by the lowest. *covered: how many have them, or 0.
int lowest_exponent(const uint16_t* from, int64_t count, int64_t* covered) {
  int64_t even[256] = {}, odd[256] = {};
  int64_t i = 0;
  for (; i + 1 < count; i += 2) {
    ++even[exponent_of(from[i])];
    ++odd[exponent_of(from[i + 1])];
  }
  if (i < count) ++even[exponent_of(from[i])];
  int64_t within = 0, most = -1;
  int best = 1;
  for (int last = 1; last < 256; ++last) {
    within += even[last] + odd[last];
    if (last > kCodes) within -= even[last - kCodes] + odd[last - kCodes];
    if (last >= kCodes && within > most) {
      most = within;
      best = last - kCodes + 1;
    }
  }
  *covered = most + even[0] + odd[0];
  return best;
}

// Codes 128 elements. Returns whether all have one; those that have none get any.
bool code_unit(const uint16_t* from, int lowest, CompactUnit* unit) {
  uint16_t codes[CompactUnit::kElements], bytes[CompactUnit::kElements];
  int misses = 0;
  for (int64_t i = 0; i < CompactUnit::kElements; ++i) {
    const int exponent = exponent_of(from[i]), code = exponent == 0 ? 0 : exponent - lowest + 1;
    misses |= (code & ~kCodes) | (exponent != 0 && code == 0);
    codes[i] = static_cast<uint16_t>(code & kCodes);
    bytes[i] = static_cast<uint16_t>((from[i] >> 8 & 0x80) | (from[i] & 0x7f));
  }
  for (int64_t i = 0; i < 32; ++i) {
    unit->sign_fraction[0][i] = static_cast<uint16_t>(bytes[i] | bytes[32 + i] << 8);
    unit->sign_fraction[1][i] = static_cast<uint16_t>(bytes[64 + i] | bytes[96 + i] << 8);
    unit->codes[i] = static_cast<uint16_t>(codes[i] | codes[32 + i] << 4 | codes[64 + i] << 8 |
                                           codes[96 + i] << 12);
  }
  return misses == 0;
}

}  // namespace

int64_t compact(void* to, const void* from, int64_t count) {
  constexpr int64_t kUnit = CompactUnit::kElements;
  const uint16_t* const elements = static_cast<const uint16_t*>(from);
  Compact* const tensor = static_cast<Compact*>(to);
  int64_t covered = 0;
  *tensor = {count, lowest_exponent(elements, count, &covered), -1, {}};
  if ((count - covered) * kMostExceptions > count) {
    memcpy(tensor + 1, from, static_cast<size_t>(count) * sizeof(uint16_t));
    return static_cast<int64_t>(sizeof(Compact) + static_cast<size_t>(count) * sizeof(uint16_t));
  }
  CompactUnit* const units = const_cast<CompactUnit*>(units_of(tensor));
  CompactException* const listed = const_cast<CompactException*>(exceptions_of(tensor));
  int32_t exceptions = 0;
  for (int64_t begin = 0; begin < count; begin += kUnit) {
    const int64_t left = count - begin < kUnit ? count - begin : kUnit;
    uint16_t last[kUnit] = {};
    const uint16_t* part = elements + begin;
    if (left < kUnit) {
      memcpy(last, part, static_cast<size_t>(left) * sizeof(uint16_t));
      part = last;
    }
    if (code_unit(part, tensor->lowest, units + begin / kUnit)) continue;
    for (int64_t i = 0; i < left; ++i) {
      const int exponent = exponent_of(part[i]);
      if (exponent == 0) continue;
      if (exponent >= tensor->lowest && exponent < tensor->lowest + kCodes) continue;
      listed[exceptions++] = {static_cast<uint32_t>(begin + i), part[i], 0};
    }
  }
  tensor->exceptions = exceptions;
  return reinterpret_cast<char*>(listed + exceptions) - static_cast<char*>(to);
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
