// The C ABI: which ISAs this machine has, which one is in use, and one entry for each kernel.
//
// A new kernel adds its signature below with MANYLORA_KERNEL, defines a function of that name in
// namespace manylora::MANYLORA_ISA in its own source, and lists the source in CMakeLists.txt. Its
// entry takes the arguments packed, 8 bytes each: an integer as int64_t, an address, a float as
// double.

#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#if defined(MANYLORA_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "attention.h"
#include "decoder.h"
#include "parallel.h"
#include "types.h"

#define MANYLORA_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(MANYLORA_X86)
#define MANYLORA_BEST(name) {generic::name, avx2::name, avx512bf16::name, amx::name}
#define MANYLORA_DECLARE(name, parameters) \
  namespace generic { void name parameters; } \
  namespace avx2 { void name parameters; } \
  namespace avx512bf16 { void name parameters; } \
  namespace amx { void name parameters; }
#else
#define MANYLORA_BEST(name) {generic::name}
#define MANYLORA_DECLARE(name, parameters) \
  namespace generic { void name parameters; }
#endif

#define MANYLORA_KERNEL(name, parameters) \
  namespace manylora { \
  MANYLORA_DECLARE(name, parameters) \
  static void(*const name##_isas[]) parameters = MANYLORA_BEST(name); \
  } \
  MANYLORA_EXPORT void manylora_##name(const char* packed) { \
    manylora::call(manylora::name##_isas[manylora::isa], packed); \
  }

namespace manylora {

template <class A>
struct Packed {
  static_assert(std::is_integral<A>::value);
  using type = int64_t;
};
template <class A>
struct Packed<A*> {
  using type = A*;
};
template <>
struct Packed<float> {
  using type = double;
};

template <class A>
static A argument(const char* packed) {
  typename Packed<A>::type value;
  static_assert(sizeof value == 8);
  memcpy(&value, packed, sizeof value);
  return static_cast<A>(value);
}

template <class... A, size_t... I>
static void call(void (*kernel)(A...), const char* packed, std::index_sequence<I...>) {
  kernel(argument<A>(packed + 8 * I)...);
}

template <class... A>
static void call(void (*kernel)(A...), const char* packed) {
  call(kernel, packed, std::index_sequence_for<A...>());
}

Pool pool = {nullptr, nullptr};
thread_local Team* team = nullptr;
static int32_t isa = 0;

#if defined(MANYLORA_X86)
// Linux lets a process use AMX tiles once it has asked for them.
static bool has_tiles() {
  constexpr unsigned kTile = 1u << 24, kBFloat16 = 1u << 22;  // of cpuid 7, EDX
  constexpr int kAskFor = 0x1023, kTileData = 18;             // ARCH_REQ_XCOMP_PERM
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kTile) == 0 || (d & kBFloat16) == 0) return false;
  return syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
}
#endif

static bool runs_here(int32_t index) {
#if defined(MANYLORA_X86)
  if (index == 1) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }
  if (index == 2) {
    return runs_here(1) && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16");
  }
  if (index == 3) return runs_here(2) && has_tiles();
#endif
  return index == 0;
}

}  // namespace manylora

// Name of ISA `index`, slowest first, or null past the last one this library was built with.
MANYLORA_EXPORT const char* manylora_isa_name(int32_t index) {
  static const char* const names[] = {"generic", "avx2", "avx512bf16", "amx"};
#if defined(MANYLORA_X86)
  return index >= 0 && index < 4 ? names[index] : nullptr;
#else
  return index == 0 ? names[0] : nullptr;
#endif
}

MANYLORA_EXPORT int32_t manylora_isa_runs_here(int32_t index) { return manylora::runs_here(index); }

// Callers choose only among the ISAs that run here. Not while a kernel runs.
MANYLORA_EXPORT void manylora_set_isa(int32_t index) { manylora::isa = index; }

MANYLORA_EXPORT int32_t manylora_get_isa() { return manylora::isa; }

MANYLORA_EXPORT void manylora_set_pool(manylora::ParallelFor parallel_for,
                                       manylora::ThreadCount thread_count) {
  manylora::pool = {parallel_for, thread_count};
}

MANYLORA_KERNEL(apply_edits,
                (void* y, int64_t y_stride, const void* x, int64_t x_stride, int64_t in,
                 int32_t dtype, const void* pool, const int32_t* group, const void* table,
                 const int32_t* plan))

MANYLORA_KERNEL(scale_rows,
                (void* out, const void* x, int64_t x_stride, int64_t in, int32_t dtype,
                 const void* pool, int32_t module, const void* table, const int32_t* plan))

MANYLORA_KERNEL(pack,
                (void* buffer, int64_t dtype, void* matrices, int64_t count, int64_t* end))

MANYLORA_KERNEL(paged_attention,
                (void* out, const void* q, int64_t q_row_stride, int64_t q_head_stride,
                 const void* k_cache, const void* v_cache, const manylora::Batch* batch,
                 const manylora::AttentionLayer* layer))

MANYLORA_KERNEL(write_kv,
                (const void* k, int64_t k_row_stride, int64_t k_head_stride, const void* v,
                 int64_t v_row_stride, int64_t v_head_stride, void* k_cache, void* v_cache,
                 const manylora::Batch* batch, const manylora::AttentionLayer* layer))

MANYLORA_KERNEL(rotary_write_kv,
                (void* qkv, int64_t stride, const void* cos, const void* sin, int64_t half,
                 void* k_cache, void* v_cache, const manylora::Batch* batch,
                 const manylora::AttentionLayer* layer))

MANYLORA_KERNEL(rms_norm,
                (void* out, const void* x, int64_t x_stride, void* residual, const void* weight,
                 int64_t rows, int64_t size, float eps, float offset, int64_t dtype))

MANYLORA_KERNEL(layer_norm,
                (void* out, const void* x, int64_t x_stride, void* residual, const void* weight,
                 const void* bias, int64_t rows, int64_t size, float eps, int64_t dtype))

MANYLORA_KERNEL(act_mul,
                (void* out, const void* x, int64_t x_stride, int64_t rows, int64_t size,
                 int64_t activation, int64_t dtype))

MANYLORA_KERNEL(add_low_rank,
                (void* y, int64_t y_stride, const void* x, int64_t x_stride, const void* a,
                 const void* bt, int64_t in, int64_t out, float* hidden, int64_t slots,
                 int64_t max_rank, const int32_t* starts, const float* scale, const int32_t* plan,
                 int64_t dtype, int64_t factor_dtype))

MANYLORA_KERNEL(low_rank_backward,
                (void* dx, int64_t dx_stride, void* da, void* dbt, const void* dy,
                 int64_t dy_stride, const void* x, int64_t x_stride, const void* a, const void* bt,
                 int64_t in, int64_t out, float* hidden, int64_t slots, int64_t max_rank,
                 const int32_t* starts, const float* scale, const int32_t* plan, int64_t dtype,
                 int64_t factor_dtype))

MANYLORA_KERNEL(linear,
                (void* y, int64_t y_stride, const void* x, int64_t x_stride, int64_t rows,
                 const void* weight, const void* bias, int64_t in, int64_t out))

MANYLORA_KERNEL(decoder_layers,
                (const manylora::DecoderStep* step, const manylora::DecoderLayer* layers,
                 int64_t count))
