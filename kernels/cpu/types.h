// Element types of tensors, and how Python names them in a call.

#pragma once

#include <stdint.h>

namespace manylora {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The codes of kernels/cpu/library.py.
enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

}  // namespace manylora
