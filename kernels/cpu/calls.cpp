// What Python calls: tensors that fit each other are handed to the kernel; where they do not, false
// is returned and nothing is done. `out`, and y of the product, are as Python has just made them.

#include "attention_layout.h"
#include "kernels.h"
#include "tensor.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

bool is_or_none(const Tensor& t, int32_t type, std::initializer_list<int64_t> sizes) {
  return !t.given || t.is(type, sizes);
}

// A norm's x [rows, n], residual of its shape or none, weight [n].
bool fits_norm(const Tensor& x, const Tensor& residual, const Tensor& weight) {
  return x.is_matrix() && is_or_none(residual, x.dtype, {x.sizes[0], x.sizes[1]}) &&
         weight.is(x.dtype, {x.sizes[1]});
}

bool fits_layer(const Tensor& x, const Batch& batch, const AttentionLayer& layer) {
  return x.is_heads() && x.dtype == layer.dtype && x.sizes[0] == batch.rows &&
         x.sizes[2] == layer.head_dim;
}

}  // namespace

// rows: of the plan; columns: how many of y's the group reaches.
bool apply_edits(Tensor y, Tensor x, Tensor pool, int64_t rows, int64_t columns,
                 const int32_t* group, const void* table, const int32_t* plan) {
  if (!x.is_matrix() || !y.is_matrix() || y.dtype != x.dtype || pool.dtype != x.dtype) return false;
  if (x.sizes[0] != rows || y.sizes[0] != rows || y.sizes[1] < columns) return false;
  apply_edits(y.data, y.strides[0], x.data, x.strides[0], x.sizes[1], x.dtype, pool.data, group,
              table, plan);
  return true;
}

bool scale_rows(Tensor out, Tensor x, Tensor pool, int64_t rows, int64_t module, const void* table,
                const int32_t* plan) {
  if (!x.is_matrix() || x.sizes[0] != rows || pool.dtype != x.dtype) return false;
  scale_rows(out.data, x.data, x.strides[0], x.sizes[1], x.dtype, pool.data, module, table, plan);
  return true;
}

// panels: packed (kernels/cpu/product.py).
bool linear(Tensor y, Tensor x, Tensor panels, Tensor bias) {
  if (!x.is_matrix() || x.dtype != kBFloat16 || x.sizes[1] != 2 * panels.sizes[1]) return false;
  const int64_t out = y.sizes[1];
  if (!is_or_none(bias, kBFloat16, {out})) return false;
  linear(y.data, out, x.data, x.strides[0], x.sizes[0], panels.data, bias.data, x.sizes[1], out);
  return true;
}

// Fills in what stays the same over a layer's calls.
bool attention_layer(AttentionLayer* layer, int64_t heads, Tensor k_cache, Tensor v_cache,
                     Tensor slopes, Tensor sinks, int64_t window, float scale, float softcap) {
  if (!k_cache.computes() || k_cache.dim != 4) return false;
  const int64_t* const size = k_cache.sizes;
  const int64_t kv_heads = size[1], block_size = size[2], head_dim = size[3];
  if (!k_cache.contiguous()) return false;
  if (!v_cache.is(k_cache.dtype, {size[0], kv_heads, block_size, head_dim})) return false;
  if (heads < 1 || kv_heads < 1 || heads % kv_heads != 0) return false;
  if (head_dim < 1 || head_dim > kMaxHeadDim) return false;
  if (k_cache.dtype == kBFloat16 && head_dim % 2 != 0) return false;
  if (block_size < 1 || block_size % kGroup != 0) return false;
  if (!is_or_none(slopes, kFloat32, {heads}) || !is_or_none(sinks, kFloat32, {heads})) return false;
  const auto slope = static_cast<const float*>(slopes.data);
  const auto sink = static_cast<const float*>(sinks.data);
  *layer = {heads, kv_heads, head_dim, block_size, window, slope, sink, scale, softcap,
            k_cache.dtype};
  return true;
}

bool paged_attention(Tensor out, Tensor q, Tensor k_cache, Tensor v_cache, const Batch* batch,
                     Tensor slopes, Tensor sinks, int64_t window, float scale, float softcap) {
  AttentionLayer layer;
  if (!q.is_heads()) return false;
  if (!attention_layer(&layer, q.sizes[1], k_cache, v_cache, slopes, sinks, window, scale, softcap))
    return false;
  if (!fits_layer(q, *batch, layer)) return false;
  paged_attention(out.data, q.data, q.strides[0], q.strides[1], k_cache.data, v_cache.data, batch,
                  &layer);
  return true;
}

bool write_kv(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, const Batch* batch) {
  const Tensor none = {};
  AttentionLayer layer;
  if (!k.is_heads() || !v.is_heads() || v.sizes[1] != k.sizes[1]) return false;
  if (!attention_layer(&layer, k.sizes[1], k_cache, v_cache, none, none, 0, 1, 0)) return false;
  if (k.sizes[1] != layer.kv_heads) return false;
  if (!fits_layer(k, *batch, layer) || !fits_layer(v, *batch, layer)) return false;
  write_kv(k.data, k.strides[0], k.strides[1], v.data, v.strides[0], v.strides[1], k_cache.data,
           v_cache.data, batch, &layer);
  return true;
}

bool rotary_write_kv(Tensor qkv, Tensor cos, Tensor sin, Tensor k_cache, Tensor v_cache,
                     const Batch* batch) {
  const Tensor none = {};
  AttentionLayer layer;
  if (!qkv.is_matrix() || k_cache.dim != 4 || cos.dim != 2) return false;
  const int64_t rows = batch->rows, half = cos.sizes[1], head_dim = k_cache.sizes[3];
  const int64_t heads = head_dim > 0 ? qkv.sizes[1] / head_dim - 2 * k_cache.sizes[1] : 0;
  if (heads < 1 || qkv.sizes[1] % head_dim != 0 || 2 * half > head_dim) return false;
  if (!cos.is(kFloat32, {rows, half}) || !sin.is(kFloat32, {rows, half})) return false;
  if (!attention_layer(&layer, heads, k_cache, v_cache, none, none, 0, 1, 0)) return false;
  if (qkv.dtype != layer.dtype || qkv.sizes[0] != rows) return false;
  rotary_write_kv(qkv.data, qkv.strides[0], cos.data, sin.data, half, k_cache.data, v_cache.data,
                  batch, &layer);
  return true;
}

bool rms_norm(Tensor out, Tensor x, Tensor residual, Tensor weight, float eps, float offset) {
  if (!fits_norm(x, residual, weight)) return false;
  rms_norm(out.data, x.data, x.strides[0], residual.data, weight.data, x.sizes[0], x.sizes[1], eps,
           offset, x.dtype);
  return true;
}

bool layer_norm(Tensor out, Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) {
  if (!fits_norm(x, residual, weight) || !is_or_none(bias, x.dtype, {x.sizes[1]})) return false;
  layer_norm(out.data, x.data, x.strides[0], residual.data, weight.data, bias.data, x.sizes[0],
             x.sizes[1], eps, x.dtype);
  return true;
}

bool act_mul(Tensor out, Tensor x, int64_t activation) {
  if (!x.is_matrix() || x.sizes[1] % 2) return false;
  act_mul(out.data, x.data, x.strides[0], x.sizes[0], x.sizes[1] / 2, activation, x.dtype);
  return true;
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
