// The kernels that others call, on plain pointers; strides in elements, dtype a DType.

#pragma once

#include "attention.h"
#include "types.h"

namespace manylora {
namespace MANYLORA_ISA {

// y [rows, out] in place, x [rows, in]. group, table, plan: as Python lays them out
// (kernels/table.py, kernels/plan.py).
void apply_edits(void* y, int64_t y_stride, const void* x, int64_t x_stride, int64_t in,
                 int64_t dtype, const void* pool, const int32_t* group, const void* table,
                 const int32_t* plan);
// out [rows, in] contiguous = in_scale * x for the rows that have one; the others are not written.
void scale_rows(void* out, const void* x, int64_t x_stride, int64_t in, int64_t dtype,
                const void* pool, int64_t module, const void* table, const int32_t* plan);

// y [rows, out] = x [rows, in] W^T + bias, all bfloat16; in a multiple of 32.
// weight: packed (kernels/cpu/product.py); bias: [out] or null.
void linear(void* y, int64_t y_stride, const void* x, int64_t x_stride, int64_t rows,
            const void* weight, const void* bias, int64_t in, int64_t out);

// out [rows, heads, head_dim] contiguous, q with strides of its rows and heads.
void paged_attention(void* out, const void* q, int64_t q_row_stride, int64_t q_head_stride,
                     const void* k_cache, const void* v_cache, const Batch* batch,
                     const AttentionLayer* layer);
// k and v [rows, kv_heads, head_dim].
void write_kv(const void* k, int64_t k_row_stride, int64_t k_head_stride, const void* v,
              int64_t v_row_stride, int64_t v_head_stride, void* k_cache, void* v_cache,
              const Batch* batch, const AttentionLayer* layer);
// qkv [rows, (heads + 2 * kv_heads) * head_dim], q in place; cos, sin: [rows, half].
void rotary_write_kv(void* qkv, int64_t stride, const void* cos, const void* sin, int64_t half,
                     void* k_cache, void* v_cache, const Batch* batch, const AttentionLayer* layer);

// out and residual [rows, size] contiguous; residual may be null.
void rms_norm(void* out, const void* x, int64_t x_stride, void* residual, const void* weight,
              int64_t rows, int64_t size, float eps, float offset, int64_t dtype);
// x [rows, heads, head_dim] in place, each head by itself; x_stride: of a row.
void rms_norm_heads(void* x, int64_t x_stride, const void* weight, int64_t rows, int64_t heads,
                    int64_t head_dim, float eps, float offset, int64_t dtype);
// bias may be null.
void layer_norm(void* out, const void* x, int64_t x_stride, void* residual, const void* weight,
                const void* bias, int64_t rows, int64_t size, float eps, int64_t dtype);
// out [rows, size] contiguous, x [rows, 2 * size]; activation: of activation.cpp.
void act_mul(void* out, const void* x, int64_t x_stride, int64_t rows, int64_t size,
             int64_t activation, int64_t dtype);

}  // namespace MANYLORA_ISA
}  // namespace manylora
