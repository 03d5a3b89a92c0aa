// A tile's keys and values: found in the paged cache, fetched ahead, packed for the products.

#pragma once

#include "attention_work.h"

namespace manylora {
namespace MANYLORA_ISA {

constexpr int64_t kTile = 32;

// Where keys and values of a KV head lie, in elements from the start of the cache, by position in
// the tile. Positions beside the wanted ones repeat the nearest of them, so that nothing branches.
struct Places {
  int64_t at[kTile];
};

// Of [lo, hi) the part in lo's tile; returns its end.
static int64_t find(const Call& call, int64_t sequence, int64_t head, int64_t lo, int64_t hi,
                    Places* places) {
  const AttentionLayer& layer = *call.layer;
  const int64_t tile = lo / kTile * kTile;
  hi = smaller(hi, tile + kTile);
  const int32_t* const table = call.batch->block_table + sequence * call.batch->table_stride;
  int64_t* const at = places->at;
  for (int64_t key = lo; key < hi;) {
    const int64_t block = key / layer.block_size, offset = key % layer.block_size;
    const int64_t end = smaller(hi, key - offset + layer.block_size);
    int64_t place = layer.place(table[block], head) + offset * layer.head_dim;
    for (; key < end; ++key, place += layer.head_dim) at[key - tile] = place;
  }
  for (int64_t j = 0; j < lo - tile; ++j) at[j] = at[lo - tile];
  for (int64_t j = hi - tile; j < kTile; ++j) at[j] = at[hi - tile - 1];
  return hi;
}

template <class T>
MANYLORA_INLINE void prefetch(const T* cache, const int64_t* at, int64_t head_dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int i = 0; i < kLanes; ++i) {
    for (int64_t d = 0; d < head_dim; d += kLine) __builtin_prefetch(cache + at[i] + d, 0, 2);
  }
}

MANYLORA_INLINE Vec load_words(const bf16* p) { return load(reinterpret_cast<const float*>(p)); }
MANYLORA_INLINE Vec load_words(const float* p) { return load(p); }
MANYLORA_INLINE Vec load_words(const f16* p) { return load(p); }

// Transposes kLanes keys into as many columns of words.
template <class T>
static void pack_keys(const T* cache, const int64_t* at, int64_t head_dim, float* words) {
  int64_t d = 0;
  for (; d + kStep<T> <= head_dim; d += kStep<T>, words += kLanes * kTile) {
    Vec rows[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = load_words(cache + at[i] + d);
    transpose(rows);
    for (int i = 0; i < kLanes; ++i) store(words + i * kTile, rows[i]);
  }
  if (d == head_dim) return;
  Vec rows[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    T whole[kStep<T>] = {};
    memcpy(whole, cache + at[i] + d, static_cast<size_t>(head_dim - d) * sizeof(T));
    rows[i] = load_words(whole);
  }
  transpose(rows);
  for (int64_t i = 0; i < ceil_div(head_dim - d, kDepth<T>); ++i) store(words + i * kTile, rows[i]);
}

// Values of kLanes keys, a row of words for each key, or for each pair of keys.
template <class T>
static void pack_values(const T* cache, const int64_t* at, int64_t head_dim, int64_t width,
                        float* words) {
  for (int i = 0; i < kLanes; ++i, words += width) {
    const T* const p = cache + at[i];
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store(words + d, load(p + d));
    if (d < head_dim) store(words + d, load(p + d, head_dim - d));
  }
}
static void pack_values(const bf16* cache, const int64_t* at, int64_t head_dim, int64_t width,
                        float* words) {
  for (int i = 0; i < kLanes; i += 2, words += width) {
    const bf16 *const even = cache + at[i], *const odd = cache + at[i + 1];
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store(words + d, interleave(even + d, odd + d));
    if (d == head_dim) continue;
    bf16 tail[2][kLanes] = {};
    memcpy(tail[0], even + d, static_cast<size_t>(head_dim - d) * sizeof(bf16));
    memcpy(tail[1], odd + d, static_cast<size_t>(head_dim - d) * sizeof(bf16));
    store(words + d, interleave(tail[0], tail[1]));
  }
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
