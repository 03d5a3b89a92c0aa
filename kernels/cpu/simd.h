// One vector type for every ISA: `Vec`, kLanes float32 lanes, with loads and stores that convert.
//
// Included by kernel sources that are compiled once per ISA; everything lies in the namespace of
// that ISA and is static, so that the linker can never merge an AVX-512 copy into generic code.
// For the same reason kernels use no std:: functions or templates.
//
//   Vec: zero() splat(f) load(p) load(p, n) store(p, v) store(p, v, n) add sub mul div max min
//        fma(a, b, c) = a * b + c   sum(v)   max_lane(v)
//        round(x): to the nearest integer, |x| < 2^22   select_below(a, b, x, y) = a < b ? x : y
//        times_power_of_2(x, n): x * 2^n for an integral n of -126 to 128
//        p: float, f16 or bf16; n <= kLanes elements, the other lanes are 0 and memory is not read
//   Operand<T>: what a dot product of T takes at once: kDepth<T> elements a lane, so that bf16
//        pairs can go to vdpbf16ps as they are. load_operand<T>(p), load_operand<T>(p, n),
//        broadcast<T>(hidden), dot(acc, a, b). Hidden<T>: how the low-rank activation h is kept.

#pragma once

#include <stdint.h>
#include <string.h>

#include "types.h"

#define MANYLORA_INLINE static inline __attribute__((always_inline))

namespace manylora {
namespace MANYLORA_ISA {

MANYLORA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MANYLORA_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
MANYLORA_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

MANYLORA_INLINE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
MANYLORA_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

MANYLORA_INLINE float to_float(float x) { return x; }
MANYLORA_INLINE float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
MANYLORA_INLINE float to_float(f16 x) {
  // Shift exponent and mantissa into place, then correct the exponent's bias by a product, which
  // also turns subnormals into normal numbers.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const float magnitude = (x.bits & 0x7c00u) == 0x7c00u
                              ? bits_to_float(rest | 0x7f800000u)
                              : bits_to_float(rest) * bits_to_float(0x77800000u);  // 2^112
  return bits_to_float(sign | float_to_bits(magnitude));
}

// Round to nearest, ties to even; NaN stays NaN.
MANYLORA_INLINE void from_float(float x, float* out) { *out = x; }
MANYLORA_INLINE void from_float(float x, bf16* out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40u : rounded);
}
MANYLORA_INLINE void from_float(float x, f16* out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: let the adder round at 2^-24
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace MANYLORA_ISA
}  // namespace manylora

#if defined(__AVX512BF16__)
#include "simd_avx512bf16.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif

namespace manylora {
namespace MANYLORA_ISA {

// float32 and float16: one element a lane.
template <class T>
struct Operand {
  Vec v;
};
template <class T>
inline constexpr int kDepth = 1;
template <class T>
struct HiddenOf {
  using type = float;
};

#if defined(__AVX512BF16__)
// bf16: pairs, multiplied and summed by one instruction. h is rounded once, to bf16.
template <>
struct Operand<bf16> {
  __m512bh v;
};
template <>
struct HiddenOf<bf16> {
  using type = bf16;
};
#else
// bf16: pairs, split into two vectors of float32 when loaded.
template <>
struct Operand<bf16> {
  Vec even, odd;
};
#endif
template <>
inline constexpr int kDepth<bf16> = 2;
template <class T>
using Hidden = typename HiddenOf<T>::type;

// Elements that one operand holds.
template <class T>
inline constexpr int kStep = kLanes * kDepth<T>;

template <class T>
MANYLORA_INLINE Vec dot(Vec acc, Operand<T> a, Operand<T> b) {
  return fma(a.v, b.v, acc);
}
template <class T>
struct Load {
  MANYLORA_INLINE Operand<T> full(const T* p) { return {load(p)}; }
  MANYLORA_INLINE Operand<T> part(const T* p, int64_t n) { return {load(p, n)}; }
  MANYLORA_INLINE Operand<T> lane(const float* h) { return {splat(*h)}; }
};

#if defined(__AVX512BF16__)
MANYLORA_INLINE Vec dot(Vec acc, Operand<bf16> a, Operand<bf16> b) {
  return {_mm512_dpbf16_ps(acc.v, a.v, b.v)};
}
template <>
struct Load<bf16> {
  MANYLORA_INLINE Operand<bf16> full(const bf16* p) {
    return {(__m512bh)_mm512_loadu_si512(p)};
  }
  MANYLORA_INLINE Operand<bf16> part(const bf16* p, int64_t n) {
    return {(__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1u, p)};
  }
  MANYLORA_INLINE Operand<bf16> lane(const bf16* h) {
    int32_t pair;
    memcpy(&pair, h, sizeof pair);
    return {(__m512bh)_mm512_set1_epi32(pair)};
  }
};
#else
// What waits for the sum before is one addition, not two multiply-adds.
MANYLORA_INLINE Vec dot(Vec acc, Operand<bf16> a, Operand<bf16> b) {
  return add(acc, fma(a.odd, b.odd, mul(a.even, b.even)));
}
template <>
struct Load<bf16> {
  MANYLORA_INLINE Operand<bf16> full(const bf16* p) {
    Operand<bf16> pairs;
    load_pairs(p, &pairs.even, &pairs.odd);
    return pairs;
  }
  MANYLORA_INLINE Operand<bf16> part(const bf16* p, int64_t n) {
    bf16 whole[kStep<bf16>] = {};
    memcpy(whole, p, static_cast<size_t>(n) * sizeof(bf16));
    return full(whole);
  }
  MANYLORA_INLINE Operand<bf16> lane(const float* h) { return {splat(h[0]), splat(h[1])}; }
};
#endif

// Calls visit with a value of the type that a `DType` names.
template <class Visit>
MANYLORA_INLINE void with_type(int64_t dtype, const Visit& visit) {
  if (dtype == kFloat32) return visit(float());
  if (dtype == kFloat16) return visit(f16());
  visit(bf16());
}

// Operand of kStep elements of a row of x or A, or of kLanes columns of a packed B.
template <class T>
MANYLORA_INLINE Operand<T> load_operand(const T* p) {
  return Load<T>::full(p);
}
// The same from the first n < kStep elements; the others count as 0 and are not read.
template <class T>
MANYLORA_INLINE Operand<T> load_operand(const T* p, int64_t n) {
  return Load<T>::part(p, n);
}
// kDepth consecutive values of h, in every lane.
template <class T>
MANYLORA_INLINE Operand<T> broadcast(const Hidden<T>* h) {
  return Load<T>::lane(h);
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
