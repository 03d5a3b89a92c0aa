// Copies a step's keys and values into the paged cache.

#include "attention.h"
#include "parallel.h"
#include "simd.h"

namespace manylora {
namespace MANYLORA_ISA {

constexpr int64_t kRowsPerTask = 32;

void write_kv(const void* k, int64_t k_row_stride, int64_t k_head_stride, const void* v,
              int64_t v_row_stride, int64_t v_head_stride, void* k_cache, void* v_cache,
              const Batch* batch, const AttentionLayer* layer) {
  const int64_t size = layer->dtype == kFloat32 ? 4 : 2;
  const size_t bytes = static_cast<size_t>(layer->head_dim * size);
  const char* const from_k = static_cast<const char*>(k);
  const char* const from_v = static_cast<const char*>(v);
  const int64_t tasks = (batch->rows + kRowsPerTask - 1) / kRowsPerTask;
  parallel_tasks(tasks, threads(), [&](int64_t task) {
    const int64_t end = (task + 1) * kRowsPerTask;
    for (int64_t row = task * kRowsPerTask; row < end && row < batch->rows; ++row) {
      const int64_t block = batch->slot_mapping[row] / layer->block_size;
      const int64_t offset = batch->slot_mapping[row] % layer->block_size;
      for (int64_t head = 0; head < layer->kv_heads; ++head) {
        const int64_t to = (layer->place(block, head) + offset * layer->head_dim) * size;
        memcpy(static_cast<char*>(k_cache) + to,
               from_k + (row * k_row_stride + head * k_head_stride) * size, bytes);
        memcpy(static_cast<char*>(v_cache) + to,
               from_v + (row * v_row_stride + head * v_head_stride) * size, bytes);
      }
    }
  });
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
