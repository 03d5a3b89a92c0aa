// A tile's keys and values: found in the paged cache, fetched ahead, multiplied.

#pragma once

#include "attention_layout.h"
#include "attention_work.h"
#include "tile_product.h"
#if defined(__AMX_BF16__)
#include "attention_amx.h"
#endif

namespace manylora {
namespace MANYLORA_ISA {

constexpr int64_t kTile = 64;
constexpr int64_t kGroups = kTile / kGroup;

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
  hi = smaller(hi, tile + kTile);
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

// All groups but the first so many.
template <class T>
MANYLORA_INLINE void prefetch(const T* cache, const Places& places, int64_t but, int64_t head_dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t g = places.first + but; g < places.end; ++g) {
    const T* const group = cache + places.at[g];
    for (int64_t i = 0; i < kGroup * head_dim; i += kLine) __builtin_prefetch(group + i, 0, 2);
  }
}

// A tile's keys or values of one head: its groups, and for each of them one of a tile to come.
template <class E>
struct Groups {
  const E *at[kGroups], *ahead[kGroups];
};
template <class E>
MANYLORA_INLINE Groups<E> groups_of(const E* cache, const Places& here, const Places& ahead) {
  Groups<E> groups;
  for (int64_t g = here.first; g < here.end; ++g) {
    const int64_t other = smaller(ahead.first + g - here.first, ahead.end - 1);
    groups.at[g] = cache + here.at[g];
    groups.ahead[g] = cache + ahead.at[other];
  }
  return groups;
}

// scores [lines][kTile] of the groups [first, end) = q [lines][head_dim] times the keys.
template <class E>
static void score(const Sizes& sizes, int64_t lines, const Hidden<E>* q, const Groups<E>& keys,
                  int64_t first, int64_t end, float* scores) {
#if defined(__AMX_BF16__)
  if constexpr (kDepth<E> == 2) {
    if (sizes.amx) {
      return score_amx(lines, q, sizes.head_dim, keys.at + first, keys.ahead + first,
                       end - first, scores + first * kGroup, kTile);
    }
  }
#endif
  constexpr int64_t kVecs = kGroup / kLanes;
  const auto vector = [&](int64_t n) {
    return keys.at[first + n / kVecs] + n % kVecs * kStep<E>;
  };
  product<E>(lines, (end - first) * kVecs, q, sizes.head_dim, vector, kGroup * kDepth<E>,
             sizes.head_dim, nullptr, scores + first * kGroup, kTile);
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
