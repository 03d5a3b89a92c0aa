// The running softmax of a unit's lines: weights from a tile's scores, and the merge of two parts.

#pragma once

#include "attention_scratch.h"
#include "vector_math.h"

namespace manylora {
namespace MANYLORA_ISA {

constexpr float kLowestShift = -3.402823466e38f;

// A score of -inf weighs 0, and a line of nothing but such scores must not become NaN by it.
MANYLORA_INLINE Vec shift_of(Vec top) { return max(top, splat(kLowestShift)); }

static void clear(const Part& part, int64_t lines, int64_t width) {
  for (int64_t i = 0; i < lines; i += kLanes) {
    store(part.top + i, splat(-kInfinity));
    store(part.sum + i, zero());
  }
  memset(part.acc, 0, static_cast<size_t>(lines * width) * sizeof(float));
}

// old_share, new_share: [lines], overwritten.
static void merge(const Part& from, const Part& into, int64_t lines, int64_t width,
                  float* old_share, float* new_share) {
  for (int64_t i = 0; i < lines; i += kLanes) {
    const Vec old_top = load(into.top + i), new_top = load(from.top + i);
    const Vec top = max(old_top, new_top), shift = shift_of(top);
    const Vec kept = exp(sub(old_top, shift)), added = exp(sub(new_top, shift));
    store(into.top + i, top);
    store(into.sum + i, fma(load(into.sum + i), kept, mul(load(from.sum + i), added)));
    store(old_share + i, kept);
    store(new_share + i, added);
  }
  for (int64_t i = 0; i < lines; ++i) {
    float* const acc = into.acc + i * width;
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec added = mul(load(from.acc + i * width + d), splat(new_share[i]));
      store(acc + d, fma(load(acc + d), splat(old_share[i]), added));
    }
  }
}

// A line's scores of columns [begin, end) of a tile, in place: scaled, capped, sloped, and -inf
// where its row does not see the key. distance: position of the tile's first key less the row's.
// Returns the highest of them and of top.
static float finish_scores(const AttentionLayer& layer, float slope, int64_t distance, Span keys,
                           int64_t begin, int64_t end, float top, float* scores) {
  static const float kRamp[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vec ramp = load(kRamp), nothing = splat(-kInfinity);
  const Vec first = splat(static_cast<float>(keys.lo)), last = splat(static_cast<float>(keys.hi));
  const Vec scale = splat(layer.scale), cap = splat(layer.softcap);
  const bool masked = keys.lo > begin || keys.hi < end, capped = layer.softcap > 0.0f;
  const bool sloped = layer.slopes != nullptr;
  Vec highest = splat(top);
  for (int64_t i = begin; i < end; i += kLanes) {
    Vec x = mul(load(scores + i), scale);
    if (capped) x = mul(tanh(mul(x, splat(1.0f / layer.softcap))), cap);
    if (sloped) {
      x = fma(splat(slope), add(splat(static_cast<float>(distance + i)), ramp), x);
    }
    if (masked) {
      const Vec key = add(splat(static_cast<float>(i)), ramp);
      x = select_below(key, first, nothing, select_below(key, last, x, nothing));
    }
    store(scores + i, x);
    highest = max(highest, x);
  }
  return max_lane(highest);
}

// Calls visit(line, row of the unit, query head) for each line of the unit's rows [begin, end).
template <class Visit>
MANYLORA_INLINE void visit_lines(const Sizes& sizes, const Unit& unit, int64_t begin, int64_t end,
                                 const Visit& visit) {
  for (int64_t j = 0; j < unit.heads; ++j) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t line = j * unit.head_lines + row * sizes.group;
      const int64_t head = (unit.head + j) * sizes.group;
      for (int64_t g = 0; g < sizes.group; ++g) visit(line + g, row, head + g);
    }
  }
}

// Turns the scores of the unit's rows [begin, end) in the groups [first, last) of a tile into
// weights, and brings their softmax forward. seen(row): the keys of [0, kTile) that the row sees.
template <class W, class Seen>
static void weigh(const AttentionLayer& layer, const Sizes& sizes, const Unit& unit, int64_t tile,
                  const Places& here, int64_t begin, int64_t end, const Seen& seen,
                  const Scratch& s, const Part& part) {
  constexpr int64_t kStride = kTile * sizeof(float) / sizeof(W);
  const int64_t lines = unit.lines(), from = here.first * kGroup, to = here.end * kGroup;
  for (int64_t i = 0; i < lines; i += kLanes) store(s.top + i, load(part.top + i));
  visit_lines(sizes, unit, begin, end, [&](int64_t line, int64_t row, int64_t head) {
    const float slope = layer.slopes ? layer.slopes[head] : 0.0f;
    s.top[line] = finish_scores(layer, slope, tile - unit.position - row, seen(row), from, to,
                                part.top[line], s.scores + line * kTile);
  });
  for (int64_t i = 0; i < lines; i += kLanes) {
    const Vec top = load(s.top + i), shift = shift_of(top);
    store(s.keep + i, exp(sub(load(part.top + i), shift)));
    store(part.top + i, top);
    store(s.top + i, shift);
  }
  visit_lines(sizes, unit, begin, end, [&](int64_t line, int64_t, int64_t) {
    const float* const scores = s.scores + line * kTile;
    W* const weights = reinterpret_cast<W*>(s.scores) + line * kStride;
    float* const kept = s.sums + line * kLanes;
    Vec sums = mul(load(kept), splat(s.keep[line]));
    for (int64_t i = from; i < to; i += kLanes) {
      const Vec weight = exp(sub(load(scores + i), splat(s.top[line])));
      store(weights + i, weight);
      sums = add(sums, weight);
    }
    store(kept, sums);
  });
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
