// The C view of a stack of decoder layers and of one step through it; kernels/cpu/decoder.py fills
// them. All tensors are bfloat16 unless said otherwise, with contiguous rows.

#pragma once

#include "attention.h"

namespace manylora {

// A product and the edits of its modules.
struct DecoderProjection {
  const void* weight;    // packed (product.cpp)
  const void* bias;      // [out] or null
  int64_t in, out;
  const int32_t* group;  // kernels/table.py: SliceGroup
};

struct DecoderLayer {
  DecoderProjection qkv, o, gate_up, down;
  // Norms' weights [hidden]: before and after attention, before and after the MLP; the two after
  // may be null.
  const void *before_attention, *after_attention, *before_mlp, *after_mlp;
  const void *q_norm, *k_norm;  // [head_dim], of each head before rotary; both may be null
  void *k_cache, *v_cache;
  const AttentionLayer* attention;
  int64_t rotary;  // which of the step's rotary embeddings
};

struct DecoderStep {
  int64_t rows;
  void* x;                // [rows, hidden], changed in place
  void *normed, *y;       // [rows, hidden]
  void *qkv, *mixed;      // [rows, qkv.out], [rows, o.in]
  void *gate_up, *gated;  // [rows, gate_up.out], [rows, down.in]
  const void* pool;
  const void* table;
  const int32_t* plan;    // null: no row has an adapter
  const Batch* batch;
  const float *cos, *sin; // [rotary embeddings, rows, half]
  int64_t half;
  int64_t activation;     // as act_mul's
  float eps, offset;      // of the norms
};

}  // namespace manylora
