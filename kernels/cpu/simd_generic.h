// Vec on any machine: 4 lanes of GCC's and clang's vector extension, which become SSE2 or NEON.

#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace manylora {
namespace MANYLORA_ISA {

constexpr int kLanes = 4;
constexpr bool kManyRegisters = false;
typedef float Lanes __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
struct Vec {
  Lanes v;
};

MANYLORA_INLINE Vec zero() { return {Lanes{0, 0, 0, 0}}; }
MANYLORA_INLINE Vec splat(float x) { return {Lanes{x, x, x, x}}; }
MANYLORA_INLINE Vec load(const float* p) {
  Vec x;
  memcpy(&x.v, p, sizeof x.v);
  return x;
}
template <class T>
MANYLORA_INLINE Vec load(const T* p) {
  return {Lanes{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
template <class T>
MANYLORA_INLINE Vec load(const T* p, int64_t n) {
  T whole[kLanes] = {};
  memcpy(whole, p, static_cast<size_t>(n) * sizeof(T));
  return load(whole);
}

// 8 consecutive bf16 as 4 even and 4 odd ones (both byte orders in use here are little-endian).
MANYLORA_INLINE void load_pairs(const bf16* p, Vec* even, Vec* odd) {
  Words pairs;
  memcpy(&pairs, p, sizeof pairs);
  even->v = (Lanes)(pairs << 16);
  odd->v = (Lanes)(pairs & 0xffff0000u);
}

template <class T>
MANYLORA_INLINE void store(T* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) from_float(x.v[i], p + i);
}
template <class T>
MANYLORA_INLINE void store(T* p, Vec x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_float(x.v[i], p + i);
}

MANYLORA_INLINE Vec add(Vec a, Vec b) { return {a.v + b.v}; }
MANYLORA_INLINE Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
MANYLORA_INLINE Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
MANYLORA_INLINE Vec div(Vec a, Vec b) { return {a.v / b.v}; }
MANYLORA_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
MANYLORA_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
MANYLORA_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__aarch64__)
  return {(Lanes)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v)};
#else
  return {a.v * b.v + c.v};
#endif
}

// Lane i meets lane i + 2, then i + 1.
MANYLORA_INLINE float sum(Vec x) { return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]); }
MANYLORA_INLINE float max_lane(Vec x) {
  const float a = x.v[0] > x.v[2] ? x.v[0] : x.v[2], b = x.v[1] > x.v[3] ? x.v[1] : x.v[3];
  return a > b ? a : b;
}

MANYLORA_INLINE Vec round(Vec x) {
  const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: the sum's last bit is 1
  return sub(add(x, shifter), shifter);
}
MANYLORA_INLINE Vec times_power_of_2(Vec x, Vec n) {
  for (int i = 0; i < kLanes; ++i) {
    x.v[i] *= bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23);
  }
  return x;
}
MANYLORA_INLINE Vec select_below(Vec a, Vec b, Vec x, Vec y) { return {a.v < b.v ? x.v : y.v}; }

}  // namespace MANYLORA_ISA
}  // namespace manylora
