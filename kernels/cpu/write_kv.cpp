// Writes a step's keys and values into the paged cache.

#include "attention_layout.h"
#include "kernels.h"
#include "parallel.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

constexpr int64_t kRowsPerTask = 32;

// [rows][kv_heads][head_dim], with strides in elements.
template <class T>
struct Rows {
  const T* start;
  int64_t row_stride, head_stride;

  const T* at(int64_t row, int64_t head) const {
    return start + row * row_stride + head * head_stride;
  }
};

template <class T>
static void write_rows(Rows<T> k, Rows<T> v, T* k_cache, T* v_cache, const Batch& batch,
                       const AttentionLayer& layer) {
  const int64_t tasks = (batch.rows + kRowsPerTask - 1) / kRowsPerTask;
  parallel_tasks(tasks, threads(), [&](int64_t task) {
    const int64_t end = (task + 1) * kRowsPerTask;
    for (int64_t row = task * kRowsPerTask; row < end && row < batch.rows; ++row) {
      const int64_t slot = batch.slot_mapping[row], position = slot % kGroup;
      for (int64_t head = 0; head < layer.kv_heads; ++head) {
        const int64_t group = group_of(layer, slot, head);
        write_key(k_cache + group, position, k.at(row, head), layer.head_dim);
        write_value(v_cache + group, position, v.at(row, head), layer.head_dim);
      }
    }
  });
}

}  // namespace

void write_kv(const void* k, int64_t k_row_stride, int64_t k_head_stride, const void* v,
              int64_t v_row_stride, int64_t v_head_stride, void* k_cache, void* v_cache,
              const Batch* batch, const AttentionLayer* layer) {
  with_type(layer->dtype, [&](auto t) {
    using T = decltype(t);
    write_rows<T>({static_cast<const T*>(k), k_row_stride, k_head_stride},
                  {static_cast<const T*>(v), v_row_stride, v_head_stride},
                  static_cast<T*>(k_cache), static_cast<T*>(v_cache), *batch, *layer);
  });
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
