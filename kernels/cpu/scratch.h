// Memory that a thread keeps for its next task.

#pragma once

#include <stdlib.h>

#include "simd.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

// Memory for so many elements, the thread's until it asks for more of this type; on a cache line.
template <class E>
E* scratch(int64_t count) {
  static thread_local E* memory = nullptr;
  static thread_local int64_t held = 0;
  if (held < count) {
    free(memory);
    held = round_up(count, 4096);
    memory = static_cast<E*>(aligned_alloc(64, static_cast<size_t>(held) * sizeof(E)));
    if (memory == nullptr) abort();
  }
  return memory;
}

}  // namespace
}  // namespace MANYLORA_ISA
}  // namespace manylora
