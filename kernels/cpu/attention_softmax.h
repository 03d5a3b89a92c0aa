// The running softmax of a line: weights from a tile's scores, and the merge of two parts.

#pragma once

#include "attention_tile.h"
#include "vector_math.h"

namespace manylora {
namespace MANYLORA_ISA {

// A score of -inf weighs 0, and a line of nothing but such scores must not become NaN by it.
MANYLORA_INLINE float shift_of(float top) { return top == -kInfinity ? 0.0f : top; }
MANYLORA_INLINE float exp_of(float x) {
  float y;
  store(&y, exp(splat(x)), 1);
  return y;
}

static void clear(const Part& part, int64_t lines, int64_t width) {
  for (int64_t i = 0; i < lines; ++i) {
    part.top[i] = -kInfinity;
    part.sum[i] = 0.0f;
  }
  memset(part.acc, 0, static_cast<size_t>(lines * width) * sizeof(float));
}

static void merge(const Part& from, const Part& into, int64_t lines, int64_t width) {
  for (int64_t i = 0; i < lines; ++i) {
    const float top = from.top[i] > into.top[i] ? from.top[i] : into.top[i];
    const float old_share = exp_of(into.top[i] - shift_of(top));
    const float new_share = exp_of(from.top[i] - shift_of(top));
    into.top[i] = top;
    into.sum[i] = into.sum[i] * old_share + from.sum[i] * new_share;
    float* const acc = into.acc + i * width;
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec added = mul(load(from.acc + i * width + d), splat(new_share));
      store(acc + d, fma(load(acc + d), splat(old_share), added));
    }
  }
}

// Turns a line's scores of a tile into weights, of which those beside [lo, hi) are 0, and brings
// its softmax forward. distance: position of the tile's first key less the row's.
template <class W>
static void weigh(const AttentionLayer& layer, float slope, int64_t distance, int64_t lo,
                  int64_t hi, const float* scores, W* weights, float* top, float* weight_sum,
                  float* keep) {
  static const float kRamp[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  constexpr int kVecs = kTile / kLanes;
  const Vec ramp = load(kRamp), nothing = splat(-kInfinity);
  Vec x[kVecs];
  for (int i = 0; i < kVecs; ++i) x[i] = mul(load(scores + i * kLanes), splat(layer.scale));
  if (layer.softcap > 0.0f) {
    const Vec inverse = splat(1.0f / layer.softcap);
    for (int i = 0; i < kVecs; ++i) x[i] = mul(tanh(mul(x[i], inverse)), splat(layer.softcap));
  }
  if (layer.slopes != nullptr) {
    for (int i = 0; i < kVecs; ++i) {
      const Vec away = add(splat(static_cast<float>(distance + i * kLanes)), ramp);
      x[i] = fma(splat(slope), away, x[i]);
    }
  }
  if (lo > 0 || hi < kTile) {
    const Vec first = splat(static_cast<float>(lo)), end = splat(static_cast<float>(hi));
    for (int i = 0; i < kVecs; ++i) {
      const Vec key = add(splat(static_cast<float>(i * kLanes)), ramp);
      x[i] = select_below(key, first, nothing, select_below(key, end, x[i], nothing));
    }
  }
  Vec highest = splat(*top);
  for (int i = 0; i < kVecs; ++i) highest = max(highest, x[i]);
  const float new_top = max_lane(highest), shift = shift_of(new_top);
  Vec sums = zero();
  for (int i = 0; i < kVecs; ++i) {
    const Vec weight = exp(sub(x[i], splat(shift)));
    store(weights + i * kLanes, weight);
    sums = add(sums, weight);
  }
  *keep = new_top == *top ? 1.0f : exp_of(*top - shift);
  *weight_sum = *weight_sum * *keep + sum(sums);
  *top = new_top;
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
