// exp, tanh and the normal distribution on Vec, to a few units in the last place of float32.
//
// The polynomials are minimax fits of this project. NaN goes through each of them.

#pragma once

#include "simd.h"

namespace manylora {
namespace MANYLORA_ISA {

constexpr float kInfinity = __builtin_inff();

// c[0] + c[1] x + ... + c[N - 1] x^(N - 1)
template <int N>
MANYLORA_INLINE Vec polynomial(const float (&c)[N], Vec x) {
  Vec y = splat(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) y = fma(y, x, splat(c[i]));
  return y;
}

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2. 0 below -87.3, where float32 would
// become subnormal; relative error 1e-7.
MANYLORA_INLINE Vec exp(Vec x) {
  constexpr float kLowest = -87.3f, kHighest = 88.8f;
  constexpr float kTerms[] = {1.0f,          1.0f,           0.5000000095f, 0.1666651868f,
                              0.0416662053f, 0.0083689082f, 0.0013950524f};
  const Vec inside = min(splat(kHighest), max(splat(kLowest), x));
  const Vec n = round(mul(inside, splat(1.44269504f)));
  // ln 2 in two parts, of which the first times n is exact.
  const Vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), inside));
  return select_below(x, splat(kLowest), zero(), times_power_of_2(polynomial(kTerms, r), n));
}

// tanh(x), relative error 3e-7 also near 0.
MANYLORA_INLINE Vec tanh(Vec x) {
  constexpr float kTerms[] = {-0.3333328371f, 0.1333148497f, -0.0537429368f, 0.0206486543f,
                              -0.005714781f};
  const Vec size = max(sub(zero(), x), x), square = mul(x, x);
  const Vec near = fma(mul(x, square), polynomial(kTerms, square), x);
  const Vec tail = div(splat(2.0f), add(exp(add(size, size)), splat(1.0f)));
  const Vec far = sub(splat(1.0f), tail);
  const Vec signed_far = select_below(x, zero(), sub(zero(), far), far);
  return select_below(size, splat(0.625f), near, signed_far);
}

// Phi(-|x|), the normal distribution's tail: exp(-x^2 / 2) t Q(t), t = 1 / (1 + 0.4 |x| / sqrt 2).
MANYLORA_INLINE Vec normal_tail(Vec x) {
  constexpr float kTerms[] = {0.2256244897f, 0.226605632f,  0.2007507923f,
                              0.1977553928f, 0.0696895841f, 0.1023090617f,
                              0.0716288025f, -0.1344178951f, 0.0400541967f};
  const Vec size = max(sub(zero(), x), x);
  const Vec t = div(splat(1.0f), fma(size, splat(0.282842712f), splat(1.0f)));
  const Vec bell = exp(mul(mul(x, x), splat(-0.5f)));
  return mul(mul(bell, splat(0.5f)), mul(t, polynomial(kTerms, t)));
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
