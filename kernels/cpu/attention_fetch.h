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
constexpr int64_t kTurn = 2 * kGroups;  // groups, each of which is fetched from in turn
// From one group before the next has its turn. Where a step takes less, four lines at once hold up
// its reading.
constexpr int64_t kFetchBytes = kLanes >= 16 ? 256 : 64;

struct Fetch {
  // A head's, of keys and of values; few ones more than once, and all once more, since a product
  // takes several at a time, from any one on.
  const char* groups[2 * kTurn];
  int64_t distinct;  // of keys, and as many of values: the first of kGroups
  int64_t heads;     // that are left
  int64_t head_bytes, group_bytes;
  int64_t group, offset;  // what is next; when nothing is left, what was last
};

// For the second-level cache.
MANYLORA_INLINE void fetch_group(const Fetch* fetch, int64_t group) {
  const char* const at = fetch->groups[group] + fetch->offset;
  for (int64_t i = 0; i < kFetchBytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

// Apart, so that a product's sums stay in registers.
__attribute__((noinline, cold)) static void next_head(Fetch* fetch) {
  if (fetch->heads == 0 || --fetch->heads == 0) return;
  fetch->offset = 0;
  for (const char*& group : fetch->groups) group += fetch->head_bytes;
}

// Past so many groups, no more than there are.
MANYLORA_INLINE void advance(Fetch* fetch, int64_t groups) {
  fetch->group += groups;
  if (fetch->group < kTurn) return;
  fetch->group -= kTurn;
  if (fetch->offset + kFetchBytes < fetch->group_bytes) {
    fetch->offset += kFetchBytes;
  } else {
    next_head(fetch);
  }
}

// fetch: null for nothing.
MANYLORA_INLINE void fetch_bytes(Fetch* fetch, int64_t bytes) {
  if (fetch == nullptr) return;
  while (bytes > 0 && fetch->heads > 0) {
    if (fetch->group % kGroups < fetch->distinct) {
      fetch_group(fetch, fetch->group);
      bytes -= kFetchBytes;
    }
    advance(fetch, 1);
  }
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
