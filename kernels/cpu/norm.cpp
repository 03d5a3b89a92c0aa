// RMSNorm and LayerNorm, with the residual sum before them.
//
// A row is summed into the residual and rounded there, then normalised from what was rounded, so
// that the result is a function of the stream that the next layer sees. All in float32, rounded
// once. A row stays in the first-level cache over its passes.

#include "kernels.h"
#include "rows.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

// Sum of term(x[i]) over four running sums, which hide the latency of an addition.
template <class T, class Term>
MANYLORA_INLINE float total(const T* x, int64_t n, const Term& term) {
  static const float kRamp[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) sums[j] = add(sums[j], term(load(x + i + j * kLanes)));
  }
  for (; i + kLanes <= n; i += kLanes) sums[0] = add(sums[0], term(load(x + i)));
  if (i < n) {
    const Vec count = splat(static_cast<float>(n - i));
    sums[1] = add(sums[1], select_below(load(kRamp), count, term(load(x + i, n - i)), zero()));
  }
  return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// The row to normalise: x, or the residual after x was added to it.
template <class T>
MANYLORA_INLINE const T* stream(const T* x, T* residual, int64_t n) {
  if (residual == nullptr) return x;
  each_vec(n, [&](int64_t i, auto part) {
    store(residual + i, add(load(residual + i, part), load(x + i, part)), part);
  });
  return residual;
}

MANYLORA_INLINE float inverse_root(float mean_square, float eps) {
  return 1.0f / __builtin_sqrtf(mean_square + eps);
}

template <class T>
MANYLORA_INLINE void rms_row(T* to, const T* h, const T* weight, int64_t n, float eps,
                             float offset) {
  const float square = total(h, n, [](Vec v) { return mul(v, v); });
  const Vec scale = splat(inverse_root(square / static_cast<float>(n), eps));
  each_vec(n, [&](int64_t i, auto part) {
    const Vec w = add(load(weight + i, part), splat(offset));
    store(to + i, mul(mul(load(h + i, part), scale), w), part);
  });
}

template <class T>
static void rms_rows(T* out, const T* x, int64_t x_stride, T* residual, const T* weight,
                     int64_t rows, int64_t n, float eps, float offset) {
  each_row(rows, n, [&](int64_t row) {
    const T* const h = stream(x + row * x_stride, residual ? residual + row * n : nullptr, n);
    rms_row(out + row * n, h, weight, n, eps, offset);
  });
}

template <class T>
static void layer_rows(T* out, const T* x, int64_t x_stride, T* residual, const T* weight,
                       const T* bias, int64_t rows, int64_t n, float eps) {
  each_row(rows, n, [&](int64_t row) {
    T* const to = out + row * n;
    const T* const h = stream(x + row * x_stride, residual ? residual + row * n : nullptr, n);
    const Vec mean = splat(total(h, n, [](Vec v) { return v; }) / static_cast<float>(n));
    const float square = total(h, n, [&](Vec v) { return mul(sub(v, mean), sub(v, mean)); });
    const Vec scale = splat(inverse_root(square / static_cast<float>(n), eps));
    each_vec(n, [&](int64_t i, auto part) {
      const Vec normed = mul(sub(load(h + i, part), mean), scale);
      const Vec shift = bias ? load(bias + i, part) : zero();
      store(to + i, fma(normed, load(weight + i, part), shift), part);
    });
  });
}

}  // namespace

void rms_norm(void* out, const void* x, int64_t x_stride, void* residual, const void* weight,
              int64_t rows, int64_t size, float eps, float offset, int64_t dtype) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    rms_rows(static_cast<T*>(out), static_cast<const T*>(x), x_stride, static_cast<T*>(residual),
             static_cast<const T*>(weight), rows, size, eps, offset);
  });
}

void rms_norm_heads(void* x, int64_t x_stride, const void* weight, int64_t rows, int64_t heads,
                    int64_t head_dim, float eps, float offset, int64_t dtype) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    each_row(rows, heads * head_dim, [&](int64_t row) {
      T* const first = static_cast<T*>(x) + row * x_stride;
      for (T* head = first; head < first + heads * head_dim; head += head_dim) {
        rms_row(head, head, static_cast<const T*>(weight), head_dim, eps, offset);
      }
    });
  });
}

void layer_norm(void* out, const void* x, int64_t x_stride, void* residual, const void* weight,
                const void* bias, int64_t rows, int64_t size, float eps, int64_t dtype) {
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    layer_rows(static_cast<T*>(out), static_cast<const T*>(x), x_stride, static_cast<T*>(residual),
               static_cast<const T*>(weight), static_cast<const T*>(bias), rows, size, eps);
  });
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
