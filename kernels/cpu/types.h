// Element types of tensors, and how they are named in a call.

#pragma once

#include <stdint.h>

namespace manylora {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// torch's own codes (c10/core/ScalarType.h); also in kernels/cpu/library.py.
enum DType : int32_t { kFloat16 = 5, kFloat32 = 6, kBFloat16 = 15 };

}  // namespace manylora
