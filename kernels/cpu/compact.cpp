// A tensor of bfloat16 made compact; compact.h says how it lies.

#include "compact.h"

#include <string.h>

namespace manylora {
namespace MANYLORA_ISA {
namespace {

constexpr int kCodes = 15;  // but for 0
// At most one of so many elements is an exception; where there are more, none is coded.
constexpr int64_t kMostExceptions = 64;

uint16_t exponent_of(uint16_t bits) { return bits >> 7 & 0xff; }

// The 15 exponents that most elements have, by the lowest.
int most_frequent(const uint16_t* from, int64_t count) {
  int64_t having[256] = {};
  for (int64_t i = 0; i < count; ++i) ++having[exponent_of(from[i])];
  int64_t within = 0, most = -1;
  int best = 1;
  for (int last = 1; last < 256; ++last) {
    within += having[last];
    if (last > kCodes) within -= having[last - kCodes];
    if (last >= kCodes && within > most) {
      most = within;
      best = last - kCodes + 1;
    }
  }
  return best;
}

// The 15 highest exponents, by the lowest: usually the most frequent ones, and quickly found.
int highest(const uint16_t* from, int64_t count) {
  uint16_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t exponent = exponent_of(from[i]);
    most = exponent > most ? exponent : most;
  }
  return most > kCodes ? most - kCodes + 1 : 1;
}

// Codes 128 elements. Returns whether all have one; those that have none get any.
bool code_unit(const uint16_t* from, int lowest, CompactUnit* unit) {
  const uint16_t below = static_cast<uint16_t>(lowest - 1);
  uint16_t codes[CompactUnit::kElements], bytes[CompactUnit::kElements];
  uint16_t misses = 0;
  for (int64_t i = 0; i < CompactUnit::kElements; ++i) {
    const uint16_t exponent = exponent_of(from[i]);
    const uint16_t code = exponent == 0 ? 0 : exponent - below;
    misses |= code & ~kCodes;
    misses |= exponent == below ? exponent : 0;
    codes[i] = code & kCodes;
    bytes[i] = (from[i] >> 8 & 0x80) | (from[i] & 0x7f);
  }
  for (int64_t i = 0; i < 32; ++i) {
    unit->sign_fraction[0][i] = static_cast<uint16_t>(bytes[i] | bytes[32 + i] << 8);
    unit->sign_fraction[1][i] = static_cast<uint16_t>(bytes[64 + i] | bytes[96 + i] << 8);
    unit->codes[i] = static_cast<uint16_t>(codes[i] | codes[32 + i] << 4 | codes[64 + i] << 8 |
                                           codes[96 + i] << 12);
  }
  return misses == 0;
}

// Codes all elements; returns how many exceptions there are, or -1 if they are too many.
int32_t code_all(const uint16_t* elements, int64_t count, int lowest, Compact* tensor) {
  constexpr int64_t kUnit = CompactUnit::kElements;
  *tensor = {count, lowest, 0, {}};
  CompactUnit* const units = const_cast<CompactUnit*>(units_of(tensor));
  CompactException* const listed = const_cast<CompactException*>(exceptions_of(tensor));
  const int64_t most = count / kMostExceptions;
  int32_t exceptions = 0;
  for (int64_t begin = 0; begin < count; begin += kUnit) {
    const int64_t left = least(kUnit, count - begin);
    uint16_t last[kUnit] = {};
    const uint16_t* part = elements + begin;
    if (left < kUnit) {
      memcpy(last, part, static_cast<size_t>(left) * sizeof(uint16_t));
      part = last;
    }
    if (code_unit(part, lowest, units + begin / kUnit)) continue;
    for (int64_t i = 0; i < left; ++i) {
      const int exponent = exponent_of(part[i]);
      if (exponent == 0 || (exponent >= lowest && exponent < lowest + kCodes)) continue;
      if (exceptions == most) return -1;
      listed[exceptions++] = {static_cast<uint32_t>(begin + i), part[i], 0};
    }
  }
  return exceptions;
}

}  // namespace

int64_t compact(void* to, const void* from, int64_t count) {
  const uint16_t* const elements = static_cast<const uint16_t*>(from);
  Compact* const tensor = static_cast<Compact*>(to);
  int32_t exceptions = code_all(elements, count, highest(elements, count), tensor);
  if (exceptions < 0) exceptions = code_all(elements, count, most_frequent(elements, count), tensor);
  tensor->exceptions = exceptions;
  if (exceptions >= 0) {
    return reinterpret_cast<const char*>(exceptions_of(tensor) + exceptions) -
           static_cast<const char*>(to);
  }
  memcpy(tensor + 1, from, static_cast<size_t>(count) * sizeof(uint16_t));
  return static_cast<int64_t>(sizeof(Compact) + static_cast<size_t>(count) * sizeof(uint16_t));
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
