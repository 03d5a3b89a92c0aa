// The gated activations of a feed-forward layer: act(gate) * up of rows [gate, up].

#include "kernels.h"
#include "rows.h"
#include "vector_math.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

// x / (1 + exp(-x))
MANYLORA_INLINE Vec silu(Vec x) { return div(x, add(splat(1.0f), exp(sub(zero(), x)))); }

// 0.5 x (1 + tanh(u)) is x / (1 + exp(-2 u)), which keeps its precision where tanh(u) is near -1.
MANYLORA_INLINE Vec gelu_tanh(Vec x) {
  const Vec cubic = fma(mul(mul(x, x), x), splat(0.044715f), x);
  return div(x, add(splat(1.0f), exp(mul(cubic, splat(-1.59576912f)))));  // -2 sqrt(2 / pi)
}

// x Phi(x), from the tail Phi(-|x|)
MANYLORA_INLINE Vec gelu_erf(Vec x) {
  const Vec tail = normal_tail(x), finite = min(splat(3e38f), x);
  return select_below(x, zero(), mul(x, tail), sub(x, mul(finite, tail)));
}

// An exponential and a division, in elements of a norm.
constexpr int64_t kWorkPerElement = 3;

template <class T, class Act>
MANYLORA_INLINE void gate_rows(T* out, const T* x, int64_t x_stride, int64_t rows, int64_t n,
                               const Act& act) {
  each_row(rows, n * kWorkPerElement, [&](int64_t row) {
    const T* const gate = x + row * x_stride;
    const T* const up = gate + n;
    T* const to = out + row * n;
    each_vec(n, [&](int64_t i, auto part) {
      store(to + i, mul(act(load(gate + i, part)), load(up + i, part)), part);
    });
  });
}

// The codes of kernels/cpu/small.py.
enum Activation : int64_t { kSilu = 0, kGeluTanh = 1, kGeluErf = 2 };

}  // namespace

void act_mul(void* out, const void* x, int64_t x_stride, int64_t rows, int64_t size,
             int64_t activation, int64_t dtype) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    T* const to = static_cast<T*>(out);
    const T* const from = static_cast<const T*>(x);
    switch (activation) {
      case kSilu: return gate_rows(to, from, x_stride, rows, size, silu);
      case kGeluTanh: return gate_rows(to, from, x_stride, rows, size, gelu_tanh);
      default: return gate_rows(to, from, x_stride, rows, size, gelu_erf);
    }
  });
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
