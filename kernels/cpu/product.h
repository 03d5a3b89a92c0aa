// The product with packed weights (product.cpp), for kernels that call others.

#pragma once

#include <stdint.h>

namespace manylora {
namespace MANYLORA_ISA {

// y [rows, out] = x [rows, in] W^T + bias, all bfloat16; in a multiple of 32.
// weight: packed (kernels/cpu/product.py); bias: [out] or null.
void linear(void* y, int64_t y_stride, const void* x, int64_t x_stride, int64_t rows,
            const void* weight, const void* bias, int64_t in, int64_t out);

}  // namespace MANYLORA_ISA
}  // namespace manylora
