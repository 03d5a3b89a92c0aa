// How a KV head's keys and values lie in a block of this backend's cache: in groups of kGroup
// positions, each in the order in which the products read it, so that nothing is packed to be read.
//
//   keys    [head_dim / kDepth][kGroup][kDepth]: a position is a lane
//   values  [kGroup / kDepth][head_dim][kDepth]: a dimension is a lane
//
// bfloat16 lies in pairs, as vdpbf16ps and the B tiles of AMX take it.

#pragma once

#include "attention.h"
#include "simd.h"

namespace manylora {
namespace MANYLORA_ISA {

constexpr int64_t kGroup = 16;

// Where the group of a slot begins, in elements from the start of the cache.
MANYLORA_INLINE int64_t group_of(const AttentionLayer& layer, int64_t slot, int64_t head) {
  const int64_t block = slot / layer.block_size, offset = slot % layer.block_size;
  return layer.place(block, head) + offset / kGroup * kGroup * layer.head_dim;
}

// position: within the group; key, value: [head_dim].
template <class T>
MANYLORA_INLINE void write_key(T* group, int64_t position, const T* key, int64_t head_dim) {
  for (int64_t d = 0; d < head_dim; d += kDepth<T>) {
    memcpy(group + d * kGroup + position * kDepth<T>, key + d, kDepth<T> * sizeof(T));
  }
}
template <class T>
MANYLORA_INLINE void write_value(T* group, int64_t position, const T* value, int64_t head_dim) {
  T* const to = group + position / kDepth<T> * head_dim * kDepth<T> + position % kDepth<T>;
  for (int64_t d = 0; d < head_dim; ++d) to[d * kDepth<T>] = value[d];
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
