// A tile's keys and values: found in the paged cache, fetched ahead, multiplied.

#pragma once

#include "attention_fetch.h"
#include "attention_work.h"
#include "tile_product.h"
#if defined(__AMX_BF16__)
#include "attention_amx.h"
#endif

namespace manylora {
namespace MANYLORA_ISA {

// Where the groups [first, end) of a tile lie, in elements from the start of the cache.
struct Places {
  int64_t first, end;
  int64_t at[kGroups];
};

// The groups of the keys of [lo, hi) that are in lo's tile; returns where these keys end.
static int64_t find(const Call& call, int64_t sequence, int64_t head, int64_t lo, int64_t hi,
                    Places* places) {
  const AttentionLayer& layer = *call.layer;
  const int64_t tile = lo / kTile * kTile;
  hi = least(hi, tile + kTile);
  const int32_t* const table = call.batch->block_table + sequence * call.batch->table_stride;
  places->first = (lo - tile) / kGroup;
  places->end = ceil_div(hi - tile, kGroup);
  for (int64_t g = places->first; g < places->end; ++g) {
    const int64_t key = tile + g * kGroup, block = key / layer.block_size;
    const int64_t slot = table[block] * layer.block_size + key - block * layer.block_size;
    places->at[g] = group_of(layer, slot, head);
  }
  return hi;
}

// The keys of [keys.lo, keys.hi) that are in the first one's tile.
template <class E>
static Fetch fetch_of(const Call& call, const Unit& unit, Span keys) {
  const AttentionLayer& layer = *call.layer;
  constexpr int64_t kSize = sizeof(E);
  Places places;
  find(call, unit.sequence, unit.head, keys.lo, keys.hi, &places);
  Fetch fetch = {};
  const int64_t count = fetch.distinct = places.end - places.first;
  for (int64_t i = 0; i < 2 * kTurn; ++i) {
    const void* const cache = i / kGroups % 2 == 0 ? call.k_cache : call.v_cache;
    const int64_t at = places.at[places.first + i % kGroups % count] * kSize;
    fetch.groups[i] = static_cast<const char*>(cache) + at;
  }
  fetch.heads = unit.heads;
  fetch.head_bytes = layer.block_size * layer.head_dim * kSize;
  fetch.group_bytes = kGroup * layer.head_dim * kSize;
  return fetch;
}

// A tile's keys or values of one head.
template <class E>
struct Groups {
  const E* at[kGroups];
};
template <class E>
MANYLORA_INLINE Groups<E> groups_of(const E* cache, const Places& here) {
  Groups<E> groups;
  for (int64_t g = here.first; g < here.end; ++g) groups.at[g] = cache + here.at[g];
  return groups;
}

// scores [lines][kTile] of the groups [first, end) = q [lines][head_dim] times the keys.
template <class E>
static void score(const Sizes& sizes, int64_t lines, const Hidden<E>* q, const Groups<E>& keys,
                  int64_t first, int64_t end, float* scores, Fetch* fetch) {
#if defined(__AMX_BF16__)
  if constexpr (kDepth<E> == 2) {
    if (sizes.amx) {
      return score_amx(lines, q, sizes.head_dim, keys.at + first, end - first,
                       scores + first * kGroup, kTile, fetch);
    }
  }
#endif
  constexpr int64_t kVecs = kGroup / kLanes;
  const auto vector = [&](int64_t, int64_t n) {
    return keys.at[first + n / kVecs] + n % kVecs * kStep<E>;
  };
  const Right<decltype(vector)> right = {vector, 1, sizes.head_dim, kGroup * kDepth<E>};
  product<E>(sizes.group, lines, (end - first) * kVecs, q, sizes.head_dim, right, nullptr,
             scores + first * kGroup, kTile, fetch);
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
