// A torch tensor as C++ sees it, without torch's headers: Python gives the address of its TensorImpl
// (`Tensor._cdata`), and what it is is asked of the C functions that libtorch exports
// (aoti_torch_get_*, of torch/csrc/inductor/aoti_torch/c/shim.h).

#pragma once

#include <stdint.h>

#include <initializer_list>

#include "types.h"

// Compiled for several instruction sets, of which the linker would keep any one.
#define MANYLORA_IN_PLACE __attribute__((always_inline)) inline

namespace manylora {

// The functions, which Python hands over at load. tensor: the address of a pointer to a TensorImpl,
// which is what a C++ `at::Tensor` is. Each returns 0 where it could answer.
struct TensorFunctions {
  int32_t (*data)(const void* tensor, void** found);
  int32_t (*dim)(const void* tensor, int64_t* found);
  int32_t (*sizes)(const void* tensor, const int64_t** found);
  int32_t (*strides)(const void* tensor, const int64_t** found);
  int32_t (*dtype)(const void* tensor, int32_t* found);
  int32_t (*device)(const void* tensor, int32_t* found);
};

struct Tensor {
  bool given = false;  // false: None
  // The rest is as here where the tensor does not lie in the CPU's memory.
  int32_t dtype = -1;  // a DType, or another of torch's
  void* data = nullptr;
  int64_t dim = -1;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;  // in elements

  // Of a type that the kernels compute in.
  MANYLORA_IN_PLACE bool computes() const {
    return dtype == kFloat32 || dtype == kFloat16 || dtype == kBFloat16;
  }

  MANYLORA_IN_PLACE bool empty() const {
    for (int64_t i = 0; i < dim; ++i) {
      if (sizes[i] == 0) return true;
    }
    return false;
  }

  MANYLORA_IN_PLACE bool contiguous() const {
    int64_t step = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
      if (sizes[i] != 1 && strides[i] != step) return empty();
      step *= sizes[i];
    }
    return true;
  }

  // Contiguous, of that type and those sizes.
  MANYLORA_IN_PLACE bool is(int32_t type, std::initializer_list<int64_t> wanted) const {
    if (dtype != type || dim != static_cast<int64_t>(wanted.size()) || !contiguous()) return false;
    const int64_t* size = sizes;
    for (const int64_t each : wanted) {
      if (*size++ != each) return false;
    }
    return true;
  }

  // [rows, n], with contiguous rows.
  MANYLORA_IN_PLACE bool is_matrix() const { return computes() && dim == 2 && strides[1] == 1; }

  // [rows, heads, head_dim], with contiguous heads.
  MANYLORA_IN_PLACE bool is_heads() const {
    return computes() && dim == 3 && (strides[2] == 1 || sizes[0] == 0);
  }
};

// impl: the TensorImpl of a tensor that lives, or null.
MANYLORA_IN_PLACE Tensor read_tensor(const TensorFunctions& functions, const void* impl) {
  constexpr int32_t kCpu = 0;
  Tensor other, t;
  other.given = t.given = impl != nullptr;
  int32_t device = kCpu;
  if (!t.given || functions.device(&impl, &device) != 0 || device != kCpu) return other;
  if (functions.data(&impl, &t.data) != 0 || functions.dim(&impl, &t.dim) != 0) return other;
  if (functions.sizes(&impl, &t.sizes) != 0 || functions.strides(&impl, &t.strides) != 0) return other;
  if (functions.dtype(&impl, &t.dtype) != 0) return other;
  return t.data == nullptr && !t.empty() ? other : t;
}

}  // namespace manylora
