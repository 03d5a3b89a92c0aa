// What a thread works on: the softmax of a unit under way, and memory that is kept for its next task.

#pragma once

#include "attention_tile.h"

namespace manylora {
namespace MANYLORA_ISA {

// A softmax under way: highest score, sum of weights, weighted sum of values of each line.
struct Part {
  float* top;  // [lines, rounded up to kLineStep]
  float* sum;  // [lines, rounded up to kLineStep]
  float* acc;  // [lines][width]
};
MANYLORA_INLINE Part part_at(float* memory, int64_t lines) {
  const int64_t whole = round_up(lines, kLineStep);
  return {memory, memory + whole, memory + 2 * whole};
}

struct Scratch {
  void* q;          // Hidden<E> [lines][head_dim]
  float* scores;    // [lines][kTile], then Hidden<E> weights [lines][kWeightStride]
  float* top;       // [lines], with the tile's scores
  float* keep;      // [lines], what a tile leaves of the sums before it
  float* sums;      // [lines][kLanes], of weights
  float* products;  // [lines of a head][head_dim]
  float* padded;    // E [kGroup][width]
  float* edge;      // words of E [width]
  float* ones;      // [lines]
  Part part;
  Part total;
};

static Scratch scratch_of(const Sizes& sizes) {
  static thread_local float* memory = nullptr;
  static thread_local int64_t held = 0;
  const int64_t lines = round_up(sizes.lines, kLineStep), width = sizes.width;
  const int64_t part = part_floats(lines, width);
  const int64_t floats = lines * (sizes.head_dim + kTile + kLanes + width + 3) +
                         (kGroup + 1) * width + 2 * part;
  if (held < floats) {
    free(memory);
    memory = static_cast<float*>(allocate(floats, sizeof(float)));
    held = floats;
  }
  float* next = memory;
  const auto take = [&](int64_t count) {
    next += count;
    return next - count;
  };
  Scratch s;
  s.scores = take(lines * kTile);
  s.products = take(lines * width);
  s.part = part_at(take(part), lines);
  s.total = part_at(take(part), lines);
  s.sums = take(lines * kLanes);
  s.top = take(lines);
  s.keep = take(lines);
  s.ones = take(lines);
  s.padded = take(kGroup * width);
  s.edge = take(width);
  s.q = take(lines * sizes.head_dim);
  for (int64_t i = 0; i < lines; ++i) s.ones[i] = 1.0f;
  return s;
}

}  // namespace MANYLORA_ISA
}  // namespace manylora
