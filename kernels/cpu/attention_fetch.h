// What is brought from memory while a tile is multiplied: the keys and values of a tile to come.
//
// A little with each line that the products read: a burst would hold up their reading. And from all
// of the tile's groups in turn: a processor's own prefetcher finds its way in each block anew, and
// does so in several at once. With one group after another 32 sequences of 2,000 tokens took
// 1.2 to 1.3 times as long where blocks lie in any order, up to 1.3 times where they lie in order.

#pragma once

#include "attention_layout.h"

namespace manylora {
namespace MANYLORA_ISA {

constexpr int64_t kTile = 64;  // positions
constexpr int64_t kGroups = kTile / kGroup;
// From one group before the next has its turn. Where a step takes less, four lines at once hold up
// its reading.
constexpr int64_t kFetchBytes = kLanes >= 16 ? 256 : 64;

struct Fetch {
  const char* groups[2 * kGroups];  // a head's, of keys, then of values
  int64_t count;                    // of groups
  int64_t heads;                    // that are left
  int64_t head_bytes, group_bytes;
  int64_t group, offset;  // what is next
};

// For the second-level cache. fetch: null for nothing.
MANYLORA_INLINE void fetch_bytes(Fetch* fetch, int64_t bytes) {
  if (fetch == nullptr) return;
  for (; bytes > 0 && fetch->heads > 0; bytes -= kFetchBytes) {
    const char* const at = fetch->groups[fetch->group] + fetch->offset;
    for (int64_t i = 0; i < kFetchBytes; i += 64) __builtin_prefetch(at + i, 0, 2);
    if (++fetch->group < fetch->count) continue;
    fetch->group = 0;
    fetch->offset += kFetchBytes;
    if (fetch->offset < fetch->group_bytes) continue;
    fetch->offset = 0;
    --fetch->heads;
    for (int64_t g = 0; g < fetch->count; ++g) fetch->groups[g] += fetch->head_bytes;
  }
}

MANYLORA_INLINE void fetch_bytes(decltype(nullptr), int64_t) {}

}  // namespace MANYLORA_ISA
}  // namespace manylora
