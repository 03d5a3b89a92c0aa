// Weights times values of a tile, over exactly the keys that each row sees.

#pragma once

#include "attention_softmax.h"
#include "attention_tile.h"

namespace manylora {
namespace MANYLORA_ISA {

// One head's lines in a tile. Lines are [rows][group].
template <class E>
struct Weighed {
  const Hidden<E>* weights;  // [lines], kWeightStride
  const float* keep;         // [lines], what the tile leaves of the sums before it
  float* acc;                // [lines][width]
  int64_t lines;
  Groups<E> values;
};
template <class E>
inline constexpr int64_t kWeightStride = kTile * sizeof(float) / sizeof(Hidden<E>);

// acc [lines][width] = keep * acc + weights times values: of `keys` keys, from an even one, in each
// of the parts.
template <class E>
static void add_keys(const Sizes& sizes, int64_t lines, const Hidden<E>* weights,
                     const E* const* values, int64_t parts, int64_t keys, const float* keep,
                     float* acc, Fetch* fetch) {
  const auto vector = [&](int64_t part, int64_t n) { return values[part] + n * kStep<E>; };
  const Right<decltype(vector)> right = {vector, parts, keys, sizes.width * kDepth<E>};
  product<E>(sizes.group, lines, sizes.width / kLanes, weights, kWeightStride<E>, right, keep, acc,
             sizes.width, fetch);
}

// Rows of a group's values, padded to whole vectors where head_dim is not a number of them.
template <class E>
static const E* whole_vectors(const Sizes& sizes, const E* values, float* to) {
  if (sizes.width == sizes.head_dim) return values;
  const int64_t row = sizes.head_dim * kDepth<E>, wide = sizes.width * kDepth<E>;
  E* const padded = reinterpret_cast<E*>(to);
  memset(to, 0, static_cast<size_t>(kGroup * sizes.width) * sizeof(E));
  for (int64_t i = 0; i < kGroup / kDepth<E>; ++i) {
    memcpy(padded + i * wide, values + i * row, static_cast<size_t>(row) * sizeof(E));
  }
  return padded;
}

// The keys [lo, hi) of a group, not all of it. Of a pair of which only one key is seen, the other's
// value is taken as 0: were it NaN, 0 * NaN is NaN.
template <class E>
static void add_part(const Sizes& sizes, int64_t lines, const Hidden<E>* weights, const E* values,
                     int64_t lo, int64_t hi, const float* keep, const Scratch& s, float* acc) {
  values = whole_vectors(sizes, values, s.padded);
  const int64_t stride = sizes.width * kDepth<E>;
  const auto add = [&](int64_t key, const E* from, int64_t keys) {
    add_keys(sizes, lines, weights + key, &from, 1, keys, keep, acc, nullptr);
    keep = s.ones;
  };
  const auto add_one = [&](int64_t key) {
    const float* const pairs = reinterpret_cast<const float*>(values + key / 2 * stride);
    const uint32_t mask = key % 2 ? 0xffff0000u : 0x0000ffffu;
    for (int64_t d = 0; d < sizes.width; ++d) {
      s.edge[d] = bits_to_float(float_to_bits(pairs[d]) & mask);
    }
    add(key / 2 * 2, reinterpret_cast<const E*>(s.edge), 2);
  };
  if constexpr (kDepth<E> == 1) return add(lo, values + lo * stride, hi - lo);
  if (lo % 2) add_one(lo++);
  if (hi - lo > 1) add(lo, values + lo / 2 * stride, (hi - lo) / 2 * 2);
  if ((hi - lo) % 2) add_one(hi - 1);
}

// The groups [first, end), which all rows of the lines [line, line + lines) see whole.
template <class E>
static void add_groups(const Sizes& sizes, const Weighed<E>& w, int64_t line, int64_t lines,
                       int64_t first, int64_t end, const Scratch& s, Fetch* fetch) {
#if defined(__AMX_BF16__)
  if constexpr (kDepth<E> == 2) {
    if (sizes.amx) {
      weigh_amx(w.lines, line, lines, w.weights + first * kGroup, kWeightStride<E>,
                w.values.at + first, end - first, sizes.head_dim, s.products, fetch);
      for (int64_t i = line; i < line + lines; ++i) {
        float* const acc = w.acc + i * sizes.width;
        const float* const added = s.products + i * sizes.width;
        for (int64_t d = 0; d < sizes.width; d += kLanes) {
          store(acc + d, fma(load(acc + d), splat(w.keep[i]), load(added + d)));
        }
      }
      return;
    }
  }
#endif
  const int64_t parts = sizes.width == sizes.head_dim ? end - first : 1;  // s.padded has one group
  for (int64_t g = first; g < end; g += parts) {
    const E* const padded = whole_vectors(sizes, w.values.at[g], s.padded);
    const float* const keep = g == first ? w.keep + line : s.ones;
    add_keys(sizes, lines, w.weights + line * kWeightStride<E> + g * kGroup,
             parts == 1 ? &padded : w.values.at + g, parts, kGroup, keep,
             w.acc + line * sizes.width, fetch);
  }
}

// keys: of the tile, those of [0, kTile) that a row sees. The groups that it sees whole.
MANYLORA_INLINE Span whole_groups(const Span& keys) {
  return {ceil_div(keys.lo, kGroup), keys.hi / kGroup};
}

// What a row sees beside its whole groups.
template <class E>
static void add_edges(const Sizes& sizes, const Weighed<E>& w, int64_t line, const Span& keys,
                      const Scratch& s) {
  const Span whole = whole_groups(keys);
  const float* keep = whole.lo < whole.hi ? s.ones : w.keep + line;
  const auto add = [&](int64_t lo, int64_t hi) {
    if (lo >= hi) return;
    const int64_t g = lo / kGroup, start = g * kGroup;
    add_part(sizes, sizes.group, w.weights + line * kWeightStride<E> + start, w.values.at[g],
             lo - start, hi - start, keep, s, w.acc + line * sizes.width);
    keep = s.ones;
  };
  if (whole.lo > whole.hi) return add(keys.lo, keys.hi);
  add(keys.lo, whole.lo * kGroup);
  add(whole.hi * kGroup, keys.hi);
}

// A head's lines of rows [begin, end). seen(row): the keys of [0, kTile) that the row sees.
template <class E, class Seen>
static void add_values(const Sizes& sizes, const Weighed<E>& w, int64_t begin, int64_t end,
                       const Seen& seen, const Scratch& s, Fetch* fetch) {
  for (int64_t row = begin, next; row < end; row = next) {
    const Span whole = whole_groups(seen(row));
    for (next = row + 1; next < end; ++next) {
      const Span same = whole_groups(seen(next));
      if (same.lo != whole.lo || same.hi != whole.hi) break;
    }
    if (whole.lo < whole.hi) {
      add_groups(sizes, w, row * sizes.group, (next - row) * sizes.group, whole.lo, whole.hi, s,
                 fetch);
    }
    for (int64_t r = row; r < next; ++r) add_edges(sizes, w, r * sizes.group, seen(r), s);
  }
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
