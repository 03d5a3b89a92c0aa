// Rotary embedding of one packed qkv row at a time: q in place, k on its way into the cache, and v
// copied beside it. Dimension i of a head is rotated with dimension i + half; the rest is kept.

#include "attention_layout.h"
#include "kernels.h"
#include "rows.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

// from and to may be the same.
template <class T>
MANYLORA_INLINE void rotate(const T* from, const float* cos, const float* sin, int64_t half,
                            int64_t head_dim, T* to) {
  each_vec(half, [&](int64_t i, auto part) {
    const Vec a = load(from + i, part), b = load(from + half + i, part);
    const Vec c = load(cos + i, part), s = load(sin + i, part);
    store(to + i, sub(mul(a, c), mul(b, s)), part);
    store(to + half + i, add(mul(b, c), mul(a, s)), part);
  });
  if (to == from) return;
  memcpy(to + 2 * half, from + 2 * half, static_cast<size_t>(head_dim - 2 * half) * sizeof(T));
}

template <class T>
static void rotary_rows(T* qkv, int64_t stride, const float* cos, const float* sin, int64_t half,
                        T* k_cache, T* v_cache, const Batch& batch, const AttentionLayer& layer) {
  const int64_t d = layer.head_dim;
  each_row(batch.rows, (layer.heads + 2 * layer.kv_heads) * d, [&](int64_t row) {
    T* const q = qkv + row * stride;
    T* const k = q + layer.heads * d;
    T* const v = k + layer.kv_heads * d;
    const float *const c = cos + row * half, *const s = sin + row * half;
    const int64_t slot = batch.slot_mapping[row], position = slot % kGroup;
    for (int64_t h = 0; h < layer.heads; ++h) rotate(q + h * d, c, s, half, d, q + h * d);
    for (int64_t h = 0; h < layer.kv_heads; ++h) {
      T rotated[kMaxHeadDim];
      rotate(k + h * d, c, s, half, d, rotated);
      const int64_t group = group_of(layer, slot, h);
      write_key(k_cache + group, position, rotated, d);
      write_value(v_cache + group, position, v + h * d, d);
    }
  });
}

}  // namespace

void rotary_write_kv(void* qkv, int64_t stride, const void* cos, const void* sin, int64_t half,
                     void* k_cache, void* v_cache, const Batch* batch,
                     const AttentionLayer* layer) {
  with_type(layer->dtype, [&](auto t) {
    using T = decltype(t);
    rotary_rows(static_cast<T*>(qkv), stride, static_cast<const float*>(cos),
                static_cast<const float*>(sin), half, static_cast<T*>(k_cache),
                static_cast<T*>(v_cache), *batch, *layer);
  });
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
