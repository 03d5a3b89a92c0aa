// The C ABI: which ISAs this machine has, which one is in use, and one entry for each kernel.
//
// A new kernel adds its signature below with MANYLORA_KERNEL, defines a function of that name in
// namespace manylora::MANYLORA_ISA in its own source or, given tensors, in calls.cpp, and lists the
// source in CMakeLists.txt. Its entry takes the arguments packed, 8 bytes each: an integer as
// int64_t, an address, a tensor as the address of its TensorImpl, a float as double. It returns
// whether the arguments fit each other; of kernels that are not called often Python sees to that.

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
#include "tensor.h"
#include "types.h"

#define MANYLORA_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(MANYLORA_X86)
#define MANYLORA_BEST(name) {generic::name, avx2::name, avx512bf16::name, amx::name}
#define MANYLORA_DECLARE(result, name, parameters) \
  namespace generic { result name parameters; } \
  namespace avx2 { result name parameters; } \
  namespace avx512bf16 { result name parameters; } \
  namespace amx { result name parameters; }
#else
#define MANYLORA_BEST(name) {generic::name}
#define MANYLORA_DECLARE(result, name, parameters) \
  namespace generic { result name parameters; }
#endif

#define MANYLORA_KERNEL(result, name, parameters) \
  namespace manylora { \
  MANYLORA_DECLARE(result, name, parameters) \
  static result(*const name##_isas[]) parameters = MANYLORA_BEST(name); \
  } \
  MANYLORA_EXPORT bool manylora_##name(const char* packed) { \
    return manylora::call(manylora::name##_isas[manylora::isa], packed); \
  }

namespace manylora {

static TensorFunctions tensor_functions = {};

template <class T>
static T word(const char* packed) {
  T value;
  static_assert(sizeof value == 8);
  memcpy(&value, packed, sizeof value);
  return value;
}

template <class A>
static A argument(const char* packed) {
  if constexpr (std::is_same_v<A, Tensor>) {
    return read_tensor(tensor_functions, word<const void*>(packed));
  } else if constexpr (std::is_same_v<A, float>) {
    return static_cast<float>(word<double>(packed));
  } else if constexpr (std::is_pointer_v<A>) {
    return word<A>(packed);
  } else {
    return static_cast<A>(word<int64_t>(packed));
  }
}

template <class R, class... A, size_t... I>
static bool call(R (*kernel)(A...), const char* packed, std::index_sequence<I...>) {
  if constexpr (std::is_same_v<R, bool>) {
    return kernel(argument<A>(packed + 8 * I)...);
  } else {
    kernel(argument<A>(packed + 8 * I)...);
    return true;
  }
}

template <class R, class... A>
static bool call(R (*kernel)(A...), const char* packed) {
  return call(kernel, packed, std::index_sequence_for<A...>());
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

MANYLORA_EXPORT void manylora_set_tensor_functions(const manylora::TensorFunctions* functions) {
  manylora::tensor_functions = *functions;
}

// Whether a contiguous tensor [size] is read as it is: torch may come to lay out others.
MANYLORA_EXPORT bool manylora_reads(const void* impl, const void* data, int32_t dtype, int64_t size) {
  const manylora::Tensor t = manylora::read_tensor(manylora::tensor_functions, impl);
  return t.data == data && t.is(dtype, {size});
}

MANYLORA_KERNEL(bool, apply_edits,
                (Tensor y, Tensor x, Tensor pool, int64_t rows, int64_t columns,
                 const int32_t* group, const void* table, const int32_t* plan))

MANYLORA_KERNEL(bool, scale_rows,
                (Tensor out, Tensor x, Tensor pool, int64_t rows, int64_t module,
                 const void* table, const int32_t* plan))

MANYLORA_KERNEL(bool, linear, (Tensor y, Tensor x, Tensor panels, Tensor bias))

MANYLORA_KERNEL(bool, attention_layer,
                (AttentionLayer* layer, int64_t heads, Tensor k_cache, Tensor v_cache,
                 Tensor slopes, Tensor sinks, int64_t window, float scale, float softcap))

MANYLORA_KERNEL(bool, paged_attention,
                (Tensor out, Tensor q, Tensor k_cache, Tensor v_cache, const Batch* batch,
                 Tensor slopes, Tensor sinks, int64_t window, float scale, float softcap))

MANYLORA_KERNEL(bool, write_kv,
                (Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, const Batch* batch))

MANYLORA_KERNEL(bool, rotary_write_kv,
                (Tensor qkv, Tensor cos, Tensor sin, Tensor k_cache, Tensor v_cache,
                 const Batch* batch))

MANYLORA_KERNEL(bool, rms_norm,
                (Tensor out, Tensor x, Tensor residual, Tensor weight, float eps, float offset))

MANYLORA_KERNEL(bool, layer_norm,
                (Tensor out, Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps))

MANYLORA_KERNEL(bool, act_mul, (Tensor out, Tensor x, int64_t activation))

MANYLORA_KERNEL(void, pack,
                (void* buffer, int64_t dtype, void* matrices, int64_t count, int64_t* end))

MANYLORA_KERNEL(void, add_low_rank,
                (void* y, int64_t y_stride, const void* x, int64_t x_stride, const void* a,
                 const void* bt, int64_t in, int64_t out, float* hidden, int64_t slots,
                 int64_t max_rank, const int32_t* starts, const float* scale, const int32_t* plan,
                 int64_t dtype, int64_t factor_dtype))

MANYLORA_KERNEL(void, low_rank_backward,
                (void* dx, int64_t dx_stride, void* da, void* dbt, const void* dy,
                 int64_t dy_stride, const void* x, int64_t x_stride, const void* a, const void* bt,
                 int64_t in, int64_t out, float* hidden, int64_t slots, int64_t max_rank,
                 const int32_t* starts, const float* scale, const int32_t* plan, int64_t dtype,
                 int64_t factor_dtype))

MANYLORA_KERNEL(void, decoder_layers,
                (const DecoderStep* step, const DecoderLayer* layers, int64_t count))
