// Vec on AVX2 with FMA and F16C: 8 lanes; tails go through a small buffer.

#pragma once

#include <immintrin.h>

namespace manylora {
namespace MANYLORA_ISA {

constexpr int kLanes = 8;
constexpr bool kManyRegisters = false;
struct Vec {
  __m256 v;
};

MANYLORA_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
MANYLORA_INLINE Vec splat(float x) { return {_mm256_set1_ps(x)}; }
MANYLORA_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
MANYLORA_INLINE Vec load(const bf16* p) {
  const __m256i halves = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(halves, 16))};
}
MANYLORA_INLINE Vec load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))};
}
template <class T>
MANYLORA_INLINE Vec load(const T* p, int64_t n) {
  T whole[kLanes] = {};
  memcpy(whole, p, static_cast<size_t>(n) * sizeof(T));
  return load(whole);
}

// 16 consecutive bf16 as 8 even and 8 odd ones.
MANYLORA_INLINE void load_pairs(const bf16* p, Vec* even, Vec* odd) {
  const __m256i pairs = _mm256_loadu_si256((const __m256i*)p);
  even->v = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  odd->v = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)));
}

MANYLORA_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
MANYLORA_INLINE void store(f16* p, Vec x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
MANYLORA_INLINE void store(bf16* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  const __m256i packed = _mm256_packus_epi32(high, high);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
template <class T>
MANYLORA_INLINE void store(T* p, Vec x, int64_t n) {
  T whole[kLanes];
  store(whole, x);
  memcpy(p, whole, static_cast<size_t>(n) * sizeof(T));
}

MANYLORA_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
MANYLORA_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
MANYLORA_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
MANYLORA_INLINE Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
MANYLORA_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
MANYLORA_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
MANYLORA_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

// Lane i meets lane i + 4, then i + 2, i + 1.
MANYLORA_INLINE float sum(Vec x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
MANYLORA_INLINE float max_lane(Vec x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

MANYLORA_INLINE Vec round(Vec x) {
  return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
MANYLORA_INLINE Vec times_power_of_2(Vec x, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}
MANYLORA_INLINE Vec select_below(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
