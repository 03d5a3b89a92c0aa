// Vec on AVX-512 with BF16: 16 lanes, masked tails.

#pragma once

#include <immintrin.h>

namespace manylora {
namespace MANYLORA_ISA {

constexpr int kLanes = 16;
constexpr bool kManyRegisters = true;
struct Vec {
  __m512 v;
};

MANYLORA_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
MANYLORA_INLINE __m512 widen(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

MANYLORA_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
MANYLORA_INLINE Vec splat(float x) { return {_mm512_set1_ps(x)}; }
MANYLORA_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
MANYLORA_INLINE Vec load(const bf16* p) { return {widen(_mm256_loadu_si256((const __m256i*)p))}; }
MANYLORA_INLINE Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
MANYLORA_INLINE Vec load(const float* p, int64_t n) {
  return {_mm512_maskz_loadu_ps(first(n), p)};
}
MANYLORA_INLINE Vec load(const bf16* p, int64_t n) {
  return {widen(_mm256_maskz_loadu_epi16(first(n), p))};
}
MANYLORA_INLINE Vec load(const f16* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
}

MANYLORA_INLINE __m256i narrow(Vec x, bf16*) { return (__m256i)_mm512_cvtneps_pbh(x.v); }
MANYLORA_INLINE __m256i narrow(Vec x, f16*) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MANYLORA_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
MANYLORA_INLINE void store(float* p, Vec x, int64_t n) {
  _mm512_mask_storeu_ps(p, first(n), x.v);
}
template <class T>
MANYLORA_INLINE void store(T* p, Vec x) {
  _mm256_storeu_si256((__m256i*)p, narrow(x, p));
}
template <class T>
MANYLORA_INLINE void store(T* p, Vec x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(x, p));
}

MANYLORA_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
MANYLORA_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
MANYLORA_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
MANYLORA_INLINE Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
MANYLORA_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
MANYLORA_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
MANYLORA_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// Lane i meets lane i + 8, then i + 4, i + 2, i + 1.
MANYLORA_INLINE float sum(Vec x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
MANYLORA_INLINE float max_lane(Vec x) { return _mm512_reduce_max_ps(x.v); }

MANYLORA_INLINE Vec round(Vec x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT)}; }
MANYLORA_INLINE Vec times_power_of_2(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }
MANYLORA_INLINE Vec select_below(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
