// The C view of a step's rows and of a KV cache; calls.cpp and Python fill them.

#pragma once

#include <stdint.h>

namespace manylora {

constexpr int64_t kMaxHeadDim = 1024;

// kernels.attention.AttentionBatch
struct Batch {
  const int32_t* seq_starts;
  const int32_t* context;
  const int32_t* block_table;
  const int64_t* slot_mapping;
  int64_t seqs;
  int64_t rows;
  int64_t table_stride;
};

// What stays the same over the calls of a layer.
struct AttentionLayer {
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t block_size;
  int64_t window;  // 0: all keys
  const float* slopes;  // [heads] or null
  const float* sinks;   // [heads] or null
  float scale;
  float softcap;  // 0: none
  int32_t dtype;

  // Where a block's vectors of a KV head begin in a cache [blocks, kv_heads, block_size, head_dim];
  // attention_layout.h says how they lie there.
  __attribute__((always_inline)) int64_t place(int64_t block, int64_t head) const {
    return (block * kv_heads + head) * block_size * head_dim;
  }
};

}  // namespace manylora
