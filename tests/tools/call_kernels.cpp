// Calls kernels on memory that another process laid out: a file that is mapped at the same address
// as there. Arguments: the file, and a list of calls, a line each: a name and 20 arguments, packed.
// There is no torch here: what that process knows of a tensor, it wrote down as `Facts`.

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "tensor.h"

#define KERNELS(each) \
  each(apply_edits) each(scale_rows) each(paged_attention) each(write_kv) each(rotary_write_kv) \
  each(rms_norm) each(layer_norm) each(act_mul) each(add_low_rank) each(low_rank_backward) \
  each(linear)

#define DECLARE(name) extern "C" bool manylora_##name(const char* packed);
KERNELS(DECLARE)

extern "C" void manylora_set_tensor_functions(const manylora::TensorFunctions* functions);

struct Facts {
  void* data;
  int64_t dtype, dim, sizes[4], strides[4];
};

// tensor: the address of a pointer to its facts.
static const Facts& facts(const void* tensor) { return **static_cast<const Facts* const*>(tensor); }

static const manylora::TensorFunctions kFunctions = {
    [](const void* t, void** data) { return *data = facts(t).data, 0; },
    [](const void* t, int64_t* dim) { return *dim = facts(t).dim, 0; },
    [](const void* t, const int64_t** sizes) { return *sizes = facts(t).sizes, 0; },
    [](const void* t, const int64_t** strides) { return *strides = facts(t).strides, 0; },
    [](const void* t, int32_t* dtype) { return *dtype = facts(t).dtype, 0; },
    [](const void*, int32_t* device) { return *device = 0; },
};

using Kernel = bool (*)(const char*);

static Kernel find(const char* name) {
#define FIND(known) \
  if (strcmp(name, #known) == 0) return manylora_##known;
  KERNELS(FIND)
  return nullptr;
}

int main(int count, char** arguments) {
  constexpr uintptr_t kAddress = 0x1000000000;
  constexpr size_t kSize = 16 << 20;
  if (count != 3) return 2;
  const int file = open(arguments[1], O_RDWR);
  void* wanted = reinterpret_cast<void*>(kAddress);
  if (mmap(wanted, kSize, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) != wanted) return 3;
  manylora_set_tensor_functions(&kFunctions);
  FILE* calls = fopen(arguments[2], "r");
  char name[64];
  while (fscanf(calls, "%63s", name) == 1) {
    int64_t packed[20];
    for (int64_t& each : packed) {
      if (fscanf(calls, "%" SCNd64, &each) != 1) return 4;
    }
    const Kernel kernel = find(name);
    if (kernel == nullptr) return 5;
    if (!kernel(reinterpret_cast<const char*>(packed))) return 6;
    printf("%s\n", name);
  }
  return 0;
}
