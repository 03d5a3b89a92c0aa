// What a thread reads next is fetched while it computes. Where fetching paused, decoding took the
// time of reading and that of computing one after the other.

#pragma once

#include "edit_job.h"

namespace manylora {
namespace MANYLORA_ISA {
namespace {

// A's or B's counterpart in the next segment, a line for each line that one row reads of it.
class Ahead {
 public:
  // Nothing where the next segment's adapter leaves the module alone.
  Ahead(const void* from, int64_t bytes)
      : at_(static_cast<const char*>(from)), end_(from == nullptr ? at_ : at_ + bytes) {}

  // For so many bytes that are read, at most a cache line.
  void fetch(int64_t bytes) {
    if (at_ >= end_) return;
    __builtin_prefetch(at_, 0, 2);
    at_ += bytes;
  }

 private:
  const char *at_, *end_;
};

// At the reading of `bytes` of the job's A or B.
template <class T>
MANYLORA_INLINE void fetch_ahead(const Job<T>& job, const T* from, int64_t bytes) {
  constexpr int64_t kLead = 1024;  // within the tensor, where it is not known what is read next
  if (job.ahead != nullptr) {
    job.ahead->fetch(bytes);
  } else {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + kLead);
  }
}

}  // namespace
}  // namespace MANYLORA_ISA
}  // namespace manylora
