// Calls kernels on memory that another process laid out: a file that is mapped at the same address
// as there. Arguments: the file, and a list of calls, "name f0 f1 i0 … i19" a line.

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define KERNELS(each) \
  each(apply_edits) each(scale_rows) each(paged_attention) each(write_kv) each(rotary_write_kv) \
  each(rms_norm) each(layer_norm) each(act_mul) each(add_low_rank) each(low_rank_backward) \
  each(linear)

#define DECLARE(name) extern "C" void manylora_##name();
KERNELS(DECLARE)

// Integers and floats travel in registers of their own, and what a kernel does not take it does not
// see (AAPCS64), so one type of function fits all.
using Kernel = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                        int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                        int64_t, int64_t, int64_t, int64_t, float, float);

static Kernel find(const char* name) {
#define FIND(known) \
  if (strcmp(name, #known) == 0) return reinterpret_cast<Kernel>(manylora_##known);
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
  FILE* calls = fopen(arguments[2], "r");
  char name[64];
  float f[2];
  while (fscanf(calls, "%63s %g %g", name, &f[0], &f[1]) == 3) {
    long long i[20];
    for (long long& each : i) {
      if (fscanf(calls, "%lld", &each) != 1) return 4;
    }
    const Kernel kernel = find(name);
    if (kernel == nullptr) return 5;
    kernel(i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9], i[10], i[11], i[12], i[13],
           i[14], i[15], i[16], i[17], i[18], i[19], f[0], f[1]);
    printf("%s\n", name);
  }
  return 0;
}
